"""The units a child is made of: single entries, output neurons, inputs, or square tiles of a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, DeltaError
from .delta import check_positions

Granularity = Literal["element", "row", "column", "block"]


@dataclass(frozen=True)
class UnitGrid:
    """How one weight is divided into units, numbered from 0.

    The weight is read as a matrix `(shape[0], prod(shape[1:]))`. A `row` is one output neuron, a `column` one input: a
    matrix row and a matrix column, or the other way round if `transposed` (GPT-2's `Conv1D` stores `(in, out)`).
    A `block` is a square tile of the matrix as stored, cut off at the edges, numbered row-major. In weights with fewer
    than two dimensions every entry is a unit, whatever the granularity.

    Args:
        shape: the weight's shape.
        granularity: what one unit is.
        block_size: entries on a tile's side; read by `block` only, and set to 1 for all others.
        transposed: whether the output neurons are the matrix's columns.

    Raises:
        ConfigError: an unknown granularity, or a `block_size` below 1.

    Example:
        >>> grid = UnitGrid((3, 4), "block", block_size=2)
        >>> grid.num_units, grid.unit_sizes().tolist()
        (4, [4, 4, 2, 2])
        >>> grid.expand(torch.tensor([1])).tolist()
        [2, 3, 6, 7]
    """

    shape: tuple[int, ...]
    granularity: Granularity = "element"
    block_size: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ConfigError(
                f"granularity={self.granularity!r} is unknown; use one of {', '.join(get_args(Granularity))}."
            )
        if self.granularity == "block" and self.block_size < 1:
            raise ConfigError(f"block_size={self.block_size} is no tile; use block_size >= 1.")
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        # one spelling per grid, so that a decoded grid equals the encoded one
        object.__setattr__(self, "block_size", int(self.block_size) if self.granularity == "block" else 1)

    @property
    def numel(self) -> int:
        """All entries of the weight."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`(shape[0], prod(shape[1:]))`; `(1, numel)` below two dimensions."""
        if len(self.shape) < 2:
            return 1, self.numel
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def tile(self) -> tuple[int, int]:
        """Matrix rows and columns of one whole unit."""
        rows, columns = self.matrix_shape
        if len(self.shape) < 2 or self.granularity == "element":
            return 1, 1
        if self.granularity == "block":
            return self.block_size, self.block_size
        return (1, max(columns, 1)) if (self.granularity == "row") != self.transposed else (max(rows, 1), 1)

    @property
    def units_shape(self) -> tuple[int, int]:
        """How many units lie below and beside one another; units are numbered row-major in this shape."""
        (rows, columns), (high, wide) = self.matrix_shape, self.tile
        return -(-rows // high), -(-columns // wide)

    @property
    def num_units(self) -> int:
        """How many units the weight has; 0 for a weight without entries."""
        return math.prod(self.units_shape) if self.numel else 0

    @property
    def has_equal_units(self) -> bool:
        """Whether all units have the same number of entries."""
        (rows, columns), (high, wide) = self.matrix_shape, self.tile
        return rows % high == 0 and columns % wide == 0

    def unit_sizes(self) -> Tensor:
        """Return the entries in each unit, int64, `(num_units,)`."""
        return self.sizes_of(torch.arange(self.num_units))

    def count_entries(self, units: Tensor) -> int:
        """Return how many entries `units` hold together, without expanding them."""
        if self.has_equal_units:
            return int(units.numel() * math.prod(self.tile))
        return int(self.sizes_of(units).sum())

    def expand(self, units: Tensor) -> Tensor:
        """Return the flat row-major indices of all entries in `units`, int64, strictly increasing.

        Args:
            units: int64, `(n,)`, strictly increasing unit numbers.
        """
        high, wide = self.tile
        if high == wide == 1 or units.numel() == 0:
            return units.clone()
        (rows, columns), (_, across) = self.matrix_shape, self.units_shape
        device = units.device
        # the units in reach of each matrix row: a run of `units`, since they are sorted by unit row first
        unit_row = units // across
        per_row = torch.bincount(unit_row, minlength=self.units_shape[0])
        first = per_row.cumsum(0) - per_row
        row_unit_row = torch.arange(rows, device=device) // high
        pieces = per_row[row_unit_row]
        piece_row = torch.repeat_interleave(torch.arange(rows, device=device), pieces)
        piece_unit = units[_count_within(pieces) + torch.repeat_interleave(first[row_unit_row], pieces)]
        left = (piece_unit % across) * wide
        lengths = (columns - left).clamp_(max=wide)
        return torch.repeat_interleave(piece_row * columns + left, lengths) + _count_within(lengths)

    def contract(self, indices: Tensor) -> Tensor:
        """Return the units whose union `indices` is; the inverse of `expand`.

        Args:
            indices: int64, `(n,)`, flat row-major positions, strictly increasing.

        Raises:
            DeltaError: positions out of order or range, or a unit that is only partly there.

        Example:
            >>> UnitGrid((2, 3), "row").contract(torch.tensor([3, 4, 5])).tolist()
            [1]
        """
        check_positions(indices, limit=self.numel, what="indices")
        high, wide = self.tile
        if high == wide == 1:
            return indices.clone()
        columns, across = self.matrix_shape[1], self.units_shape[1]
        owner = (indices // columns) // high * across + (indices % columns) // wide
        units: Tensor
        units, counts = torch.unique(owner, return_counts=True)
        broken = (counts != self.sizes_of(units)).nonzero().flatten()
        if broken.numel():
            at = int(broken[0])
            raise DeltaError(
                f"{self.granularity} {int(units[at])} of {self.shape} has {int(counts[at])} of its "
                f"{int(self.sizes_of(units[at : at + 1]))} entries; give whole units or use granularity='element'."
            )
        return units

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return the mean score of each unit, `(num_units,)`, fp32 (fp64 for fp64 scores).

        Args:
            scores: the weight's shape, floating point.
        """
        wide_dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        (rows, columns), (high, wide), (down, across) = self.matrix_shape, self.tile, self.units_shape
        if high == wide == 1 or self.numel == 0:
            return scores.reshape(-1).to(wide_dtype)
        matrix = scores.reshape(rows, columns).to(wide_dtype)
        if not self.has_equal_units:
            padded = matrix.new_zeros(down * high, across * wide)
            padded[:rows, :columns] = matrix
            matrix = padded
        sums = matrix.view(down, high, across, wide).sum(dim=(1, 3)).view(-1)
        means: Tensor = sums / self.unit_sizes().to(sums)
        return means

    def sizes_of(self, units: Tensor) -> Tensor:
        """Return the entries in each of `units`, int64."""
        (rows, columns), (high, wide) = self.matrix_shape, self.tile
        if self.has_equal_units:
            return torch.full_like(units, high * wide)
        across = self.units_shape[1]
        below = (rows - units // across * high).clamp_(max=high)
        beside = (columns - units % across * wide).clamp_(max=wide)
        sizes: Tensor = below * beside
        return sizes


def _count_within(lengths: Tensor) -> Tensor:
    """Return `0..length-1` for each length, one run after the other."""
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.arange(starts.numel(), device=lengths.device) - starts
