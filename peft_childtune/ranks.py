"""What the processes of one training run have to agree on, over torch.distributed; with one process nothing happens.

The functions from `sum_over_ranks_` on are collectives: every process has to call them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import SelectionError

__all__ = ["agree", "failing_together", "is_first_rank", "rank", "sum_over_ranks_", "unwrapped", "world_size"]

logger = logging.getLogger(__name__)

_PATIENCE = 30  # seconds until a process says what it waits for
_SHARED = "_peft_childtune_is_shared"  # on an error that every process has heard of


def world_size() -> int:
    """Return how many processes train together: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first_rank() -> bool:
    """Return whether this is the process that shows bars and messages."""
    return rank() == 0


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel or `torch.compile`."""
    is_wrapper = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = model.module if is_wrapper else getattr(model, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def sum_over_ranks_(tensor: Tensor) -> None:
    """Add up a tensor over all processes, in place, with the same result on each."""
    if world_size() == 1:
        return
    # NCCL takes tensors of its device only, and scores may be kept on the CPU
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor.device
    there = tensor.to(device).contiguous()
    dist.all_reduce(there)
    if there is not tensor:
        tensor.copy_(there)


def _gather(value: str | None, group: dist.ProcessGroup | None = None) -> list[str | None]:
    gathered: list[str | None] = [None] * dist.get_world_size(group)
    # a process that never comes leaves the others waiting without a word
    hint = threading.Timer(
        _PATIENCE,
        logger.warning,
        [
            "process %d has waited %d s for the others: they are still at work, or never come here. Every process has "
            "to call `fit_head` and `select_child_network`, and to train: not only the main one, and not under "
            "`main_process_first`.",
            rank(),
            _PATIENCE,
        ],
    )
    hint.daemon = True
    hint.start()
    try:
        dist.all_gather_object(gathered, value, group=group)
    finally:
        hint.cancel()
    return gathered


def _shared(error: Exception) -> Exception:
    """Return an error that every process is about to raise, marked as such."""
    setattr(error, _SHARED, True)
    return error


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every process if the block raises on one, instead of letting the others wait for it for ever.

    Blocks may be nested, and may end in collectives that are reached only after an inner block has gone well on all.

    Raises:
        SelectionError: another process has failed; its own error is in the message.
    """
    if world_size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
        if getattr(error, _SHARED, False):
            raise
    messages = _gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise _shared(error)
    for number, message in enumerate(messages):
        if message is not None:
            raise _shared(SelectionError(f"process {number} of {len(messages)} has failed, so all stop. {message}"))


def agree(value: str, *, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise on every process unless all have the same `value`.

    Args:
        value: a digest, or anything else that is short.
        what: what differs, and the way out, for the message.
        group: the processes that are asked, all by default; their numbers in the message are those within it.

    Raises:
        SelectionError: two processes differ.
    """
    if world_size() == 1:
        return
    found = _gather(value, group)
    for number, other in enumerate(found):
        if other != found[0]:
            differ = f"process {number} of {len(found)} has {other}, process 0 has {found[0]}: {what}"
            raise _shared(SelectionError(differ))
