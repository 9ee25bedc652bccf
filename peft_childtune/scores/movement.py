"""How far each weight moves in a short dense training, which is taken back."""

from __future__ import annotations

import torch
from torch import nn

from peft_childtune.errors import ScoreError, UnsupportedError
from peft_childtune.ranks import world_size
from peft_childtune.scores.batch import batch_size, detached_to, loss_of
from peft_childtune.scores.inputs import ScoreInputs
from peft_childtune.scores.preserve import preserved
from peft_childtune.scores.result import ScoreResult
from peft_childtune.scores.score import check_data, no_batches, read_batches

__all__ = ["movement_scores"]

_FEWEST_STEPS = 3  # the first moves every weight by the learning rate, in fp32 up to rounding, which would decide


def movement_scores(inputs: ScoreInputs, *, epochs: int = 1, learning_rate: float = 1e-4) -> ScoreResult:
    """Return how far each weight moves in a short training of all covered weights and heads, then take it back.

    AdamW without weight decay, gradients clipped to norm 1, in train mode. Afterwards every weight, gradient and
    buffer is what it was, bit for bit, also if the training breaks off. It takes the memory of full fine-tuning, and a
    copy of the weights, which `scores_device` can place elsewhere.

    Args:
        inputs: of a score.
        epochs: over the dataloader; more than one need one that can be read again.
        learning_rate: of full fine-tuning.

    Raises:
        ScoreError: there are fewer than three batches, or a loss is missing or not finite.
        UnsupportedError: a covered weight is in half precision, where steps of this size are lost to rounding; or
            there are several processes.

    Source: the sparse masks of LT-SFT, Ansell et al. 2022 (arXiv:2110.07560), section 3.
    """
    if world_size() > 1:
        raise UnsupportedError(
            "score='movement': trains the base for a while, which several processes cannot do together here; choose "
            "the child in one process, and pass it to all: select_child_network(model, "
            "network=ChildNetwork.load(path))."
        )
    check_data(inputs.dataloader, num_batches=inputs.num_batches)
    for name, parameter in inputs.parameters.items():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise UnsupportedError(
                f"{name}: score='movement' takes steps of {learning_rate:g}, which {parameter.dtype} loses to "
                "rounding; choose the child on the model in float32, and pass it here: select_child_network(model, "
                "network=ChildNetwork.load(path))."
            )
    device = None if inputs.scores_device is None else torch.device(inputs.scores_device)
    moved = {id(p): p for p in (*inputs.parameters.values(), *inputs.heads.values())}
    before = {key: p.detach().to(device or p.device, copy=True) for key, p in moved.items()}
    with preserved(inputs.model, next(inputs.model.parameters()).device):
        try:
            for p in moved.values():
                p.requires_grad = True
            for module in inputs.model.modules():  # not `train()`, which may do more, such as merging an adapter
                module.training = True
            seen, batches, loss = _train(inputs, list(moved.values()), epochs=epochs, learning_rate=learning_rate)
            scores = {
                name: (p.detach().to(before[id(p)].device) - before[id(p)]).abs_().float()
                for name, p in inputs.parameters.items()
            }
        finally:
            for key, p in moved.items():
                p.data.copy_(before[key])
    if not any(bool(each.any()) for each in scores.values()):
        raise ScoreError("score='movement': no weight has moved; look at what the loss is computed from.")
    return ScoreResult(scores, num_examples=seen, num_batches=batches, loss=loss / batches)


def _train(
    inputs: ScoreInputs, moved: list[nn.Parameter], *, epochs: int, learning_rate: float
) -> tuple[int, int, float]:
    """Train in place; return examples, batches and the sum of their losses."""
    optimizer = torch.optim.AdamW(moved, lr=learning_rate, weight_decay=0.0)
    home = next(inputs.model.parameters()).device
    seen, batches, total = 0, 0, 0.0
    for _ in range(epochs):
        assert inputs.dataloader is not None  # it was checked
        for batch in read_batches(
            inputs.dataloader, inputs.num_batches, title="Movement" if inputs.show_progress else None
        ):
            batch = detached_to(batch, home)
            loss = loss_of(inputs.model, batch, loss_fn=inputs.loss_fn, index=batches)
            if not torch.isfinite(loss):
                raise ScoreError(
                    f"batch {batches}: the loss is {float(loss.detach())} after {batches} steps at {learning_rate:g}; "
                    "look at the data, or choose by another score."
                )
            if not loss.requires_grad:
                raise ScoreError(f"batch {batches}: the loss does not depend on any of the covered weights.")
            loss.backward()  # type: ignore[no-untyped-call]
            for p in moved:
                if p.grad is not None and p.grad.is_sparse:
                    p.grad = p.grad.to_dense()
            torch.nn.utils.clip_grad_norm_(moved, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen, batches, total = seen + (batch_size(batch) or 1), batches + 1, total + float(loss.detach())
    if not batches:
        raise no_batches(inputs.dataloader)
    if batches < _FEWEST_STEPS:
        raise ScoreError(
            f"score='movement': after {batches} steps AdamW has moved all weights alike; give {_FEWEST_STEPS} batches "
            "or more, or choose by score='gradient'."
        )
    return seen, batches, total
