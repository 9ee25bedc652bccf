"""The front of a code: what it is, how the weight is divided, and how many units follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..errors import FormatError
from ..sparse import Granularity, UnitGrid
from .bits import Reader, write_varint

FORMAT_VERSION: int = 1
MAGIC = b"CT"
MAX_NUMEL = 1 << 62  # so that positions and sums of two of them fit int64
MAX_DIMENSIONS = 32
SEEDED, RESAMPLED = 8, 9  # coding ids; those of listed units are in indices.py
CODINGS = frozenset({0, 1, 2, 3, 4, SEEDED, RESAMPLED})
_GRANULARITIES = get_args(Granularity)
_TRANSPOSED, _BY_COLUMN = 4, 8


@dataclass(frozen=True)
class Header:
    """What precedes the payload.

    Args:
        coding: id of the payload's coding.
        grid: how the weight is divided.
        by_column: whether the coded units are numbered column-major.
        count: kept units; 0 for resampled ones.
    """

    coding: int
    grid: UnitGrid
    by_column: bool
    count: int

    def encode(self) -> bytes:
        """Return the bytes of the header."""
        grid = self.grid
        flags = _GRANULARITIES.index(grid.granularity) | _TRANSPOSED * grid.transposed | _BY_COLUMN * self.by_column
        numbers = [len(grid.shape), *grid.shape]
        if grid.granularity == "block":
            numbers.append(grid.block_size)
        if self.coding != RESAMPLED:
            numbers.append(self.count)
        return MAGIC + bytes([FORMAT_VERSION, self.coding, flags]) + b"".join(map(write_varint, numbers))


def decode_header(reader: Reader, *, shape: tuple[int, ...] | None) -> Header:
    """Return the header at the front of a code that must be of a weight of this shape; of any, if that is None.

    Raises:
        FormatError: not a code, of another version or shape, or with a field out of its range.
    """
    if reader.take(2, "magic").tobytes() != MAGIC:
        raise FormatError(f"magic: not {MAGIC!r}; this is no code of a child.")
    version, coding, flags = reader.byte("version"), reader.byte("coding"), reader.byte("flags")
    if version != FORMAT_VERSION:
        raise FormatError(f"version: {version}, above its limit {FORMAT_VERSION}; a newer release may read it.")
    if coding not in CODINGS:
        raise FormatError(f"coding: {coding} is unknown in version {version}; the code is damaged.")
    if flags >= 16:
        raise FormatError(f"flags: {flags}, above its limit 15; the code is damaged.")
    dimensions = reader.varint("dimensions", limit=MAX_DIMENSIONS)
    stored = tuple(reader.varint("shape", limit=MAX_NUMEL) for _ in range(dimensions))
    if shape is not None and stored != tuple(shape):
        raise FormatError(f"shape: {stored} where the weight has {tuple(shape)}; this code is of another weight.")
    granularity: Granularity = _GRANULARITIES[flags & 3]
    block_size = reader.varint("block size", limit=MAX_NUMEL) if granularity == "block" else 1
    if block_size < 1:
        raise FormatError("block size: 0, below its limit 1; the code is damaged.")
    grid = UnitGrid(stored, granularity, block_size=block_size, transposed=bool(flags & _TRANSPOSED))
    if grid.numel > MAX_NUMEL:
        raise FormatError(f"shape: {stored} has {grid.numel} entries, above the limit {MAX_NUMEL}.")
    by_column = bool(flags & _BY_COLUMN)
    if by_column and (coding in (SEEDED, RESAMPLED) or min(grid.units_shape) < 2):
        raise FormatError("flags: column order where units have one order only; the code is damaged.")
    count = 0 if coding == RESAMPLED else reader.varint("count", limit=grid.num_units)
    return Header(coding, grid, by_column, count)
