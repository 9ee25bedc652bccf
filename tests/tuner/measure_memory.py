"""A program that chooses and trains a child of a few wide layers, and prints the bytes that each took at its peak.

    python tests/tuner/measure_memory.py '{"density": 0.01}' 3

It runs in a process of its own, with an allocator that gives freed pages back.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_childtune import ChildTuningConfig, select_child_network


class Wide(nn.Module):
    """Blocks of two linear layers, whose weights are far larger than what flows through them."""

    def __init__(self, blocks: int, width: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)) for _ in range(blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def wide(blocks: int) -> Wide:
    return Wide(blocks, width=1024, inner=4096)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def run(base: nn.Module, options: dict[str, Any], batch: Tensor, before: int) -> dict[str, int]:
    """Choose and train; return the peaks of both above what there was before the base was built."""
    reset = Path("/proc/self/clear_refs").write_text
    config = ChildTuningConfig(**options)
    reset("5")
    model = get_peft_model(base, config)
    if config.needs_data:
        select_child_network(model, [batch] * 3, loss_fn=loss, show_progress=False)
    peaks = {"selection": resident("VmHWM") - before}
    reset("5")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        loss(model.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**peaks, "training": resident("VmHWM") - before}


def main(options: dict[str, Any], blocks: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")  # peft 0.21
    run(Wide(1, 8, 8), options, torch.randn(2, 8), 0)  # whatever libraries load and keep at their first use
    before = resident("VmRSS")
    print(json.dumps(run(wide(blocks), options, torch.randn(1, 1024), before)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
