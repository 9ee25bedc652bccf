"""What every benchmark shares: the record of the machine, interleaved timing, paired ratios, result files, tables.

A machine that is slow for a while is slow for every case, so cases are timed in turns and compared pair by pair: the
ratio of two cases is the median over the repeats of one's seconds over the other's in the same repeat.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

import peft_childtune
from peft_childtune.kernels import load_extension

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
RESULTS = Path(__file__).resolve().parent / "results"

Value = str | int | float | bool | None


def parser(description: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=None, help=f"timed rounds (default {repeats}, with --quick 2)")
    result.add_argument(
        "--quick", action="store_true", help="tiny shapes: shows that the script runs, measures nothing"
    )
    result.add_argument("--save", action="store_true", help="write the result file even with --quick")
    result.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the result file goes")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    result.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default cpu")
    result.add_argument("--seed", type=int, default=0, help="of weights, inputs and children (default 0)")
    result.set_defaults(full_repeats=repeats)
    return result


def parse(
    arguments: argparse.ArgumentParser, argv: Sequence[str] | None = None, *, keeps_memory: bool = False
) -> argparse.Namespace:
    """Parse, fill in the number of repeats, set threads and seed.

    Args:
        arguments: the options.
        argv: the command line; None for the process's own.
        keeps_memory: let the process keep freed memory: for what runs over and over, as training steps do.
    """
    options = arguments.parse_args(argv)
    if keeps_memory:
        keep_freed_memory()
    if options.repeats is None:
        options.repeats = 2 if options.quick else options.full_repeats
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


def keep_freed_memory() -> None:
    """Keep glibc from handing freed memory back to the system, where this is glibc.

    Otherwise some methods, LoRA above all, fetch hundreds of megabytes anew at every step in some runs and take up to
    half as long again (on a virtual machine a fresh page costs microseconds): a ratio to them is then luck.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def environment(seed: int, *, device: str) -> dict[str, Value]:
    """Return what a reader needs to repeat a measurement: machine, versions, seed, commit, date."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers", "numpy")}
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "cpu": _cpu_model(),
        "cores": len(_cores()),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
        "peft_childtune": peft_childtune.__version__,
        "extension": load_extension() is not None,
        "commit": _git("rev-parse", "HEAD"),
        "package_modified": bool(_git("status", "--porcelain", "--", "peft_childtune")),
        "seed": seed,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def interleave(
    cases: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the seconds of every case in every repeat.

    Each repeat runs each case once, and each starts with another case than the one before it. On a GPU the seconds are
    those between two synchronised CUDA events.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names * warmup:
        cases[name]()
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    was_enabled = gc.isenabled()
    gc.disable()  # a collection in the middle of one case would be counted as that case's time
    try:
        for repeat in range(repeats):
            gc.collect()
            start = repeat % len(names)
            for name in names[start:] + names[:start]:
                seconds[name].append(clock(cases[name]))
    finally:
        if was_enabled:
            gc.enable()
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], case: str, *, to: str) -> dict[str, float]:
    """Return the median and the quartiles of the paired ratios of two cases.

    Example:
        >>> ratio({"ours": [1.0, 2.0, 9.0], "theirs": [2.0, 4.0, 6.0]}, "ours", to="theirs")
        {'median': 0.5, 'low': 0.5, 'high': 1.0, 'pairs': 3}
    """
    pairs = [ours / theirs for ours, theirs in zip(seconds[case], seconds[to], strict=True)]
    low, median, high = (float(value) for value in np.quantile(pairs, (0.25, 0.5, 0.75)))
    return {"median": median, "low": low, "high": high, "pairs": len(pairs)}


def save_result(
    name: str, rows: Sequence[Mapping[str, Value]], *, environment: Mapping[str, Value], folder: Path = RESULTS
) -> Path:
    """Write `folder/name.json`: one line per row, floats to five digits, so that two runs compare line by line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps({key: _short(value) for key, value in row.items()}) for row in rows)
    header = json.dumps(dict(environment), indent=4).replace("\n}", "\n  }")
    path = folder / f"{name}.json"
    path.write_text(f'{{\n  "environment": {header},\n  "rows": [\n{lines}\n  ]\n}}\n')
    return path


def finish(name: str, rows: Sequence[Mapping[str, Value]], *, options: argparse.Namespace) -> None:
    """Print the rows as a table; save them unless the run was a quick one without `--save`.

    Results of another device than the CPU go to a file of their own, `name_cuda.json`.
    """
    print_table(rows)
    if options.save or not options.quick:
        name = name if options.device == "cpu" else f"{name}_{options.device}"
        record = environment(options.seed, device=options.device)
        print(f"saved {save_result(name, rows, environment=record, folder=options.results)}")


def print_table(rows: Sequence[Mapping[str, Value]]) -> None:
    """Print rows under the names of their columns, numbers to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    left = [any(isinstance(row.get(column), str) for row in rows) for column in columns]
    for line in (columns, *cells):
        padded = [c.ljust(w) if text else c.rjust(w) for c, w, text in zip(line, widths, left, strict=True)]
        print("  ".join(padded).rstrip())


def _cell(value: Value) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _short(value: Value) -> Value:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _cpu_seconds(case: Callable[[], object]) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def _cuda_seconds(case: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    case()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> list[int]:
    return list(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _git(*command: str) -> str | None:
    """Return what git prints here, None outside a clone."""
    line = ["git", "--no-optional-locks", *command]
    try:
        root = Path(__file__).resolve().parents[2]
        return subprocess.run(line, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
