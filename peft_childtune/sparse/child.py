"""The child of one weight: which of its units may change, listed or as a rule that draws them from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BudgetError, DeltaError
from .delta import check_positions
from .rng import HASH_RANGE, chunk_bounds, hash_positions
from .units import UnitGrid


@dataclass(frozen=True)
class SeededUnits:
    """A fixed random child: the units whose hash at step 0 is below `threshold`, and the first `ties` that equal it.

    Args:
        seed: in [0, 2^64), see `hash_positions`, like `stream`.
        stream: in [0, 2^63).
        threshold: in [0, 2^63].
        ties: how many units with exactly this hash are kept, lowest first.
        count: how many units this makes; checked when they are drawn.

    Raises:
        DeltaError: a number out of its range.
    """

    seed: int
    stream: int
    threshold: int
    ties: int
    count: int

    def __post_init__(self) -> None:
        _check_seed(self.seed, self.stream)
        if not 0 <= self.threshold <= HASH_RANGE:
            raise DeltaError(f"threshold={self.threshold} is out of range; hashes lie in [0, 2^63).")
        if self.ties and self.threshold == HASH_RANGE:
            raise DeltaError(f"threshold={self.threshold} with ties={self.ties}; no hash equals 2^63, so use ties=0.")
        if not 0 <= self.ties <= self.count:
            raise DeltaError(f"ties={self.ties} of count={self.count} units; use 0 <= ties <= count.")

    def draw(self, num_units: int, device: torch.device | str | None = None) -> Tensor:
        """Return the units, int64, strictly increasing, out of `num_units`; memory beside them stays bounded.

        Raises:
            DeltaError: the rule keeps another number of units than `count`.
        """
        target = torch.device("cpu" if device is None else device)
        found, drawn = [], 0
        for units in self._draw(num_units, target):
            drawn += units.numel()
            if drawn > self.count:  # no more than was promised is ever held
                break
            found.append(units)
        self._check_count(drawn, num_units)
        return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=target)

    def check(self, num_units: int) -> None:
        """Draw the units without keeping them.

        Raises:
            DeltaError: the rule keeps another number of units than `count`.
        """
        self._check_count(sum(units.numel() for units in self._draw(num_units, torch.device("cpu"))), num_units)

    def _draw(self, num_units: int, device: torch.device) -> Iterator[Tensor]:
        ties = self.ties
        for start, stop in chunk_bounds(num_units, device):
            hashes = hash_positions(torch.arange(start, stop, device=device), seed=self.seed, stream=self.stream)
            if ties:
                equal = (hashes == self.threshold).nonzero().flatten()[:ties]
                ties -= equal.numel()
                hashes[equal] = -1
            yield (hashes <= self.threshold - 1).nonzero().flatten() + start
        if ties:
            raise DeltaError(
                f"seed={self.seed}, stream={self.stream} finds {self.ties - ties} of {self.ties} ties among "
                f"{num_units} units; the record is damaged or belongs to another shape."
            )

    def _check_count(self, drawn: int, num_units: int) -> None:
        if drawn != self.count:
            raise DeltaError(
                f"seed={self.seed}, stream={self.stream} draws {drawn} of {num_units} units where "
                f"{self.count} were recorded; the record is damaged or belongs to another shape."
            )


@dataclass(frozen=True)
class ResampledUnits:
    """Every entry may change; at each optimizer step a Bernoulli mask of this density picks those that do.

    Args:
        seed: in [0, 2^64), see `bernoulli_mask`, like `stream` and `density`.
        stream: in [0, 2^63).
        density: in (0, 1].

    Raises:
        BudgetError: `density` is out of range.
        DeltaError: another number is.

    Source: Child-Tuning-F, Xu et al. 2021 (arXiv:2109.05687).
    """

    seed: int
    stream: int
    density: float

    def __post_init__(self) -> None:
        _check_seed(self.seed, self.stream)
        if not 0.0 < self.density <= 1.0:
            raise BudgetError(f"density={self.density!r} is out of range; use 0 < density <= 1.")


@dataclass(frozen=True, eq=False)
class TensorChild:
    """The child of one weight.

    Args:
        grid: how the weight is divided.
        units: the kept unit numbers (int64, strictly increasing), or a rule that draws them.

    Raises:
        DeltaError: units that do not fit the grid.

    Example:
        >>> child = TensorChild(UnitGrid((2, 3), "row"), torch.tensor([1]))
        >>> child.nnz, child.indices().tolist()
        (3, [3, 4, 5])
    """

    grid: UnitGrid
    units: Tensor | SeededUnits | ResampledUnits

    def __post_init__(self) -> None:
        if isinstance(self.units, Tensor):
            check_positions(self.units, limit=self.grid.num_units, what="units")
        elif isinstance(self.units, SeededUnits) and self.units.count > self.grid.num_units:
            raise DeltaError(
                f"count={self.units.count} of {self.grid.num_units} units; a child keeps no more than all."
            )

    @property
    def nnz(self) -> int:
        """Entries that may change."""
        if isinstance(self.units, ResampledUnits):
            return self.grid.numel
        if isinstance(self.units, SeededUnits):
            if self.grid.has_equal_units:
                high, wide = self.grid.tile
                return self.units.count * high * wide
            return self.grid.count_entries(self.units.draw(self.grid.num_units))
        return self.grid.count_entries(self.units)

    def indices(self, device: torch.device | str | None = None) -> Tensor:
        """Return the flat row-major positions that may change, int64, strictly increasing; all of them if resampled.

        Args:
            device: of the result; for listed units the device they are on, else the CPU, if not given.
        """
        if isinstance(self.units, ResampledUnits):
            return torch.arange(self.grid.numel, device=device)
        if isinstance(self.units, SeededUnits):
            return self.grid.expand(self.units.draw(self.grid.num_units, device))
        return self.grid.expand(self.units if device is None else self.units.to(device))


def _check_seed(seed: int, stream: int) -> None:
    if not 0 <= seed < 1 << 64:
        raise DeltaError(f"seed={seed} is out of range; use 0 <= seed < 2^64.")
    if not 0 <= stream < 1 << 63:
        raise DeltaError(f"stream={stream} is out of range; use 0 <= stream < 2^63.")
