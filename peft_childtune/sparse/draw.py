"""Draws a fixed random child: the units of the smallest hashes that fit a budget, in one streamed pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from .child import SeededUnits
from .rng import HASH_RANGE, chunk_bounds, hash_positions
from .units import UnitGrid

_CPU = torch.device("cpu")
_SIGMAS = 8.0  # half width of the window around the expected threshold, in standard deviations
_Window = tuple[int, int]  # hashes from the first bound up to, not including, the second


def draw_units(grids: Mapping[str, tuple[int, UnitGrid]], *, budget: int, seed: int) -> dict[str, SeededUnits]:
    """Return for each tensor the rule that keeps the units of the smallest hashes of all tensors together.

    Equal hashes are taken from the first tensor and its lowest unit first. Units are taken up to the first that does
    not fit the budget. Only hashes near the expected threshold are ever kept in memory.

    Args:
        grids: the stream and the grid of each tensor.
        budget: how many entries may be kept.
        seed: in [0, 2^64).
    """
    numel = sum(grid.numel for _, grid in grids.values())
    if numel == 0 or budget <= 0:
        return {name: SeededUnits(seed, stream, 0, 0, 0) for name, (stream, _) in grids.items()}
    if budget >= numel:
        return {
            name: SeededUnits(seed, stream, HASH_RANGE, 0, grid.num_units) for name, (stream, grid) in grids.items()
        }
    share = budget / numel
    largest = max(math.prod(grid.tile) for _, grid in grids.values())
    # the sum of independent unit sizes: its variance is at most share * (1 - share) * numel * largest
    spread = _SIGMAS * math.sqrt(share * (1 - share) / numel * largest) + _SIGMAS * largest / numel
    while True:
        window = (max(0, int((share - spread) * HASH_RANGE)), min(HASH_RANGE, int((share + spread) * HASH_RANGE)))
        drawn = _draw_within(grids, window, budget=budget, seed=seed)
        if drawn is not None:
            return drawn
        spread *= 4


def _draw_within(
    grids: Mapping[str, tuple[int, UnitGrid]], window: _Window, *, budget: int, seed: int
) -> dict[str, SeededUnits] | None:
    """Return the rules, or None if the threshold is not inside the window."""
    low, high = window
    below_units, entries, near_hashes, near_sizes, near_owners = [], 0, [], [], []
    for owner, (stream, grid) in enumerate(grids.values()):
        below_units.append(0)
        for start, stop in chunk_bounds(grid.num_units, _CPU):
            units = torch.arange(start, stop)
            hashes = hash_positions(units, seed=seed, stream=stream)
            array = hashes.numpy()  # numpy compares and counts several times faster than torch 2.13
            below = array < low
            below_units[owner] += int(np.count_nonzero(below))
            entries += _count(grid, units, torch.from_numpy(below))
            near = torch.from_numpy(np.flatnonzero((array >= low) & (array <= high - 1)))
            near_hashes.append(hashes[near])
            near_sizes.append(grid.sizes_of(units[near]))
            near_owners.append(torch.full_like(near, owner))
    left = budget - entries
    hashes, order = torch.sort(torch.cat(near_hashes), stable=True)
    sizes, owners = torch.cat(near_sizes)[order], torch.cat(near_owners)[order]
    taken = int(torch.searchsorted(sizes.cumsum(0), left, right=True))
    if left < 0 or (taken == hashes.numel() and high < HASH_RANGE) or (taken == 0 and low > 0):
        return None
    threshold = int(hashes[taken - 1]) if taken else 0
    near_units = torch.bincount(owners[:taken], minlength=len(grids))
    ties = torch.bincount(owners[:taken][hashes[:taken] == threshold], minlength=len(grids))
    return {
        name: SeededUnits(seed, stream, threshold, int(ties[owner]), below_units[owner] + int(near_units[owner]))
        for owner, (name, (stream, _)) in enumerate(grids.items())
    }


def _count(grid: UnitGrid, units: Tensor, kept: Tensor) -> int:
    if grid.has_equal_units:
        return int(kept.count_nonzero()) * math.prod(grid.tile)
    return grid.count_entries(units[kept])
