"""The gradient mask of Child-Tuning-F: a Bernoulli(p) draw for every optimizer step, kept gradients times 1/p."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..sparse import bernoulli_mask
from .operator import operator

__all__ = ["StepGate"]


@dataclass(frozen=True, eq=False)
class StepGate:
    """The gradient mask of one tensor at the current optimizer step.

    The mask depends on the counter alone, so it is the same over accumulated micro-batches, under recomputation, on
    every rank and device.

    Attributes:
        seed: of the whole child.
        stream: number of the tensor within the child.
        density: p, the share of gradients that pass.
        step: int64, `(1,)`, optimizer steps taken so far; read when the gradient is computed.

    Source: Child-Tuning-F, Xu et al. 2021 (arXiv:2109.05687), equation 3: g * M / p, M ~ Bernoulli(p).
    """

    seed: int
    stream: int
    density: float
    step: Tensor

    def __call__(self, gradient: Tensor) -> Tensor:
        """Return `gradient`, any shape, masked and scaled by 1/p."""
        # an operator's integers are signed
        return _gated(gradient, self.step, self.seed - (self.seed >> 63 << 64), self.stream, self.density)


@operator("gate", fake=lambda gradient, step, seed, stream, density: gradient.new_empty(gradient.shape))
def _gated(gradient: Tensor, step: Tensor, seed: int, stream: int, density: float) -> Tensor:
    mask = bernoulli_mask(
        gradient.numel(), density, seed=seed % (1 << 64), stream=stream, step=step, device=gradient.device
    )
    # not times the mask: an overflow outside of it would come out as NaN
    return gradient.reshape(-1).where(mask, 0).div_(density).view_as(gradient)
