"""The training examples under `accelerate launch` with two real processes, on tiny models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import causal_lm
import peft
import pytest
import text_classification
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_childtune import get_child_network, get_deltas

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"


def launch(*command: str | Path) -> str:
    """Return what two processes print, on a port that is free."""
    options = "--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no --main_process_port 0"
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options.split(), "--num_processes", "2", *command],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- text_classification.py


@pytest.fixture(scope="module")
def classified(encoder, table_file, tmp_path_factory):
    """What two processes print, the folder they save in, and the folder of one process on the same global batch."""
    folder = tmp_path_factory.mktemp("classified")
    line = f"--model {encoder} --dataset {table_file} --test-rows 25 --epochs 1 --density 0.05 --score fisher".split()
    text_classification.main([*line, "--batch-size", "8", "--output", str(folder / "1")])
    printed = launch(EXAMPLES / "text_classification.py", *line, "--batch-size", "4", "--output", folder / "2")
    return printed, folder / "2" / "seed-0", folder / "1" / "seed-0"


def test_two_processes_classify_and_one_of_them_prints(classified):
    printed, _, _ = classified
    assert re.findall(r"(\d+) process", printed) == ["2"]
    assert printed.count("seed 0:") == 1


def test_the_adapter_of_two_processes_loads_and_holds_a_trained_child(classified):
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(classified[1])
    assert any(bool(delta.values.any()) for delta in get_deltas(model).values())


def test_two_processes_choose_the_child_of_one(classified):
    # of 71 rows each process scores every other batch, and accelerate repeats one row to make the shares even
    two, one = (
        get_child_network(peft.AutoPeftModelForSequenceClassification.from_pretrained(folder))
        for folder in classified[1:]
    )
    assert two.nnz == one.nnz
    # scores that agree to float32 rounding may change places at the threshold
    assert two.overlap(one) > 0.99


# --- causal_lm.py


@pytest.fixture(scope="module")
def modelled(language_model, tmp_path_factory):
    """What two processes print, the folder they save and log in, the model, and the held-out blocks: an odd number."""
    folder = tmp_path_factory.mktemp("modelled")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"the {word} is good and the plot is fine" for word in ("film", "cast") * 20))
    line = f"--model {language_model} --text {text} --block 8 --test-blocks 7 --batch-size 3 --steps 6 --density 0.1"
    logging = ["--log-with", "file", "--learning-rate", "0.01", "--output", folder / "out"]
    printed = launch(HERE / "file_tracker.py", folder, EXAMPLES / "causal_lm.py", *line.split(), *logging)
    held_out = causal_lm.read_texts(text)[32:]
    rows = causal_lm.blocks(held_out, AutoTokenizer.from_pretrained(language_model), 8)[:7]
    return printed, folder, language_model, rows


def found(pattern: str, printed: str) -> float:
    (number,) = re.findall(pattern, printed)
    return float(number)


def test_two_processes_model_a_text_and_one_of_them_prints(modelled):
    printed = modelled[0]
    assert re.findall(r"(\d+) process", printed) == ["2"]
    assert re.findall(r"step (\d)/6", printed) == ["1", "6"]


def test_the_perplexity_of_two_processes_counts_every_block_once(modelled):
    printed, _, language_model, rows = modelled
    assert len(rows) == 7  # three and three, one alone, and two of the first again
    base = AutoModelForCausalLM.from_pretrained(language_model)
    # three digits are printed
    assert found(r"base: ([\d.]+)", printed) == pytest.approx(causal_lm.perplexity(base, rows, 3), abs=6e-4)


def test_the_adapter_of_two_processes_has_the_perplexity_that_they_measured(modelled):
    printed, folder, language_model, rows = modelled
    base = AutoModelForCausalLM.from_pretrained(language_model)
    before = causal_lm.perplexity(base, rows, 3)
    after = causal_lm.perplexity(peft.PeftModel.from_pretrained(base, folder / "out"), rows, 3)
    assert after < before - 0.01
    assert found(r"steps: ([\d.]+)", printed) == pytest.approx(after, abs=6e-4)


def test_of_two_processes_only_the_first_logs(modelled):
    assert [path.name for path in modelled[1].glob("*.jsonl")] == ["causal_lm-0.jsonl"]


def test_the_loss_and_the_learning_rate_of_every_step_are_logged(modelled):
    records = [json.loads(line) for line in (modelled[1] / "causal_lm-0.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    # one step of warm-up, then down to zero: it moves once a step, however many processes there are
    assert [record["learning rate"] for record in steps] == pytest.approx([0.0, 0.01, 0.008, 0.006, 0.004, 0.002])
    assert f"loss {steps[-1]['loss']:.3f}" in modelled[0]
