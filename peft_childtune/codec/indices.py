"""Codings of listed units, and the choice of the shortest one."""

from __future__ import annotations

import numpy as np

from ..errors import FormatError
from .bits import Bytes, Ints, check_padding, one_bits, pack_positions
from .fields import pack_fields, unpack_fields
from .lzma_bitmap import compress_bitmap, decompress_bitmap, is_repetitive, is_worth_trying
from .rice import (
    decode_block_rice,
    decode_rice,
    encode_block_rice,
    encode_rice,
    estimate_block_rice,
    gaps_of,
    plan_block_rice,
    plan_rice,
)

RAW, RICE, BLOCK_RICE, BITMAP, LZMA = range(5)
_MAX_BITMAP = 1 << 28  # bytes; above this the compressor would take minutes
_MAX_BITMAP_RATIO = 512  # bitmap bytes per byte of the best other coding; beyond it the bitmap is all but empty
_LEAST_GAIN = 16  # bytes that compression has to save: it is decoded far more slowly
_BANDS, _LEAST_SAMPLE = 4, 1 << 11  # of rows and of units, to compare row order with column order


def encode_units(units: Ints, *, units_shape: tuple[int, int]) -> tuple[int, bool, bytes]:
    """Return the coding id, whether units are in column-major order, and the payload, of the shortest coding.

    Column order and compression cost more time than all else: a sample says whether they are worth trying.

    Args:
        units: int64, `(n,)`, strictly increasing, row-major in `units_shape`.
        units_shape: how many units lie below and beside one another.
    """
    limit = units_shape[0] * units_shape[1]
    if units.size == 0:
        return RAW, False, b""
    units = _narrow(units, limit)
    by_column = _is_shorter_by_column(units, units_shape)
    ordered = _transposed(units, units_shape) if by_column else units
    gaps = gaps_of(ordered)
    parameter, rice_size = plan_rice(gaps)
    bitmap_size = -(-limit // 8)
    sizes = {RAW: -(-units.size * _width(limit) // 8), RICE: rice_size}
    if estimate_block_rice(gaps) < rice_size:
        parameters, sizes[BLOCK_RICE] = plan_block_rice(gaps)
    if bitmap_size <= _MAX_BITMAP:
        sizes[BITMAP] = bitmap_size
    coding = min(sizes, key=lambda coding: sizes[coding])  # the first one of equals
    size = sizes[coding]
    if bitmap_size <= min(_MAX_BITMAP, _MAX_BITMAP_RATIO * size) and is_repetitive(gaps, lines=units_shape[by_column]):
        # in both orders: the one that Rice coding prefers need not be the one in which lines are alike
        best: tuple[int, bool, bytes] | None = None
        for order in (False, True) if min(units_shape) > 1 else (False,):
            bitmap = pack_positions(_transposed(units, units_shape) if order else units, length=limit)
            if not is_worth_trying(bitmap):
                continue
            compressed = compress_bitmap(bitmap)
            if len(compressed) < size - (_LEAST_GAIN if best is None else 0):
                best, size = (LZMA, order, compressed), len(compressed)
        if best is not None:
            return best
    if coding == RAW:
        return RAW, False, pack_fields(units, _width(limit)).tobytes()
    if coding == RICE:
        return RICE, by_column, encode_rice(gaps, parameter)
    if coding == BLOCK_RICE:
        return BLOCK_RICE, by_column, encode_block_rice(gaps, parameters)
    return BITMAP, by_column, pack_positions(ordered, length=limit).tobytes()


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
        units = unpack_fields(payload, _width(limit), count=count).astype(np.int64)
        if units.size and (int(units[-1]) >= limit or bool((np.diff(units) <= 0).any())):
            raise FormatError(f"payload: units are not strictly increasing below {limit}; the code is damaged.")
    elif coding == RICE:
        units = decode_rice(payload, count=count, limit=limit)
    elif coding == BLOCK_RICE:
        units = decode_block_rice(payload, count=count, limit=limit)
    else:
        bitmap = payload if coding == BITMAP else decompress_bitmap(payload, size=-(-limit // 8))
        check_padding(bitmap, limit)
        units = one_bits(bitmap, count=count)
    return _transposed(units, units_shape[::-1]).astype(np.int64) if by_column else units


def _is_shorter_by_column(units: Ints, units_shape: tuple[int, int]) -> bool:
    """Return whether column order saves at least 1 % in a sample: some bands of rows, put together."""
    down, across = units_shape
    if min(down, across) < 2:
        return False
    band = max(down // 64, -(-_LEAST_SAMPLE * down // (_BANDS * units.size)))  # rows
    if band * _BANDS * 2 <= down:
        starts = [i * (down - band) // (_BANDS - 1) for i in range(_BANDS)]
        bounds = np.array([[start, start + band] for start in starts], dtype=units.dtype) * across
        cuts = np.searchsorted(units, bounds).tolist()
        pieces = [
            units[a:b] - (start - i * band) * across
            for i, ((a, b), start) in enumerate(zip(cuts, starts, strict=True))
        ]
        units, down = np.concatenate(pieces), band * _BANDS
    by_row, by_column = gaps_of(units), gaps_of(_transposed(units, (down, across)))
    return estimate_block_rice(by_column) < 0.99 * estimate_block_rice(by_row)


def _transposed(units: Ints, units_shape: tuple[int, int]) -> Ints:
    """Return the numbers of row-major units in column-major order, sorted; with the shape transposed, its inverse."""
    down, across = units_shape
    units = _narrow(units, down * across)  # int32 is sorted twice as fast
    row = units // across
    numbers = (units - row * across) * down + row
    numbers.sort()
    return numbers


def _narrow(positions: Ints, limit: int) -> Ints:
    """Return positions up to `limit` as int32 where they fit: half the memory, and twice as fast."""
    return positions.astype(np.int32) if limit < 1 << 31 else positions


def _width(limit: int) -> int:
    return max(limit - 1, 0).bit_length()
