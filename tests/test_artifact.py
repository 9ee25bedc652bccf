"""An adapter folder read without a model: everything that is in it, and everything that is wrong with it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_childtune import ChildTuningConfig, FormatError, get_child_network, get_deltas
from peft_childtune.artifact import Artifact, read_json
from peft_childtune.codec import encode_child
from peft_childtune.sparse import SeededUnits, TensorChild, UnitGrid


def _base(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    return model


def _saved(folder, **options):
    """Save an adapter of the first two layers, with the last one whole; return the model."""
    options = {"score": "magnitude", "density": 0.3} | options
    config = ChildTuningConfig(target_modules=["0", "2"], modules_to_save=["4"], **options)
    model = get_peft_model(_base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "child_tuning_values" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path):
    _saved(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "random"},
        {"mode": "task_free", "resample": True, "score": "fisher"},
        {"granularity": "row"},
        {"granularity": "column", "density": 0.5},
        {"granularity": "block", "block_size": 4},
        {"save_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_what_is_read_is_what_the_model_held(tmp_path, options):
    model = _saved(tmp_path, **options)
    artifact = Artifact(tmp_path)
    network, deltas = get_child_network(model), get_deltas(model)
    assert sorted(artifact.names()) == sorted(network.children)
    dtype = torch.bfloat16 if "save_dtype" in options else torch.float32
    for name, delta in deltas.items():
        stored = artifact.stored(name)
        assert stored.nnz == delta.nnz
        if not delta.nnz:
            assert (stored.shape, stored.coding, artifact.child(name, delta.shape)) == (None, None, None)
            continue
        assert stored.shape == delta.shape
        assert torch.equal(artifact.child(name, delta.shape).indices(), network.indices[name])
        assert torch.equal(artifact.values(name), delta.values.to(dtype))
    assert {name: shape for name, (_, _, shape) in artifact.heads.items()} == {"4.weight": (2, 8), "4.bias": (2,)}
    assert artifact.verify().problems == []


def test_a_tensor_of_which_nothing_was_kept_is_listed(tmp_path):
    _saved(tmp_path, density=0.01)
    artifact = Artifact(tmp_path)
    empty = [name for name in artifact.names() if artifact.stored(name).nnz == 0]
    assert empty
    assert all(artifact.values(name).numel() == 0 for name in empty)
    assert artifact.verify(lambda name: _base().get_parameter(name)).problems == []


def _rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)


def _reconfigure(folder, change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


_WEIGHT = "base_model.model.2.child_tuning_{}.weight"
_SEAL = "base_model.model.0.child_tuning_seal"


def _last_bit(key):
    def change(tensors):
        raw = tensors[key].contiguous().view(torch.uint8)
        raw.view(-1)[-1] ^= 1

    return change


_DAMAGES = {
    "a flipped code bit": (_last_bit(_WEIGHT.format("code")), "2.weight: "),
    "a flipped value bit": (_last_bit(_WEIGHT.format("values")), "2.weight: the stored child differs"),
    "a value that is not finite": (
        lambda t: t[_WEIGHT.format("values")].__setitem__(0, float("inf")),
        "2.weight: a value is not finite",
    ),
    "values of another length": (
        lambda t: t.__setitem__(_WEIGHT.format("values"), t[_WEIGHT.format("values")][1:]),
        "2.weight: adapter_config.json lists",
    ),
    "values that are integers": (
        lambda t: t.__setitem__(_WEIGHT.format("values"), t[_WEIGHT.format("values")].int()),
        "2.weight: a value is not finite",
    ),
    "values of two dimensions": (
        lambda t: t.__setitem__(_WEIGHT.format("values"), t[_WEIGHT.format("values")][None]),
        "2.weight: code U8",
    ),
    "a code of another dtype": (
        lambda t: t.__setitem__(_WEIGHT.format("code"), t[_WEIGHT.format("code")].to(torch.int32)),
        "2.weight: code I32",
    ),
    "a missing delta": (lambda t: t.pop(_WEIGHT.format("values")), "2.weight: its child_tuning_values is missing"),
    "a missing code": (lambda t: t.pop(_WEIGHT.format("code")), "2.weight: its child_tuning_code is missing"),
    "both missing": (
        lambda t: [t.pop(_WEIGHT.format(kind)) for kind in ("code", "values")],
        "2.weight: adapter_config.json lists",
    ),
    "one tensor too many": (
        lambda t: t.update(
            {_WEIGHT.format(k).replace(".2.", ".9."): t[_WEIGHT.format(k)] for k in ("code", "values")}
        ),
        "9.weight: is in the weights file, but not in `child`",
    ),
    "two tensors exchanged": (
        lambda t: t.update(
            {
                "base_model.model.0.child_tuning_code.weight": t[_WEIGHT.format("code")],
                _WEIGHT.format("code"): t["base_model.model.0.child_tuning_code.weight"],
            }
        ),
        "0.weight: ",
    ),
    "a flipped head bit": (_last_bit("base_model.model.4.weight"), "4.weight: the stored tensor differs"),
    "a head that is not finite": (
        lambda t: t["base_model.model.4.weight"].__setitem__((0, 0), float("nan")),
        "4.weight: an entry is not finite",
    ),
    "a missing head": (lambda t: t.pop("base_model.model.4.bias"), "`modules_to_save` tensors that were saved"),
    "no seal": (lambda t: t.pop(_SEAL), "0 seals instead of one"),
    "two seals": (lambda t: t.__setitem__(_SEAL.replace(".0.", ".2."), t[_SEAL]), "2 seals instead of one"),
    "a flipped seal bit": (_last_bit(_SEAL), "child_tuning_seal: "),
}


@pytest.mark.parametrize("damage", list(_DAMAGES))
def test_damage_to_the_weights_file_is_found_and_named(folder, damage):
    change, message = _DAMAGES[damage]
    _rewrite(folder, change)
    problems = Artifact(folder).verify().problems
    assert problems and message in problems[0]


_MISFITS = {
    "another count": lambda c: c["child"]["2.weight"].__setitem__(0, 1),
    "another size": lambda c: c["child"]["2.weight"].__setitem__(1, 1),
    "a missing entry": lambda c: c["child"].pop("2.weight"),
    "no pair": lambda c: c["child"].__setitem__("2.weight", 7),
    "one entry too many": lambda c: c["child"].__setitem__("9.weight", [0, 0]),
    "no table": lambda c: c.__setitem__("child", None),
    "an empty table": lambda c: c.__setitem__("child", {}),
    "a list": lambda c: c.__setitem__("child", [1]),
}


@pytest.mark.parametrize("misfit", list(_MISFITS))
def test_a_configuration_of_another_file_is_found(folder, misfit):
    _reconfigure(folder, _MISFITS[misfit])
    assert Artifact(folder).verify().problems


def test_a_tensor_that_is_there_twice_is_refused_as_loading_refuses_it(folder):
    key = "base_model.model.0.child_tuning_code.weight"
    _rewrite(folder, lambda t: t.__setitem__(key.removeprefix("base_model.model."), t[key].clone()))
    with pytest.raises(FormatError, match="is there twice"):
        Artifact(folder)


@pytest.mark.parametrize("modules", [5, "4", {"4": 1}])
def test_modules_to_save_that_are_no_list_are_refused_when_it_is_opened(folder, modules):
    _reconfigure(folder, lambda c: c.__setitem__("modules_to_save", modules))
    with pytest.raises(FormatError, match="modules_to_save=.* is no list of names"):
        Artifact(folder)


def test_a_file_that_is_cut_off_is_refused_when_it_is_opened(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="not a sound safetensors file"):
        Artifact(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "1", "[" * 100_000, '{"a": "\udcff"}'], ids=range(6))
def test_a_configuration_that_is_no_json_object_is_refused(folder, text):
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(FormatError, match="adapter_config.json"):
        Artifact(folder)


def test_a_configuration_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate((1 << 26) + 1)
    with pytest.raises(FormatError, match="above the limit"):
        read_json(path)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_no_damage(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        Artifact(folder)


def test_a_base_is_compared_tensor_by_tensor(folder):
    asked = []

    def base(name):
        asked.append(name)
        return _base().get_parameter(name)

    verdict = Artifact(folder).verify(base)
    assert (verdict.problems, verdict.unverified) == ([], [])
    assert sorted(asked) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_another_base_is_told_from_damage(folder):
    verdict = Artifact(folder).verify(lambda name: _base(scale=1.01).get_parameter(name))
    assert verdict.is_other_base
    assert verdict.problems[0].startswith("2.weight: the base weights differ")


def test_a_damaged_file_is_never_compared_with_a_base(folder):
    _rewrite(folder, _last_bit(_WEIGHT.format("values")))

    def explode(name):
        raise AssertionError("a base was asked for")

    verdict = Artifact(folder).verify(explode)
    assert verdict.problems and not verdict.is_other_base


def test_a_code_that_asks_for_more_drawing_than_a_file_alone_may_is_refused_unless_the_base_has_that_shape(folder):
    child = TensorChild(UnitGrid((1 << 20, 1 << 20)), SeededUnits(1, 0, 1 << 40, 0, 12))
    key = "base_model.model.0.child_tuning_code.weight"
    _rewrite(folder, lambda tensors: tensors.update({key: encode_child(child)}))
    _reconfigure(folder, lambda config: config["child"].update({"0.weight": [12, encode_child(child).numel()]}))
    values = Artifact(folder).values("0.weight").numel()
    _reconfigure(folder, lambda config: config["child"].update({"0.weight": [values, encode_child(child).numel()]}))
    assert "1099511627776 units have to be drawn" in Artifact(folder).verify().problems[0]
    tensors = dict(_base().named_parameters())
    verdict = Artifact(folder).verify(lambda name: tensors[name].detach())
    assert "0.weight: the base tensor is of shape" in verdict.problems[0]
