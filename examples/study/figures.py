"""The study's plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw_differences(differences: Mapping[str, Any], path: Path, *, title: str) -> None:
    """Draw one line a method: its difference and the interval."""
    figure = Figure(figsize=(7, 0.28 * len(differences) + 1.2), layout="constrained")
    ax = figure.subplots()
    places = range(len(differences))
    means = [each.mean for each in differences.values()]
    errors = [
        [each.mean - each.low for each in differences.values()],
        [each.high - each.mean for each in differences.values()],
    ]
    ax.errorbar(means, places, xerr=errors, fmt="o", capsize=3)
    ax.axvline(0, color="0.5", linewidth=1)
    ax.set_yticks(places, list(differences))
    ax.invert_yaxis()
    ax.set_xlabel("points of accuracy, mean over tasks, 95 % interval")
    ax.set_title(title)
    figure.savefig(path, dpi=110)


def draw_rates(lines: Sequence[Mapping[str, Any]], path: Path, *, methods: Sequence[str]) -> None:
    """Draw accuracy over the learning rate, one curve for each of the methods that were run at more than one."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        found[line["method"]][line["learning_rate"]].append(100 * line["accuracy"])
    figure = Figure(figsize=(9, 5), layout="constrained")
    ax = figure.subplots()
    complete = {
        method: sorted((rate, sum(a) / len(a)) for rate, a in rates.items() if len(a) == max(map(len, rates.values())))
        for method, rates in found.items()
    }
    shown = [method for method in sorted(complete) if method in methods and len(complete[method]) > 1]
    for number, method in enumerate(shown):
        style = ("-", "--", ":")[number // 10 % 3]
        ax.plot(*zip(*complete[method], strict=True), marker="o", linestyle=style, label=method)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("accuracy, mean over the development tasks")
    ax.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)


def draw_forgetting(changes: Mapping[tuple[str, float], Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw one curve a method over its learning rates: what it learnt of the tales, what it forgot of others."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, _), seeds in sorted(changes.items()):
        means = [sum(each[name] for each in seeds) / len(seeds) for name in ("unrelated", "tales")]
        found[method].append((means[0], means[1]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for method, points in found.items():
        ax.plot(*zip(*points, strict=True), marker="o", label=method)
    ax.set_xlabel("change of loss on unrelated texts, nats a token: further left forgets less")
    ax.set_ylabel("on other tales: lower learns more")
    ax.legend()
    figure.savefig(path, dpi=110)
