"""Tiny random models of the families that PEFT's users adapt, and the few steps every contract test repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
    ViTConfig,
)

from peft_childtune import ChildTuningConfig, select_child_network
from peft_childtune.tuner import ChildTuningLayer

VOCABULARY = 64
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One model family: how to build it, feed it, and which names PEFT users give it.

    Attributes:
        auto: the `transformers` auto class that builds and loads it.
        task_type: what a PEFT user writes; None where PEFT has no task type for it.
        heads: state dict prefixes that are trained whole, as PEFT does for that task type.
        weight: a weight inside the blocks, by the base model's own name.
    """

    name: str
    auto: Any
    config: Callable[[], Any]
    task_type: str | None
    weight: str
    heads: tuple[str, ...] = ()

    def build(self, seed: int = 0) -> nn.Module:
        """Return a random base model in eval mode; eager attention, since SDPA has other kernels without gradients."""
        torch.manual_seed(seed)
        return self.auto.from_config(self.config(), attn_implementation="eager").eval()

    def batch(self, seed: int = 0, size: int = 3) -> Batch:
        """Return one batch with labels, some of it padded."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 2, (size,), generator=generator)
        if self.name == "vit":
            return {"pixel_values": torch.randn(size, 3, 8, 8, generator=generator), "labels": labels}
        tokens = torch.randint(3, VOCABULARY, (size, 6), generator=generator)
        mask = torch.ones_like(tokens)
        if self.name in ("bert", "t5"):
            mask[0, 4:] = 0
        out = {"input_ids": tokens, "attention_mask": mask}
        if self.name == "bert":
            return out | {"labels": labels}
        if self.name == "t5":
            return out | {"labels": torch.randint(3, VOCABULARY, (size, 5), generator=generator)}
        return out | {"labels": tokens}

    def batches(self, count: int = 4) -> list[Batch]:
        return [self.batch(seed) for seed in range(count)]


def _bert() -> Any:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _gpt2() -> Any:
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=16,
        n_inner=48,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _llama() -> Any:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _t5() -> Any:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


def _vit() -> Any:
    return ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "bert",
            AutoModelForSequenceClassification,
            _bert,
            "SEQ_CLS",
            "bert.encoder.layer.0.output.dense.weight",
            ("classifier",),
        ),
        Family("gpt2", AutoModelForCausalLM, _gpt2, "CAUSAL_LM", "transformer.h.0.mlp.c_proj.weight"),
        Family("llama", AutoModelForCausalLM, _llama, "CAUSAL_LM", "model.layers.0.mlp.down_proj.weight"),
        Family("t5", AutoModelForSeq2SeqLM, _t5, "SEQ_2_SEQ_LM", "encoder.block.0.layer.0.SelfAttention.q.weight"),
        Family("vit", AutoModelForImageClassification, _vit, None, "vit.layers.0.mlp.fc2.weight"),
    )
}


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, so that -0 differs from 0 and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(bits(first), bits(second))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def differing(model: nn.Module, saved: dict[str, Tensor]) -> list[str]:
    """Return the names under which a model and a snapshot differ in any bit, or that only one of them has."""
    now = model.state_dict()
    return sorted(set(now) ^ set(saved)) + [n for n in saved if n in now and not same_bits(now[n], saved[n])]


def layers_in(model: nn.Module) -> list[ChildTuningLayer]:
    return [module for module in model.modules() if isinstance(module, ChildTuningLayer)]


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the base tensors inside a wrapped model by the base's own names: no adapter, no trained head."""
    found = {}
    for name, tensor in model.state_dict().items():
        if ".child_tuning_" in name or ".modules_to_save." in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
        found[name] = tensor
    return found


@torch.no_grad()
def output(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits in eval mode."""
    return model.eval()(**batch).logits


def wrap(base: nn.Module, family: Family, *, adapter_name: str = "default", **options: Any) -> nn.Module:
    """Return the wrapped model with its child selected, on four batches if its score needs data."""
    config = ChildTuningConfig(**({"task_type": family.task_type, "score": "fisher", "density": 0.2} | options))
    model = get_peft_model(base, config, adapter_name=adapter_name)
    if config.needs_data:
        select_child_network(model, family.batches(), adapter_name=adapter_name, show_progress=False)
    return model


def config_of(family: Family, **options: Any) -> ChildTuningConfig:
    """Return the configuration of a random child that needs no data."""
    return ChildTuningConfig(**({"task_type": family.task_type, "score": "random", "density": 0.2} | options))


def with_two_adapters(name: str, **second: Any) -> nn.Module:
    """Return a model with adapters "one" and "two", of different children and deltas."""
    family = FAMILIES[name]
    model = wrap(family.build(), family, adapter_name="one", score="magnitude")
    model.add_adapter("two", config_of(family, seed=1, **second))
    return add_noise(add_noise(model, "one", seed=1), "two", seed=2)


@torch.no_grad()
def add_noise(model: nn.Module, adapter_name: str = "default", *, seed: int = 1, scale: float = 0.05) -> nn.Module:
    """Write noise into an adapter's deltas and heads in place, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".child_tuning_values.{adapter_name}." in name or f".modules_to_save.{adapter_name}." in name:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.dtype))
    return model


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int = 20,
    accumulate: int = 1,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    eps: float = 1e-8,
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Take AdamW steps with momentum and clipping over what requires a gradient.

    Args:
        before_step: called with the number of the step between the last backward pass and the clipping.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), eps=eps, weight_decay=weight_decay)
    model.train()
    for step in range(steps):
        for part in range(accumulate):
            loss = model(**batches[(step * accumulate + part) % len(batches)]).loss / accumulate
            loss.backward()
        if before_step is not None:
            before_step(step)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
