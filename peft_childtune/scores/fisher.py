"""Per-example empirical Fisher information: the mean over examples of the squared gradient.

Examples are scored together, with one forward and one backward pass for several of them, wherever that gives what a
loop over batches of one gives. The first of these parts is scored both ways; if they differ, the loop does the rest.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_childtune.errors import ScoreError
from peft_childtune.scores.batch import batch_size, examples
from peft_childtune.scores.finite import check_scores, has_loss
from peft_childtune.scores.gradients import for_each_gradient
from peft_childtune.scores.rules import add_squares_, example_gradients, has_rule
from peft_childtune.scores.sums import ScoreSums
from peft_childtune.scores.taps import CannotSplit, tapped
from peft_childtune.scores.uses import Use, owners_of
from peft_childtune.scores.weighting import WEIGHTINGS, example_weights, groups

__all__ = ["PerExampleFisher"]

logger = logging.getLogger(__name__)

_PART = 8  # examples in one pass: their activations take most of the memory, and more of them are hardly faster
_TOLERANCE = 1e-3  # of a tensor's largest score, in fp32: far above rounding, far below any wrong rule or weighting


class PerExampleFisher:
    """Adds up squared per-example gradients, batch by batch.

    Args:
        model: in eval mode, no parameter trainable.
        parameters: name to parameter, each parameter once.
        loss_of: loss of a batch; takes the batch and its number.
        device: of the scores; None for each parameter's own.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        loss_of: Callable[[Any, int], Tensor],
        *,
        device: torch.device | None = None,
    ) -> None:
        self._sums = ScoreSums(parameters, device=device)
        self._device = device
        self._parameters = dict(parameters)
        self._owners = owners_of(model, parameters)
        self._loss_of = loss_of
        self._precision = _precision(model)
        self._weightings: list[str] = []  # the ones that explain every batch so far, best first
        self._loop_only = False
        self._first = 0  # place in its batch of the first example of the part at work, for messages

    def means(self, *, num_examples: int, num_batches: int) -> dict[str, Tensor]:
        """Return the mean over examples."""
        return self._sums.divide(num_examples)

    @property
    def sums(self) -> dict[str, Tensor]:
        """What was added up so far."""
        return self._sums.tensors

    def add(self, batch: Any, index: int) -> tuple[int, float]:
        """Add the squared gradients of every example in a batch; return its size and its mean loss.

        An example without a single counted label has no loss (0 / 0): it adds nothing to the scores and counts.

        Raises:
            ScoreError: the batch has no size; the loss of an example is missing or not finite, or a gradient is.
        """
        size = batch_size(batch)
        if not size:
            raise ScoreError(
                f"batch {index}: nothing in it tells how many examples it holds; "
                "let tensors have the batch size as their first dimension."
            )
        # one part on an accelerator, which a small one would leave idle
        parts = -(-size // _PART) if all(p.device.type == "cpu" for p in self._parameters.values()) else 1
        losses = []
        for number in range(parts):
            self._first, end = number * size // parts, (number + 1) * size // parts
            part = examples(batch, slice(self._first, end), size=size) if parts > 1 else batch
            losses.append((self._add_part(part, end - self._first, index), end - self._first))
        check_scores(self.sums, index=index)
        counted = [(loss, count) for loss, count in losses if not math.isnan(loss)]
        total = sum(count for _, count in counted)
        return size, sum(loss * count for loss, count in counted) / total if total else float("nan")

    def _add_part(self, batch: Any, size: int, index: int) -> float:
        if size == 1 or self._loop_only:
            return self._loop(batch, size, index, self._sums)
        weights = example_weights(batch, size=size)
        if self._weightings:
            known = [name for name in self._weightings if name in weights]
            if len(known) < len(self._weightings):  # no label in the whole part
                return self._loop(batch, size, index, self._sums)
            if len(groups(weights, known, tolerance=self._precision)) == 1:
                return self._together_or_loop(batch, weights[known[0]], index)
        return self._both_ways(batch, weights, size, index)

    def _together_or_loop(self, batch: Any, weights: Tensor, index: int) -> float:
        try:
            loss = self._together(batch, weights, index, self._sums)
        except CannotSplit as reason:
            self._give_up(str(reason))
            loss = None
        return self._loop(batch, len(weights), index, self._sums) if loss is None else loss

    def _both_ways(self, batch: Any, weights: dict[str, Tensor], size: int, index: int) -> float:
        """Score a batch one by one, and keep the weightings with which one pass over it gives the same.

        Both ways use the same memory in turn: they are compared by the means of their rows and columns.
        """
        is_first = not any(bool(total.any()) for total in self.sums.values())
        sums = self._sums if is_first else ScoreSums(self._parameters, device=self._device)
        loss = self._loop(batch, size, index, sums)
        expected = _marginals(sums)
        candidates = self._weightings or [name for name in WEIGHTINGS if name in weights]
        distances: list[tuple[float, list[str]]] = []
        tried: list[str] = []
        try:
            # the likeliest last: what is in memory then need not be computed again
            for tried in reversed(groups(weights, candidates, tolerance=self._precision)):
                sums.clear()
                if self._together(batch, weights[tried[0]], index, sums) is None:
                    tried = []  # an example without labels: this batch tells nothing
                    break
                distances.append((_distance(_marginals(sums), expected, precision=self._precision), tried))
            else:
                self._keep_close(distances, index)
        except CannotSplit as reason:
            self._give_up(str(reason))
        if self._loop_only or not self._weightings or not tried:
            sums.clear()
            self._loop(batch, size, index, sums)
        elif self._weightings[0] not in tried:
            sums.clear()
            self._together(batch, weights[self._weightings[0]], index, sums)
        if not is_first:
            for name, scores in sums.tensors.items():
                self._sums.add(name, scores)
        return loss

    def _keep_close(self, distances: list[tuple[float, list[str]]], index: int) -> None:
        best, limit = min(distance for distance, _ in distances), max(_TOLERANCE, 16 * self._precision)
        close = [pair for pair in distances if pair[0] <= min(limit, 10 * max(best, self._precision))]
        self._weightings = [name for _, group in sorted(close, key=lambda pair: pair[0]) for name in group]
        if not self._weightings:
            self._give_up(f"one pass over batch {index} differs by {best:.1e} from its examples one by one")

    def _give_up(self, reason: str) -> None:
        self._loop_only = True
        logger.info("Fisher information is computed example by example, which is slower: %s.", reason)

    def _loop(self, batch: Any, size: int, index: int, sums: ScoreSums) -> float:
        """Add the squared gradients of each example as a batch of its own, by plain autograd; return the mean loss."""
        losses = []
        for parameter in self._parameters.values():
            parameter.requires_grad = True
        try:
            for position in range(size):
                one = examples(batch, slice(position, position + 1), size=size) if size > 1 else batch
                loss = self._loss_of(one, index)
                if not has_loss(loss, one, index=index, position=self._first + position):
                    continue
                losses.append(float(loss.detach()))
                for_each_gradient(loss, self._parameters, use=sums.add_square)
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad = False
        return sum(losses) / len(losses) if losses else float("nan")

    def _together(self, batch: Any, weights: Tensor, index: int, sums: ScoreSums) -> float | None:
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
                            with sums.adding(name, device=use.device) as total:
                                add_squares_(total, use, own, scales.square())
                    use.release()

            taps.on_gradient = add_at_once
            taps.backward(loss, scale=size)
        with torch.no_grad():
            self._add_the_rest(taps.uses, once, scales, sums)
        return float(loss.detach())

    def _add_the_rest(self, uses: list[Use], once: set[str], scales: Tensor, sums: ScoreSums) -> None:
        """Add what takes another call of the module, or several uses of a parameter, whose gradients add up first."""
        uses = [use for use in uses if use.grads]
        for position, scale in enumerate(scales.tolist()):
            if not scale:
                continue
            shared: dict[str, Tensor] = {}
            for use in uses:
                for own, grad in example_gradients(use, position).items():
                    name = use.owner.names[own]
                    if name in once:
                        sums.add_square(name, grad, factor=scale**2)
                    else:
                        shared[name] = shared[name] + grad if name in shared else grad
            for name, grad in shared.items():
                sums.add_square(name, grad, factor=scale**2)


def _precision(model: nn.Module) -> float:
    """Return the relative rounding error of the coarsest arithmetic in the model."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = {p.dtype for p in parameters}
    devices = {p.device.type for p in parameters}
    dtypes |= {torch.get_autocast_dtype(device) for device in devices if torch.is_autocast_enabled(device)}
    if "cuda" in devices:
        dtypes.add(torch.float16)  # TF32, which convolutions use by default, has as many digits
    return max([torch.finfo(torch.float32).eps, *(torch.finfo(dtype).eps for dtype in dtypes)])


def _marginals(sums: ScoreSums) -> dict[str, Tensor]:
    """Return the mean of every row and every column of each sum, read as a matrix: an entry that is wrong shows."""
    found = {}
    for name, scores in sums.tensors.items():
        matrix = scores.reshape(scores.shape[0] if scores.dim() else 1, -1)
        found[name] = torch.cat([matrix.mean(1), matrix.mean(0)]) if scores.numel() else scores.flatten()
    return found


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor], *, precision: float) -> float:
    """Return the largest difference of two sets of numbers, relative to the largest number of the same tensor.

    Tensors that hold nothing but rounding noise (a key bias, whose gradient vanishes in exact arithmetic) are compared
    with the largest number of all.
    """
    largest = {name: float(numbers.max()) if numbers.numel() else 0.0 for name, numbers in expected.items()}
    floor = max(largest.values()) * 1e4 * precision**2
    if floor == 0.0:
        return float(any(bool(numbers.any()) for numbers in found.values()))
    return max(
        float((found[name] - numbers).abs().max()) / max(largest[name], floor)
        for name, numbers in expected.items()
        if numbers.numel()
    )
