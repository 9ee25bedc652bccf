"""Golomb-Rice coding of gaps: one parameter for all of them, or one for each block of 64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..errors import FormatError
from .bits import Bytes, Ints, Reader, pack_unary, running_sum_, unpack_unary
from .fields import BLOCK, MAX_WIDTH, as_blocks, block_bits, pack_blocks, pack_fields, unpack_blocks, unpack_fields

_CHUNK = 1 << 15  # gaps at a time: within the cache


def gaps_of(positions: Ints) -> Ints:
    """Return the number of positions left out before each one, in the dtype of the positions."""
    gaps = positions.copy()
    gaps[1:] -= positions[:-1]
    gaps[1:] -= 1
    return gaps


def plan_rice(gaps: Ints) -> tuple[int, int]:
    """Return the parameter that codes all gaps shortest, and the bytes of that code."""
    first = max(int(_guess_parameter(np.array([_sum(gaps) / max(gaps.size, 1)]))[0]) - 1, 0)
    high = gaps >> first
    best, unary, least = first, 0, math.inf
    for parameter in range(first, first + 3):
        bits = _sum(high) + gaps.size
        if bits + gaps.size * parameter < least:
            best, unary, least = parameter, bits, bits + gaps.size * parameter
        high >>= 1
    return best, 1 + -(-gaps.size * best // 8) + -(-unary // 8)


def encode_rice(gaps: Ints, parameter: int) -> bytes:
    """Return the parameter (one byte), the low bits of all gaps, and their high parts in unary.

    Source: R. F. Rice, "Some practical universal noiseless coding techniques", 1979.
    """
    return bytes([parameter]) + pack_fields(gaps, parameter).tobytes() + pack_unary(gaps >> parameter).tobytes()


def decode_rice(payload: Bytes, *, count: int, limit: int) -> Ints:
    """Return the positions that `encode_rice` was given the gaps of.

    Args:
        payload: all of it.
        count: how many positions, already known not to exceed `limit`.
        limit: bound of the positions.
    """
    reader = Reader(payload)
    parameter = reader.byte("Rice parameter")
    _check_parameter(parameter, limit)
    low = unpack_fields(reader.take(-(-count * parameter // 8), "low bits"), parameter, count=count)
    positions = unpack_unary(reader.rest(), count=count)
    if count and int(positions[-1]) + 1 - count > limit >> parameter:  # checked before the shift can overflow
        raise _gap_error(limit)
    # the end of the i-th unary number is the sum of the high parts up to it, plus i; the low bits make up for the i
    positions <<= parameter
    total = mask = (1 << parameter) - 1
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        steps = low[part].astype(np.int64)
        steps -= mask
        steps[:1] += total
        sums = running_sum_(steps)
        positions[part] += sums
        total = int(sums[-1])
    return _checked(positions, limit)


def encode_block_rice(gaps: Ints, parameters: Ints) -> bytes:
    """Return the same with a parameter for each 64 gaps: the least one, their width, and each as a bit field."""
    least, width = _span(parameters)
    high = gaps >> np.repeat(parameters.astype(gaps.dtype), BLOCK)[: gaps.size]
    parts = (pack_fields(parameters - least, width), pack_blocks(gaps, parameters), pack_unary(high))
    return bytes([least, width]) + b"".join(part.tobytes() for part in parts)


def decode_block_rice(payload: Bytes, *, count: int, limit: int) -> Ints:
    """Return the positions that `encode_block_rice` was given the gaps of; arguments as in `decode_rice`."""
    reader = Reader(payload)
    least, width = reader.byte("least Rice parameter"), reader.byte("width of the Rice parameters")
    if width > 6:
        raise FormatError(f"width of the Rice parameters: {width} bits, above its limit 6; the code is damaged.")
    blocks = -(-count // BLOCK)
    packed = reader.take(-(-blocks * width // 8), "Rice parameters")
    parameters = unpack_fields(packed, width, count=blocks).astype(np.int64) + least
    _check_parameter(int(parameters.max()) if blocks else least, limit)
    low_bits = block_bits(parameters, count)
    low = unpack_blocks(reader.take(-(-low_bits // 8), "low bits"), parameters, count=count)
    per_gap = np.repeat(parameters, BLOCK)[:count]
    steps = gaps_of(unpack_unary(reader.rest(), count=count))
    if bool((steps > limit >> per_gap).any()):  # checked before the shift can overflow
        raise _gap_error(limit)
    steps <<= per_gap
    steps += low
    steps[1:] += 1
    return _checked(running_sum_(steps), limit)


def plan_block_rice(gaps: Ints) -> tuple[Ints, int]:
    """Return the parameter that codes each 64 gaps shortest, and the bytes of that code."""
    table = as_blocks(gaps)
    sizes = np.full(len(table), BLOCK)
    sizes[-1:] = gaps.size - (len(table) - 1) * BLOCK
    first = np.maximum(_guess_parameter(_block_sums(table) / sizes) - 1, 0)
    high = table >> first.astype(table.dtype)[:, None]
    best, unary, least = first, first, np.full(len(table), np.iinfo(np.int64).max)
    for parameter in (first, first + 1, first + 2):
        bits = _block_sums(high)
        length = bits + sizes * parameter
        is_shorter = length < least
        best, unary = np.where(is_shorter, parameter, best), np.where(is_shorter, bits, unary)
        least = np.minimum(length, least)
        high >>= 1
    _, width = _span(best)
    low_bits, unary_bits = block_bits(best, gaps.size), int(unary.sum()) + gaps.size
    return best, 2 + -(-best.size * width // 8) + -(-low_bits // 8) + -(-unary_bits // 8)


def estimate_block_rice(gaps: Ints) -> int:
    """Return about how many bytes `encode_block_rice` makes, at a tenth of the cost of `plan_block_rice`."""
    means = _block_sums(as_blocks(gaps)) / BLOCK
    parameters = _guess_parameter(means + 1.443)  # nearer to the best one for small means
    # a unary part of 1 + gap / 2^k bits, less what rounding down saves on average
    scale = np.ldexp(1.0, -parameters)
    bits = (parameters + 1 + means * scale - (1 - scale) / 2).sum() * BLOCK
    return int(bits) // 8


def _span(parameters: Ints) -> tuple[int, int]:
    """Return the least parameter, and the bits of how far the others exceed it."""
    least = int(parameters.min())
    return least, int(parameters.max() - least).bit_length()


def _guess_parameter(means: npt.NDArray[np.float64]) -> Ints:
    # the best one of a geometric distribution is within one of log2 of its median; frexp rounds that down, plus one
    return np.frexp(np.maximum(means * 0.693, 1.0))[1].astype(np.int64) - 1


def _check_parameter(parameter: int, limit: int) -> None:
    if parameter > min(limit.bit_length(), MAX_WIDTH):
        raise FormatError(f"Rice parameter: {parameter}, too large for {limit} positions; the code is damaged.")


def _sum(gaps: Ints) -> int:
    # in their own dtype, which is five times as fast: gaps add up to less than the positions they lead to
    return int(gaps.sum(dtype=gaps.dtype))


def _block_sums(table: Ints) -> Ints:
    # in their own dtype, like `_sum`, and twice as fast as `sum` with short rows
    sums: Ints = np.einsum("ij->i", table)
    return sums


def _checked(positions: Ints, limit: int) -> Ints:
    # a step is at most 2^63, so that a sum that wraps around is negative before it can be positive again
    if positions.size and (int(positions[-1]) >= limit or int(positions.min()) < 0):
        raise FormatError(f"payload: a position is outside of [0, {limit}); the code is damaged.")
    return positions


def _gap_error(limit: int) -> FormatError:
    return FormatError(f"payload: a gap is larger than all {limit} positions; the code is damaged.")
