"""Reads `protocol.toml`: the methods, the phases, and the learning rates of each."""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training import Method

FILE = Path(__file__).resolve().with_name("protocol.toml")


@dataclass(frozen=True)
class Phase:
    """Tasks, seeds and methods, and whether they are computed in bf16."""

    tasks: list[str]
    seeds: list[int]
    methods: list[str]
    bf16: bool


@dataclass(frozen=True)
class Protocol:
    """What the study runs."""

    phases: Mapping[str, Phase]
    methods: Mapping[str, Method]
    grids: Mapping[str, list[float]]

    def rates(self, phase: str, *, development: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        """Return the learning rates of each method of a phase: the whole grid in development, else the best of it."""
        if phase == "development":
            return {name: self.grids[name] for name in self.phases[phase].methods}
        best = best_rates(development)
        return {name: [best[name]] for name in self.phases[phase].methods if name in best}


def best_rates(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the learning rate of the highest mean accuracy over tasks, by method; among equals the lowest.

    Only rates that have all the runs (task and seed) that any rate of the method has take part: tasks differ in
    difficulty, and a single seed may be lucky.
    """
    found: dict[str, dict[float, dict[tuple[str, int], float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        found[line["method"]][line["learning_rate"]][line["task"], line["seed"]] = line["accuracy"]

    def mean(runs: Mapping[tuple[str, int], float]) -> float:
        tasks = {task for task, _ in runs}
        by_task = [[accuracy for (name, _), accuracy in runs.items() if name == task] for task in sorted(tasks)]
        return sum(sum(each) / len(each) for each in by_task) / len(by_task)

    best = {}
    for method, rates in found.items():
        most = max(rates.values(), key=len)
        complete = sorted(rate for rate, runs in rates.items() if set(runs) == set(most))
        best[method] = max(complete, key=lambda rate: mean(rates[rate]))
    return best


def read_protocol(path: Path = FILE) -> Protocol:
    """Return what the file says."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    defaults = raw["defaults"]
    known = set(Method.__annotations__)
    methods, grids = {}, {}
    for name, entry in raw["methods"].items():
        entry = defaults | entry
        grids[name] = [float(rate) for rate in entry.pop("rates")]
        if unknown := set(entry) - known:
            raise ValueError(f"{path}: methods.{name}: {min(unknown)!r} is none of {', '.join(sorted(known))}.")
        methods[name] = Method(**entry)
    phases = {
        name: Phase(
            phase["tasks"], phase["seeds"], phase.get("methods", list(methods)), phase.get("bf16", raw["bf16"])
        )
        for name, phase in raw["phases"].items()
    }
    return Protocol(phases, methods, grids)
