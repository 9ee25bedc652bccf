"""A short training on the way to a child, whose steps all processes take together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from peft_childtune.errors import ScoreError
from peft_childtune.ranks import failing_together, sum_over_ranks_
from peft_childtune.scores.batch import batch_size, detached_to, loss_of
from peft_childtune.scores.finite import has_loss
from peft_childtune.scores.score import no_batches, read_batches

__all__ = ["ShortTraining", "check_schedule", "rereadable"]

_FP16_SCALE = 1024.0  # of the loss, as gradients below 6e-8 are lost in float16; a power of two rounds nothing


def check_schedule(epochs: int, learning_rate: float) -> None:
    """Raise `ScoreError` unless there is a whole epoch or more, and a finite learning rate above 0."""
    if not isinstance(epochs, int) or epochs < 1 or not 0 < learning_rate < math.inf:
        raise ScoreError(
            f"epochs={epochs!r}, learning_rate={learning_rate!r}: give a whole epoch or more, and a rate above 0."
        )


def rereadable(dataloader: Iterable[Any], num_batches: int | None) -> Iterable[Any]:
    """Return what can be read for every epoch: an iterator's batches, in a list, or the dataloader as it is.

    A collective, as an iterator may fail in one process.
    """
    with failing_together():
        return list(islice(dataloader, num_batches)) if isinstance(dataloader, Iterator) else dataloader


class ShortTraining:
    """Trains parameters in place by AdamW, without warm-up and weight decay.

    With several processes each takes a batch of its own in a step, the gradient is the mean over the examples of all
    of them, and all have the same weights afterwards.

    Args:
        model: which computes the loss, with the modes and flags that it has.
        trained: the parameters, with gradients switched on. Those in half precision follow float32 copies: most steps
            of a fine-tuning are smaller than the distance to their next number, and would be lost.
        learning_rate: of AdamW.
        max_norm: to which gradients are clipped.
        loss_fn: takes the model and a batch, returns a scalar; None for `model(**batch).loss`.

    Attributes:
        masters: what the optimizer steps on: the parameters, or their float32 copies.
        examples: read so far, by all processes, as are
        batches: and
        steps: steps taken.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Sequence[nn.Parameter],
        *,
        learning_rate: float,
        max_norm: float = math.inf,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.masters = [
            p.detach().float().requires_grad_() if p.dtype in (torch.bfloat16, torch.float16) else p for p in trained
        ]
        self.examples, self.batches, self.steps = 0, 0, 0
        self._scale = _FP16_SCALE if any(p.dtype is torch.float16 for p in trained) else 1.0
        self._model, self._trained, self._max_norm, self._loss_fn = model, trained, max_norm, loss_fn
        self._home = next(model.parameters()).device
        self._optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.0)

    def epoch(
        self,
        dataloader: Iterable[Any],
        *,
        num_batches: int | None = None,
        title: str | None = None,
        steps: bool = True,
    ) -> float:
        """Take a step for each batch, as long as one of the processes has data; return the mean loss of an example.

        A batch of which no label counts is left out.

        Args:
            dataloader: this process's.
            num_batches: read at most so many batches of it; None for all.
            title: of the progress bar; None for no bar.
            steps: whether to take them, or to look at the loss only.

        Raises:
            ScoreError: there is no batch; or a loss or gradient is missing, not finite, or depends on nothing that is
                trained.
            SelectionError: another process has failed.
        """
        unread = read_batches(dataloader, num_batches, title=title)
        total = torch.zeros(2, dtype=torch.float64)  # the sum of losses, and how many
        while True:
            loss, counts = None, torch.zeros(3, dtype=torch.float64)  # those of the step, and batches
            with failing_together():
                for batch in unread:
                    loss, size = self._loss(batch), batch_size(batch) or 1
                    counts += torch.tensor([0, 0, 1] if loss is None else [float(loss.detach()) * size, size, 1])
                    break
            sum_over_ranks_(counts)
            if not counts[2]:
                break
            if counts[1] and steps:
                with failing_together():
                    if loss is not None:
                        share = size / float(counts[1])
                        (loss * (share * self._scale)).backward()  # type: ignore[no-untyped-call]
                    self._take_gradients()
                self._step()
            total += counts[:2]
            self.examples, self.batches = self.examples + int(counts[1]), self.batches + int(counts[2])
        if not self.batches:
            raise no_batches(dataloader)
        if not total[1]:
            raise ScoreError(
                "The dataloader yields no batch when it is read again, or none of which a label counts; give one that "
                "can be read for every epoch, such as a DataLoader over a list, and look at the labels."
            )
        return float(total[0] / total[1])

    def _loss(self, batch: Any) -> Tensor | None:
        loss = loss_of(self._model, detached_to(batch, self._home), loss_fn=self._loss_fn, index=self.batches)
        if not has_loss(loss.detach(), batch, index=self.batches):
            return None
        if not loss.requires_grad:
            raise ScoreError(
                f"batch {self.batches}: the loss does not depend on any of the {len(self._trained)} tensors to be "
                "trained; look at what it is computed from, and whether they take part in it."
            )
        return loss

    def _take_gradients(self) -> None:
        """Move each gradient to what is stepped on."""
        for p, master in zip(self._trained, self.masters, strict=True):
            grad, p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
            master.grad = (grad.to_dense() if grad.is_sparse else grad).to(master.dtype).div_(self._scale)

    def _step(self) -> None:
        for master in self.masters:
            assert master.grad is not None  # it has just been taken
            sum_over_ranks_(master.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, self._max_norm))
        if not math.isfinite(norm):  # the same on every process
            rate = self._optimizer.defaults["lr"]
            raise ScoreError(
                f"batch {self.batches}: the gradient's norm is {norm} after {self.steps} steps of {rate:g}; look at "
                "that batch, or use float32 or bfloat16, which overflow later than float16."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        with torch.no_grad():
            for p, master in zip(self._trained, self.masters, strict=True):
                if p is not master:
                    p.copy_(master)
        torch.clear_autocast_cache()  # which would hold the weights as they were, inside a caller's autocast
