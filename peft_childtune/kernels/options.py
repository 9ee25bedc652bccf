"""Which kernels run: chosen by cost, unless forced here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..errors import ConfigError

__all__ = ["KernelOptions", "WeightGradient", "kernel_options", "use_kernels"]

WeightGradient = Literal["gather", "hull", "sampled"]


@dataclass
class KernelOptions:
    """What `use_kernels` has set.

    Attributes:
        weight_gradient: the path that is forced, or None for the cheapest.
        compose_cache: whether layers keep composed weights between evaluations at few tokens.
        extension: whether `extension.c` is used where it can be compiled.
    """

    weight_gradient: WeightGradient | None = None
    compose_cache: bool = True
    extension: bool = True


# One for the process: autograd runs backward passes in threads of its own.
kernel_options = KernelOptions()


@contextmanager
def use_kernels(
    *,
    weight_gradient: WeightGradient | None = None,
    compose_cache: bool | None = None,
    extension: bool | None = None,
) -> Iterator[KernelOptions]:
    """Force a kernel for as long as the block lasts, in the whole process.

    Args:
        weight_gradient: how the gradient of a child's delta is computed: `"gather"` from the dense product of the
            whole weight, `"hull"` from the product of the rows and columns in which the child has entries,
            `"sampled"` entry by entry (SDDMM; in float32 where the device has no kernel for the dtype, and `"hull"`
            where it has none at all). None leaves it as it is: chosen by estimated cost, unless forced further out.
        compose_cache: whether an adapter that is not merged keeps its composed weights while it is evaluated on few
            tokens: one copy of the adapted weights in memory, for the speed of the base. None leaves it as it is.
        extension: whether loops in C, compiled on first use, do on a CPU what torch is slow at: the entry-by-entry
            product in float32, merging and unmerging. False: torch's operations alone. None leaves it as it is.
            (`PEFT_CHILDTUNE_EXTENSION=0` in the environment cannot be undone here.)

    Raises:
        ConfigError: an unknown path.

    Example:
        >>> with use_kernels(weight_gradient="gather", compose_cache=False) as options:
        ...     options.weight_gradient
        'gather'
    """
    if weight_gradient is not None and weight_gradient not in get_args(WeightGradient):
        raise ConfigError(
            f"weight_gradient={weight_gradient!r} is unknown; use one of {', '.join(get_args(WeightGradient))}, "
            "or None to leave it as it is."
        )
    before = replace(kernel_options)
    if weight_gradient is not None:
        kernel_options.weight_gradient = weight_gradient
    if compose_cache is not None:
        kernel_options.compose_cache = compose_cache
    if extension is not None:
        kernel_options.extension = extension
    try:
        yield kernel_options
    finally:
        vars(kernel_options).update(vars(before))
