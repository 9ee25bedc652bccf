"""How many entries a child may keep, and over what the budget is shared."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from ..errors import BudgetError

Scope = Literal["global", "layer", "tensor", "row"]


def budget_for(density: float, numel: int) -> int:
    """Return how many of `numel` entries a child of this density keeps: the product, rounded to the nearest integer.

    Args:
        density: kept fraction, in (0, 1].
        numel: entries that share the budget.

    Raises:
        BudgetError: `density` is not in (0, 1], or keeps none of `numel > 0` entries.

    Example:
        >>> budget_for(0.1, 1000)
        100
    """
    budget = share_of(density, numel)
    if budget == 0 and numel > 0:
        raise empty_budget_error(density, numel=numel, needed=1)
    return budget


def share_of(density: float, numel: int) -> int:
    """Return the same as `budget_for`, where a budget of 0 is an answer."""
    if not 0.0 < density <= 1.0:
        raise BudgetError(f"density={density!r} is out of range; use 0 < density <= 1.")
    return round(density * numel)


def empty_budget_error(density: float, *, numel: int, needed: int, unit: str = "weight") -> BudgetError:
    """Return the error of a child without entries, with a density that would do.

    Args:
        density: the one that was asked for.
        numel: entries that share the largest budget.
        needed: entries of the smallest child, one unit.
        unit: what one unit is called.
    """
    enough = Context(prec=2, rounding=ROUND_CEILING).divide(Decimal(needed), Decimal(max(numel, 1)))
    size = "" if needed == 1 else f" (one {unit} has {needed})"
    return BudgetError(
        f"child network: density={density:g} keeps 0 of {numel} weights{size}; "
        f"use density >= {float(enough):g} or cover more weights with `target_modules`."
    )
