"""Saves one of two adapters into a folder, over and over: `python -m tests.hostile.writing FOLDER SECONDS`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

from peft_childtune import ChildTuningConfig
from tests.hostile.artifacts import small

DENSITIES = (0.3, 0.6)


def adapter(number: int) -> nn.Module:
    """Return a model with one of the two adapters."""
    base = small()
    torch.manual_seed(number)
    config = ChildTuningConfig(
        target_modules=["layers.0.0"], score="magnitude", density=DENSITIES[number], init_weights=False
    )
    return get_peft_model(base, config)


if __name__ == "__main__":
    torch.set_num_threads(1)
    models = [adapter(0), adapter(1)]
    stop = time.monotonic() + float(sys.argv[2])
    saves = 0
    while time.monotonic() < stop:
        models[saves % 2].save_pretrained(Path(sys.argv[1]))
        saves += 1
    print(saves)
