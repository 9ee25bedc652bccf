"""The classification example: every option has a flag, seeds are summed up right, the saved adapter loads."""

from __future__ import annotations

import dataclasses

import numpy as np
import peft
import pytest
import text_classification
from text_classification import CHILD_FLAGS, child_config, learning_rate, metrics, parser, table

from peft_childtune import ChildTuningConfig

# what PEFT or the library fills in, what the example sets itself, and what the library refuses
NOT_FLAGS = {field.name for field in dataclasses.fields(peft.PeftConfig)} | {
    "seed",
    "target_parameters",
    "selection",
    "child",
    "pickled",
}


def test_every_option_of_the_configuration_has_a_flag():
    assert {field.name for field in dataclasses.fields(ChildTuningConfig)} - NOT_FLAGS == set(CHILD_FLAGS)


def test_flags_reach_the_configuration():
    line = "--mode task_free --density 0.25 --resample --save-dtype bfloat16 --layers-to-transform 0 2 --block-size 8"
    config = child_config(parser().parse_args(line.split()), seed=7)
    found = (config.mode, config.density, config.resample, config.save_dtype, config.layers_to_transform)
    assert (*found, config.block_size, config.seed) == ("task_free", 0.25, True, "bfloat16", [0, 2], 8, 7)


def test_options_left_out_keep_the_defaults_of_the_library():
    assert child_config(parser().parse_args([]), seed=0) == ChildTuningConfig(task_type="SEQ_CLS")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("--density 0.5", 2e-4), ("--density 0.001", 1e-2), ("--method full", 1e-4), ("--learning-rate 0.5", 0.5)],
)
def test_fewer_weights_take_longer_steps_up_to_a_limit(line, expected):
    args = parser().parse_args([*line.split(), "--score", "random"])
    assert learning_rate(args, child_config(args, seed=0)) == pytest.approx(expected)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        text_classification.main(["--help"])
    assert "--granularity" in capsys.readouterr().out


def test_classes_are_measured_by_accuracy_f1_and_matthews_correlation():
    logits = np.eye(2)[[1, 1, 0, 0]]
    # of two positives and two negatives one each is right: accuracy and both F1 are 1/2, the correlation is 0
    assert metrics(logits, np.array([1, 0, 1, 0])) == {"accuracy": 0.5, "f1": 0.5, "matthews": 0.0}


def test_regressed_values_are_measured_by_correlation():
    assert metrics(np.array([[1.0], [2.0], [3.0]]), np.array([-2.0, -4.0, -6.0])) == {"pearson": pytest.approx(-1)}


def test_the_table_ends_in_mean_and_sample_standard_deviation():
    results = {0: {"accuracy": 0.5, "trained weights": 1200}, 1: {"accuracy": 0.7, "trained weights": 1200}}
    assert table(results).splitlines() == [
        "| seed | accuracy | trained weights |",
        "| --- | ---: | ---: |",
        "| 0 | 0.5000 | 1,200 |",
        "| 1 | 0.7000 | 1,200 |",
        "| mean | 0.6000 | 1,200 |",
        "| sd | 0.1414 | 0 |",
    ]


def test_two_seeds_are_trained_and_each_saved_adapter_loads(encoder, table_file, tmp_path, capsys):
    line = f"--model {encoder} --dataset {table_file} --test-rows 24 --epochs 1 --density 0.05 --seeds 0 1 --fit-head"
    text_classification.main([*line.split(), "--output", str(tmp_path)])
    assert "| sd |" in capsys.readouterr().out
    for seed in (0, 1):
        model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / f"seed-{seed}")
        assert model.peft_config["default"].density == 0.05


def test_a_child_learns_what_decides_the_label(encoder, table_file, tmp_path, capsys):
    line = f"--model {encoder} --dataset {table_file} --test-rows 24 --batch-size 4 --epochs 15 --learning-rate 0.003"
    text_classification.main([*line.split(), "--output", str(tmp_path)])
    accuracy = float(capsys.readouterr().out.split('"accuracy": ')[1].split(",")[0])
    assert accuracy >= 0.75  # guessing gets one half
