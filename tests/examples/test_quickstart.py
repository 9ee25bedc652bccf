"""The main job end to end on a tiny encoder, and the pieces whose answer is known beforehand."""

from __future__ import annotations

import re

import pytest
import quickstart
import torch

from peft_childtune import ChildNetwork


@pytest.fixture
def job(encoder, table_file, tmp_path):
    arguments = ["--model", str(encoder), "--dataset", str(table_file), "--train-rows", "48", "--test-rows", "24"]
    return quickstart.make_job(quickstart.parser().parse_args([*arguments, "--epochs", "1"]), tmp_path)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit, match="0"):
        quickstart.main(["--help"])
    assert "--dataset" in capsys.readouterr().out


def test_the_table_is_aligned_markdown():
    results = [
        quickstart.Result("probe", accuracy=0.75, trained=385, file_bytes=4700, seconds=3.4),
        quickstart.Result("full fine-tuning", accuracy=0.8126, trained=22713986, file_bytes=90856728, seconds=41.6),
    ]
    assert quickstart.table(results).splitlines() == [
        "| method           | accuracy | trained weights | file, bytes | seconds |",
        "| ---------------- | -------: | --------------: | ----------: | ------: |",
        "| probe            |    0.750 |             385 |       4,700 |       3 |",
        "| full fine-tuning |    0.813 |      22,713,986 |  90,856,728 |      42 |",
    ]


def test_every_method_starts_from_the_same_head(job):
    first, second = job.base().state_dict(), job.base().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("nnz", "rank"), [(1, 1), (160, 1), (161 * 3, 3), (160 * 5 + 70, 5)])
def test_lora_trains_about_as_many_weights_as_the_child(job, nnz, rank):
    # one matrix of 32 x 64 and one of 64: LoRA of rank r on the matrix trains 96 r weights
    name = "bert.encoder.layer.0.intermediate.dense"
    shapes = {f"{name}.weight": (64, 32), f"{name}.bias": (64,)}
    indices = {f"{name}.weight": torch.arange(nnz * 96 // 160), f"{name}.bias": torch.arange(0)}
    model = quickstart.lora_like(ChildNetwork.from_indices(indices, shapes))(job.base())
    assert model.peft_config["default"].r == rank


def test_accuracy_counts_the_rows_in_the_order_of_the_predictions(job):
    labels = torch.tensor([record["labels"] for record in quickstart.by_length(job.test)])
    logits = torch.nn.functional.one_hot(labels, 2).float()
    logits[:6] = logits[:6].flip(1)  # six of 24 wrong
    assert quickstart.accuracy(logits, job) == 0.75


def test_features_do_not_depend_on_padding(job):
    encoder = quickstart.AutoModel.from_pretrained(job.model).eval()
    together, _ = quickstart.pooled_features(encoder, job.loader(job.test, batch_size=24))
    alone, _ = quickstart.pooled_features(encoder, job.loader(job.test, batch_size=1))
    # rounding only: a batch multiplies matrices of other sizes
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-5)


def test_the_main_job_prints_eight_methods_and_reloads_identical_predictions(encoder, table_file, capsys):
    arguments = ["--model", str(encoder), "--dataset", str(table_file), "--train-rows", "48", "--test-rows", "24"]
    quickstart.main([*arguments, "--epochs", "1"])
    out = capsys.readouterr().out
    assert re.findall(r"^\| (.+?) +\| [01]\.\d{3}", out.replace("    ", " "), re.M) == [
        "linear probe",
        "child by movement 2 %",
        "Child-Tuning-D 30 %",
        "Child-Tuning-D 2 %",
        "Child-Tuning-F 30 %",
        "fixed random child 2 %",
        "LoRA",
        "full fine-tuning",
    ]
    assert "all 24 predictions are identical" in out
