"""The benchmarks run, count and compare rightly, and write only where they are told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import file_size
import harness
import memory
import peers
import pytest
import report
import switch
import table
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


def machine(**changes: object) -> dict[str, object]:
    names = ("cpu", "threads", "gpu", "torch", "peft", "transformers", "commit", "package_modified", "date", "seed")
    return dict.fromkeys(names, "x") | {"gpu": None, "package_modified": False} | changes


# --- timing


def test_a_ratio_is_the_median_of_the_pairs_and_not_the_ratio_of_the_medians():
    seconds = {"ours": [1.0, 10.0, 3.0], "theirs": [2.0, 10.0, 1.0]}  # pairs .5, 1, 3; medians 3 / 2
    assert harness.ratio(seconds, "ours", to="theirs") == {"median": 1.0, "low": 0.75, "high": 2.0, "pairs": 3}


def test_each_repeat_runs_every_case_once_and_starts_with_another_one():
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in "abc"}
    harness.interleave(cases, repeats=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_every_case_has_the_seconds_of_every_repeat_but_not_of_the_warmup():
    seconds = harness.interleave({"a": lambda: None, "b": lambda: None}, repeats=4, warmup=2)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4}


# --- result files


def test_a_result_file_is_json_with_one_line_for_each_row(tmp_path):
    rows = [{"method": "ours", "seconds": 0.123456789}, {"method": "theirs", "seconds": None}]
    path = harness.save_result("step", rows, environment={"seed": 3}, folder=tmp_path / "new")
    assert json.loads(path.read_text()) == {
        "environment": {"seed": 3},
        "rows": [{"method": "ours", "seconds": 0.12346}, {"method": "theirs", "seconds": None}],
    }
    assert '    {"method": "theirs", "seconds": null}\n' in path.read_text()


def test_the_environment_names_versions_seed_and_machine():
    record = harness.environment(7, device="cpu")
    assert record["seed"] == 7
    assert record["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert None not in [record[name] for name in ("cpu", "cores", "python", "peft", "transformers", "date")]


# --- peers


@pytest.fixture
def base() -> peers.Base:
    return peers.Base(layers=1, vocab=50, quick=True)


@pytest.mark.parametrize("method", ["element", "rows", "columns", "block16", "shira", "supertuning"])
def test_every_sparse_method_trains_about_the_density_asked_for(base, method):
    model = peers.wrap(method, base.build(), density=0.1, head=False)
    covered = 4 * 64 * 64 + 2 * 64 * 128
    assert sum(p.numel() for p in peers.trainable(model)) == pytest.approx(0.1 * covered, rel=0.1)


@pytest.mark.parametrize(("architecture", "linear_layers"), [("bert", 6), ("gpt2", 4), ("llama", 7)])
def test_lora_takes_every_linear_layer_of_the_blocks(architecture, linear_layers):
    base = peers.Base(architecture, layers=1, vocab=50, quick=True)
    model = peers.wrap("lora_r8", base.build(), head=False)
    shapes = [m.get_base_layer().weight.shape for m in model.modules() if hasattr(m, "lora_A")]
    assert len(shapes) == linear_layers
    assert sum(p.numel() for p in peers.trainable(model)) == 8 * sum(map(sum, shapes))


def test_equal_bases_have_equal_weights(base):
    first, second = base.build().state_dict(), base.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_authors_optimizer_keeps_the_gradient_from_what_is_masked():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = peers.MaskedAdamW([weight], masks={weight: torch.tensor([True, False, True])})
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight != 0).tolist() == [True, False, True]


def test_the_authors_masks_keep_the_largest_squares_of_all_encoder_gradients(base):
    model, batch = base.build().eval(), base.batch(4, 8)
    masks = peers.authors_masks(model, [batch], 0.1)
    model(**batch).loss.backward()
    squares = torch.cat([(p.grad**2).flatten() if p.grad is not None else torch.zeros(p.numel()) for p in masks])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert len(masks) == 16  # weight and bias of six linear layers and two norms
    assert kept.float().mean() == pytest.approx(0.1, abs=1e-3)
    assert squares[kept].min() >= squares[~kept].max()


def test_every_changed_base_weight_is_counted_under_its_wrapped_name(base):
    switched = switch.Switched("element", base, density=0.1)
    switched.switch()
    assert switched.differing() == 0
    with torch.no_grad():
        switched.model.get_parameter("base_model.model.bert.encoder.layer.0.output.dense.base_layer.weight").view(-1)[
            :5
        ].add_(1)
    assert switch.differing(switched.model, switched.original) == 5


def test_the_file_size_limit_of_a_half_is_two_bits_a_weight_and_the_value():
    assert file_size.limit(0.5, 4) == 4.25


# --- report


def test_a_peer_with_a_smaller_number_is_marked_as_ahead():
    line = table.Line("step", 0.95, {"full": 1.0, "lora_r8": 0.83, "shira": 0.951})
    text = line.markdown(["full", "authors", "lora_r8", "shira"])
    assert text == "| step | 0.95 | 1.00 | – | **0.83 ahead** | 0.95 |"


def test_the_tables_say_in_how_many_lines_a_peer_is_ahead():
    rows = [
        {"method": "element", "density": 0.1, "peak_mib": 900.0},
        {"method": "element", "density": 0.01, "peak_mib": 700.0},
        {"method": "lora_r8", "density": None, "peak_mib": 800.4},
        {"method": "shira", "density": 0.01, "peak_mib": 750.0},
    ]
    text = table.tables({"memory": {"environment": machine(commit="0123456789"), "rows": rows}})
    assert "In 1 of 2 lines a peer is **ahead** of ours." in text
    assert "| Peak memory of a whole run, MiB | ours | LoRA r8 | SHiRA |\n| --- | ---: | ---: | ---: |" in text
    assert "| 10 % of the weights, at random | 900 | **800 ahead** | – |\n" in text
    assert "| 1 % of the weights, at random | 700 | 800 | 750 |" in text
    assert "commit 0123456;" in text


def test_results_of_several_commits_are_all_named():
    text = table.machine([machine(commit="aaaaaaaaaa"), machine(commit="bbbbbbbbbb", package_modified=True)])
    assert "commit aaaaaaa, bbbbbbb+;" in text


def test_two_rows_where_one_was_expected_are_refused():
    with pytest.raises(ValueError, match="2 rows have"):
        table.find([{"method": "full"}, {"method": "full"}], method="full")


def test_results_that_are_not_there_do_not_empty_the_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->")
    with pytest.raises(SystemExit, match="no result files"):
        report.main(["--plots-only", "--results", str(tmp_path), "--readme", str(readme)])
    assert "old" in readme.read_text()


# --- the scripts

SAVED = {
    "codec": ["codec_speed", "index_size"],
    "file_size": ["file_size"],
    "inference": ["inference"],
    "memory": ["memory"],
    "selection": ["selection", "fisher"],
    "step": ["step"],
    "switch": ["switch"],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def script(name: str, *flags: object) -> str:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *flags]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside these
    done = subprocess.run(list(map(str, command)), env=one_thread, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", SAVED)
def test_a_quick_run_saves_where_it_is_told(name, results):
    script(name, "--quick", "--save", "--results", results)
    for saved in SAVED[name]:
        content = json.loads((results / f"{saved}.json").read_text())
        assert content["rows"] and content["environment"]["seed"] == 0


def test_plots_and_table_are_made_from_the_saved_results(results, tmp_path):
    for name, saved in SAVED.items():
        if not (results / f"{saved[0]}.json").exists():  # this test was run alone
            script(name, "--quick", "--save", "--results", results)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\nend\n")
    report.main(["--plots-only", "--results", str(results), "--readme", str(readme)])
    plots = {path.stem: path.read_bytes() for path in results.glob("*.png")}
    assert set(plots) == {"step", "memory", "inference", "file_size"}
    assert all(content.startswith(b"\x89PNG") and len(content) < 100_000 for content in plots.values())
    for name in table.TABLES.keys() & {saved for names in SAVED.values() for saved in names}:
        for title, lines in table.TABLES[name](report.load(results)[name]["rows"]).items():
            assert not lines or table.table(title, lines) in readme.read_text()


def test_a_quick_report_runs_the_scripts_and_writes_nothing():
    before = {path: path.stat().st_mtime_ns for path in BENCHMARKS.rglob("results/*")}
    printed = script("report", "--quick", "--only", "switch")
    assert "--- switch:" in printed and "base_entries_changed" in printed
    assert {path: path.stat().st_mtime_ns for path in BENCHMARKS.rglob("results/*")} == before


def test_a_failed_memory_run_shows_why():
    with pytest.raises(RuntimeError, match="nonesuch: the run failed(?s:.*)no method is called 'nonesuch'"):
        memory.main(["--quick", "--methods", "nonesuch"])
