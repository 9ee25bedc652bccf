"""Units of a weight against a table made entry by entry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_childtune.errors import ConfigError, DeltaError
from peft_childtune.sparse import UnitGrid

grids = st.builds(
    UnitGrid,
    st.lists(st.integers(0, 7), max_size=4).map(tuple),
    st.sampled_from(["element", "row", "column", "block"]),
    block_size=st.integers(1, 5),
    transposed=st.booleans(),
)


def table_of(grid: UnitGrid) -> np.ndarray:
    """The unit of every flat position, the slow way."""
    if len(grid.shape) < 2:
        return np.arange(math.prod(grid.shape))
    rows, columns = grid.shape[0], math.prod(grid.shape[1:])
    units = []
    for row in range(rows):
        for column in range(columns):
            by_row = row if not grid.transposed else column
            by_column = column if not grid.transposed else row
            beside = -(-columns // grid.block_size)
            tile = (row // grid.block_size) * beside + column // grid.block_size
            units.append(
                {"element": row * columns + column, "row": by_row, "column": by_column, "block": tile}[
                    grid.granularity
                ]
            )
    return np.array(units, dtype=np.int64)


@given(grids)
def test_unit_sizes_count_the_entries_of_each_unit(grid):
    table = table_of(grid)
    expected = np.bincount(table, minlength=grid.num_units) if table.size else np.zeros(0)
    assert grid.unit_sizes().tolist() == expected.tolist()


@given(grids, st.data())
@settings(deadline=None)
def test_expanding_units_gives_all_their_entries_in_order(grid, data):
    units = sorted(data.draw(st.sets(st.integers(0, grid.num_units - 1)))) if grid.num_units else []
    expected = np.flatnonzero(np.isin(table_of(grid), units))
    assert grid.expand(torch.tensor(units, dtype=torch.int64)).tolist() == expected.tolist()


@given(grids, st.data())
@settings(deadline=None)
def test_contracting_undoes_expanding(grid, data):
    units = sorted(data.draw(st.sets(st.integers(0, grid.num_units - 1)))) if grid.num_units else []
    assert grid.contract(grid.expand(torch.tensor(units, dtype=torch.int64))).tolist() == units


@given(grids, st.data())
@settings(deadline=None)
def test_counting_entries_agrees_with_expanding(grid, data):
    units = sorted(data.draw(st.sets(st.integers(0, grid.num_units - 1)))) if grid.num_units else []
    tensor = torch.tensor(units, dtype=torch.int64)
    assert grid.count_entries(tensor) == grid.expand(tensor).numel()


@given(grids)
@settings(deadline=None)
def test_a_unit_scores_the_mean_of_its_entries(grid):
    scores = torch.randn(grid.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table, flat = table_of(grid), scores.flatten().numpy()
    expected = torch.tensor([flat[table == unit].mean() for unit in range(grid.num_units)], dtype=torch.float64)
    torch.testing.assert_close(grid.unit_scores(scores), expected, rtol=1e-12, atol=1e-12)  # order of summation


def test_half_precision_scores_are_averaged_in_fp32():
    scores = torch.full((1, 4096), 0.1, dtype=torch.bfloat16)
    mean = UnitGrid((1, 4096), "row").unit_scores(scores)
    torch.testing.assert_close(mean, scores[0, :1].float(), rtol=1e-6, atol=0)  # fp32 rounding of 4096 equal terms


@pytest.mark.parametrize(
    ("granularity", "transposed", "expected"),
    [("row", False, [3, 4, 5]), ("row", True, [1, 4]), ("column", False, [1, 4]), ("column", True, [3, 4, 5])],
)
def test_rows_are_output_neurons_also_when_transposed(granularity, transposed, expected):
    grid = UnitGrid((2, 3), granularity, transposed=transposed)
    assert grid.expand(torch.tensor([1])).tolist() == expected


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
@pytest.mark.parametrize("shape", [(), (5,)])
def test_below_two_dimensions_every_entry_is_a_unit(shape, granularity):
    assert UnitGrid(shape, granularity, block_size=3).num_units == math.prod(shape)


def test_a_convolution_is_read_as_one_row_per_output_channel():
    assert UnitGrid((4, 3, 2, 2), "row").expand(torch.tensor([2])).tolist() == list(range(24, 36))


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_a_unit_with_a_missing_entry_is_refused(granularity):
    grid = UnitGrid((4, 4), granularity, block_size=2)
    indices = grid.expand(torch.tensor([1]))[1:]
    with pytest.raises(DeltaError, match="give whole units"):
        grid.contract(indices)


@pytest.mark.parametrize("indices", [[1, 0], [0, 0], [16], [-1]])
def test_positions_that_are_no_indices_are_refused(indices):
    with pytest.raises(DeltaError):
        UnitGrid((4, 4), "row").contract(torch.tensor(indices))


def test_the_block_size_of_other_granularities_does_not_make_grids_differ():
    assert UnitGrid((4, 4), "row", block_size=7) == UnitGrid((4, 4), "row")


@pytest.mark.parametrize("options", [{"granularity": "head"}, {"granularity": "block", "block_size": 0}])
def test_options_without_meaning_are_refused(options):
    with pytest.raises(ConfigError):
        UnitGrid((4, 4), **options)


def test_positions_beyond_2_to_the_31_are_exact():
    grid = UnitGrid((70000, 70000), "column")
    indices = grid.expand(torch.tensor([69999]))
    assert indices[-1].item() == 70000 * 70000 - 1
