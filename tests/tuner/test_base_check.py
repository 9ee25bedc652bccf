"""`verify_base` says whether a model is the base of a saved adapter, to the last entry if asked."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_childtune import (
    BaseMismatchError,
    ChildTuningConfig,
    FormatError,
    IntegrityError,
    UnsupportedError,
    get_child_network,
    verify_base,
)

_LOGGER = "peft_childtune.tuner.base_check"


@pytest.fixture
def saved(family, tmp_path):
    """Return the folder of an adapter of a tiny BERT."""
    model = get_peft_model(
        family("bert"),
        ChildTuningConfig(task_type="SEQ_CLS", score="magnitude", density=0.1, init_weights=False),
    )
    model.save_pretrained(tmp_path)
    return tmp_path


_NAME = "bert.encoder.layer.1.intermediate.dense.weight"


@pytest.mark.parametrize("full", [False, True])
def test_the_base_itself_passes(saved, family, full):
    verify_base(family("bert"), saved, full=full)


def test_embeddings_that_peft_has_saved_beside_the_child_are_no_damage(family, tmp_path):
    base = family("gpt2")
    model = get_peft_model(base, ChildTuningConfig(score="magnitude", init_weights=False))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    verify_base(family("gpt2"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "transformer.h.0.mlp.c_fc.extra": torch.zeros(1)}, path)
    with pytest.raises(IntegrityError, match="holds no base weights"):
        verify_base(family("gpt2"), tmp_path)


@pytest.mark.parametrize("full", [False, True])
def test_a_base_with_one_targeted_tensor_scaled_is_refused_by_name(saved, family, full):
    base = family("bert")
    with torch.no_grad():
        base.get_parameter(_NAME).mul_(1.01)
    with pytest.raises(BaseMismatchError, match=f"^{_NAME}: the base weights differ"):
        verify_base(base, saved, full=full)


def test_a_change_between_the_samples_is_seen_by_the_full_comparison_only(family, tmp_path):
    wide = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(100, 100)])})
    plain = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    model = get_peft_model(
        wide, ChildTuningConfig(target_modules=["0"], score="magnitude", density=0.01, init_weights=False)
    )
    model.save_pretrained(tmp_path)
    (kept,) = (set(v.tolist()) for n, v in get_child_network(model).indices.items() if n.endswith("weight"))
    base = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(100, 100)])})
    base.load_state_dict(plain)
    verify_base(base, tmp_path, full=True)
    unseen = next(i for i in range(1, 10) if i not in kept)  # every tenth of 10,000 is sampled
    with torch.no_grad():
        base["layers"][0].weight.view(-1)[unseen] += 1e-6
    verify_base(base, tmp_path)
    with pytest.raises(BaseMismatchError, match=r"^layers\.0\.weight: "):
        verify_base(base, tmp_path, full=True)


@pytest.mark.parametrize("state", ["wrapped", "merged", "disabled", "twice"])
def test_a_model_with_adapters_is_checked_as_the_base_that_it_was(saved, family, state):
    model = PeftModel.from_pretrained(family("bert"), saved)
    if state == "merged":
        model.merge_adapter()
    if state == "disabled":
        model.base_model.disable_adapter_layers()
    if state == "twice":
        model.load_adapter(saved, "again")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    verify_base(model, saved, full=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.get_base_model().get_parameter(_NAME.replace("dense.", "dense.base_layer.")).mul_(1.01)
    with pytest.raises(BaseMismatchError, match=_NAME):
        verify_base(model, saved, full=True)


def test_a_base_under_lora_is_checked(saved, family):
    model = get_peft_model(family("bert"), LoraConfig(target_modules=["query", "dense"]))
    verify_base(model, saved, full=True)


def test_another_precision_of_the_base_passes_and_is_said_to_be_compared_by_sample(saved, family, caplog):
    with caplog.at_level(logging.WARNING, logger=_LOGGER):
        verify_base(family("bert").bfloat16(), saved)
        assert "another precision" in caplog.text
        assert "entry by entry" not in caplog.text
        verify_base(family("bert").bfloat16(), saved, full=True)
    assert "were not compared entry by entry" in caplog.text


def test_a_model_without_the_tensors_is_refused(saved, family):
    with pytest.raises(BaseMismatchError, match=r"the model has no such parameter.*load it onto"):
        verify_base(family("gpt2"), saved)


def test_the_named_base_is_in_the_message(family, tmp_path):
    get_peft_model(family("bert"), ChildTuningConfig(task_type="SEQ_CLS", score="magnitude")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    named = json.loads(path.read_text()) | {"base_model_name_or_path": "org/model", "revision": "v2"}
    path.write_text(json.dumps(named))  # PEFT's own fields: people edit them
    base = family("bert")
    with torch.no_grad():
        base.get_parameter(_NAME).mul_(1.01)
    for check in (verify_base, PeftModel.from_pretrained):
        with pytest.raises(BaseMismatchError, match=f"^{_NAME}: .*'org/model', revision 'v2'"):
            check(base, tmp_path)


def test_a_damaged_adapter_is_called_damaged_and_not_made_for_another_base(saved, family):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    key = f"base_model.model.{_NAME}".replace(".weight", ".child_tuning_code.weight")
    tensors[key][-1] ^= 1
    save_file(tensors, path)
    with pytest.raises(IntegrityError, match=f"^{_NAME}: "):
        verify_base(family("bert"), saved)


def test_an_adapter_of_another_method_is_refused(family, tmp_path):
    get_peft_model(family("bert"), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="not an adapter of this method"):
        verify_base(family("bert"), tmp_path)


def test_weights_on_the_meta_device_are_refused(saved, family):
    with pytest.raises(UnsupportedError, match="meta device"):
        verify_base(family("bert").to("meta"), saved)
