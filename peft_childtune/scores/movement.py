"""How far each weight moves in a dense training, which is taken back."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from peft_childtune.errors import ScoreError
from peft_childtune.ranks import is_first_rank
from peft_childtune.scores.preserve import preserved
from peft_childtune.scores.result import ScoreResult
from peft_childtune.scores.score import check_data
from peft_childtune.scores.steps import ShortTraining, check_schedule, rereadable

if TYPE_CHECKING:
    from peft_childtune.scores.inputs import ScoreInputs

__all__ = ["movement_scores"]

logger = logging.getLogger(__name__)

_FEWEST_STEPS = 3  # the first moves every weight by the learning rate, in fp32 up to rounding, which would decide


def movement_scores(inputs: ScoreInputs, *, epochs: int = 4, learning_rate: float = 2e-4) -> ScoreResult:
    """Return how far each weight moves in a training of all covered weights and heads, then take it back.

    AdamW without weight decay, gradients clipped to norm 1, in train mode, three steps at least. Afterwards every
    covered weight and head, gradient and buffer is what it was, bit for bit, also if the training breaks off. (What a
    forward writes into other parameters stays.) It takes the memory of full fine-tuning (in float32, whatever the
    model has), and a copy of the weights, which `scores_device` can place elsewhere. Several processes train together,
    each on its share of the data: as many times fewer steps, on larger batches.

    Args:
        inputs: of a score.
        epochs: over the dataloader, which has to yield its batches each time; those of an iterator are kept.
        learning_rate: of full fine-tuning.

    Raises:
        ScoreError: there are no batches, a loss is missing, a loss or gradient is not finite, or nothing moves.
        SelectionError: another process has failed.

    Source: the sparse masks of LT-SFT, Ansell et al. 2022 (arXiv:2110.07560), section 3.
    """
    check_schedule(epochs, learning_rate)
    check_data(inputs.dataloader, num_batches=inputs.num_batches)
    assert inputs.dataloader is not None  # it was checked
    data = rereadable(inputs.dataloader, inputs.num_batches)
    device = None if inputs.scores_device is None else torch.device(inputs.scores_device)
    moved = {id(p): p for p in (*inputs.parameters.values(), *inputs.heads.values())}
    before = {key: p.detach().to(device or p.device, copy=True) for key, p in moved.items()}
    title = "Movement" if inputs.show_progress and is_first_rank() else None
    with preserved(inputs.model, next(inputs.model.parameters()).device):
        try:
            for p in moved.values():
                p.requires_grad = True
            for module in inputs.model.modules():  # not `train()`, which may do more, such as merging an adapter
                module.training = True
            training = ShortTraining(
                inputs.model, list(moved.values()), learning_rate=learning_rate, max_norm=1.0, loss_fn=inputs.loss_fn
            )
            losses: list[float] = []
            while len(losses) < epochs or training.steps < _FEWEST_STEPS:
                losses.append(training.epoch(data, num_batches=inputs.num_batches, title=title))
            ends = dict(zip(moved, training.masters, strict=True))
            scores = {
                name: (ends[id(p)].detach().to(before[id(p)].device) - before[id(p)]).abs_().float()
                for name, p in inputs.parameters.items()
            }
        finally:
            for key, p in moved.items():
                p.data.copy_(before[key])
        examples, batches = training.examples // len(losses), training.batches // len(losses)
        start = training.epoch(data, num_batches=inputs.num_batches, steps=False)
    if not any(bool(each.any()) for each in scores.values()):
        raise ScoreError("score='movement': no weight has moved; look at what the loss is computed from.")
    if losses[-1] >= start and is_first_rank():
        logger.warning(
            "The training by which movement chooses has learnt nothing: the mean loss is %.4g before it, and %.4g in "
            "the last of %d passes at a learning rate of %g, so what moved says little of the data. Where that rate "
            "is too high (or low) for a model, or the data too few, give it others: register_score('mine', lambda "
            "inputs: inputs.compute('movement', learning_rate=%g)), and ChildTuningConfig(score='mine', "
            "scope='tensor').",
            start,
            losses[-1],
            len(losses),
            learning_rate,
            learning_rate / 10,
        )
    return ScoreResult(scores, num_examples=examples, num_batches=batches, loss=losses[-1])
