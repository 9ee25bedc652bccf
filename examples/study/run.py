"""Run the study: every run of a phase that its result file does not hold yet.

    python examples/study/run.py development                      # about an hour and a half on two cores
    python examples/study/run.py development --methods random-2 fisher-row-2
    python examples/study/run.py confirmation                     # with the learning rates that development chose

Each run adds one line to `results/<phase>.jsonl` as it ends, so a run that is broken off goes on where it was. What is
run is said in `protocol.toml`; `summary.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the data and models that all examples share; workers inherit it

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from protocol import Protocol, read_protocol  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

import peft_childtune  # noqa: E402

RESULTS = HERE / "results"


@dataclass(frozen=True)
class Job:
    """One run."""

    phase: str
    method: str
    task: str
    learning_rate: float
    seed: int
    bf16: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what tells it from other runs."""
        return tuple(asdict(self).values())


def jobs_of(protocol: Protocol, phase: str, *, methods: Sequence[str], rates: dict[str, list[float]]) -> Iterator[Job]:
    """Yield the runs of a phase, seed by seed, so that a phase that is broken off is complete for the first seeds."""
    for seed in protocol.phases[phase].seeds:
        for task in protocol.phases[phase].tasks:
            for method in methods:
                for rate in rates[method]:
                    yield Job(phase, method, task, rate, seed, protocol.phases[phase].bf16)


def execute(job: Job) -> dict[str, Any]:
    """Do one run in a worker process; return its line."""
    from training import run

    protocol = read_protocol()
    outcome = run(
        protocol.methods[job.method], task=job.task, learning_rate=job.learning_rate, seed=job.seed, bf16=job.bf16
    )
    pairs = zip(outcome.predictions, outcome.labels, strict=True)
    return {
        **asdict(job),
        "accuracy": round(sum(a == b for a, b in pairs) / len(outcome.labels), 5),
        "trained": outcome.trained,
        "loss": None if outcome.loss is None else round(outcome.loss, 5),
        "seconds": round(outcome.seconds, 2),
        "predictions": digits(outcome.predictions),
        "labels": digits(outcome.labels),
    }


def digits(labels: Sequence[int]) -> str:
    """Return one character a label, so that a line stays short."""
    return "".join("0123456789abcdefghijklmnopqrstuvwxyz"[label] for label in labels)


def start_worker() -> None:
    """Have one thread in this process: two such processes do more than one with two threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a result file, none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def origin() -> dict[str, str]:
    """Return what a line says of the program that made it."""
    commit = subprocess.run(["git", "-C", HERE, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip(),
        "date": date.today().isoformat(),
        **{module.__name__: module.__version__ for module in (torch, peft, transformers, peft_childtune)},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    protocol = read_protocol()
    p.add_argument("phase", choices=sorted(protocol.phases))
    p.add_argument("--methods", nargs="+", choices=sorted(protocol.methods), help="default: all of the phase")
    p.add_argument("--seeds", nargs="+", type=int, help="of the phase's; default: all")
    p.add_argument("--tasks", nargs="+", help="of the phase's; default: all")
    p.add_argument("--workers", type=int, default=2, help="processes side by side (default 2)")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = p.parse_args(argv)
    path = options.results / f"{options.phase}.jsonl"
    rates = protocol.rates(options.phase, development=read_lines(options.results / "development.jsonl"))
    methods = options.methods or list(rates)
    if missing := [name for name in methods if name not in rates]:
        raise SystemExit(f"{', '.join(missing)}: no learning rate yet; run them in development first")
    done = {Job(**{key: line[key] for key in Job.__annotations__}).key for line in read_lines(path)}
    wanted = [
        job
        for job in jobs_of(protocol, options.phase, methods=methods, rates=rates)
        if job.key not in done
        and (not options.seeds or job.seed in options.seeds)
        and (not options.tasks or job.task in options.tasks)
    ]
    print(f"{len(done)} runs done, {len(wanted)} to do", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = origin()
    workers = ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=start_worker)
    with workers, path.open("a", encoding="utf-8") as file:
        waiting = [workers.submit(execute, job) for job in wanted]
        try:
            for future in tqdm(as_completed(waiting), total=len(waiting), unit="run", mininterval=10):
                file.write(json.dumps(future.result() | made_by) + "\n")
                file.flush()
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
