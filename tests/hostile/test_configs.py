"""A configuration may come from a stranger: each field is checked before anything relies on it."""

from __future__ import annotations

import json
import time

import pytest
from peft import PeftModel

from peft_childtune import ChildTuningConfig, ChildTuningError, ConfigError
from tests.hostile.artifacts import OWN_FIELDS, PEFT_PATHS, photograph, save, small

_VALUES = {
    "int": 3,
    "negative": -1,
    "huge": 10**300,
    "float": 0.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "true": True,
    "text": "x",
    "long text": "x" * 100_000,
    "empty text": "",
    "none": None,
    "list": [],
    "numbers": [1, 2],
    "names": ["x"],
    "mixed": ["x", None, {"y": []}],
    "table": {},
    "nested": {"a": {"b": {"c": {"d": {"e": {}}}}}},
}
_ALSO = ("inference_mode", "base_model_name_or_path", "revision", "task_type", "peft_version")


def _is_sound(field: str, value: object) -> bool:
    """Return whether a value means something in a field, from the documentation of the fields alone."""
    kind = ChildTuningConfig.__dataclass_fields__[field].type
    text = str(kind)
    if value is None:
        return "None" in text or "Optional" in text
    if field in ("resample", "init_weights", "inference_mode", "pickled"):
        return isinstance(value, bool)
    if field == "density":
        return type(value) in (int, float) and 0 < value <= 1
    if field in ("seed", "block_size"):
        return type(value) is int and (field == "block_size") <= value < 2**62
    if field in ("target_modules", "exclude_modules", "layers_pattern"):
        return isinstance(value, str) and len(value) < 5000 or _is_names(value)
    if field == "modules_to_save":
        return _is_names(value)
    if field == "layers_to_transform":
        numbers = value if isinstance(value, list) else [value]
        return all(type(number) is int and 0 <= number < 2**62 for number in numbers)
    if field == "selection":
        return value == {}
    if field == "child":
        return value == {}
    if field in ("base_model_name_or_path", "revision", "peft_version"):
        return isinstance(value, str)
    return False  # closed choices, of which none is "x"; target_parameters


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


@pytest.mark.parametrize("value", _VALUES.values(), ids=_VALUES)
@pytest.mark.parametrize("field", [*OWN_FIELDS, *_ALSO])
def test_a_field_of_no_sense_is_refused_with_its_name_its_value_and_a_way_out(field, value):
    if field == "resample" and value is True:
        pytest.skip("means something together with mode='task_free' only")
    if _is_sound(field, value):
        options = {"target_modules": ["x"]} if field == "layers_pattern" else {}
        options |= {"layers_to_transform": [0]} if field == "layers_pattern" else {}
        ChildTuningConfig(**options | {field: value})
        return
    with pytest.raises((ChildTuningError, ValueError)) as caught:
        ChildTuningConfig(**{field: value})
    message = str(caught.value)
    if field == "task_type" and isinstance(value, str):  # PEFT's own list, and its own message
        assert "Invalid task type" in message
        return
    assert isinstance(caught.value, ChildTuningError)
    assert field in message and len(message) < 1000
    assert any(
        way in message
        for way in ("give", "use", "one of", "0.02 keeps", "save or fetch", "list the names", "name the mod")
    )


@pytest.mark.parametrize("value", [3, "x", [1], {"a": 1}, float("nan")], ids=str)
@pytest.mark.parametrize("field", ["density", "score", "seed", "target_modules", "child", "layers_to_transform"])
@pytest.mark.parametrize("path", PEFT_PATHS)
def test_a_field_of_another_type_in_a_file_changes_nothing(path, field, value, tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    base = small()
    before = photograph(base)
    with pytest.raises(ChildTuningError):
        PEFT_PATHS[path](base, tmp_path)
    after = {name.replace(".base_layer", ""): bits for name, bits in photograph(base).items()}
    assert all(after[name] == bits for name, bits in before.items())


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|aa)*b",
        "((a.)*)*b",
        r"(?:x{1,9}y)+",
        ".*.*.*.*.*b",
        "a*a*a*a*a*b",
        ".?" * 40 + "X",
        "(?:.|[a-z])" * 40 + "X",
        "(?:en|e|en?)" * 20 + "X",
        r"(?x)([a-z.]+) +X",
        "(?=(?:a|a.)+X)b",
        "|".join([".*.*.*.*X"] * 400),
        "x" * 5000,
    ],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save"])
def test_a_pattern_that_may_take_for_ever_is_refused(field, pattern):
    options = {"layers_to_transform": [0], "target_modules": ["x"]} if field == "layers_pattern" else {}
    value = [pattern] if field == "modules_to_save" else pattern
    with pytest.raises(ConfigError, match=rf"^{field}=.*list the names"):
        ChildTuningConfig(**options | {field: value})


@pytest.mark.parametrize("pattern", ["(ead", "a)", "*", "[", "x{9999999999999999}", "(" * 3000])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_pattern_that_is_none_is_refused(field, pattern):
    with pytest.raises(ConfigError, match=rf"^{field}=.*is no pattern.*list the names"):
        ChildTuningConfig(**{field: [pattern] if field == "modules_to_save" else pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r".*\.(q_proj|v_proj)$",
        r".*encoder\.layers\.\d+\.(fc1|fc2)",
        r"^(?!.*vision).*(q_proj|v_proj)$",
        r"model\.layers\.[0-9]{1,2}\.mlp\.(up|down)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp|ffn).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
        r"[)*+{]+\)*\+",
        r"model\.layers\.([0-9])+\.(?:self_attn\.)?(q|k|v|o)_proj",
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}"
        r"\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|out_proj|fc1)))",
        "(query|key|value|dense)",
        "",
    ],
)
def test_the_patterns_that_people_write_are_accepted(pattern):
    assert ChildTuningConfig(target_modules=pattern).target_modules == pattern


def test_the_slowest_accepted_pattern_takes_seconds_at_most():
    """Of the repeats that are accepted, as many as can be, against names longer than any model has."""
    import re

    ChildTuningConfig(target_modules=".*.*.*.*X")
    start = time.process_time()
    for _ in range(10):
        assert re.fullmatch(".*.*.*.*X", "model.language_model.layers.10.block_sparse_moe.experts.w") is None
    assert time.process_time() - start < 5


def test_a_configuration_that_lists_more_than_the_file_has_is_refused_before_the_model_is_touched(tmp_path):
    save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    name = "layers.0.0.weight"
    config["child"][name] = [12, 11]  # as many as the base has entries, but the file has three
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ChildTuningError, match=r"layers\.0\.0\.weight.*lists 12 entries .* there are 3"):
        ChildTuningConfig.from_pretrained(tmp_path)
    with pytest.raises(ChildTuningError, match=r"layers\.0\.0\.weight"):
        PeftModel.from_pretrained(small(), tmp_path)
