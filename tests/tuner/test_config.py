"""The configuration: its documentation, its checks, and what it is on disk."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

from peft_childtune import (
    ChildNetwork,
    ChildTuningConfig,
    ConfigError,
    UnsupportedError,
    get_child_network,
    get_deltas,
    select_child_network,
)

_FIELDS = {f.name: f for f in dataclasses.fields(ChildTuningConfig) if f.name in ChildTuningConfig.__annotations__}


def _documented() -> dict[str, tuple[str, str]]:
    """Name -> (default, text), as the docstring has them."""
    section = inspect.getdoc(ChildTuningConfig).partition("Args:\n")[2].partition("\n\n")[0]
    pattern = r"^    (\w+) \(`[^`]+`, \*optional\*, defaults to `([^`]*)`\):\n((?:        .*\n?)+)"
    found = re.findall(pattern, section, flags=re.MULTILINE)
    return {name: (default, " ".join(text.split())) for name, default, text in found}


def test_the_docstring_lists_every_field_in_order_and_no_other():
    assert list(_documented()) == list(_FIELDS)


@pytest.mark.parametrize("name", _FIELDS)
def test_docstring_help_and_default_agree(name):
    default, text = _documented()[name]
    assert text == _FIELDS[name].metadata["help"]
    assert default == str(_FIELDS[name].default)


def test_the_defaults_are_the_documented_ones():
    config = ChildTuningConfig()
    assert (config.mode, config.density, config.score, config.scope) == ("task_driven", 0.3, "movement", None)
    assert (config.granularity, config.resample, config.init_weights) == ("element", False, True)
    assert config.target_modules is None
    assert config.save_dtype is None
    assert config.peft_type.value == "CHILD_TUNING"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "task-driven"}, "mode='task-driven' is not one of 'task_driven', 'task_free'"),
        ({"score": "Fisher"}, "score='Fisher'"),
        ({"scope": "model"}, "scope='model'"),
        ({"granularity": "tile"}, "granularity='tile'"),
        ({"save_dtype": "int8"}, "save_dtype='int8'"),
        ({"save_dtype": torch.bfloat16}, "save_dtype"),
        ({"density": 0}, "density=0 "),
        ({"density": -0.1}, "density=-0.1"),
        ({"density": 1.0001}, "density=1.0001"),
        ({"density": 30}, "density=30"),
        ({"density": float("nan")}, "density=nan"),
        ({"density": True}, "density=True"),
        ({"density": "0.3"}, "density='0.3'"),
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": 2.0}, "block_size=2.0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed="),
        ({"seed": 1.0}, "seed=1.0"),
        ({"seed": None}, "seed=None"),
        ({"resample": True}, 'resample=True belongs to mode="task_free"'),
        ({"mode": "task_free", "score": "magnitude"}, "score='magnitude' has no meaning"),
        ({"mode": "task_free", "resample": True, "granularity": "row"}, "resample=True"),
        ({"mode": "task_free", "resample": True, "scope": "tensor"}, "resample=True"),
        ({"scope": "row", "granularity": "block"}, 'scope="row"'),
        ({"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ".*fc", "layers_pattern": "layers"}, "layers_pattern"),
        ({"layers_pattern": "layers"}, "layers_to_transform is not"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ChildTuningConfig(**options)


def test_target_parameters_are_refused():
    with pytest.raises(UnsupportedError, match="target_modules"):
        ChildTuningConfig(target_parameters=["fc.weight"])


def test_a_misspelt_option_is_refused():
    with pytest.raises(TypeError, match="densty"):
        ChildTuningConfig(densty=0.1)


@pytest.mark.parametrize("density", [1, 1.0, 1e-9])
def test_the_bounds_of_the_density_are_allowed(density):
    assert ChildTuningConfig(density=density).density == density


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"score": "fisher"}, True),
        ({"score": "fisher_batch"}, True),
        ({"score": "gradient"}, True),
        ({"score": "magnitude"}, False),
        ({"score": "random"}, False),
        ({"mode": "task_free"}, False),
        ({"mode": "task_free", "resample": True}, False),
    ],
)
def test_a_configuration_knows_whether_its_child_needs_data(options, needed):
    assert ChildTuningConfig(**options).needs_data is needed


_EVERYTHING = {
    "task_type": "SEQ_CLS",
    "target_modules": ["query", "dense"],
    "exclude_modules": ["pooler.dense"],
    "mode": "task_driven",
    "density": 0.02,
    "score": "gradient",
    "scope": "layer",
    "granularity": "block",
    "block_size": 8,
    "seed": 2**63 - 1,
    "save_dtype": "bfloat16",
    "init_weights": False,
    "modules_to_save": ["classifier"],
    "layers_to_transform": [0, 1],
    "layers_pattern": ["layer"],
    "selection": {"source": "gradient", "examples": 12},
}


@pytest.mark.parametrize("loader", [ChildTuningConfig, PeftConfig])
@pytest.mark.parametrize("options", [{}, _EVERYTHING], ids=["defaults", "everything"])
def test_a_saved_configuration_loads_equal(tmp_path, loader, options):
    config = ChildTuningConfig(**options)
    config.save_pretrained(str(tmp_path))
    loaded = loader.from_pretrained(str(tmp_path))
    assert isinstance(loaded, ChildTuningConfig)
    for name in _FIELDS:
        one, other = getattr(config, name), getattr(loaded, name)
        assert one == other, name
    assert loaded.task_type == config.task_type


def test_the_file_is_the_same_one_every_time_and_names_the_method():
    names = [f"module_{i}" for i in range(30)]
    texts = {
        json.dumps(ChildTuningConfig(target_modules=order).to_dict(), sort_keys=True)
        for order in (names, names[::-1], names[15:] + names[:15])
    }
    assert len(texts) == 1
    loaded = json.loads(texts.pop())
    assert loaded["peft_type"] == "CHILD_TUNING"
    assert loaded["target_modules"] == sorted(names)


def _wrapped(toy, config=None):
    return get_peft_model(toy(), config or ChildTuningConfig(score="magnitude", density=0.25))


def _listed(path):
    return json.loads((path / "adapter_config.json").read_text())["child"]


def test_a_scope_that_was_not_given_follows_the_score():
    config = ChildTuningConfig()
    assert config.budget_scope == "tensor"
    assert dataclasses.replace(config, score="fisher").budget_scope == "global"
    assert dataclasses.replace(config, score="fisher", scope="row").budget_scope == "row"
    assert dataclasses.replace(config, mode="task_free", resample=True).budget_scope == "global"
    config.score = "fisher"
    assert config.budget_scope == "global"


def test_files_sealed_under_earlier_defaults_stay_valid():
    # digests of configurations as they were when "fisher" and "global" were the defaults
    assert ChildTuningConfig(score="fisher", scope="global").own_digest().hex() == "dc7048f8f8747f561349cde127705c16"
    random = ChildTuningConfig(score="random", scope="global", density=0.02)
    assert random.own_digest().hex() == "15e14990b6a06bd022f2c036d25be9cd"


def test_saving_writes_the_sizes_into_the_file_and_not_into_the_live_configuration(toy, tmp_path):
    model = _wrapped(toy)
    model.save_pretrained(tmp_path)
    config = model.peft_config["default"]
    nnz = {name: delta.nnz for name, delta in get_deltas(model).items()}
    assert {name: sizes[0] for name, sizes in _listed(tmp_path).items()} == nnz
    assert config.child is None
    assert config.to_dict()["child"] is None
    assert "_layout" not in config.to_dict()
    assert "_layout" not in (tmp_path / "adapter_config.json").read_text()


def test_a_configuration_that_was_saved_once_makes_a_fresh_adapter(toy, tmp_path, batches):
    config = ChildTuningConfig(score="magnitude", density=0.25)
    model = _wrapped(toy, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    base = toy()
    expected = base(**batches[0]).logits
    fresh = _wrapped(lambda: base, config)
    assert not any(bool(delta.values.any()) for delta in get_deltas(fresh).values())
    assert torch.equal(fresh(**batches[0]).logits, expected)
    fresh.train()(**batches[0]).loss.backward()


def test_two_adapters_that_share_a_configuration_object_are_saved_with_their_own_sizes(toy, tmp_path):
    config = ChildTuningConfig(score="fisher", density=0.25)
    model = get_peft_model(toy(), config)
    model.add_adapter("other", config)
    shapes = {n: tuple(p.shape) for n, p in toy().named_parameters() if n.startswith("layers.")}
    for adapter, count in [("default", 3), ("other", 5)]:
        child = ChildNetwork.from_indices({n: torch.arange(count) for n in shapes}, shapes)
        select_child_network(model, network=child, adapter_name=adapter)
    model.save_pretrained(tmp_path)
    assert {sizes[0] for sizes in _listed(tmp_path).values()} == {3}
    assert {sizes[0] for sizes in _listed(tmp_path / "other").values()} == {5}
    loaded = PeftModel.from_pretrained(toy(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    assert get_child_network(loaded).nnz == 3 * len(shapes)
    assert get_child_network(loaded, "other").nnz == 5 * len(shapes)


def test_the_sizes_belong_to_what_was_saved_last(toy, tmp_path):
    model = get_peft_model(toy(), ChildTuningConfig(score="fisher", density=0.25))
    shapes = {n: tuple(p.shape) for n, p in toy().named_parameters() if n.startswith("layers.")}
    for count in (2, 4):
        child = ChildNetwork.from_indices({n: torch.arange(count) for n in shapes}, shapes)
        select_child_network(model, network=child)
        model.save_pretrained(tmp_path)
        assert {sizes[0] for sizes in _listed(tmp_path).values()} == {count}


def test_a_configuration_saved_on_its_own_after_another_model_was_saved_lists_no_child(toy, tmp_path):
    config = ChildTuningConfig(score="magnitude", density=0.25)
    _wrapped(toy, config).save_pretrained(tmp_path / "model")
    config.save_pretrained(str(tmp_path / "alone"))
    assert _listed(tmp_path / "alone") is None
