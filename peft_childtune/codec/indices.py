"""Codings of listed units, and the choice of the shortest one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import FormatError
from .bits import Bytes, Ints, check_padding, one_bits, pack_fields, pack_positions, unpack_fields
from .lzma_bitmap import compress_bitmap, decompress_bitmap, is_worth_trying
from .rice import decode_block_rice, decode_rice, encode_block_rice, encode_rice, gaps_of, plan_block_rice, plan_rice

RAW, RICE, BLOCK_RICE, BITMAP, LZMA = range(5)
_MAX_BITMAP = 1 << 28  # bytes; above this the compressor would take minutes
_MAX_BITMAP_RATIO = 512  # bitmap bytes per byte of the best other coding; beyond it the bitmap is all but empty


def encode_units(units: Ints, *, units_shape: tuple[int, int]) -> tuple[int, bool, bytes]:
    """Return the coding id, whether units are in column-major order, and the payload, of the shortest coding.

    Args:
        units: `(n,)`, strictly increasing, row-major in `units_shape`.
        units_shape: how many units lie below and beside one another.
    """
    limit = units_shape[0] * units_shape[1]
    best = (RAW, False, pack_fields(units, _width(limit)).tobytes())
    if units.size == 0:
        return best
    plans = []
    for by_column, ordered in _orders(units, units_shape):
        gaps = gaps_of(ordered)
        (parameter, rice_size), (parameters, block_size) = plan_rice(gaps), plan_block_rice(gaps)
        plans.append((min(rice_size, block_size), by_column, ordered, gaps, rice_size, parameter, parameters))
    size, by_column, ordered, gaps, rice_size, parameter, parameters = min(plans, key=lambda plan: plan[0])
    if size < len(best[2]) and size == rice_size:
        best = (RICE, by_column, encode_rice(gaps, parameter))
    elif size < len(best[2]):
        best = (BLOCK_RICE, by_column, encode_block_rice(gaps, parameters))
    size = -(-limit // 8)
    if size <= min(_MAX_BITMAP, _MAX_BITMAP_RATIO * len(best[2])):
        bitmap = pack_positions(ordered, length=limit)
        if size < len(best[2]):
            best = (BITMAP, by_column, bitmap.tobytes())
        if is_worth_trying(bitmap, rival=len(best[2])):
            compressed = compress_bitmap(bitmap)
            if len(compressed) < len(best[2]):
                best = (LZMA, by_column, compressed)
    return best


def decode_units(payload: Bytes, *, coding: int, by_column: bool, count: int, units_shape: tuple[int, int]) -> Ints:
    """Return the units, int64, strictly increasing, row-major in `units_shape`.

    Nothing larger is allocated than the payload's bits or the bitmap of the weight can justify.

    Raises:
        FormatError: a payload that does not hold exactly `count` units in range.
    """
    limit = units_shape[0] * units_shape[1]
    if count > limit:
        raise FormatError(f"count: {count} units, above its limit {limit}; the code is damaged.")
    if coding in (RAW, RICE, BLOCK_RICE) and count > payload.size * 8 and not (coding == RAW and limit == 1):
        raise FormatError(f"count: {count} units in a payload of {payload.size} bytes; the code is damaged.")
    if coding == RAW:
        units = unpack_fields(payload, _width(limit), count=count)
        if units.size and (int(units[-1]) >= limit or bool((np.diff(units) <= 0).any())):
            raise FormatError(f"payload: units are not strictly increasing below {limit}; the code is damaged.")
    elif coding == RICE:
        units = decode_rice(payload, count=count, limit=limit)
    elif coding == BLOCK_RICE:
        units = decode_block_rice(payload, count=count, limit=limit)
    else:
        bitmap = payload if coding == BITMAP else decompress_bitmap(payload, size=-(-limit // 8))
        check_padding(bitmap, limit)
        units = one_bits(bitmap)
        if units.size != count:
            raise FormatError(f"payload: {units.size} units where the header declares {count}; the code is damaged.")
    return _to_row_major(units, units_shape) if by_column else units


def _orders(units: Ints, units_shape: tuple[int, int]) -> Iterator[tuple[bool, Ints]]:
    yield False, units
    down, across = units_shape
    if min(down, across) > 1:
        transposed = units % across * down + units // across
        transposed.sort()
        yield True, transposed


def _to_row_major(units: Ints, units_shape: tuple[int, int]) -> Ints:
    down, across = units_shape
    restored = units % down * across + units // down
    restored.sort()
    return restored


def _width(limit: int) -> int:
    return max(limit - 1, 0).bit_length()
