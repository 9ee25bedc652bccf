"""The study: what it runs, how it chooses learning rates, and its differences and intervals."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from peft_childtune import ChildTuningConfig
from peft_childtune.scores import registry

HERE = Path(__file__).resolve().parents[2] / "examples" / "study"


def _load(name):
    spec = importlib.util.spec_from_file_location(f"study_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study():
    """Return the study's modules, which import each other by their bare names."""
    sys.path.insert(0, str(HERE))
    before = set(sys.modules)
    try:
        yield {name: _load(name) for name in ("protocol", "summary", "run", "forgetting")}
    finally:
        sys.path.remove(str(HERE))
        registry._registered.clear()
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(HERE)):
                del sys.modules[name]


def _line(method="a", task="t", seed=0, rate=1e-3, predictions="0101", labels="0101"):
    right = sum(p == q for p, q in zip(predictions, labels, strict=True))
    line = {"method": method, "task": task, "seed": seed, "learning_rate": rate, "bf16": True, "phase": "development"}
    return line | {"accuracy": right / len(labels), "predictions": predictions, "labels": labels}


def test_development_and_confirmation_share_no_task_and_are_large_enough(study):
    phases = study["protocol"].read_protocol().phases
    development, confirmation = phases["development"], phases["confirmation"]
    assert not set(development.tasks) & set(confirmation.tasks)
    assert not set(development.seeds) & set(confirmation.seeds)
    assert len(development.tasks) >= 4 and len(confirmation.tasks) >= 3 and len(confirmation.seeds) >= 5


def test_every_method_of_the_protocol_can_be_built(study):
    protocol = study["protocol"].read_protocol()

    for name, method in protocol.methods.items():
        assert protocol.grids[name], name
        if method.kind == "child":
            ChildTuningConfig(**method.options)


def test_a_misspelt_entry_of_the_protocol_is_refused(study, tmp_path):
    text = study["protocol"].FILE.read_text() + "\n[methods.wrong]\nfits_haed = true\n"
    (tmp_path / "protocol.toml").write_text(text)
    with pytest.raises(ValueError, match=r"methods\.wrong: 'fits_haed'"):
        study["protocol"].read_protocol(tmp_path / "protocol.toml")


def test_the_best_rate_is_that_of_the_highest_mean_over_tasks_not_over_runs(study):
    lines = [_line(task="easy", rate=1e-3, seed=s) for s in range(9)]
    lines += [_line(task="hard", rate=1e-3, predictions="1010")]
    lines += [_line(task="easy", rate=1e-2, predictions="0111", seed=s) for s in range(9)]
    lines += [_line(task="hard", rate=1e-2, predictions="0111")]
    assert study["protocol"].best_rates(lines) == {"a": 1e-2}


def test_a_rate_that_ran_on_some_of_the_tasks_only_is_not_compared(study):
    lines = [_line(task="easy", rate=1e-2), _line(task="easy", rate=1e-3), _line(task="hard", predictions="1010")]
    assert study["protocol"].best_rates(lines) == {"a": 1e-3}


def test_confirmation_runs_at_the_best_rate_and_waits_for_methods_without_one(study):
    protocol = study["protocol"].read_protocol()
    lines = [_line(method="full", rate=3e-5), _line(method="full", rate=1e-4, predictions="0000")]
    assert protocol.rates("confirmation", development=lines) == {"full": [3e-5]}


def test_runs_that_are_done_are_not_done_again(study, tmp_path, monkeypatch, capsys):
    run = study["run"]
    protocol = study["protocol"].read_protocol()
    jobs = list(run.jobs_of(protocol, "development", methods=["full"], rates=dict(protocol.grids)))
    lines = [{**{key: getattr(job, key) for key in type(job).__annotations__}, "accuracy": 1.0} for job in jobs]
    (tmp_path / "development.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.main(["development", "--methods", "full", "--results", str(tmp_path)])
    assert f"{len(jobs)} runs done, 0 to do" in capsys.readouterr().out


def test_a_difference_is_paired_by_task_and_seed_and_counts_points(study):
    a = {("t", 0): _line(predictions="0101"), ("t", 1): _line(predictions="0100"), ("u", 0): _line()}
    b = {("t", 0): _line(predictions="0001"), ("t", 1): _line(predictions="0001")}
    found = study["summary"].difference(a, b)
    assert found.mean == 12.5  # one row of four, and none
    assert found.low <= found.mean <= found.high
    assert study["summary"].difference(a, {}) is None


def test_equal_methods_differ_by_nothing_however_rows_and_seeds_are_drawn(study):
    runs = {("t", seed): _line(predictions="0011") for seed in range(3)}
    assert str(study["summary"].difference(runs, runs)) == "+0.0 [+0.0, +0.0]"


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says(study):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        methods: list[dict[tuple[str, int], object]] = [{}, {}]
        for task in "tuvw":
            for seed in range(5):
                for runs, chance in zip(methods, (0.80, 0.75), strict=True):
                    right = rng.random(200) < chance + 0.03 * rng.standard_normal()  # a good seed, or a bad one
                    said = "".join("10"[each] for each in right.astype(int))
                    runs[task, seed] = _line(predictions=said, labels="0" * 200)
        found = study["summary"].difference(*methods, resamples=200)
        covered += found.low <= 5.0 <= found.high
    assert covered >= 90  # of 100


def test_methods_that_were_tested_on_different_rows_are_not_compared(study):
    with pytest.raises(ValueError, match="t: .*different rows"):
        study["summary"].difference({("t", 0): _line()}, {("t", 0): _line(labels="1111")})


def test_one_or_two_seeds_give_no_interval(study):
    runs = [{("t", seed): _line(predictions=said) for seed in range(2)} for said in ("0101", "0100")]
    assert str(study["summary"].difference(*runs)) == "+25.0"


def test_a_run_that_says_the_most_frequent_label_has_failed(study):
    labels = "0" * 60 + "1" * 40
    runs = {("t", 0): _line(predictions="0" * 100, labels=labels), ("t", 1): _line(predictions=labels, labels=labels)}
    assert study["summary"].failures(runs) == 1


def test_runs_in_both_precisions_are_put_beside_each_other(study):
    fp32, bf16 = ({"full": {("t", 0): _line(predictions=said)}} for said in ("0101", "0111"))
    assert study["summary"].precision_table(fp32, bf16).splitlines()[-1] == "| `full` | t | 100.0 | 75.0 | 25.0 % |"


def test_users_are_shown_what_was_run_on_all_tasks(study):
    def runs(predictions, tasks="tu"):
        return {(task, seed): _line(task=task, predictions=predictions) for task in tasks for seed in range(3)}

    methods = {"full": runs("0101"), "random-2": runs("0100"), "lora": runs("0101", "t"), "other": runs("0101")}
    rows = study["summary"].choices_table(methods, tasks=["t", "u"]).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ['| `score="random"`', "| full fine-tuning"]
    assert rows[1].split(" | ")[1:3] == ["3", "100.0"] and rows[1].split(" | ")[3].startswith("+25.0 [")


def test_the_table_has_a_row_for_each_method_that_has_run_on_all_tasks(study):
    def runs(predictions):
        return {(task, seed): _line(task=task, predictions=predictions) for task in "tu" for seed in range(3)}

    methods = {"full": runs("0101"), "random-2": runs("0100"), "half": {("t", 0): _line()}}
    rows = study["summary"].table(methods, tasks=["t", "u"], order=["half", "full", "random-2"]).splitlines()[2:]
    assert len(rows) == 2
    assert rows[0].split(" | ")[0] == "| `full`" and "+25.0 [" in rows[0]
    assert rows[1].split(" | ")[-1] == "-25.0 [-62.5, +0.0] |" or rows[1].split(" | ")[-1].startswith("-25.0 [")


def _forgetting_lines():
    def line(method, rate, seed, tales, news, food):
        return {"method": method, "rate": rate, "seed": seed, "losses": {"tales": tales, "news": news, "food": food}}

    return [
        line("lora", 5e-4, 0, 2.0, 4.5, 6.0),
        line("base", 0.0, 0, 3.0, 4.0, 5.0),
        line("full", 3e-5, 0, 2.5, 4.25, 5.0),
        line("full", 3e-5, 1, 2.75, 4.75, 5.5),
    ]


def test_forgetting_is_counted_from_the_base_and_over_the_unrelated_texts(study):
    changes = study["forgetting"].changes(_forgetting_lines())
    assert list(changes) == [("full", 3e-5), ("lora", 5e-4)]
    assert changes["lora", 5e-4] == [{"tales": -1.0, "news": 0.5, "food": 1.0, "unrelated": 0.75}]


def test_forgetting_is_shown_with_its_spread_over_seeds(study, tmp_path):
    base, full, lora = study["forgetting"].table(_forgetting_lines()).splitlines()[2:]
    assert base == "| base: loss |  |  | 3.000 | 4.000 | 5.000 |  |"
    assert full.startswith("| `full` | 3e-05 | 2 | -0.375 ± 0.177 | +0.500 ± 0.354 |")
    assert lora == "| `lora` | 0.0005 | 1 | -1.000 | +0.500 | +1.000 | +0.750 |"
    study["forgetting"].draw_forgetting(study["forgetting"].changes(_forgetting_lines()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
