"""Training under DeepSpeed in two real processes, against one without it. Skipped where it is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from peft_childtune import get_child_network
from peft_childtune.codec import read_step
from tests.distributed.launching import run_cases
from tests.distributed.training import base_model, child_model, state_of, train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed; where it is, this runs on a CPU, too",
)

KINDS = ("d", "f_fixed", "f_resampled")
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false", "ACCELERATE_USE_DEEPSPEED": "true"}


def _run(names: list[str], folder: Path) -> dict[str, list[Any]]:
    return run_cases(names, 2, folder, program="deepspeed_cases.py", environment=ENVIRONMENT, timeout=900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    names = [f"zero{stage}_{kind}" for stage in (0, 2, 3) for kind in KINDS]
    names += [f"zero{stage}_{case}" for stage in (2, 3) for case in ("bf16", "fp16", "resumed")]
    names += ["zero3_saved", "zero3_small_parameters", "selected_late", "zero_init", "other_children"]
    return _run(names, folder)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        model = child_model(kind)
        digest = get_child_network(model).digest()
        train(model)
        found[kind] = {"digest": digest, **state_of(model)}
    return found


def _check_close(trained: dict[str, Any], expected: dict[str, Any]) -> None:
    # 1e-4: float32 sums in another order, of a few 1e-6 after five steps of Adam
    assert trained.keys() == expected.keys()
    for name, values in trained.items():
        assert float((values - expected[name]).norm() / expected[name].norm()) < 1e-4, name


def _check_equal(some: dict[str, Any], others: dict[str, Any]) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


def _steps(codes: dict[str, Any]) -> set[int]:
    return {read_step(code) for code in codes.values()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_under_deepspeed_train_what_one_does(two, one, stage, kind):
    first, second = two[f"zero{stage}_{kind}"]
    for run in (first, second):
        assert run["digest"] == one[kind]["digest"]
        _check_equal(run["frozen"], run["before"])
        _check_equal(run["codes"], one[kind]["codes"])  # with the steps that were counted
        _check_close(run["trained"], one[kind]["trained"])
    _check_equal(first["trained"], second["trained"])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_step_of_an_engine_draws_a_new_mask(two, stage):
    first, second = two[f"zero{stage}_f_resampled"]
    assert _steps(first["codes"]) == _steps(second["codes"]) == {5}


@pytest.mark.parametrize("stage", [2, 3])
def test_steps_skipped_for_an_overflow_are_not_counted(two, stage):
    first, second = two[f"zero{stage}_fp16"]
    assert 0 < first["applied"] < 5
    assert _steps(first["codes"]) == _steps(second["codes"]) == {first["applied"]}
    _check_equal(first["trained"], second["trained"])


@pytest.mark.parametrize("stage", [2, 3])
def test_in_bfloat16_the_base_is_rounded_once_and_stays(two, stage):
    first, second = two[f"zero{stage}_bf16"]
    _check_equal(first["frozen"], {name: base.bfloat16() for name, base in first["before"].items()})
    _check_equal(first["trained"], second["trained"])
    assert {values.dtype for values in first["trained"].values()} == {torch.bfloat16}
    assert _steps(first["codes"]) == {5}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_engine_ends_bit_equal_to_an_uninterrupted_one(two, stage):
    for run in two[f"zero{stage}_resumed"]:
        for kind in ("trained", "frozen", "codes"):
            _check_equal(run["resumed"][kind], run["uninterrupted"][kind])
        assert _steps(run["resumed"]["codes"]) == {5}


@pytest.mark.parametrize("way", ["trained_only", "all", "gathered"])
def test_what_was_gathered_is_saved_whole_and_loads_in_one_process(two, folder, way):
    loaded = PeftModel.from_pretrained(base_model(), folder / way, is_trainable=True)
    _check_equal(state_of(loaded)["trained"], two["zero3_saved"][0]["trained"])
    assert get_child_network(loaded).digest() == two["zero3_saved"][0]["digest"]


def test_parameters_too_small_to_be_divided_can_be_saved_directly(two, folder):
    loaded = PeftModel.from_pretrained(base_model(), folder / "small", is_trainable=True)
    _check_equal(state_of(loaded)["trained"], two["zero3_small_parameters"][0]["trained"])


def test_saving_divided_weights_directly_says_what_to_call_and_writes_nothing(two, folder):
    first, second = two["zero3_saved"]
    assert first["direct"].startswith("UnsupportedError: ")
    assert "accelerator.get_state_dict" in first["direct"]
    assert second["direct"] != "nothing was raised"
    assert not (folder / "direct" / "adapter_model.safetensors").exists()


def test_saving_before_any_forward_says_that_the_base_is_unknown(two):
    assert two["zero3_saved"][0]["early"].startswith("UnsupportedError: bert.encoder.layer.")
    assert "no forward has seen it whole" in two["zero3_saved"][0]["early"]


@pytest.mark.parametrize("act", ["deltas", "merge"])
def test_what_needs_whole_weights_is_refused_while_they_are_divided(two, act):
    for run in two["zero3_saved"]:
        assert run[act].startswith("UnsupportedError: ")
        assert "ZeRO-3" in run[act]


@pytest.mark.parametrize("model", ["engine0", "engine2", "engine3", "model2", "model3"])
def test_selecting_in_an_engine_is_refused(two, model):
    for run in two["selected_late"]:
        assert run[model].startswith("SelectionError: the model is in a DeepSpeed engine already")


@pytest.mark.parametrize("kind", ["d", "f_fixed"])
def test_a_given_or_random_child_trains_on_a_base_that_was_divided_while_it_loaded(two, one, folder, kind):
    first, second = two["zero_init"]
    _check_close(first[kind]["trained"], one[kind]["trained"])
    _check_equal(first[kind]["codes"], one[kind]["codes"])
    _check_equal(first[kind]["trained"], second[kind]["trained"])
    loaded = PeftModel.from_pretrained(base_model(), folder / f"init_{kind}", is_trainable=True)
    _check_equal(state_of(loaded)["trained"], first[kind]["trained"])


@pytest.mark.parametrize(
    ("act", "error"),
    [("magnitude", "TargetError"), ("fisher", "UnsupportedError"), ("load", "UnsupportedError")],
)
def test_what_needs_the_weights_is_refused_on_a_base_that_was_divided_while_it_loaded(two, act, error):
    for run in two["zero_init"]:
        assert run[act].startswith(f"{error}: ")


def test_different_children_are_refused_before_they_are_trained_as_one(two):
    for run in two["other_children"]:
        assert all(found.startswith("SelectionError: ") and "`seed` above all" in found for found in run)


def test_an_accelerate_loop_trains_and_saves_the_same(one, tmp_path):
    first, second = _run(["by_accelerate"], tmp_path)["by_accelerate"]
    assert first["engine"] == "DeepSpeedEngine"
    _check_close(first["trained"], one["f_resampled"]["trained"])
    _check_equal(first["trained"], second["trained"])
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "accelerate", is_trainable=True)
    _check_equal(state_of(loaded)["trained"], first["trained"])


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_saves_the_whole_adapter_also_in_its_checkpoints(tmp_path, stage):
    first, second = _run([f"trainer_zero{stage}"], tmp_path)[f"trainer_zero{stage}"]
    assert first["engine"] == "DeepSpeedEngine"
    _check_equal(first["trained"], second["trained"])
    assert _steps(first["codes"]) == {3}
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / f"trainer{stage}", is_trainable=True)
    _check_equal(state_of(loaded)["trained"], first["trained"])
    checkpoint = PeftModel.from_pretrained(base_model(), tmp_path / f"trainer{stage}" / "checkpoint-2")
    assert _steps(state_of(checkpoint)["codes"]) == {2}
