"""A child to bytes and back: the shortest coding of listed units, or the rule that draws them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import ChildTuningError, FormatError
from ..sparse import ResampledUnits, SeededUnits, TensorChild
from .bits import Reader, write_varint
from .header import MAX_DIMENSIONS, MAX_NUMEL, RESAMPLED, SEEDED, Header, decode_header
from .indices import LZMA, decode_units, encode_units

_STEP_BYTES = 8  # at the end of the code of a resampled child
_MAX_SEED, _MAX_STREAM = (1 << 64) - 1, (1 << 63) - 1


def encode_child(child: TensorChild) -> Tensor:
    """Return the child as bytes, in the coding that is shortest for it.

    Args:
        child: of a weight with at most 2^62 entries and 32 dimensions.

    Returns:
        uint8, 1-D, on the CPU; see FORMAT.md.

    Raises:
        FormatError: the weight is too large for the format.

    Example:
        >>> from peft_childtune.sparse import TensorChild, UnitGrid
        >>> child = TensorChild(UnitGrid((2, 4)), torch.tensor([1, 6]))
        >>> code = encode_child(child)
        >>> decode_child(code, shape=(2, 4)).indices().tolist()
        [1, 6]
    """
    grid, units = child.grid, child.units
    if grid.numel > MAX_NUMEL or len(grid.shape) > MAX_DIMENSIONS:
        raise FormatError(
            f"shape: {grid.shape} is above the limits of {MAX_NUMEL} entries, {MAX_DIMENSIONS} dimensions."
        )
    if isinstance(units, SeededUnits):
        code = Header(SEEDED, grid, False, units.count).encode() + write_varint(units.seed)
        code += write_varint(units.stream) + struct.pack("<Q", units.threshold) + write_varint(units.ties)
    elif isinstance(units, ResampledUnits):
        code = Header(RESAMPLED, grid, False, 0).encode() + write_varint(units.seed)
        code += write_varint(units.stream) + struct.pack("<d", units.density)
        code += bytes(-len(code) % _STEP_BYTES) + bytes(_STEP_BYTES)  # aligned, so that the step can be viewed
    else:
        coding, by_column, payload = encode_units(units.cpu().numpy(), units_shape=grid.units_shape)
        code = Header(coding, grid, by_column, units.numel()).encode() + payload
    return torch.from_numpy(np.frombuffer(code, dtype=np.uint8).copy())


@dataclass(frozen=True)
class Demand:
    """What decoding a code takes beyond its own length.

    Attributes:
        scanned: units that are drawn or decompressed, to see which are kept.
        nnz: at most so many entries are kept.
    """

    scanned: int
    nnz: int


def measure_child(code: Tensor, *, shape: tuple[int, ...]) -> Demand:
    """Return what `decode_child` would take; only the header of the code is read.

    Raises:
        FormatError: the header is not one of a child of a weight of this shape.
    """
    header = decode_header(_reader(code), shape=shape)
    grid, (high, wide) = header.grid, header.grid.tile
    nnz = grid.numel if header.coding == RESAMPLED else min(header.count * high * wide, grid.numel)
    return Demand(grid.num_units if header.coding in (SEEDED, LZMA) else 0, nnz)


def decode_child(code: Tensor, *, shape: tuple[int, ...], nnz: int | None = None) -> TensorChild:
    """Return the child that `encode_child` was given; listed units are on the CPU.

    Every length is checked before anything of that length is allocated.

    Args:
        code: uint8, 1-D, on any device.
        shape: of the weight; must be the one in the code.
        nnz: how many entries it must keep, if that is known: a code that keeps more is refused before its units are
            listed, which a code of a few bytes can make as many as the weight has entries.

    Raises:
        FormatError: anything but the code of a child of a weight of this shape.
    """
    reader = _reader(code)
    header = decode_header(reader, shape=shape)
    grid = header.grid
    if nnz is not None:
        _check_entries(header, nnz)
    if header.coding in (SEEDED, RESAMPLED):
        rule = _decode_rule(reader, header)
        return TensorChild(grid, rule)
    units = decode_units(
        reader.rest(),
        coding=header.coding,
        by_column=header.by_column,
        count=header.count,
        units_shape=grid.units_shape if grid.num_units else (0, 0),
    )
    return TensorChild(grid, torch.from_numpy(units))


def _reader(code: Tensor) -> Reader:
    if code.dtype != torch.uint8 or code.ndim != 1:
        raise FormatError(f"code: {code.dtype} of shape {tuple(code.shape)}; a code is a 1-D uint8 tensor.")
    return Reader(code.detach().cpu().contiguous().numpy())


def _check_entries(header: Header, nnz: int) -> None:
    grid, (high, wide) = header.grid, header.grid.tile
    most = grid.numel if header.coding == RESAMPLED else header.count * high * wide
    least = most if header.coding == RESAMPLED or grid.has_equal_units else header.count  # tiles are cut at the edges
    if not least <= nnz <= most:
        raise FormatError(f"count: {header.count} units are not {nnz} entries; the code is damaged.")


def _decode_rule(reader: Reader, header: Header) -> SeededUnits | ResampledUnits:
    seed, stream = reader.varint("seed", limit=_MAX_SEED), reader.varint("stream", limit=_MAX_STREAM)
    word = reader.take(8, "threshold or density").tobytes()
    try:
        if header.coding == RESAMPLED:
            resampled = ResampledUnits(seed, stream, struct.unpack("<d", word)[0])
            _decode_step(reader)
            return resampled
        ties = reader.varint("ties", limit=header.grid.num_units)
        reader.expect_end()
        seeded = SeededUnits(seed, stream, struct.unpack("<Q", word)[0], ties, header.count)
        seeded.check(header.grid.num_units)  # the count must be true before anyone relies on it
    except FormatError:
        raise
    except ChildTuningError as error:
        raise FormatError(f"seeded child: {error}") from error
    return seeded


def _decode_step(reader: Reader) -> None:
    if reader.size % _STEP_BYTES:
        raise FormatError(
            f"code: {reader.size} bytes, not a multiple of {_STEP_BYTES}; the code is cut off or damaged."
        )
    padding = reader.take(reader.left % _STEP_BYTES, "padding")
    if padding.any():
        raise FormatError("padding: not zero; the code is damaged.")
    if struct.unpack("<q", reader.take(_STEP_BYTES, "step").tobytes())[0] < 0:
        raise FormatError("step: negative, below its limit 0; the code is damaged.")
    reader.expect_end()
