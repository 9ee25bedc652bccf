"""Families whose code reads weights instead of calling layers, has no embeddings, or has a head of several layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from peft_childtune import ChildTuningConfig, get_child_network
from tests.contract.families import add_noise, same_bits

_TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_SPEECH = {"num_feat_extract_layers": 1, "conv_dim": [8], "conv_stride": [2], "conv_kernel": [4], "num_labels": 2}


def _lfm2() -> nn.Module:
    kinds = {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(**_TEXT, **kinds, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def _bamba() -> nn.Module:
    mixer = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]}
    return tf.BambaForCausalLM(
        tf.BambaConfig(**_TEXT, **mixer, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    )


def _wavlm() -> nn.Module:
    text = {key: value for key, value in _TEXT.items() if key != "vocab_size"}
    config = tf.WavLMConfig(**text, **_SPEECH, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return tf.WavLMForSequenceClassification(config)


def _deberta() -> nn.Module:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    return tf.DebertaForSequenceClassification(tf.DebertaConfig(**_TEXT, **relative))


def _roberta() -> nn.Module:
    return tf.RobertaForSequenceClassification(tf.RobertaConfig(**_TEXT, max_position_embeddings=16))


def _convnext() -> nn.Module:
    return tf.ConvNextForImageClassification(tf.ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2]))


class _Encoder(nn.Module):
    """torch's own encoder, whose attention and fast path read the weights of their parts."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.encoder(x),)


_MAKE = {
    "lfm2": _lfm2,
    "bamba": _bamba,
    "wavlm": _wavlm,
    "deberta": _deberta,
    "roberta": _roberta,
    "convnext": _convnext,
    "torch": _Encoder,
}
_TASKS = {"deberta": "SEQ_CLS", "roberta": "SEQ_CLS"}


def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return _MAKE[name]().eval()


def _inputs(name: str) -> dict[str, Any]:
    torch.manual_seed(1)
    if name == "torch":
        return {"x": torch.randn(2, 3, 8)}
    if name == "convnext":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    if name == "wavlm":
        return {"input_values": torch.randn(2, 64)}
    return {"input_ids": torch.randint(3, 40, (2, 6))}


def _wrap(name: str) -> nn.Module:
    config = ChildTuningConfig(task_type=_TASKS.get(name), score="magnitude", density=0.3)
    return get_peft_model(_build(name), config)


@torch.no_grad()
def _answer(model: nn.Module, name: str) -> torch.Tensor:
    out = model.eval()(**_inputs(name))
    return out[0] if isinstance(out, tuple) else out.logits


@pytest.mark.parametrize("name", _MAKE)
def test_every_delta_of_a_model_that_reads_weights_gets_a_gradient(name):
    model = _wrap(name).train()
    out = model(**_inputs(name))
    (out[0] if isinstance(out, tuple) else out.logits).square().sum().backward()
    values = {n: p for n, p in model.named_parameters() if ".child_tuning_values." in n}
    assert values and not [n for n, p in values.items() if p.grad is None]


@pytest.mark.parametrize("name", _MAKE)
def test_merged_and_unmerged_agree_where_models_read_weights(name):
    model = add_noise(_wrap(name))
    unmerged = _answer(model, name)
    model.merge_adapter()
    assert same_bits(_answer(model, name), unmerged)


@pytest.mark.parametrize("name", _MAKE)
def test_disabled_adapters_are_out_of_what_models_read(name):
    model = add_noise(_wrap(name))
    with model.disable_adapter():
        assert same_bits(_answer(model, name), _answer(_build(name), name))


@pytest.mark.parametrize("name", _MAKE)
def test_such_a_model_loads_and_unloads_to_the_same_bits(name, tmp_path):
    model = add_noise(_wrap(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_build(name), tmp_path)
    assert same_bits(_answer(loaded, name), _answer(model, name))
    assert same_bits(_answer(loaded.merge_and_unload(), name), _answer(model, name))


@pytest.mark.parametrize("name", ["roberta", "deberta"])
def test_unloading_a_head_of_several_layers_gives_the_base_back(name):
    model = add_noise(_wrap(name)).unload()
    assert {type(m) for m in model.modules()} == {type(m) for m in _build(name).modules()}


def test_the_attention_of_torch_is_covered_up_to_its_output_projection():
    assert "encoder.layers.0.self_attn.out_proj.weight" in get_child_network(_wrap("torch")).indices
