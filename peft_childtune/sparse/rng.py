"""Counter-based random masks: the same bits on every device, process and release.

A generator with a state draws differently on a GPU, on another rank, or after a restart. Here the number at a position
is a function of `(seed, step, stream, position)` alone, in int64 arithmetic modulo 2^64, the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BudgetError

_MASK64 = (1 << 64) - 1
_WEYL, _OTHER = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03  # 2^64 / golden ratio, and an unrelated odd word
_MIX_A, _MIX_B = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53  # murmur3's 64-bit finaliser
_LOW31, _LOW63 = (1 << 31) - 1, (1 << 63) - 1
HASH_RANGE = 1 << 63  # hashes lie in [0, HASH_RANGE)
_CPU_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 24  # positions at a time: within the cache, and few launches


def hash_positions(positions: Tensor, *, seed: int, stream: int, step: int | Tensor = 0) -> Tensor:
    """Return one uniform number in `[0, 2^63)` for each position.

    Args:
        positions: int64, any shape.
        seed: any integer; taken modulo 2^64.
        stream: any integer; give every tensor its own.
        step: any integer, or an int64 tensor of one element on the device of `positions` (read without a sync).

    Returns:
        int64, the shape of `positions`.

    Example:
        >>> hash_positions(torch.arange(2), seed=0, stream=0).tolist()
        [7465466193072338020, 911600238555137241]

    Source: the finaliser of MurmurHash3 (A. Appleby), two rounds with a key before and a key between them.
    """
    before, between = _keys(seed, stream, step, device=positions.device)
    word = positions * _signed(_WEYL)
    word += before
    _mix_(word)
    word ^= between
    _mix_(word)
    return word.bitwise_and_(_LOW63)


def bernoulli_mask(
    numel: int,
    density: float,
    *,
    seed: int,
    stream: int,
    step: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return a mask in which each of `numel` positions is kept with probability `density`, independently.

    Made in chunks, so that beside the mask itself only a bounded amount of memory is used.

    Args:
        numel: length of the mask.
        density: in (0, 1].
        seed: as in `hash_positions`, like `stream` and `step`.
        stream: see `seed`.
        step: see `seed`.
        device: of the mask; the CPU if not given.

    Returns:
        bool, `(numel,)`.

    Raises:
        BudgetError: `density` is not in (0, 1].

    Example:
        >>> bernoulli_mask(8, 0.5, seed=1, stream=0).tolist()
        [False, False, False, False, False, True, True, False]
    """
    if not 0.0 < density <= 1.0:
        raise BudgetError(f"density={density!r} is out of range; use 0 < density <= 1.")
    device = torch.device("cpu" if device is None else device)
    limit = density_threshold(density)
    if limit == HASH_RANGE:
        return torch.ones(numel, dtype=torch.bool, device=device)
    mask = torch.empty(numel, dtype=torch.bool, device=device)
    for start, stop in chunk_bounds(numel, device):
        positions = torch.arange(start, stop, device=device)
        mask[start:stop] = hash_positions(positions, seed=seed, stream=stream, step=step) < limit
    return mask


def density_threshold(density: float) -> int:
    """Return the bound below which a hash falls with probability `density`."""
    return min(round(density * HASH_RANGE), HASH_RANGE)


def chunk_bounds(numel: int, device: torch.device) -> list[tuple[int, int]]:
    """Return the `(start, stop)` bounds of chunks that keep temporary memory small."""
    size = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    return [(start, min(start + size, numel)) for start in range(0, numel, size)]


def _keys(seed: int, stream: int, step: int | Tensor, *, device: torch.device) -> tuple[int | Tensor, int | Tensor]:
    """Return the two keys of a sequence: both depend on all of seed, stream and step."""
    key = _mix((seed * _WEYL + 1) & _MASK64)
    key = _mix((key ^ (stream * _WEYL)) & _MASK64)
    if isinstance(step, Tensor):
        counter = step.detach().reshape(()).to(device=device, dtype=torch.int64) * _signed(_WEYL)
        before = _mix_(counter ^ _signed(key))
        return before, _mix_(before ^ _signed(_OTHER))
    before_int = _mix((key ^ (step * _WEYL)) & _MASK64)
    return _signed(before_int), _signed(_mix(before_int ^ _OTHER))


def _mix(word: int) -> int:
    word = ((word ^ (word >> 33)) * _MIX_A) & _MASK64
    word = ((word ^ (word >> 33)) * _MIX_B) & _MASK64
    return word ^ (word >> 33)


def _mix_(word: Tensor) -> Tensor:
    """Finalise `word` in place; int64 shifts carry the sign, so the upper bits are masked off."""
    word ^= (word >> 33).bitwise_and_(_LOW31)
    word *= _signed(_MIX_A)
    word ^= (word >> 33).bitwise_and_(_LOW31)
    word *= _signed(_MIX_B)
    word ^= (word >> 33).bitwise_and_(_LOW31)
    return word


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
