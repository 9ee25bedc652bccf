"""Flips bits of a file, one at a time, and loads: `python -m tests.hostile.flips FOLDER FILE FIRST STOP STEP`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from tests.hostile.artifacts import Loading


def main(folder: Path, file: Path, bits: range) -> dict[str, list[int]]:
    """Return the bits by what became of them."""
    raw = file.read_bytes()
    loading = Loading(folder)
    found: dict[str, list[int]] = {}
    try:
        for bit in bits:
            damaged = bytearray(raw)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(bytes(damaged))
            found.setdefault(loading.outcome(), []).append(bit)
    finally:
        file.write_bytes(raw)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    outcomes = main(Path(sys.argv[1]), Path(sys.argv[1], sys.argv[2]), range(*map(int, sys.argv[3:6])))
    print(json.dumps(outcomes))
    print(Counter({name: len(bits) for name, bits in outcomes.items()}), file=sys.stderr)
