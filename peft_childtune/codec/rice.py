"""Golomb-Rice coding of gaps: one parameter for all of them, or one for each block of 64."""

from __future__ import annotations

import numpy as np

from ..errors import FormatError
from .bits import MAX_WIDTH, Bytes, Ints, Reader, check_padding, pack_fields, pack_unary, unpack_fields, unpack_unary

BLOCK = 64  # gaps that share a parameter


def gaps_of(positions: Ints) -> Ints:
    """Return the number of positions left out before each one."""
    return np.diff(positions, prepend=-1) - 1


def positions_of(gaps: Ints, *, limit: int) -> Ints:
    """Return the positions with these gaps before them.

    Raises:
        FormatError: a position at or beyond `limit`.
    """
    positions = np.cumsum(gaps + 1)
    positions -= 1
    # each gap is below 2^62, so the first sum out of range is still exact and cannot hide behind a wrap-around
    if positions.size and int(positions.max()) >= limit:
        raise FormatError(f"payload: a position is outside of [0, {limit}); the code is damaged.")
    return positions


def plan_rice(gaps: Ints) -> tuple[int, int]:
    """Return the parameter that codes all gaps shortest, and the bytes of that code."""
    guess = int(_guess_parameter(np.array([gaps.mean() if gaps.size else 0.0]))[0])
    candidates = range(max(guess - 1, 0), min(guess + 1, MAX_WIDTH) + 1)
    unary, parameter = min(
        ((int((gaps >> candidate).sum()) + gaps.size, candidate) for candidate in candidates),
        key=lambda plan: plan[0] + gaps.size * plan[1],
    )
    return parameter, 1 + -(-gaps.size * parameter // 8) + -(-unary // 8)


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
    return _join(unpack_unary(reader.rest(), count=count), low, parameter, limit)


def encode_block_rice(gaps: Ints, parameters: Ints) -> bytes:
    """Return the same with a parameter for each 64 gaps: the least one, their width, and each as a bit field."""
    least, width = _span(parameters)
    per_gap = np.repeat(parameters, BLOCK)[: gaps.size]
    parts = (pack_fields(parameters - least, width), pack_fields(gaps, per_gap), pack_unary(gaps >> per_gap))
    return bytes([least, width]) + b"".join(part.tobytes() for part in parts)


def decode_block_rice(payload: Bytes, *, count: int, limit: int) -> Ints:
    """Return the positions that `encode_block_rice` was given the gaps of; arguments as in `decode_rice`."""
    reader = Reader(payload)
    least, width = reader.byte("least Rice parameter"), reader.byte("width of the Rice parameters")
    if width > 6:
        raise FormatError(f"width of the Rice parameters: {width} bits, above its limit 6; the code is damaged.")
    blocks = -(-count // BLOCK)
    parameters = unpack_fields(reader.take(-(-blocks * width // 8), "Rice parameters"), width, count=blocks) + least
    _check_parameter(int(parameters.max()) if blocks else least, limit)
    per_gap = np.repeat(parameters, BLOCK)[:count]
    low_bits = int(per_gap.sum())
    packed = reader.take(-(-low_bits // 8), "low bits")
    check_padding(packed, low_bits)
    low = unpack_fields(packed, per_gap, count=count)
    return _join(unpack_unary(reader.rest(), count=count), low, per_gap, limit)


def plan_block_rice(gaps: Ints) -> tuple[Ints, int]:
    """Return the parameter that codes each 64 gaps shortest, and the bytes of that code."""
    blocks = -(-gaps.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype=np.int64)
    padded[: gaps.size] = gaps
    table = padded.reshape(blocks, BLOCK)
    sizes = np.full(blocks, BLOCK)
    sizes[-1:] = gaps.size - (blocks - 1) * BLOCK
    guess = _guess_parameter(table.sum(axis=1) / np.maximum(sizes, 1))
    best, unary, least = guess, np.zeros_like(guess), np.full(blocks, np.iinfo(np.int64).max)
    for parameter in (guess - 1, guess, guess + 1):
        parameter = np.clip(parameter, 0, MAX_WIDTH)
        high = (table >> parameter[:, None]).sum(axis=1)
        is_shorter = (length := high + sizes * parameter) < least
        best, unary = np.where(is_shorter, parameter, best), np.where(is_shorter, high, unary)
        least = np.minimum(length, least)
    _, width = _span(best)
    low_bits, unary_bits = int((best * sizes).sum()), int(unary.sum()) + gaps.size
    return best, 2 + -(-blocks * width // 8) + -(-low_bits // 8) + -(-unary_bits // 8)


def _span(parameters: Ints) -> tuple[int, int]:
    """Return the least parameter, and the bits of how far the others exceed it."""
    least = int(parameters.min())
    return least, int(parameters.max() - least).bit_length()


def _guess_parameter(means: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Ints:
    # the best one of a geometric distribution is within one of log2 of its median
    return np.clip(np.floor(np.log2(np.maximum(means * 0.693, 1.0))), 0, MAX_WIDTH).astype(np.int64)


def _check_parameter(parameter: int, limit: int) -> None:
    if parameter > min(limit.bit_length(), MAX_WIDTH):
        raise FormatError(f"Rice parameter: {parameter}, too large for {limit} positions; the code is damaged.")


def _join(high: Ints, low: Ints, parameter: int | Ints, limit: int) -> Ints:
    if bool((high > (np.int64(limit) >> parameter)).any()):  # checked before the shift can overflow
        raise FormatError(f"payload: a gap is larger than all {limit} positions; the code is damaged.")
    gaps = high << parameter
    gaps |= low
    return positions_of(gaps, limit=limit)
