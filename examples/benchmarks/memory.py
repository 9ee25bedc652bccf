"""Peak memory of a whole run: build the model, choose the child, train three steps at 2048 tokens.

    python examples/benchmarks/memory.py

Each method runs in a process of its own, with an allocator that gives freed pages back, and reports the peak of its
resident memory: of the whole process, imported libraries included, and of each phase where the kernel lets a process
reset that peak. On a GPU it is `torch.cuda.max_memory_allocated`. Ours chooses by per-example Fisher information, the
authors' by theirs, over two batches; SHiRA and Super-Tuning choose while the model is built.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Value, finish, parse, parser
from peers import GRANULARITY, authors_masks, base_arguments, base_of, trainee, wrap

from peft_childtune import select_child_network

METHODS = (
    "full",
    "authors:0.1",
    "lora_r8",
    "shira:0.1",
    "supertuning:0.1",
    "element:0.1",
    "rows:0.1",
    "columns:0.1",
    "shira:0.01",
    "supertuning:0.01",
    "element:0.01",
)
# glibc keeps freed blocks for later: with this, what a process holds is what it uses
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
MIB = 1 << 20


def status(field: str) -> float:
    """Return a field of this process's memory status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def reset_peak() -> bool:
    """Make the kernel forget the peak so far; False where it does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def work(options: argparse.Namespace) -> dict[str, float | None]:
    """Run one method in this process; return MiB at the peak of each phase, and before the first."""
    name, _, density = options.worker.partition(":")
    base = base_of(options)
    batches = [base.batch(*shape_of(options)) for _ in range(2)]
    cuda = options.device == "cuda"
    result: dict[str, float | None] = {"imports_mib": 0.0 if cuda else status("VmRSS")}
    kept: dict[str, object] = {}

    def build() -> None:
        chosen = {"density": float(density)} if density else {}
        kept["model"] = wrap(name, base.build(), **chosen, score="fisher")

    def select() -> None:
        if name == "authors":
            kept["masks"] = authors_masks(kept["model"], batches, float(density))
        elif name in GRANULARITY:
            select_child_network(kept["model"], batches, show_progress=False)

    def train() -> None:
        trained = trainee(name, kept["model"], masks=kept.get("masks"))
        for _ in range(3):
            trained.step(batches[0])
        result["trained"] = trained.trained

    def peak_of(phase: Callable[[], None]) -> float | None:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        known = cuda or reset_peak()
        phase()
        # without a reset this is the peak of the whole process so far: still right for the maximum
        peaks.append(torch.cuda.max_memory_allocated() / MIB if cuda else status("VmHWM"))
        return peaks[-1] if known else None

    peaks: list[float] = []
    for phase in (build, select, train):
        result[f"{phase.__name__}_mib"] = peak_of(phase)
        result[f"after_{phase.__name__}_mib"] = torch.cuda.memory_allocated() / MIB if cuda else status("VmRSS")
    result["peak_mib"] = max(peaks)
    return result


def shape_of(options: argparse.Namespace) -> tuple[int, int]:
    """Return rows and tokens of a batch."""
    if options.quick:
        return 2, 8
    return (4, 512) if base_of(options).architecture == "llama" else (16, 128)


def measure(method: str, options: argparse.Namespace) -> dict[str, float | None]:
    """Run `work` in a new process."""
    command = [sys.executable, __file__, "--worker", method, *(["--quick"] if options.quick else [])]
    for name in ("architecture", "layers", "vocab", "dtype", "threads", "device", "seed"):
        value = getattr(options, name)
        command += [] if value is None else [f"--{name}", str(value)]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method}: the run failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    arguments = parser(__doc__, repeats=1)  # runs differ by a thousandth
    arguments.add_argument("--methods", nargs="+", default=None, help="method or method:density")
    base_arguments(arguments, layers=6)
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    options = parse(arguments, argv)
    if options.worker:
        print(json.dumps(work(options)))
        return
    base, (count, tokens) = base_of(options), shape_of(options)
    rows: list[dict[str, Value]] = []
    for method in options.methods or (("element:0.1",) if options.quick else METHODS):
        print(f"{method} ...", flush=True)
        runs = [measure(method, options) for _ in range(1 if options.quick else options.repeats)]
        middle = {
            key: None if value is None else statistics.median(run[key] for run in runs)
            for key, value in runs[0].items()
        }
        name, _, density = method.partition(":")
        row: dict[str, Value] = {**base.record, "rows": count, "tokens": tokens}
        row |= {"method": name, "density": float(density) if density else None}
        peaks = [run["peak_mib"] for run in runs]
        row |= {"trained": int(middle.pop("trained")), "runs": len(runs), "spread": max(peaks) / min(peaks) - 1}
        rows.append(row | middle)
    for row in rows:
        for other in ("full", "authors", "lora_r8", "shira"):
            same = [r for r in rows if r["method"] == other and (other != "shira" or r["density"] == row["density"])]
            row[f"to_{other}"] = row["peak_mib"] / same[0]["peak_mib"] if same else None
    finish("memory", rows, options=options)


if __name__ == "__main__":
    main()
