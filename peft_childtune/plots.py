"""Pictures of children, for people. Needs matplotlib (`pip install "peft_childtune[plots]"`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import UnsupportedError
from .tuner import SelectionDiagnosis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_child"]


def plot_child(diagnosis: SelectionDiagnosis, *, ax: Axes | None = None) -> Axes:
    """Draw the density of every covered tensor: blocks from top to bottom, kinds of tensor from left to right.

    Args:
        diagnosis: of `diagnose_selection(model)`.
        ax: where to draw; None for a new figure.

    Returns:
        The axes; `plot_child(...).figure.savefig("child.png")` keeps them.

    Raises:
        UnsupportedError: matplotlib is not installed.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> from peft_childtune import ChildTuningConfig, diagnose_selection
        >>> base = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> config = ChildTuningConfig(target_modules=["0", "2"], score="magnitude", density=0.25)
        >>> plot_child(diagnose_selection(get_peft_model(base, config))).get_title()
        '12 of 46 weights, density 26.1%'
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError('plots need matplotlib: pip install "peft_childtune[plots]".') from error
    blocks, kinds = list(diagnosis.blocks), list(diagnosis.kinds)
    density = np.full((len(blocks), len(kinds)), np.nan)
    for name, (kept, numel) in diagnosis.tensors.items():
        block = next((each for each in blocks if name.startswith(f"{each}.")), "outside blocks")
        density[blocks.index(block), kinds.index(name.removeprefix(f"{block}."))] = kept / max(1, numel)
    if ax is None:
        size = (min(40.0, max(5.0, 0.5 * len(kinds) + 2)), min(40.0, max(3.0, 0.3 * len(blocks) + 2)))
        ax = Figure(figsize=size, layout="constrained").subplots()
    smallest = min((d for d in density.flat if d > 0), default=1.0)
    picture = ax.imshow(
        np.ma.masked_less_equal(np.nan_to_num(density), 0), norm=LogNorm(smallest * 0.999, 1), aspect="auto"
    )
    ax.set_facecolor("0.9")  # nothing chosen, or no such tensor
    ax.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right")
    ax.set_yticks(range(len(blocks)), blocks)
    ax.set_title(
        f"{diagnosis.nnz:,} of {diagnosis.covered:,} weights, density {diagnosis.nnz / max(1, diagnosis.covered):.1%}"
    )
    ax.figure.colorbar(picture, ax=ax, label="density")
    return ax
