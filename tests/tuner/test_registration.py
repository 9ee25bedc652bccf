"""The method's entry in PEFT's tables, made from outside PEFT."""

from __future__ import annotations

import copy
import enum
import importlib.util
import json
import pickle

import peft
import pytest
from peft import PeftType, mapping

from peft_childtune import ChildTuningConfig, ChildTuningModel, PeftVersionError
from peft_childtune.tuner import registration
from peft_childtune.tuner.registration import ChildTuningPeftType, check_peft_version, register

_TABLES = ["CONFIG", "TUNER", "PREFIX", "MIXED_MODEL"]
_TYPE = ChildTuningPeftType.CHILD_TUNING


@pytest.fixture
def tables(monkeypatch):
    """Empty tables in place of PEFT's."""
    made = {name: {} for name in _TABLES}
    for name, table in made.items():
        monkeypatch.setattr(registration, f"PEFT_TYPE_TO_{name}_MAPPING", table)
    return made


def test_importing_the_package_registers_the_method():
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["CHILD_TUNING"] is ChildTuningConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["CHILD_TUNING"] is ChildTuningModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["CHILD_TUNING"] == "child_tuning_"


def test_the_prefix_is_the_one_that_transformers_derives_from_the_type():
    assert ChildTuningModel.prefix == registration.PREFIX == f"{_TYPE.value.lower()}_"


def test_the_type_reads_as_its_string_everywhere():
    assert _TYPE == "CHILD_TUNING"
    assert hash(_TYPE) == hash("CHILD_TUNING")
    assert (_TYPE.value, _TYPE.name) == ("CHILD_TUNING",) * 2
    # text shows a member as it shows PEFT's own, which some of PEFT's callers take apart
    assert str(_TYPE).replace(type(_TYPE).__name__, "") == str(PeftType.LORA).replace("PeftType", "").replace(
        "LORA", _TYPE.name
    )
    assert {_TYPE: 1}["CHILD_TUNING"] == 1
    assert json.dumps(_TYPE) == '"CHILD_TUNING"'
    assert copy.deepcopy(_TYPE) is _TYPE
    assert pickle.loads(pickle.dumps(_TYPE)) is _TYPE


def test_registering_again_changes_nothing():
    before = [dict(getattr(mapping, f"PEFT_TYPE_TO_{name}_MAPPING")) for name in _TABLES]
    register(ChildTuningConfig, ChildTuningModel)
    assert [getattr(mapping, f"PEFT_TYPE_TO_{name}_MAPPING") for name in _TABLES] == before


def test_registering_fills_the_three_tables(tables):
    register(ChildTuningConfig, ChildTuningModel)
    assert tables == {
        "CONFIG": {_TYPE: ChildTuningConfig},
        "TUNER": {_TYPE: ChildTuningModel},
        "PREFIX": {_TYPE: "child_tuning_"},
        "MIXED_MODEL": {},
    }


def test_registering_steps_aside_where_peft_ships_the_name(tables, monkeypatch):
    shipped = enum.Enum("PeftType", {"LORA": "LORA", "CHILD_TUNING": "CHILD_TUNING"}, type=str)
    monkeypatch.setattr(registration, "PeftType", shipped)
    register(ChildTuningConfig, ChildTuningModel)
    assert not any(tables.values())


@pytest.mark.parametrize("table", ["CONFIG", "TUNER", "MIXED_MODEL"])
def test_a_name_taken_by_another_package_is_refused(tables, table):
    tables[table]["CHILD_TUNING"] = dict
    with pytest.raises(KeyError, match="another package"):
        register(ChildTuningConfig, ChildTuningModel)
    assert sum(map(len, tables.values())) == 1


def test_a_prefix_taken_by_another_package_is_refused(tables):
    tables["PREFIX"]["OTHER"] = "child_tuning_"
    with pytest.raises(KeyError, match="child_tuning_"):
        register(ChildTuningConfig, ChildTuningModel)
    assert sum(map(len, tables.values())) == 1


@pytest.mark.parametrize("version", ["0.21.0", "0.21.2", "0.21.2.post1", "0.21.9+local"])
def test_the_supported_release_is_accepted(version):
    check_peft_version(version)


@pytest.mark.parametrize("version", ["0.20.1", "0.22.0", "0.22.0.dev0", "0.22.0rc1", "1.0", "0.3"])
def test_another_release_is_refused_with_the_command_that_helps(version):
    with pytest.raises(PeftVersionError, match=r"pip install") as caught:
        check_peft_version(version)
    assert f"peft {version} is installed" in str(caught.value)
    assert isinstance(caught.value, ImportError)


def test_the_release_is_checked_on_import(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    spec = importlib.util.spec_from_file_location("peft_childtune.tuner._again", registration.__file__)
    with pytest.raises(PeftVersionError, match=r"0\.20\.0"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
