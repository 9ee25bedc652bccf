"""Bit fields of one width, or of one width for each 64: eight fields at a time, vectorised with numpy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .bits import Bytes, Ints, check_padding

MAX_WIDTH = 62  # bits of one field
BLOCK = 64  # fields that share a width in `pack_blocks`
_GROUPS = 1 << 13  # of 8 fields, at a time: within the cache
_SLACK = 16  # bytes after the last group of fields, so that every word of it lies within
Words = npt.NDArray[np.unsignedinteger]


def pack_fields(values: Ints, width: int) -> Bytes:
    """Return the lowest `width` bits of each value, one field after the other, padded with zeros to a whole byte.

    Eight fields fill `width` bytes, so the first fields of all groups of eight lie `width` bytes apart, at the same
    shift in their byte; so do all second ones, and so on: eight vectorised steps, whatever the number of fields.

    Args:
        values: `(n,)`, not negative.
        width: at most `MAX_WIDTH`.
    """
    size = -(-values.size * width // 8)
    if width == 0:
        return np.zeros(0, dtype=np.uint8)
    values = _padded(values, 128) & ((1 << width) - 1)
    while width <= 12:  # two fields make one of twice the width
        values = values[0::2] | values[1::2] << width
        width *= 2
    groups = values.size // 8
    packed = np.zeros(groups * width + _SLACK, dtype=np.uint8)
    for start in range(0, groups, _GROUPS):
        fields = values[start * 8 : (start + _GROUPS) * 8].reshape(-1, 8).astype(_word(width))
        for lane in range(8):
            byte, shift = divmod(lane * width, 8)
            target = _every(packed, width, words=fields, at=start * width + byte)
            target |= fields[:, lane] << shift
            if width > 32:  # the rest of a field that ends beyond the word
                target = _every(packed, width, words=fields, at=start * width + byte + 4)
                target |= fields[:, lane] >> 32 << shift
    return packed[:size]


def unpack_fields(packed: Bytes, width: int, *, count: int) -> Words:
    """Return `count` fields, in the shortest unsigned dtype that serves; the inverse of `pack_fields`.

    Raises:
        FormatError: another length than those fields have, or padding bits that are not zero.
    """
    check_padding(packed, count * width)
    if width == 0:
        return np.zeros(count, dtype=np.uint8)
    groups = -(-count // 8)
    padded = np.zeros(groups * width + _SLACK, dtype=np.uint8)
    padded[: packed.size] = packed
    fields = np.empty((groups, 8), dtype=_word(width))
    for start in range(0, groups, _GROUPS):
        part = fields[start : start + _GROUPS]
        for lane in range(8):
            byte, shift = divmod(lane * width, 8)
            np.right_shift(_every(padded, width, words=part, at=start * width + byte), shift, out=part[:, lane])
            if width > 32:
                part[:, lane] |= _every(padded, width, words=part, at=start * width + byte + 4) >> shift << 32
        part &= (1 << width) - 1
    return fields.reshape(-1)[:count]


def block_bits(widths: Ints, count: int) -> int:
    """Return the bits of `count` fields, a width for each `BLOCK` of them."""
    missing = widths.size * BLOCK - count  # from the last block
    return int(widths.sum()) * BLOCK - (missing * int(widths[-1]) if missing else 0)


def pack_blocks(values: Ints, widths: Ints) -> Bytes:
    """Return the fields of `values` like `pack_fields`, with a width of its own for each `BLOCK` of them.

    A block fills `8 * width` bytes, so all blocks of one width are packed at once and put in their places.

    Args:
        values: `(n,)`, not negative.
        widths: int64, one for each `BLOCK` values or less, at most `MAX_WIDTH`.
    """
    table = as_blocks(values)
    ends = np.cumsum(widths)
    words = np.zeros(int(ends[-1]) if ends.size else 0, dtype=np.uint64)
    for width, chosen, place in _by_width(widths, ends):
        words[place] = pack_fields(table[chosen].reshape(-1), width).view(np.uint64).reshape(place.shape)
    return words.view(np.uint8)[: -(-block_bits(widths, values.size) // 8)]


def unpack_blocks(packed: Bytes, widths: Ints, *, count: int) -> Ints:
    """Return `count` fields, int64; the inverse of `pack_blocks`.

    Raises:
        FormatError: another length than those fields have, or padding bits that are not zero.
    """
    check_padding(packed, block_bits(widths, count))
    ends = np.cumsum(widths)
    words = np.zeros(int(ends[-1]) if ends.size else 0, dtype=np.uint64)
    words.view(np.uint8)[: packed.size] = packed
    table = np.zeros((widths.size, BLOCK), dtype=np.int64)
    for width, chosen, place in _by_width(widths, ends):
        fields = unpack_fields(words[place].view(np.uint8).reshape(-1), width, count=chosen.size * BLOCK)
        table[chosen] = fields.reshape(-1, BLOCK)
    return table.reshape(-1)[:count]


def as_blocks(values: Ints) -> Ints:
    """Return the values as `(blocks, BLOCK)`, with zeros after the last one."""
    return _padded(values, BLOCK).reshape(-1, BLOCK)


def _padded(values: Ints, multiple: int) -> Ints:
    if values.size % multiple == 0:
        return values
    padded = np.zeros(-(-values.size // multiple) * multiple, dtype=values.dtype)
    padded[: values.size] = values
    return padded


def _every(packed: Bytes, step: int, *, words: Words, at: int) -> Words:
    """Return a view: for each row of `words`, the word of that type that starts at byte `at`, `at + step`, ..."""
    return np.ndarray(words.shape[:1], words.dtype, buffer=packed, offset=at, strides=(step,))


def _by_width(widths: Ints, ends: Ints) -> Iterator[tuple[int, Ints, Ints]]:
    """Yield each width but 0, the blocks that have it, and where their words are: `(blocks, width)`."""
    for width in np.flatnonzero(np.bincount(widths)).tolist():
        if width:
            chosen = np.flatnonzero(widths == width)
            yield width, chosen, (ends[chosen] - width)[:, None] + np.arange(width)


def _word(width: int) -> np.dtype[np.unsignedinteger]:
    # the shortest word that holds a field at each of its shifts; it is never longer than the `width` bytes to the next
    bits = min(width + 8 - math.gcd(width, 8), 64)
    return np.dtype(f"<u{1 << (bits - 1).bit_length() >> 3}")
