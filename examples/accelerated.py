"""What the examples that run under `accelerate launch` share: their flags, and the `Accelerator` these ask for."""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import Accelerator


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `make_accelerator` reads."""
    group = parser.add_argument_group("accelerate")
    group.add_argument(
        "--mixed-precision",
        choices=("no", "bf16", "fp16"),
        help="default: what `accelerate launch` says; without it bf16 on a GPU that can, else no",
    )
    group.add_argument(
        "--log-with", nargs="+", metavar="TRACKER", help="log to these: tensorboard, wandb, trackio, mlflow, ..., all"
    )


def make_accelerator(args: argparse.Namespace, project: str) -> Accelerator:
    """Return the accelerator of this process, its trackers started with the command line's values.

    Raises:
        SystemExit: the processes do not know of each other, or a tracker's package is not installed.
    """
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    if precision is None:
        bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        precision = "bf16" if bf16 else "no"
    accelerator = Accelerator(mixed_precision=precision, log_with=args.log_with, project_dir=args.output or ".")
    if accelerator.num_processes == 1 and os.environ.get("WORLD_SIZE", "1") != "1":
        raise SystemExit(
            f"{os.environ['WORLD_SIZE']} processes were started, but each runs alone: accelerate has found no device "
            "for them. To try it out on CPUs, set ACCELERATE_USE_CPU=true."
        )
    if args.log_with:
        found = {str(name) for name in accelerator.log_with}
        if missing := [name for name in args.log_with if name not in found | {"all"}]:
            raise SystemExit(f"--log-with {' '.join(missing)}: not installed; pip install it")
        plain = (bool, float, int, str)  # what trackers take
        config = {name: value if isinstance(value, plain) else str(value) for name, value in vars(args).items()}
        accelerator.init_trackers(project, config=config)
    return accelerator
