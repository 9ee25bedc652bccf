"""Starts the processes of one training run, and collects what each of them has found."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_HERE = Path(__file__).parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    program: Sequence[str], processes: int, *, environment: Mapping[str, str] | None = None, timeout: float = 240
) -> list[str]:
    """Run a Python program in so many processes that can talk to each other; return what each has printed."""
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
        **(environment or {}),
    }
    running = [
        subprocess.Popen(
            [sys.executable, *program],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, f"exit status {process.returncode}:\n{text}"
    return printed


def answer(cases: Mapping[str, Callable[[Path], Any]]) -> None:
    """Be one of the processes that `run_cases` starts, in a process group that is formed already."""
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    torch.use_deterministic_algorithms(True)
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    for name in names:
        torch.save((dist.get_world_size(), cases[name](folder)), folder / f"{name}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


def run_cases(
    names: Sequence[str], processes: int, folder: Path, *, program: str = "cases.py", **options: Any
) -> dict[str, list[Any]]:
    """Run functions of `program` in so many processes; return by name what each process got from it, in their order.

    That there were so many is asserted: the number comes from the process group that they formed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start([str(_HERE / program), str(folder), *names], processes, **options)
    found: dict[str, list[Any]] = {}
    for name in names:
        saved = [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(processes)]
        assert [world for world, _ in saved] == [processes] * processes
        found[name] = [result for _, result in saved]
    return found
