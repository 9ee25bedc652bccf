"""A wrong adapter or a wrong base is refused on every load path, and nothing half-loaded stays behind."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_childtune import BaseMismatchError, ChildTuningError, FormatError, SelectionError, get_child_network
from peft_childtune.tuner import ChildTuningLayer
from tests.contract.families import (
    FAMILIES,
    add_noise,
    base_state,
    differing,
    layers_in,
    output,
    same_bits,
    snapshot,
    wrap,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def by_native_and_first_use(base, folder):
    """`is_trainable=True` calls no `eval()`, so transformers' own path gives no hook before the first use."""
    try:
        base.load_adapter(str(folder), is_trainable=True)
    finally:
        base.train()


def by_state_dict(base, folder):
    model = get_peft_model(base, PeftConfig.from_pretrained(str(folder)))
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))


def by_injection(base, folder):
    model = inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), base)
    tensors = load_file(folder / WEIGHTS)
    set_peft_model_state_dict(model, {key.removeprefix("base_model.model."): t for key, t in tensors.items()})


def by_native_state_dict(base, folder):
    base.load_adapter(
        adapter_state_dict=load_file(folder / WEIGHTS), peft_config=PeftConfig.from_pretrained(str(folder))
    )


PATHS = {
    "PeftModel": lambda base, folder: PeftModel.from_pretrained(base, folder),
    "low_cpu_mem_usage": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "is_trainable": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "native": lambda base, folder: base.load_adapter(str(folder)),
    "native trainable": by_native_and_first_use,
    "native state dict": by_native_state_dict,
    "state dict": by_state_dict,
    "injection": by_injection,
}


def flip(kind):
    """Return a damage: one bit in the middle of the first tensor of that kind."""

    def damage(tensors):
        key = min(key for key in tensors if kind in key)
        raw = tensors[key].contiguous().view(-1).view(torch.uint8)
        raw[raw.numel() // 2] ^= 4

    return damage


def drop(kind):
    def damage(tensors):
        del tensors[min(key for key in tensors if kind in key)]

    return damage


def swap_two_children(tensors):
    """Exchange two sound pairs of code and values of one shape: each is well-formed, in the wrong place."""
    names = ["attention.self.value", "attention.output.dense"]
    for kind in ("code", "values"):
        first, second = (
            next(k for k in tensors if f"layer.0.{name}.child_tuning_{kind}.weight" in k) for name in names
        )
        tensors[first], tensors[second] = tensors[second], tensors[first]


def extra(tensors):
    tensors["base_model.model.bert.encoder.layer.7.output.dense.child_tuning_values.weight"] = torch.zeros(3)


def zero_values(tensors):
    for key in tensors:
        if ".child_tuning_values." in key:
            tensors[key] = torch.zeros_like(tensors[key])


def nothing(tensors):
    for key in [key for key in tensors if ".child_tuning_" in key]:
        del tensors[key]


DAMAGES = {
    "a flipped bit in the values": flip("child_tuning_values"),
    "a flipped bit in the code": flip("child_tuning_code"),
    "a flipped bit in the head": flip("classifier"),
    "a flipped bit in the seal": flip("child_tuning_seal"),
    "missing values": drop("child_tuning_values"),
    "missing code": drop("child_tuning_code"),
    "a missing head tensor": drop("classifier"),
    "a missing seal": drop("child_tuning_seal"),
    "two children exchanged": swap_two_children,
    "all values zero": zero_values,
}


def damaged_copy(folder, target, damage):
    shutil.copytree(folder, target)
    tensors = {key: tensor.clone() for key, tensor in load_file(target / WEIGHTS).items()}
    damage(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / WEIGHTS, {"format": "pt"})
    return target


class Untouched:
    """What a base model must look like after a refusal, taken before the attempt."""

    def __init__(self, base):
        self.base = base
        next(base.parameters()).requires_grad_(False)  # a pattern of flags that no blanket reset would restore
        self.tensors = snapshot(base)
        self.flags = {name: p.requires_grad for name, p in base.named_parameters()}
        self.kinds = [type(module) for module in base.modules()]

    def check(self):
        assert differing(self.base, self.tensors) == []
        assert [type(module) for module in self.base.modules()] == self.kinds
        assert not getattr(self.base, "peft_config", None)
        assert not getattr(self.base, "_hf_peft_config_loaded", False)
        assert {name: p.requires_grad for name, p in self.base.named_parameters()} == self.flags


def foreign(saved):
    """Return a base of which one covered tensor is 1 % larger."""
    base = saved.fresh()
    with torch.no_grad():
        base.get_parameter(saved.family.weight).mul_(1.01)
    return base


@pytest.mark.parametrize(
    ("path", "damage"), [(p, d) for p in PATHS for d in DAMAGES if (p, d) != ("injection", "a missing head tensor")]
)
def test_a_damaged_adapter_is_refused_and_leaves_the_base_as_it_was(path, damage, saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    folder = damaged_copy(saved.folder, tmp_path / "adapter", DAMAGES[damage])
    base = saved.fresh()
    untouched = Untouched(base)
    with pytest.raises(FormatError):
        PATHS[path](base, folder)
    untouched.check()


def test_a_missing_head_tensor_is_refused_after_direct_injection_and_leaves_nothing_that_could_be_used(
    saved_adapter, tmp_path
):
    saved = saved_adapter("bert")
    folder = damaged_copy(saved.folder, tmp_path / "adapter", drop("classifier"))
    base = saved.fresh()
    with pytest.raises((FormatError, KeyError)):  # KeyError: PEFT's own, raised before any hook of ours is called
        PATHS["injection"](base, folder)
    if layers_in(base):
        with pytest.raises(SelectionError, match="never loaded"):
            output(base, saved.batch)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_an_adapter_made_for_other_base_weights_is_refused_by_the_name_of_the_tensor(name, path, saved_adapter):
    saved = saved_adapter(name)
    base = foreign(saved)
    untouched = Untouched(base)
    with pytest.raises(BaseMismatchError, match=saved.family.weight.replace(".", r"\.")):
        PATHS[path](base, saved.folder)
    untouched.check()


@pytest.mark.parametrize("path", PATHS)
def test_the_weights_of_one_adapter_with_the_configuration_of_another_are_refused(path, saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    other = add_noise(wrap(saved.fresh(), saved.family, score="random", density=0.15, seed=3))
    other.save_pretrained(tmp_path)
    shutil.copy(saved.folder / WEIGHTS, tmp_path / WEIGHTS)
    base = saved.fresh()
    untouched = Untouched(base)
    with pytest.raises((ChildTuningError, RuntimeError)):  # transformers itself refuses tensors of other sizes
        PATHS[path](base, tmp_path)
    untouched.check()


@pytest.mark.parametrize("path", ["PeftModel", "low_cpu_mem_usage", "native"])
def test_an_adapter_for_another_family_is_refused(path, saved_adapter):
    base = FAMILIES["llama"].build()
    untouched = Untouched(base)
    with pytest.raises(ValueError):
        PATHS[path](base, saved_adapter("gpt2").folder)
    untouched.check()


@pytest.mark.parametrize("path", ["PeftModel", "low_cpu_mem_usage", "state dict"])
def test_a_tensor_that_belongs_nowhere_is_refused(path, saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    folder = damaged_copy(saved.folder, tmp_path / "adapter", extra)
    base = saved.fresh()
    untouched = Untouched(base)
    with pytest.raises(FormatError, match=r"layer\.7"):
        PATHS[path](base, folder)
    untouched.check()


@pytest.mark.parametrize("path", ["PeftModel", "low_cpu_mem_usage", "native", "state dict"])
def test_a_file_of_which_only_the_head_is_left_is_refused_at_the_latest_at_first_use(path, saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    folder = damaged_copy(saved.folder, tmp_path / "adapter", nothing)
    base = saved.fresh()
    with pytest.raises((ChildTuningError, RuntimeError)):
        PATHS[path](base, folder)
        output(base, saved.batch)


@pytest.mark.parametrize("sizes", [[-1, 5], [10**15, 10**15], [3], "many", [1.5, 2], [5, 0], [True, 1]], ids=str)
@pytest.mark.parametrize("path", ["PeftModel", "low_cpu_mem_usage", "native"])
def test_sizes_in_the_configuration_that_mean_nothing_are_refused_before_memory_is_asked_for(
    path, sizes, saved_adapter, tmp_path
):
    saved = saved_adapter("bert")
    shutil.copytree(saved.folder, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    config["child"][saved.family.weight] = sizes
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    base = saved.fresh()
    untouched = Untouched(base)
    with pytest.raises(FormatError, match="child"):
        PATHS[path](base, tmp_path / "adapter")
    untouched.check()


@pytest.mark.parametrize(
    "damage", ["a flipped bit in the values", "a missing head tensor", "a missing seal", "foreign"]
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_second_adapter_that_is_refused_leaves_the_first_working_and_active(
    damage, low_cpu_mem_usage, saved_adapter, tmp_path
):
    saved = saved_adapter("bert")
    if damage == "foreign":
        first = add_noise(wrap(foreign(saved), saved.family, score="random"), seed=8)
        folder = saved.folder
    else:
        first = add_noise(wrap(saved.fresh(), saved.family, score="random"), seed=8)
        folder = damaged_copy(saved.folder, tmp_path / "adapter", DAMAGES[damage])
    before, answer = snapshot(first), output(first, saved.batch)
    flags = {name: p.requires_grad for name, p in first.named_parameters()}
    with pytest.raises(ChildTuningError):
        first.load_adapter(folder, adapter_name="second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert differing(first, before) == []
    assert {name: p.requires_grad for name, p in first.named_parameters()} == flags
    assert list(first.peft_config) == ["default"]
    assert first.active_adapters == ["default"]
    assert same_bits(output(first, saved.batch), answer)
    if damage != "foreign":  # a sound file is still welcome under the name that was refused
        first.load_adapter(saved.folder, adapter_name="second")
        first.set_adapter("second")
        assert same_bits(output(first, saved.batch), saved.logits)


def test_a_second_native_adapter_that_is_refused_leaves_the_first_working(saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    folder = damaged_copy(saved.folder, tmp_path / "adapter", flip("child_tuning_values"))
    model = saved.fresh()
    model.load_adapter(str(saved.folder), adapter_name="first")
    before = snapshot(model)
    with warnings.catch_warnings(), pytest.raises(FormatError):
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        model.load_adapter(str(folder), adapter_name="second")
    assert differing(model, before) == []
    assert list(model.peft_config) == ["first"]
    assert same_bits(output(model, saved.batch), saved.logits)


def test_a_refused_checkpoint_leaves_the_adapter_that_was_to_be_resumed_as_it_was(saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    folder = damaged_copy(saved.folder, tmp_path / "adapter", flip("child_tuning_code"))
    model = add_noise(wrap(saved.fresh(), saved.family, score="random"), seed=8)
    before, network = snapshot(model), get_child_network(model)
    with pytest.raises(FormatError):
        set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    assert differing(model, before) == []
    assert get_child_network(model) == network


@pytest.mark.parametrize("path", ["PeftModel", "native"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_low_precision_copy_of_the_base_is_accepted_and_one_of_a_foreign_base_refused(dtype, path, saved_adapter):
    saved = saved_adapter("llama")
    model = PATHS[path](saved.fresh(dtype=dtype), saved.folder) or None
    assert path == "native" or layers_in(model)
    with pytest.raises(BaseMismatchError):
        PATHS[path](foreign(saved).to(dtype), saved.folder)


@pytest.mark.parametrize("path", ["PeftModel", "native"])
@pytest.mark.parametrize(
    ("made_on", "loaded_on"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str
)
def test_a_base_in_the_other_low_precision_cannot_be_verified_and_warns(made_on, loaded_on, path, tmp_path, caplog):
    family = FAMILIES["gpt2"]
    add_noise(wrap(family.build().to(made_on), family, score="magnitude")).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="peft_childtune"):
        PATHS[path](family.build().to(loaded_on), tmp_path)
    assert "could not be verified" in caplog.text


def test_the_wide_base_of_an_adapter_made_in_low_precision_is_accepted(tmp_path):
    family = FAMILIES["gpt2"]
    add_noise(wrap(family.build().to(torch.bfloat16), family, score="magnitude")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(family.build(), tmp_path)
    assert any(isinstance(module, ChildTuningLayer) for module in model.modules())


def test_a_file_that_is_no_safetensors_file_is_refused_and_leaves_no_adapter(saved_adapter, tmp_path):
    saved = saved_adapter("bert")
    shutil.copytree(saved.folder, tmp_path / "adapter")
    weights = tmp_path / "adapter" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(Exception, match="(?i)safetensors|header|deserializing|incomplete"):
        PeftModel.from_pretrained(saved.fresh(), tmp_path / "adapter")


def smuggle(saved, target, key):
    """Return a copy of an adapter whose file also holds a base tensor, half as large again."""
    own = saved.fresh().get_parameter(key.replace(".base_layer", ""))

    def damage(tensors):
        tensors[f"base_model.model.{key}"] = own.detach() * 1.5

    return damaged_copy(saved.folder, target, damage)


BASE_KEYS = {"covered": "transformer.h.0.mlp.c_proj.base_layer.weight", "outside": "transformer.wpe.weight"}


@pytest.mark.parametrize("key", BASE_KEYS.values(), ids=BASE_KEYS)
@pytest.mark.parametrize("path", PATHS)
def test_base_weights_in_an_adapter_file_are_refused(path, key, saved_adapter, tmp_path):
    saved = saved_adapter("gpt2")
    folder = smuggle(saved, tmp_path / "adapter", key)
    base = saved.fresh()
    before = snapshot(base)
    with pytest.raises(ChildTuningError, match="no base weights"):
        PATHS[path](base, folder)
    assert [name for name, tensor in base_state(base).items() if not same_bits(before[name], tensor)] == []
