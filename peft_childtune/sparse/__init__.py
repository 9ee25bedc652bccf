"""Tensor arithmetic of child networks: deltas, units, budgets, selection and random masks. Pure functions only."""

from .budget import Scope, budget_for
from .child import ResampledUnits, SeededUnits, TensorChild
from .delta import SparseDelta, compose, compose_entries
from .rng import bernoulli_mask, hash_positions
from .select import budgets_of, select_children, select_random_children
from .topk import select_topk
from .units import Granularity, UnitGrid

__all__ = [
    "Granularity",
    "ResampledUnits",
    "Scope",
    "SeededUnits",
    "SparseDelta",
    "TensorChild",
    "UnitGrid",
    "bernoulli_mask",
    "budget_for",
    "budgets_of",
    "compose",
    "compose_entries",
    "hash_positions",
    "select_children",
    "select_random_children",
    "select_topk",
]
