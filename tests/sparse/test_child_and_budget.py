"""The child of one weight, and the size of a budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_childtune.errors import BudgetError, DeltaError
from peft_childtune.sparse import (
    ResampledUnits,
    SeededUnits,
    TensorChild,
    UnitGrid,
    budget_for,
    hash_positions,
    select_random_children,
)


@pytest.mark.parametrize(("density", "numel", "expected"), [(0.1, 1000, 100), (0.3, 5, 2), (1.0, 7, 7), (0.5, 0, 0)])
def test_a_budget_is_the_rounded_share(density, numel, expected):
    assert budget_for(density, numel) == expected


def test_a_budget_of_nothing_names_a_density_that_works():
    with pytest.raises(BudgetError, match=r"density=0\.001 keeps 0 of 300 weights; use density >= 0\.0034"):
        budget_for(0.001, 300)


@given(st.integers(1, 10**9))
def test_the_proposed_density_keeps_something(numel):
    with pytest.raises(BudgetError) as refused:
        budget_for(1e-12, numel)
    assert budget_for(float(str(refused.value).split("density >= ")[1].split()[0]), numel) >= 1


@pytest.mark.parametrize("density", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(BudgetError, match="0 < density <= 1"):
        budget_for(density, 100)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
def test_nnz_counts_the_indices(granularity):
    grid = UnitGrid((5, 7), granularity, block_size=3)
    for units in (torch.tensor([0, 3]), select_random_children(grids={"w": grid}, density=0.6, seed=0)["w"].units):
        child = TensorChild(grid, units)
        assert child.nnz == child.indices().numel()


def test_every_entry_of_a_resampled_child_may_change():
    child = TensorChild(UnitGrid((2, 3)), ResampledUnits(0, 0, 0.3))
    assert (child.nnz, child.indices().tolist()) == (6, list(range(6)))


def test_seeded_units_are_those_below_the_threshold():
    hashes = hash_positions(torch.arange(200_000), seed=3, stream=9)
    threshold = 2**61
    expected = (hashes < threshold).nonzero().flatten()
    units = SeededUnits(3, 9, threshold, 0, expected.numel())
    assert torch.equal(units.draw(200_000), expected)


def test_seeded_units_that_do_not_add_up_are_refused():
    with pytest.raises(DeltaError, match="were recorded"):
        TensorChild(UnitGrid((100,)), SeededUnits(0, 0, 2**61, 0, 99)).indices()


@pytest.mark.parametrize(
    "make",
    [
        lambda: SeededUnits(-1, 0, 0, 0, 0),
        lambda: SeededUnits(2**64, 0, 0, 0, 0),
        lambda: SeededUnits(0, -1, 0, 0, 0),
        lambda: SeededUnits(0, 0, 2**63 + 1, 0, 0),
        lambda: SeededUnits(0, 0, 2**63, 1, 1),
        lambda: SeededUnits(0, 0, 0, 2, 1),
        lambda: ResampledUnits(0, 2**63, 0.5),
        lambda: TensorChild(UnitGrid((4,)), SeededUnits(0, 0, 0, 0, 5)),
        lambda: TensorChild(UnitGrid((4,)), torch.tensor([4])),
        lambda: TensorChild(UnitGrid((4,)), torch.tensor([1, 1])),
        lambda: TensorChild(UnitGrid((4, 4), "row"), torch.tensor([4])),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(DeltaError):
        make()


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan")])
def test_a_resampled_density_out_of_range_is_refused(density):
    with pytest.raises(BudgetError):
        ResampledUnits(0, 0, density)
