"""transformers' own loader, which knows nothing of this method, and pickles on every path."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from peft_childtune import ChildTuningConfig, ChildTuningError, IntegrityError, UnsupportedError
from tests.hostile.artifacts import NATIVE_PATHS, PEFT_PATHS, bert, photograph, save, small

_WEIGHTS, _PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_WORDS = "embeddings.word_embeddings.weight"
_PREFIX = "base_model.model."
_VALUES = f"{_PREFIX}encoder.layer.0.attention.self.query.child_tuning_values.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folders of a base and of an adapter on it."""
    folder = tmp_path_factory.mktemp("native")
    bert().save_pretrained(folder / "base")
    base = AutoModel.from_pretrained(folder / "base", attn_implementation="eager", add_pooling_layer=False)
    config = ChildTuningConfig(target_modules=["query"], score="magnitude", density=0.2, init_weights=False)
    get_peft_model(base, config).save_pretrained(folder / "adapter")
    return folder


def _from_auto_model(base, folder):
    del base
    return AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)


_PATHS = NATIVE_PATHS | {"AutoModel": _from_auto_model}


def _refused(base, folder, path, error, match) -> None:
    before = photograph(base)
    with pytest.raises(error, match=match):
        _PATHS[path](base, folder)
    assert photograph(base) == before
    assert not getattr(base, "_hf_peft_config_loaded", False)
    assert "_load_pretrained_model" not in vars(base)


@pytest.mark.parametrize("path", _PATHS)
def test_a_sound_adapter_loads_and_leaves_no_guard_behind(path, saved):
    model = _PATHS[path](bert(), saved / "adapter")
    assert "_load_pretrained_model" not in vars(model)
    assert not any(module._pending for module in model.modules() if hasattr(module, "_pending"))
    copy.deepcopy(model)


@pytest.mark.parametrize("path", _PATHS)
@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        (f"{_PREFIX}encoder.layer.0.output.dense.weight", torch.zeros(8, 12), "holds no base weights"),
        ("encoder.layer.0.output.dense.weight", torch.zeros(8, 12), "holds no base weights"),
        (f"{_PREFIX}encoder.layer.9.attention.self.query.child_tuning_values.weight", torch.zeros(2), "matches noth"),
        (f"{_PREFIX}encoder.layer.0.output.dense.child_tuning_values.weight", torch.zeros(2), "matches nothing"),
        (_VALUES.removeprefix(_PREFIX), torch.zeros(3), "twice"),
        ("anything", torch.zeros(3), "holds no base weights"),
    ],
    ids=["base weight", "base weight without prefix", "no such layer", "layer that is no target", "twice", "anything"],
)
def test_a_tensor_too_many_is_refused_before_anything_is_written(path, name, tensor, match, saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / _WEIGHTS)
    save_file(tensors | {name: tensor}, tmp_path / "adapter" / _WEIGHTS, metadata={"format": "pt"})
    _refused(bert(), tmp_path / "adapter", path, IntegrityError, match)


def test_a_tensor_too_many_in_a_state_dict_is_refused(saved):
    tensors = load_file(saved / "adapter" / _WEIGHTS)
    base = bert()
    before = photograph(base)
    config = PeftConfig.from_pretrained(str(saved / "adapter"))
    with pytest.raises(IntegrityError, match="holds no base weights"):
        base.load_adapter(adapter_state_dict=tensors | {"encoder.x": torch.zeros(1)}, peft_config=config)
    assert photograph(base) == before


@pytest.mark.parametrize("path", _PATHS)
def test_a_tensor_of_another_shape_is_refused_by_name(path, saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / _WEIGHTS)
    tensors[_VALUES] = torch.zeros(len(tensors[_VALUES]) + 1)
    save_file(tensors, tmp_path / "adapter" / _WEIGHTS, metadata={"format": "pt"})
    _refused(bert(), tmp_path / "adapter", path, IntegrityError, "query.child_tuning_values.weight: has the shape")


@pytest.mark.parametrize("path", ["native trainable"])
def test_a_trainable_adapter_is_verified_before_the_loader_returns(path, saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / _WEIGHTS)
    tensors[_VALUES] = tensors[_VALUES] + 1
    save_file(tensors, tmp_path / "adapter" / _WEIGHTS, metadata={"format": "pt"})
    _refused(bert(), tmp_path / "adapter", path, IntegrityError, "query.weight: the stored child differs")


def test_an_adapter_of_another_method_passes_the_guard(saved, tmp_path):
    from peft import LoraConfig

    get_peft_model(bert(), LoraConfig(target_modules=["key"], r=2)).save_pretrained(tmp_path)
    model = NATIVE_PATHS["native"](bert(), saved / "adapter")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        model.load_adapter(str(tmp_path), adapter_name="other")
    assert set(model.peft_config) == {"default", "other"}


def _as_pickle(folder) -> None:
    torch.save(load_file(folder / _WEIGHTS), folder / _PICKLE)
    (folder / _WEIGHTS).unlink()


@pytest.mark.parametrize("path", _PATHS)
def test_a_pickle_is_refused_by_transformers_paths(path, saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    _as_pickle(tmp_path / "adapter")
    _refused(bert(), tmp_path / "adapter", path, UnsupportedError, "adapter_model.bin: is no safetensors file")


def test_a_pickle_is_refused_where_it_is_asked_for(saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    torch.save(load_file(tmp_path / "adapter" / _WEIGHTS), tmp_path / "adapter" / _PICKLE)
    with pytest.raises(UnsupportedError, match="adapter_model.bin"):
        bert().load_adapter(str(tmp_path / "adapter"), use_safetensors=False)


@pytest.mark.parametrize("path", PEFT_PATHS)
def test_a_pickle_is_refused_by_peft_paths(path, tmp_path):
    save(tmp_path)
    _as_pickle(tmp_path)
    base = small()
    with pytest.raises(UnsupportedError, match="adapter_model.bin: is no safetensors file"):
        PEFT_PATHS[path](base, tmp_path)


def test_a_pickle_in_a_subfolder_is_refused(tmp_path):
    save(tmp_path / "inside")
    _as_pickle(tmp_path / "inside")
    with pytest.raises(UnsupportedError, match="adapter_model.bin"):
        PeftModel.from_pretrained(small(), tmp_path, subfolder="inside")


def test_a_refused_pickle_leaves_what_was_saved_before(tmp_path):
    save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = PeftModel.from_pretrained(small(), tmp_path)
    with pytest.raises(UnsupportedError, match="safe_serialization=True"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert PeftModel.from_pretrained(small(), tmp_path)


def test_an_old_pickle_beside_the_weights_is_left_alone(tmp_path):
    (tmp_path / _PICKLE).write_bytes(b"old")
    save(tmp_path)
    assert (tmp_path / _PICKLE).read_bytes() == b"old"
    assert PeftModel.from_pretrained(small(), tmp_path)


def test_no_class_is_taken_from_a_file(tmp_path):
    """PEFT's `auto_mapping` names a class and a library; only `AutoPeftModel` reads it, from a list of libraries."""
    from peft import AutoPeftModel

    save(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = path.read_text().replace('"parent_library": "tests.hostile.artifacts"', '"parent_library": "antigravity"')
    path.write_text(text)
    with pytest.raises(ValueError, match="not in the import allowlist"):
        AutoPeftModel.from_pretrained(tmp_path)
    assert PeftModel.from_pretrained(small(), tmp_path)  # reads no such thing


def test_every_error_of_these_paths_is_of_one_root():
    assert issubclass(UnsupportedError, ChildTuningError) and issubclass(IntegrityError, ChildTuningError)
