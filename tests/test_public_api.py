"""What users may import, and that it is documented and typed."""

from __future__ import annotations

import importlib
import inspect
import pickle
import pkgutil
from pathlib import Path

import pytest

import peft_childtune
from peft_childtune import errors

_MODULES = sorted(m.name for m in pkgutil.walk_packages(peft_childtune.__path__, "peft_childtune."))


def test_the_public_names_are_the_documented_ones():
    assert peft_childtune.__all__ == [
        "BaseMismatchError",
        "BudgetError",
        "ChildNetwork",
        "ChildTuningCallback",
        "ChildTuningConfig",
        "ChildTuningError",
        "ChildTuningModel",
        "ConfigError",
        "DeltaError",
        "FormatError",
        "IntegrityError",
        "MemoryEstimate",
        "PeftVersionError",
        "ScoreError",
        "ScoreInputs",
        "SelectionDiagnosis",
        "SelectionError",
        "SelectionStability",
        "SparseDelta",
        "TargetError",
        "UnsupportedError",
        "diagnose_selection",
        "estimate_memory",
        "fit_head",
        "get_child_network",
        "get_deltas",
        "register_score",
        "select_child_network",
        "selection_report",
        "selection_stability",
        "skip_verification",
        "suggest_learning_rate",
        "verify_base",
    ]


@pytest.mark.parametrize("name", peft_childtune.__all__)
def test_every_public_name_exists_and_is_documented(name):
    assert inspect.getdoc(getattr(peft_childtune, name))


def test_the_selection_is_called_as_in_the_documentation():
    parameters = inspect.signature(peft_childtune.select_child_network).parameters
    assert [(p.name, p.kind.name, p.default) for p in parameters.values()] == [
        ("model", "POSITIONAL_OR_KEYWORD", inspect.Parameter.empty),
        ("dataloader", "POSITIONAL_OR_KEYWORD", None),
        ("network", "KEYWORD_ONLY", None),
        ("num_batches", "KEYWORD_ONLY", None),
        ("loss_fn", "KEYWORD_ONLY", None),
        ("adapter_name", "KEYWORD_ONLY", "default"),
        ("scores_device", "KEYWORD_ONLY", None),
        ("show_progress", "KEYWORD_ONLY", True),
    ]


@pytest.mark.parametrize("name", _MODULES)
def test_every_list_of_public_names_is_sorted_and_true(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert public == sorted(public, key=lambda n: (not n.isupper(), n[0].islower(), n))  # constants, types, functions
    assert [n for n in public if not hasattr(module, n)] == []


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("BudgetError", ValueError),
        ("DeltaError", ValueError),
        ("ScoreError", ValueError),
        ("TargetError", ValueError),
        ("SelectionError", RuntimeError),
        ("UnsupportedError", NotImplementedError),
        ("FormatError", ValueError),
        ("IntegrityError", errors.FormatError),
        ("BaseMismatchError", ValueError),
        ("PeftVersionError", ImportError),
    ],
)
def test_an_error_is_a_child_tuning_error_and_the_builtin_it_refines(name, builtin):
    error = getattr(errors, name)
    assert issubclass(error, errors.ChildTuningError)
    assert issubclass(error, builtin)
    assert str(pickle.loads(pickle.dumps(error("w: what happened")))) == "w: what happened"


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (Path(peft_childtune.__file__).parent / "py.typed").is_file()


def test_the_version_is_a_release():
    assert [part.isdigit() for part in peft_childtune.__version__.split(".")] == [True] * 3
