"""Deltas survive bit for bit; what is no number is neither saved nor loaded."""

from __future__ import annotations

import struct

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from peft_childtune import ChildTuningConfig, ChildTuningError, DeltaError, get_deltas
from peft_childtune.codec import decode_child
from peft_childtune.seal import Sealed, make_seal
from peft_childtune.weights import fingerprint
from tests.hostile.artifacts import NATIVE_PATHS, OTHER_PATHS, PEFT_PATHS, bert, photograph, save, small

_WEIGHTS = "adapter_model.safetensors"
_ODD = [-0.0, 0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38]  # zeros, subnormals, the largest


def _bits(values: torch.Tensor) -> list[int]:
    return [struct.unpack("<I", struct.pack("<f", value))[0] for value in values.tolist()]


def _fill(model, values) -> None:
    for name, parameter in model.named_parameters():
        if "child_tuning_values" in name:
            parameter.data = torch.tensor((values * parameter.numel())[: parameter.numel()])


@pytest.mark.parametrize("path", PEFT_PATHS | OTHER_PATHS)
def test_signed_zeros_and_subnormals_survive_bit_for_bit(path, tmp_path):
    model = get_peft_model(small(), ChildTuningConfig(target_modules=["layers.0.0"], score="magnitude", density=1.0))
    _fill(model, _ODD)
    model.save_pretrained(tmp_path)
    name = "second" if path == "second adapter" else "default"
    loaded = (PEFT_PATHS | OTHER_PATHS)[path](small(), tmp_path)
    for key, delta in get_deltas(loaded, name).items():
        assert _bits(delta.values) == _bits(torch.tensor((_ODD * delta.nnz)[: delta.nnz])), key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_delta_that_is_no_number_is_not_saved(value, tmp_path):
    model = get_peft_model(small(), ChildTuningConfig(target_modules=["layers.0.0"], score="magnitude", density=0.5))
    model.get_parameter("base_model.model.layers.0.0.child_tuning_values.default.weight").data[1] = value
    with pytest.raises(DeltaError, match=r"layers\.0\.0\.weight: 1 of its .* not finite.* at place 1"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / _WEIGHTS).exists()


def test_a_delta_that_overflows_when_it_is_rounded_is_not_saved(tmp_path):
    config = ChildTuningConfig(target_modules=["layers.0.0"], score="magnitude", density=0.5, save_dtype="float16")
    model = get_peft_model(small(), config)
    model.get_parameter("base_model.model.layers.0.0.child_tuning_values.default.weight").data[0] = 1e5
    with pytest.raises(DeltaError, match="bfloat16"):
        model.save_pretrained(tmp_path)


def _poison(folder, make, value) -> None:
    """Put a value into a saved delta, and make the seal anew, as one who means harm can."""
    tensors = load_file(folder / _WEIGHTS)
    key = next(name for name in tensors if "child_tuning_values" in name)
    tensors[key][0] = value
    prefix = "base_model.model."
    base = dict(make().named_parameters())
    children, heads = {}, {}
    for name, tensor in tensors.items():
        path, _, parameter = name.removeprefix(prefix).rpartition(".child_tuning_values.")
        if path:
            base_name = f"{path}.{parameter}"
            code = tensors[name.replace("_values", "_code")]
            indices = decode_child(code, shape=tuple(base[base_name].shape)).indices()
            children[base_name] = Sealed(code, tensor, lambda n=base_name, i=indices: fingerprint(base[n].detach(), i))
        elif "child_tuning" not in name:
            heads[name.removeprefix(prefix)] = tensor
    seal = next(name for name in tensors if name.endswith("child_tuning_seal"))
    config = ChildTuningConfig.from_pretrained(str(folder)).file_digest
    tensors[seal] = make_seal(children, heads, config=config)
    save_file(tensors, folder / _WEIGHTS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", PEFT_PATHS | OTHER_PATHS | NATIVE_PATHS)
def test_a_delta_that_is_no_number_is_not_loaded(path, value, tmp_path):
    make = bert if path in NATIVE_PATHS else small
    save(tmp_path, make, **({"target_modules": ["query"], "density": 1.0} if make is bert else {}))
    _poison(tmp_path, make, 0.25)
    (PEFT_PATHS | OTHER_PATHS | NATIVE_PATHS)[path](make(), tmp_path)  # the seal is right: a sound value loads
    _poison(tmp_path, make, value)
    base = make()
    before = photograph(base)
    with pytest.raises(ChildTuningError, match="not finite"):
        (PEFT_PATHS | OTHER_PATHS | NATIVE_PATHS)[path](base, tmp_path)
    after = {name.replace(".base_layer", ""): bits for name, bits in photograph(base).items()}
    assert all(after[name] == bits for name, bits in before.items())
