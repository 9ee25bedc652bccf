"""Saves that are killed: `python -m tests.trust.killed_saves FOLDER KILLS SEED`.

A forked process saves two adapters in turns into one folder until SIGKILL ends it at a random moment; then the folder
is loaded. Prints a JSON table: for each pair of adapters, how often the folder held the one, the other, or was
refused, and which files the last save has left.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_childtune import ChildTuningConfig, IntegrityError, get_deltas


def base() -> nn.Module:
    """Return two blocks of 16 k weights, the same ones every time."""
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(128, 128) for _ in range(2)])})


def adapter(*, seed: int, density: float) -> PeftModel:
    """Return the base with a random child and a delta that `seed` determines."""
    config = ChildTuningConfig(target_modules=["0", "1"], score="magnitude", density=density, init_weights=False)
    plain = base()
    torch.manual_seed(seed)
    return get_peft_model(plain, config)


# the same child with other values, and another child: two files that belong together, and two that do not
PAIRS = {
    "same child": lambda: (adapter(seed=1, density=0.3), adapter(seed=2, density=0.3)),
    "other child": lambda: (adapter(seed=1, density=0.3), adapter(seed=2, density=0.2)),
}


def saved(model: PeftModel) -> dict[str, tuple[bytes, bytes]]:
    """Return the bits of an adapter."""
    deltas = get_deltas(model).items()
    return {name: (d.indices.numpy().tobytes(), d.values.numpy().tobytes()) for name, d in deltas}


def save_until_killed(models: tuple[PeftModel, ...], folder: Path, started: int) -> None:
    """Save in turns for ever, and tell that the first save has begun."""
    os.write(started, b"!")
    while True:
        for model in models:
            model.save_pretrained(folder)


def kill_one(models: tuple[PeftModel, ...], folder: Path, delay: float) -> str:
    """Kill a process while it saves; return what is in the folder then."""
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        save_until_killed(models, folder, writing)
    select.select([reading], [], [])
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    os.close(reading), os.close(writing)
    try:
        found = saved(PeftModel.from_pretrained(base(), folder))
    except IntegrityError:
        return "refused"
    return next((f"number {i}" for i, model in enumerate(models) if saved(model) == found), "something else")


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    random.seed(seed)
    table = {}
    for pair, make in PAIRS.items():
        models = make()
        place = folder / pair
        models[0].save_pretrained(place)
        outcomes = Counter(kill_one(models, place, random.uniform(0, 0.08)) for _ in range(kills))
        models[1].save_pretrained(place)
        assert saved(PeftModel.from_pretrained(base(), place)) == saved(models[1])
        left = sorted(path.name for path in place.iterdir())
        table[pair] = {"outcomes": dict(outcomes), "files": left}
    print(json.dumps(table))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
