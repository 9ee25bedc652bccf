"""Per-example empirical Fisher information: the mean over examples of the squared gradient.

Examples are scored together, with one forward and one backward pass per batch, wherever that gives what a loop over
batches of one gives. The first batch is scored both ways; if they differ, the loop does the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_childtune.errors import ScoreError
from peft_childtune.scores.batch import batch_size, example
from peft_childtune.scores.finite import check_scores, has_loss
from peft_childtune.scores.rules import add_squares_, example_gradients, has_rule
from peft_childtune.scores.taps import CannotSplit, tapped
from peft_childtune.scores.uses import Use, owners_of
from peft_childtune.scores.weighting import WEIGHTINGS, example_weights, groups

__all__ = ["PerExampleFisher"]

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # of a tensor's largest score, in fp32: far above rounding, far below any wrong rule or weighting


class PerExampleFisher:
    """Adds up squared per-example gradients, batch by batch.

    Args:
        model: in eval mode, no parameter trainable.
        parameters: name to parameter, each parameter once.
        loss_of: loss of a batch; takes the batch and its number.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], loss_of: Callable[[Any, int], Tensor]
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self._parameters = dict(parameters)
        self._owners = owners_of(model, parameters)
        self._loss_of = loss_of
        self._precision = _precision(model)
        self._weightings: list[str] = []  # the ones that explain every batch so far, best first
        self._loop_only = False

    def means(self, *, num_examples: int, num_batches: int) -> dict[str, Tensor]:
        """Return the mean over examples."""
        return {name: total.div_(num_examples) for name, total in self._sums().items()}

    def add(self, batch: Any, index: int) -> tuple[int, float]:
        """Add the squared gradients of every example in a batch; return its size and its mean loss.

        An example without a single counted label has no loss (0 / 0): it adds nothing to the scores and counts.

        Raises:
            ScoreError: the batch has no size; the loss of an example is missing or not finite, or a gradient is.
        """
        size, loss = self._add_batch(batch, index)
        check_scores(self.sums, index=index)
        return size, loss

    def _add_batch(self, batch: Any, index: int) -> tuple[int, float]:
        size = batch_size(batch)
        if not size:
            raise ScoreError(
                f"batch {index}: nothing in it tells how many examples it holds; "
                "let tensors have the batch size as their first dimension."
            )
        if size == 1 or self._loop_only:
            return size, self._loop(batch, size, index, self._sums())
        weights = example_weights(batch, size=size)
        if self._weightings:
            known = [name for name in self._weightings if name in weights]
            if len(known) < len(self._weightings):  # no label in the whole batch
                return size, self._loop(batch, size, index, self._sums())
            if len(groups(weights, known, tolerance=self._precision)) == 1:
                return size, self._together_or_loop(batch, weights[known[0]], index)
        return size, self._both_ways(batch, weights, size, index)

    def _sums(self) -> dict[str, Tensor]:
        self.sums = self.sums or self._zeros()
        return self.sums

    def _zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self._parameters.items()}

    def _together_or_loop(self, batch: Any, weights: Tensor, index: int) -> float:
        try:
            loss = self._together(batch, weights, index, self._sums())
        except CannotSplit as reason:
            self._give_up(str(reason))
            loss = None
        return self._loop(batch, len(weights), index, self._sums()) if loss is None else loss

    def _both_ways(self, batch: Any, weights: dict[str, Tensor], size: int, index: int) -> float:
        """Score a batch one by one, and keep the weightings with which one pass over it gives the same."""
        expected = self._zeros()
        loss = self._loop(batch, size, index, expected)
        candidates = self._weightings or [name for name in WEIGHTINGS if name in weights]
        distances: list[tuple[float, list[str]]] = []
        try:
            for group in groups(weights, candidates, tolerance=self._precision):
                found = self._zeros()
                if self._together(batch, weights[group[0]], index, found) is None:
                    self._add(expected)  # an example without labels: this batch tells nothing
                    return loss
                distances.append((_distance(found, expected, precision=self._precision), group))
                del found
        except CannotSplit as reason:
            self._give_up(str(reason))
        else:
            best, limit = min(distance for distance, _ in distances), max(_TOLERANCE, 16 * self._precision)
            close = [pair for pair in distances if pair[0] <= min(limit, 10 * max(best, self._precision))]
            self._weightings = [name for _, group in sorted(close, key=lambda pair: pair[0]) for name in group]
            if not self._weightings:
                self._give_up(f"one pass over batch {index} differs by {best:.1e} from its examples one by one")
        self._add(expected)
        return loss

    def _add(self, scores: dict[str, Tensor]) -> None:
        if not self.sums:
            self.sums = scores
            return
        for name, total in self.sums.items():
            total += scores[name]

    def _give_up(self, reason: str) -> None:
        self._loop_only = True
        logger.info("Fisher information is computed example by example, which is slower: %s.", reason)

    def _loop(self, batch: Any, size: int, index: int, sums: dict[str, Tensor]) -> float:
        """Add the squared gradients of each example as a batch of its own, by plain autograd; return the mean loss."""
        losses = []
        for parameter in self._parameters.values():
            parameter.requires_grad = True
        try:
            for position in range(size):
                one = example(batch, position, size=size) if size > 1 else batch
                loss = self._loss_of(one, index)
                if not has_loss(loss, one, index=index, position=position):
                    continue
                losses.append(float(loss.detach()))
                if loss.requires_grad:
                    grads = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
                    for name, grad in zip(self._parameters, grads, strict=True):
                        if grad is not None:
                            grad = (grad.to_dense() if grad.is_sparse else grad).float()
                            sums[name].addcmul_(grad, grad)
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad = False
        return sum(losses) / len(losses) if losses else float("nan")

    def _together(self, batch: Any, weights: Tensor, index: int, sums: dict[str, Tensor]) -> float | None:
        """Add the squared gradients of all examples from one pass; return the loss, or None if it is not finite."""
        size = len(weights)
        # the loss is scaled by the batch size, or half precision would lose small gradients that the loop keeps
        scales = torch.where(weights > 0, 1.0 / (weights * size), 0.0)
        with tapped(self._owners, size=size) as taps:
            loss = self._loss_of(batch, index)
            if not torch.isfinite(loss):
                return None
            waiting: dict[str, list[Use]] = {}
            for use in taps.uses:
                for name in use.owner.names.values():
                    waiting.setdefault(name, []).append(use)
            once = {name for name, uses in waiting.items() if len(uses) == 1}

            def add_at_once(use: Use) -> None:
                if has_rule(use) and once.issuperset(use.owner.names.values()):
                    with torch.no_grad():
                        for own, name in use.owner.names.items():
                            add_squares_(sums[name], use, own, scales.square())
                    use.release()

            taps.on_gradient = add_at_once
            taps.backward(loss, scale=size)
        with torch.no_grad():
            self._add_the_rest(taps.uses, once, scales, sums)
        return float(loss.detach())

    def _add_the_rest(self, uses: list[Use], once: set[str], scales: Tensor, sums: dict[str, Tensor]) -> None:
        """Add what takes another call of the module, or several uses of a parameter, whose gradients add up first."""
        uses = [use for use in uses if use.grad is not None]
        for position, scale in enumerate(scales.tolist()):
            if not scale:
                continue
            shared: dict[str, Tensor] = {}
            for use in uses:
                for own, grad in example_gradients(use, position).items():
                    name = use.owner.names[own]
                    if name in once:
                        sums[name].addcmul_(grad, grad, value=scale**2)
                    else:
                        shared[name] = shared[name] + grad if name in shared else grad
            for name, grad in shared.items():
                sums[name].addcmul_(grad, grad, value=scale**2)


def _precision(model: nn.Module) -> float:
    """Return the relative rounding error of the coarsest arithmetic in the model."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = {p.dtype for p in parameters}
    devices = {p.device.type for p in parameters}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    if "cuda" in devices:
        dtypes.add(torch.float16)  # TF32, which convolutions use by default, has as many digits
    return max([torch.finfo(torch.float32).eps, *(torch.finfo(dtype).eps for dtype in dtypes)])


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor], *, precision: float) -> float:
    """Return the largest difference of two sets of scores, relative to the largest score of the same tensor.

    Tensors that hold nothing but rounding noise (a key bias, whose gradient vanishes in exact arithmetic) are compared
    with the largest score of all.
    """
    largest = {name: float(scores.max()) if scores.numel() else 0.0 for name, scores in expected.items()}
    floor = max(largest.values()) * 1e4 * precision**2
    if floor == 0.0:
        return float(any(bool(scores.any()) for scores in found.values()))
    return max(
        float((found[name] - scores).abs().max()) / max(largest[name], floor)
        for name, scores in expected.items()
        if scores.numel()
    )
