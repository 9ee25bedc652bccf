"""Selects the child network: from scores, or at random from a seed, within a budget shared over a scope."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError, ScoreError
from .budget import Scope, empty_budget_error, share_of
from .child import TensorChild
from .draw import draw_units
from .rng import hash_positions
from .rows import select_per_neuron
from .topk import select_topk
from .units import UnitGrid

__all__ = ["budgets_of", "select_children", "select_random_children", "select_topk"]


def select_children(
    scores: Mapping[str, Tensor],
    *,
    grids: Mapping[str, UnitGrid],
    density: float,
    scope: Scope = "global",
    groups: Mapping[str, str] | None = None,
) -> dict[str, TensorChild]:
    """Return the child of highest score that fits the budget.

    Single entries fill the budget exactly. Larger units are taken by descending mean score, up to the first that does
    not fit any more. Among equals the earlier tensor of `grids` and the lower unit come first.

    Args:
        scores: one per grid, the weight's shape, floating point; NaN is refused.
        grids: how each weight is divided into units.
        density: kept fraction of all entries that share a budget, in (0, 1].
        scope: what shares a budget: all tensors, each of `groups`, each tensor, or the output neurons of each tensor
            (`row`, for element granularity; 1-D tensors share one budget).
        groups: the group of each tensor, for `scope="layer"`.

    Returns:
        One child per grid, empty ones included, units on the device of the scores.

    Raises:
        BudgetError: nothing at all would be kept, or `density` is out of range.
        ConfigError: a scope that does not go with the granularity, or without its groups.
        ScoreError: scores that are missing, misshapen or NaN.

    Example:
        >>> scores = {"w": torch.tensor([[1.0, 9.0], [8.0, 2.0]]), "b": torch.tensor([5.0, 0.0])}
        >>> grids = {name: UnitGrid(tuple(s.shape)) for name, s in scores.items()}
        >>> {name: c.indices().tolist() for name, c in select_children(scores, grids=grids, density=0.5).items()}
        {'w': [1, 2], 'b': [0]}

    Source: Child-Tuning-D, Xu et al. 2021 (arXiv:2109.05687), with an exact budget.
    """
    _check_scores(scores, grids)
    selected: dict[str, Tensor] = {}
    for names in _budget_groups(grids, density=density, scope=scope, groups=groups):
        budget = share_of(density, sum(grids[name].numel for name in names))
        members = {name: scores[name] for name in names}
        if scope == "row" and len(grids[names[0]].shape) > 1:
            selected |= {name: _score_neurons(name, scores[name], grids[name], density) for name in names}
        elif all(grids[name].tile == (1, 1) for name in names):
            selected |= select_topk(members, budget)
        else:
            selected |= _select_units(members, grids=grids, budget=budget)
    children = {name: TensorChild(grids[name], selected[name]) for name in grids}
    _refuse_empty(children, grids=grids, density=density, scope=scope, groups=groups)
    return children


def select_random_children(
    *,
    grids: Mapping[str, UnitGrid],
    density: float,
    scope: Scope = "global",
    groups: Mapping[str, str] | None = None,
    seed: int,
) -> dict[str, TensorChild]:
    """Return a random child within the same budgets as `select_children`: the units of the smallest hashes.

    Args:
        grids: how each weight is divided; a tensor's place in this mapping is its stream.
        density: as in `select_children`, like `scope` and `groups`.
        scope: see `density`.
        groups: see `density`.
        seed: any integer; taken modulo 2^64.

    Returns:
        One child per grid, kept as a seed; for `scope="row"` as a list of units.

    Raises:
        BudgetError: nothing at all would be kept, or `density` is out of range.
        ConfigError: a scope that does not go with the granularity, or without its groups.

    Example:
        >>> children = select_random_children(grids={"w": UnitGrid((10, 10))}, density=0.25, seed=0)
        >>> children["w"].nnz
        25
    """
    seed %= 1 << 64
    streams = {name: stream for stream, name in enumerate(grids)}
    children: dict[str, TensorChild] = {}
    for names in _budget_groups(grids, density=density, scope=scope, groups=groups):
        if scope == "row" and len(grids[names[0]].shape) > 1:
            for name in names:
                units = _draw_neurons(grids[name], density=density, seed=seed, stream=streams[name])
                children[name] = TensorChild(grids[name], units)
            continue
        budget = share_of(density, sum(grids[name].numel for name in names))
        members = {name: (streams[name], grids[name]) for name in names}
        drawn = draw_units(members, budget=budget, seed=seed)
        children |= {name: TensorChild(grids[name], units) for name, units in drawn.items()}
    children = {name: children[name] for name in grids}
    _refuse_empty(children, grids=grids, density=density, scope=scope, groups=groups)
    return children


def budgets_of(
    grids: Mapping[str, UnitGrid], *, density: float, scope: Scope = "global", groups: Mapping[str, str] | None = None
) -> list[tuple[list[str], int]]:
    """Return which tensors share each budget, and how many entries a child keeps of it, before anything is chosen.

    Exact where all units that share a budget are of one size. Elsewhere (whole rows next to the single entries of
    biases, tiles cut off at an edge) a choice may keep less than one of the largest units fewer.

    Args:
        grids: as in `select_children`, like the others.
        density: see `grids`.
        scope: see `grids`.
        groups: see `grids`.

    Raises:
        BudgetError: nothing at all would be kept, or `density` is out of range.
        ConfigError: a scope that does not go with the granularity, or without its groups.

    Example:
        >>> budgets_of({"w": UnitGrid((10, 10), "row"), "v": UnitGrid((5, 10), "row")}, density=0.25)
        [(['w', 'v'], 30)]
    """
    budgets = []
    for names in _budget_groups(grids, density=density, scope=scope, groups=groups):
        budget = share_of(density, sum(grids[name].numel for name in names))
        sizes = {
            math.prod(grids[name].tile) if grids[name].has_equal_units else 1 for name in names if grids[name].numel
        }
        size = sizes.pop() if len(sizes) == 1 else 1
        budgets.append((names, budget // size * size))
    if not any(nnz for _, nnz in budgets):
        raise _empty_error(grids, density=density, scope=scope, groups=groups)
    return budgets


def _budget_groups(
    grids: Mapping[str, UnitGrid], *, density: float, scope: Scope, groups: Mapping[str, str] | None
) -> list[list[str]]:
    """Return the names that share each budget, in the order of `grids`."""
    share_of(density, 0)  # refuses a density out of range, whatever the grids
    if scope not in get_args(Scope):
        raise ConfigError(f"scope={scope!r} is unknown; use one of {', '.join(get_args(Scope))}.")
    if scope == "global":
        return [list(grids)] if grids else []
    if scope == "layer":
        missing = [name for name in grids if groups is None or name not in groups]
        if groups is None or missing:
            raise ConfigError(f"{missing[:1]}: scope='layer' needs the group of every tensor; give it in `groups`.")
        by_group: dict[str, list[str]] = {}
        for name in grids:
            by_group.setdefault(groups[name], []).append(name)
        return list(by_group.values())
    if scope == "row":
        for name, grid in grids.items():
            if grid.granularity != "element":
                raise ConfigError(
                    f"{name}: scope='row' with granularity={grid.granularity!r}; a budget per output neuron is "
                    f"counted in single entries, so use granularity='element'."
                )
    return [[name] for name in grids]


def _select_units(scores: Mapping[str, Tensor], *, grids: Mapping[str, UnitGrid], budget: int) -> dict[str, Tensor]:
    """Return the longest run of units, best mean score first, whose entries fit the budget."""
    means = {name: grids[name].unit_scores(tensor) for name, tensor in scores.items()}
    for name, mean in means.items():
        if bool(mean.isnan().any()):
            raise ScoreError(f"{name}: a score is NaN; check the loss and the data for overflow before selecting.")
    order = torch.sort(torch.cat([mean.cpu() for mean in means.values()]), descending=True, stable=True).indices
    sizes = torch.cat([grids[name].unit_sizes() for name in scores])
    taken = int(torch.searchsorted(sizes[order].cumsum(0), budget, right=True))
    chosen = torch.zeros(order.numel(), dtype=torch.bool)
    chosen[order[:taken]] = True
    parts = torch.split(chosen, [grids[name].num_units for name in scores])
    return {name: part.nonzero().flatten().to(scores[name].device) for name, part in zip(scores, parts, strict=True)}


def _score_neurons(name: str, scores: Tensor, grid: UnitGrid, density: float) -> Tensor:
    if scores.numel() and bool(scores.max().isnan()):
        raise ScoreError(f"{name}: a score is NaN; check the loss and the data for overflow before selecting.")
    matrix = scores.detach().reshape(grid.matrix_shape)
    matrix = matrix.T if grid.transposed else matrix
    chosen = select_per_neuron(grid, density=density, read=lambda start, stop: matrix[start:stop])
    return chosen.to(scores.device)


def _draw_neurons(grid: UnitGrid, *, density: float, seed: int, stream: int) -> Tensor:
    positions = torch.arange(grid.numel).reshape(grid.matrix_shape)
    positions = positions.T if grid.transposed else positions
    # the smallest hash first; a hash has 63 bits, so its negative is exact
    return select_per_neuron(
        grid,
        density=density,
        read=lambda start, stop: hash_positions(positions[start:stop], seed=seed, stream=stream).neg_(),
    )


def _check_scores(scores: Mapping[str, Tensor], grids: Mapping[str, UnitGrid]) -> None:
    differing = sorted(set(scores) ^ set(grids))
    if differing:
        raise ScoreError(f"{differing[0]}: has scores or a grid but not both; give one of each for every tensor.")
    for name, grid in grids.items():
        if tuple(scores[name].shape) != grid.shape:
            raise ScoreError(f"{name}: scores have shape {tuple(scores[name].shape)}, the weight {grid.shape}.")
        if not scores[name].is_floating_point():
            raise ScoreError(f"{name}: scores have dtype {scores[name].dtype}; give a floating point dtype.")


def _refuse_empty(
    children: Mapping[str, TensorChild],
    *,
    grids: Mapping[str, UnitGrid],
    density: float,
    scope: Scope,
    groups: Mapping[str, str] | None,
) -> None:
    def is_empty(child: TensorChild) -> bool:
        return (child.units.numel() if isinstance(child.units, Tensor) else child.units.count) == 0  # type: ignore[union-attr]

    if all(is_empty(child) for child in children.values()):
        raise _empty_error(grids, density=density, scope=scope, groups=groups)


def _empty_error(
    grids: Mapping[str, UnitGrid], *, density: float, scope: Scope, groups: Mapping[str, str] | None
) -> BudgetError:
    # the budget that needs the least density for one unit of any of its tensors, the largest to be on the safe side
    best = (0, 1)
    for names in _budget_groups(grids, density=density, scope=scope, groups=groups):
        numel = sum(grids[name].numel for name in names)
        needed = max((grids[name].tile[0] * grids[name].tile[1] for name in names if grids[name].numel), default=1)
        best = max(best, (numel, needed), key=lambda pair: pair[0] / pair[1])
    unit = next((grid.granularity for grid in grids.values()), "weight")
    return empty_budget_error(density, numel=best[0], needed=best[1], unit=unit)
