"""What the processes of one run do, by name: `python cases.py FOLDER NAME...` leaves what each found in FOLDER."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from training import child_model, state_of, train, wrapped

from peft_childtune import get_child_network

CASES: dict[str, Callable[[Path], Any]] = {}


def _trained(how: str | None, kind: str) -> Callable[[Path], Any]:
    def case(folder: Path) -> dict[str, Any]:
        model = child_model(kind)
        before = state_of(model)["frozen"]
        digest = get_child_network(model).digest()
        model = wrapped(model, how)
        train(model)
        return {"digest": digest, "before": before, **state_of(model)}

    return case


for _how in (None, "ddp", "fsdp2"):
    for _kind in ("d", "f_fixed", "f_resampled"):
        CASES[f"{_how or 'one'}_{_kind}"] = _trained(_how, _kind)


def main(folder: Path, names: list[str]) -> None:
    """Form a process group, run the cases, and save what this process found."""
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    for name in names:
        torch.save((dist.get_world_size(), CASES[name](folder)), folder / f"{name}-{dist.get_rank()}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
