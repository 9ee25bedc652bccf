"""Make the study's tables and plots from its result lines; put the tables into this page, one into the main README.

python examples/study/summary.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import numpy as np  # noqa: E402
from figures import draw_differences, draw_rates  # noqa: E402
from marked import insert  # noqa: E402
from protocol import best_rates, read_protocol  # noqa: E402
from run import RESULTS, read_lines  # noqa: E402

RESAMPLES = 2000
FEWEST_SEEDS = 3  # for an interval; below five it is somewhat too narrow
FAILED = 0.02  # a run fails if it is not this much better than always saying the most frequent label
CHOICES = {  # what the main README compares
    "movement-full-fitted-2": '`fit_head`, then `score="movement"`, the default',
    "movement-full-2": "the default without `fit_head`",
    "random-2": '`score="random"`',
    "random-fitted-2": '`fit_head`, then `score="random"`',
    "fisher-global-2": '`score="fisher"`, the paper\'s',
    "full": "full fine-tuning",
    "full-fitted": "`fit_head`, then all weights of the blocks",
    "lora": "LoRA r8",
    "shira-2": "SHiRA",
    "supertuning-2": "Super-Tuning",
}
Line = dict[str, Any]
Runs = dict[tuple[str, int], Line]  # by task and seed


@dataclass(frozen=True)
class Difference:
    """Accuracy of one method minus that of another, in points, with a 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int  # of the task that has fewest

    def __str__(self) -> str:
        """Return it as a table shows it; without the interval where one or two seeds tell nothing of their spread."""
        return f"{self.mean:+.1f}" + (f" [{self.low:+.1f}, {self.high:+.1f}]" if self.seeds >= FEWEST_SEEDS else "")


def chosen(lines: Sequence[Line], rates: Mapping[str, float]) -> dict[str, Runs]:
    """Return the runs of each method at its chosen learning rate."""
    found: dict[str, Runs] = {}
    for line in lines:
        if rates.get(line["method"]) == line["learning_rate"]:
            found.setdefault(line["method"], {})[line["task"], line["seed"]] = line
    return found


def correct(line: Line) -> np.ndarray:
    """Return which test rows a run got right, bool `(rows,)`."""
    return np.array(list(line["predictions"])) == np.array(list(line["labels"]))


def difference(a: Runs, b: Runs, *, resamples: int = RESAMPLES) -> Difference | None:
    """Return how much better `a` is than `b`, on the tasks and seeds that both have.

    The interval is of the mean over these tasks: seeds (training rows, head, order) and test rows are drawn again with
    replacement, both at once, the same ones for `a` and `b`.
    """
    shared = sorted(set(a) & set(b))
    if not shared:
        return None
    rng = np.random.default_rng(0)
    points, drawn, counts = [], [], []
    for task in sorted({task for task, _ in shared}):
        seeds = [seed for name, seed in shared if name == task]
        if any(a[task, s]["labels"] != b[task, s]["labels"] for s in seeds):
            raise ValueError(f"{task}: the two methods were tested on different rows; run one of them anew.")
        pairs = [correct(a[task, s]).astype(np.int8) - correct(b[task, s]).astype(np.int8) for s in seeds]
        gain = np.stack(pairs) * 100.0
        points.append(gain.mean())
        count, rows = gain.shape
        counts.append(count)
        resampled = [
            gain[rng.integers(count, size=count)][:, rng.integers(rows, size=rows)].mean() for _ in range(resamples)
        ]
        drawn.append(np.array(resampled))
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Difference(float(np.mean(points)), float(low), float(high), min(counts))


def failures(runs: Runs) -> int:
    """Return how many runs are hardly better than always saying the most frequent label."""

    def most_frequent(line: Line) -> float:
        return max(line["labels"].count(label) for label in set(line["labels"])) / len(line["labels"])

    return sum(line["accuracy"] < most_frequent(line) + FAILED for line in runs.values())


def table(methods: Mapping[str, Runs], *, tasks: Sequence[str], order: Sequence[str]) -> str:
    """Return the Markdown table of a phase: a row a method, differences to a random child and to full fine-tuning."""
    head = ["method", "rate", "seeds", *tasks, "mean", "sd", "failed", "against random-2", "against full"]
    rows = []
    for name in (name for name in order if name in methods):
        runs = methods[name]
        by_task = {t: [line["accuracy"] * 100 for (task, _), line in runs.items() if task == t] for t in tasks}
        if missing := [task for task in tasks if not by_task[task]]:
            print(f"{name}: left out of the table, not run on {', '.join(missing)}")
            continue
        spread = np.mean([np.std(found, ddof=1) for found in by_task.values() if len(found) > 1] or [np.nan])
        against = [
            "" if other == name or other not in methods else str(difference(runs, methods[other]))
            for other in ("random-2", "full")
        ]
        rows.append(
            [
                f"`{name}`",
                f"{next(iter(runs.values()))['learning_rate']:g}",
                str(min(map(len, by_task.values()))),
                *(f"{np.mean(by_task[task]):.1f}" for task in tasks),
                f"{np.mean([np.mean(found) for found in by_task.values()]):.1f}",
                "" if np.isnan(spread) else f"{spread:.1f}",
                str(failures(runs)),
                *against,
            ]
        )
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def choices_table(methods: Mapping[str, Runs], *, tasks: Sequence[str]) -> str:
    """Return the Markdown table of what users choose between, as far as it was run on all tasks."""
    rows = [["2 % chosen by, or instead", "seeds", "accuracy", "against random", "against full"]]
    rows.append(["---", "---:", "---:", "---:", "---:"])
    for name, label in CHOICES.items():
        runs = methods.get(name, {})
        if {task for task, _ in runs} == set(tasks):
            means = [np.mean([line["accuracy"] for (t, _), line in runs.items() if t == task]) for task in tasks]
            others = ["" if name == other else str(difference(runs, methods[other])) for other in ("random-2", "full")]
            seeds = min(sum(t == task for t, _ in runs) for task in tasks)
            rows.append([label, str(seeds), f"{100 * np.mean(means):.1f}", *others])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def precision_table(fp32: Mapping[str, Runs], bf16: Mapping[str, Runs]) -> str:
    """Return the Markdown table of the runs that were made in both precisions."""
    rows = [["method", "task", "fp32", "bf16", "predictions that differ"], ["---", "---", "---:", "---:", "---:"]]
    for method, runs in fp32.items():
        for (task, seed), line in sorted(runs.items()):
            if (twin := bf16.get(method, {}).get((task, seed))) is not None:
                differ = sum(a != b for a, b in zip(line["predictions"], twin["predictions"], strict=True))
                share = f"{100 * differ / len(line['predictions']):.1f} %"
                figures = [f"{100 * each['accuracy']:.1f}" for each in (line, twin)]
                rows.append([f"`{method}`", task, *figures, share])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tables and plots."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    p.add_argument("--readme", type=Path, default=HERE / "README.md", metavar="FILE")
    options = p.parse_args(argv)
    protocol = read_protocol()
    lines = {phase: read_lines(options.results / f"{phase}.jsonl") for phase in protocol.phases}
    rates = best_rates(lines["development"])
    text = options.readme.read_text(encoding="utf-8")
    for phase in ("development", "screening", "confirmation", "transfer"):
        tasks = protocol.phases[phase].tasks
        if not lines[phase]:
            continue
        methods = chosen(lines[phase], rates)
        text = insert(text, table(methods, tasks=tasks, order=list(protocol.methods)), name=phase)
        differences = {
            name: difference(runs, methods["random-2"]) for name, runs in methods.items() if name != "random-2"
        }
        ordered = {name: differences[name] for name in protocol.methods if differences.get(name)}
        draw_differences(ordered, options.results / f"{phase}.png", title=f"{phase}: points against random-2")
        print(f"{phase}: {len(lines[phase])} runs, {sum(map(len, methods.values()))} at the chosen rates")
    if lines["precision"]:
        here, there = chosen(lines["precision"], rates), chosen(lines["development"], rates)
        text = insert(text, precision_table(here, there), name="fp32")
    tasks = protocol.phases["confirmation"].tasks
    if methods := chosen(lines["confirmation"], rates):
        main_page = HERE.parents[1] / "README.md"
        inserted = insert(main_page.read_text(encoding="utf-8"), choices_table(methods, tasks=tasks), name="choices")
        main_page.write_text(inserted, encoding="utf-8")
    draw_rates(lines["development"], options.results / "rates.png", methods=protocol.phases["confirmation"].methods)
    options.readme.write_text(text, encoding="utf-8")
    print(f"wrote the tables in {options.readme}")


if __name__ == "__main__":
    main()
