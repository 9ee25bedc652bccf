"""The flags that the launched examples share: which precision is computed in, and which trackers are told what."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest
import text_classification
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerated import add_flags, make_accelerator


@pytest.fixture(autouse=True)
def one_accelerator_a_test() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """The steps and values that a tracker is told, its configuration first."""
    found: list[tuple[Any, dict[str, Any]]] = []

    class ListTracker(GeneralTracker):
        name = "list"
        requires_logging_directory = False
        tracker = found

        def __init__(self, project: str) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            found.append(("configuration", values))

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            found.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "list", ListTracker)
    return found


def parsed(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(line.split(), argparse.Namespace(output=None, epochs=3))


@pytest.mark.parametrize(
    ("line", "launched_with", "expected"),
    [
        ("", None, "no"),
        ("", "bf16", "bf16"),
        ("--mixed-precision no", "bf16", "no"),
        ("--mixed-precision bf16", "no", "bf16"),
    ],
)
def test_the_flag_decides_the_precision_and_then_accelerate_launch(line, launched_with, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched_with:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    assert make_accelerator(parsed(line), "project").mixed_precision == expected


def test_nothing_is_logged_unless_asked_for():
    assert make_accelerator(parsed(""), "project").trackers == []


def test_a_tracker_is_told_the_command_line(logged):
    make_accelerator(parsed("--log-with list"), "project")
    found = ("configuration", {"epochs": 3, "output": "None", "mixed_precision": "None", "log_with": "['list']"})
    assert logged == [found]


@pytest.mark.filterwarnings("ignore:.*no supported trackers are currently installed")
def test_a_tracker_that_is_not_installed_is_an_error(monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(SystemExit, match="--log-with wandb: not installed"):
        make_accelerator(parsed("--log-with wandb"), "project")


def test_losses_and_metrics_of_all_seeds_are_logged_at_steps_that_only_grow(logged, encoder, table_file, tmp_path):
    line = f"--model {encoder} --dataset {table_file} --test-rows 24 --epochs 1 --mode task_free --seeds 5 2"
    text_classification.main([*line.split(), "--batch-size", "24", "--log-with", "list", "--output", str(tmp_path)])
    # 72 rows in batches of 24 are three steps a seed, a tenth of which warms up; the metrics come with the last
    rates = [1e-4 / 0.3 * share for share in (1, 2 / 3, 1 / 3)]
    for seed, start in ((5, 0), (2, 3)):
        losses = [(step, values) for step, values in logged if f"seed {seed}/loss" in values]
        assert [step for step, _ in losses] == [start + 1, start + 2, start + 3]
        assert [values[f"seed {seed}/learning rate"] for _, values in losses] == pytest.approx(rates)
        assert [step for step, values in logged if f"seed {seed}/accuracy" in values] == [start + 3]


def test_processes_that_each_run_alone_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as `accelerate launch` sets it; without LOCAL_RANK nothing is connected
    with pytest.raises(SystemExit, match="ACCELERATE_USE_CPU=true"):
        make_accelerator(parsed(""), "project")
