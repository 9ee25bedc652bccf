"""An adapter of three tensors and two heads, as the seal sees it."""

from __future__ import annotations

from functools import partial

import torch

from peft_childtune.seal import Sealed, make_seal
from peft_childtune.weights import fingerprint

BASES = {"a.weight": torch.linspace(-1, 1, 12).view(3, 4), "a.bias": torch.linspace(2, 3, 3), "b": torch.randn(5)}
INDICES = {"a.weight": [1, 7], "a.bias": [], "b": [0, 1, 4]}
CODES = {"a.weight": [9, 8, 7], "a.bias": [], "b": [1, 2]}
VALUES = {"a.weight": [0.5, -0.25], "a.bias": [], "b": [1.0, -0.0, 3.0]}
CONFIG = bytes(range(16))
HEADS = {"head.weight": torch.linspace(0, 1, 6).view(2, 3), "head.steps": torch.tensor(7)}


def children(bases=None, codes=None, values=None, dtype=torch.float32):
    bases, codes, values = (bases or BASES), CODES | (codes or {}), VALUES | (values or {})
    return {
        name: Sealed(
            torch.tensor(codes[name], dtype=torch.uint8),
            torch.tensor(values[name], dtype=torch.float32).to(dtype),
            partial(fingerprint, base, torch.tensor(INDICES[name], dtype=torch.int64), whole=True),
        )
        for name, base in bases.items()
    }


def seal():
    return make_seal(children(), HEADS, config=CONFIG)
