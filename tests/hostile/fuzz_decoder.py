"""Any bytes given to the decoder are refused by name or give a valid child.

A target for atheris (`pip install atheris`): `python tests/hostile/fuzz_decoder.py -max_total_time=120`. The property
itself is also tested, with hypothesis, in every run of the tests.
"""

from __future__ import annotations

import sys

import torch

from peft_childtune.codec import decode_child, encode_child, measure_child
from peft_childtune.errors import FormatError
from peft_childtune.sparse import ResampledUnits, SeededUnits, TensorChild, UnitGrid

SHAPES = [(), (7,), (2, 8), (40, 50), (3, 4, 5), (0, 3), (1 << 12, 1 << 11)]
_FRONT = bytes.fromhex("435401")


def seeds() -> list[bytes]:
    """Return sound inputs of every coding, to begin with."""
    made = []
    for number, shape in enumerate(SHAPES[1:4], start=1):
        grid = UnitGrid(shape)
        children = [torch.arange(0, grid.numel, 3), torch.arange(grid.numel // 2), ResampledUnits(1, 2, 0.3)]
        children += [SeededUnits(1, 2, 1 << 63, 0, grid.numel)]
        made += [
            bytes([number]) + bytes(encode_child(TensorChild(grid, units)).tolist())[len(_FRONT) :]
            for units in children
        ]
    return made


def check(data: bytes) -> None:
    """Decode the bytes after the first one as a code of a weight whose shape the first one picks."""
    shape = SHAPES[data[0] % len(SHAPES)] if data else ()
    raw = _FRONT + data[1:]  # otherwise nearly all inputs end at the magic number
    code = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    try:
        demand = measure_child(code, shape=shape)
        child = decode_child(code, shape=shape)
    except FormatError:
        return
    indices = child.indices()
    numel = child.grid.numel
    if child.grid.shape != shape or child.nnz != indices.numel() or not child.nnz <= demand.nnz <= numel:
        raise AssertionError(f"{child} of {shape} has {child.nnz} entries, {indices.numel()} listed, {demand}")
    if indices.numel() and (indices[0] < 0 or indices[-1] >= numel or bool((indices.diff() <= 0).any())):
        raise AssertionError(f"{child} of {shape} has positions out of order or range")
    if not torch.equal(decode_child(encode_child(child), shape=shape).indices(), indices):
        raise AssertionError(f"{child} of {shape} does not survive encoding")
    decode_child(code, shape=shape, nnz=child.nnz)


if __name__ == "__main__":
    import atheris

    # this Python code alone: instrumented torch would take minutes to start
    for name in [name for name in sys.modules if name.startswith("peft_childtune.codec")]:
        module = sys.modules[name]
        for key, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__module__", None) == name and hasattr(value, "__code__"):
                setattr(module, key, atheris.instrument_func(value))
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()
