"""Budgets and scopes of scored and random children against slow selection."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_childtune.errors import BudgetError, ConfigError, ScoreError
from peft_childtune.sparse import (
    SeededUnits,
    UnitGrid,
    hash_positions,
    select_children,
    select_random_children,
)

SHAPES = {"a.weight": (6, 10), "a.bias": (6,), "b.weight": (9, 7), "b.bias": (9,), "empty": (0, 4)}
GROUPS = {name: name[0] for name in SHAPES}
MEMBERS = {
    "global": [list(SHAPES)],
    "layer": [["a.weight", "a.bias"], ["b.weight", "b.bias"], ["empty"]],
    "tensor": [[name] for name in SHAPES],
}
MANY = 60


def grids_of(granularity="element", block_size=4, transposed=False, shapes=SHAPES):
    return {n: UnitGrid(s, granularity, block_size=block_size, transposed=transposed) for n, s in shapes.items()}


def scores_of(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    # few different numbers, so that there are ties
    return {name: torch.randint(0, 9, shape, generator=generator).float() for name, shape in shapes.items()}


def take_in_order(ranking, grids, budget):
    """Units of a ranking [(rank, tensor order, unit)] up to the first that does not fit the budget."""
    names, kept, used = list(grids), {name: [] for name in grids}, 0
    for _, order, unit in sorted(ranking):
        size = int(grids[names[order]].unit_sizes()[unit])
        if used + size > budget:
            break
        used += size
        kept[names[order]].append(unit)
    return {name: sorted(units) for name, units in kept.items()}


def slow_selection(ranks, grids, density, scope):
    """`ranks[name][unit]`: lower is better."""
    order, kept = {name: i for i, name in enumerate(grids)}, {}
    for names in MEMBERS[scope]:
        budget = round(density * sum(math.prod(grids[name].shape) for name in names))
        ranking = [(rank, order[name], unit) for name in names for unit, rank in enumerate(ranks[name])]
        selection = take_in_order(ranking, grids, budget)
        kept |= {name: selection[name] for name in names}
    return kept


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
@pytest.mark.parametrize("density", [0.11, 0.3, 0.5, 1.0])
def test_scored_children_hold_the_best_units_that_fit(scope, granularity, density):
    grids, scores = grids_of(granularity), scores_of()
    children = select_children(scores, grids=grids, density=density, scope=scope, groups=GROUPS)
    ranks = {name: (-grids[name].unit_scores(scores[name])).tolist() for name in grids}
    assert {n: c.units.tolist() for n, c in children.items()} == slow_selection(ranks, grids, density, scope)


@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
@pytest.mark.parametrize("density", [0.11, 0.3, 0.5, 1.0])
def test_random_children_hold_the_units_of_the_smallest_hashes(scope, granularity, density):
    grids = grids_of(granularity)
    children = select_random_children(grids=grids, density=density, scope=scope, groups=GROUPS, seed=5)
    ranks = {
        name: hash_positions(torch.arange(grid.num_units), seed=5, stream=stream).tolist()
        for stream, (name, grid) in enumerate(grids.items())
    }
    drawn = {name: child.grid.contract(child.indices()).tolist() for name, child in children.items()}
    assert drawn == slow_selection(ranks, grids, density, scope)


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.3, 0.999])
def test_a_large_random_child_keeps_exactly_its_budget(density):
    shapes = {"a": (700, 300), "b": (1000,), "c": (300, 400)}
    children = select_random_children(grids=grids_of(shapes=shapes), density=density, seed=1)
    assert sum(child.indices().numel() for child in children.values()) == round(density * 331_000)


def test_random_children_of_different_seeds_differ():
    first, second = (select_random_children(grids=grids_of(), density=0.3, seed=seed) for seed in (0, 1))
    assert first["a.weight"].indices().tolist() != second["a.weight"].indices().tolist()


@pytest.mark.parametrize("seed", [-1, 2**64 + 3])
def test_any_integer_is_a_seed(seed):
    children = select_random_children(grids=grids_of(), density=0.3, seed=seed)
    assert children["a.weight"].units.seed == seed % 2**64


def test_random_children_are_kept_as_a_rule():
    children = select_random_children(grids=grids_of("row"), density=0.3, seed=0)
    assert all(isinstance(child.units, SeededUnits) for child in children.values())


def test_equal_hashes_are_drawn_lowest_first(monkeypatch):
    import peft_childtune.sparse.child as child_module
    import peft_childtune.sparse.draw as draw_module

    def coarse(positions, *, seed, stream, step=0):
        return hash_positions(positions, seed=seed, stream=stream, step=step) >> 61 << 61

    monkeypatch.setattr(child_module, "hash_positions", coarse)
    monkeypatch.setattr(draw_module, "hash_positions", coarse)
    grids = grids_of(shapes={"a": (20,), "b": (30,)})
    children = select_random_children(grids=grids, density=0.5, seed=0)
    ranks = [
        (int(rank), order, unit)
        for order, grid in enumerate(grids.values())
        for unit, rank in enumerate(coarse(torch.arange(grid.num_units), seed=0, stream=order))
    ]
    expected = take_in_order(ranks, grids, 25)
    assert {name: child.indices().tolist() for name, child in children.items()} == expected


def slow_row_selection(ranks, neurons, inputs, budget, density):
    """Ranks (neurons, inputs) as nested lists, lower is better; returns {(neuron, input)}."""
    each = math.floor(density * inputs)
    ordered = [sorted(range(inputs), key=lambda entry, row=row: (row[entry], entry)) for row in ranks]
    kept = {(n, entry) for n in range(neurons) for entry in ordered[n][:each]}
    if each < inputs:
        rest = sorted(range(neurons), key=lambda n: (ranks[n][ordered[n][each]], n))
        kept |= {(n, ordered[n][each]) for n in rest[: budget - len(kept)]}
    return kept


@pytest.mark.parametrize("transposed", [False, True])
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 99))
@settings(deadline=None, max_examples=MANY)
def test_a_row_scope_gives_every_output_neuron_its_share(transposed, rows, columns, density, seed):
    if round(density * rows * columns) == 0:
        return
    scores = scores_of(seed, {"w": (rows, columns)})
    grids = grids_of(transposed=transposed, shapes={"w": (rows, columns)})
    child = select_children(scores, grids=grids, density=density, scope="row")["w"]
    matrix = scores["w"].t() if transposed else scores["w"]
    kept = slow_row_selection((-matrix).tolist(), *matrix.shape, round(density * rows * columns), density)
    expected = sorted((entry * columns + n) if transposed else (n * columns + entry) for n, entry in kept)
    assert child.indices().tolist() == expected


def test_a_random_row_scope_gives_every_output_neuron_its_share():
    child = select_random_children(grids=grids_of(shapes={"w": (40, 25)}), density=0.3, scope="row", seed=0)["w"]
    ranks = hash_positions(torch.arange(1000), seed=0, stream=0).view(40, 25).tolist()
    expected = slow_row_selection(ranks, 40, 25, 300, 0.3)
    assert child.indices().tolist() == sorted(n * 25 + entry for n, entry in expected)


def test_a_row_scope_of_several_chunks_is_the_same(monkeypatch):
    import peft_childtune.sparse.rows as rows_module

    scores, grids = scores_of(3, {"w": (50, 20)}), grids_of(shapes={"w": (50, 20)})
    whole = select_children(scores, grids=grids, density=0.33, scope="row")["w"].indices()
    monkeypatch.setattr(rows_module, "_CHUNK", 60)
    assert torch.equal(select_children(scores, grids=grids, density=0.33, scope="row")["w"].indices(), whole)


def test_a_row_scope_gives_a_bias_a_budget_of_its_own():
    scores = {"w": torch.rand(4, 10), "b": torch.tensor([0.0, 3.0, 2.0, 1.0])}
    grids = grids_of(shapes={"w": (4, 10), "b": (4,)})
    children = select_children(scores, grids=grids, density=0.5, scope="row")
    assert children["b"].indices().tolist() == [1, 2]


@pytest.mark.parametrize("select", ["scored", "random"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, BudgetError, "0 < density <= 1"),
        ({"density": 1.5}, BudgetError, "0 < density <= 1"),
        ({"density": 0.001}, BudgetError, r"use density >= 0\.0073"),
        ({"density": 0.001, "scope": "tensor"}, BudgetError, r"use density >= 0\.016"),
        ({"density": 0.3, "scope": "block"}, ConfigError, "scope='block' is unknown"),
        ({"density": 0.3, "scope": "layer"}, ConfigError, "needs the group of every tensor"),
        ({"density": 0.3, "scope": "layer", "groups": {"a.weight": "a"}}, ConfigError, "a.bias"),
        ({"density": 0.3, "scope": "row", "granularity": "row"}, ConfigError, "granularity='element'"),
    ],
)
def test_budgets_without_meaning_are_refused(select, options, error, message):
    options = dict(options)
    grids = grids_of(options.pop("granularity", "element"))
    with pytest.raises(error, match=message):
        if select == "scored":
            select_children(scores_of(), grids=grids, **options)
        else:
            select_random_children(grids=grids, seed=0, **options)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "block"])
@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_the_density_that_the_error_proposes_works(granularity, scope):
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    grids, options = grids_of(granularity, shapes=shapes), {"scope": scope, "groups": GROUPS}
    with pytest.raises(BudgetError) as refused:
        select_random_children(grids=grids, density=1e-6, seed=0, **options)
    proposed = float(str(refused.value).split("density >= ")[1].split()[0])
    children = select_random_children(grids=grids, density=proposed, seed=0, **options)
    assert any(child.nnz for child in children.values())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"w": torch.ones(3, 2)}, "w: scores have shape"),
        ({"w": torch.ones(2, 3, dtype=torch.int64)}, "w: scores have dtype"),
        ({"v": torch.ones(2, 3)}, "v: has scores or a grid but not both"),
        ({}, "w: has scores or a grid but not both"),
    ],
)
def test_scores_that_do_not_fit_the_weights_are_refused(scores, message):
    with pytest.raises(ScoreError, match=message):
        select_children(scores, grids={"w": UnitGrid((2, 3))}, density=0.5)


@pytest.mark.parametrize(("granularity", "scope"), [("element", "global"), ("row", "global"), ("element", "row")])
def test_a_nan_score_is_refused_with_its_name(granularity, scope):
    scores = {"w": torch.ones(2, 3)}
    scores["w"][1, 1] = math.nan
    with pytest.raises(ScoreError, match="^w: a score is NaN"):
        select_children(scores, grids={"w": UnitGrid((2, 3), granularity)}, density=0.5, scope=scope)
