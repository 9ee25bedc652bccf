"""Fitting a fresh head on the frozen base, before weights are scored by its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import SelectionError
from ..ranks import failing_together, is_first_rank
from ..scores import ShortTraining, check_data, check_schedule, preserved, rereadable
from .base_alone import BaseAlone, heads_of
from .readiness import check_untrained, ready_model
from .shards import without_repeats

__all__ = ["fit_head"]


def fit_head(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    epochs: int = 3,
    learning_rate: float = 3e-3,
    num_batches: int | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    adapter_name: str = "default",
    show_progress: bool = True,
) -> float:
    """Train an adapter's `modules_to_save`, and nothing else, on the frozen base in eval mode.

    A fresh head is random, and so are the gradients that come through it: another head chooses another child. Call
    this before `select_child_network`. Training then also begins with a head that fits. If it fails, the head is as it
    was.

    With several processes this is a collective: each reads its own share of the data, the steps are those of all.

    Args:
        model: a model with an adapter that has `modules_to_save`, as PEFT gives every SEQ_CLS and TOKEN_CLS model.
        dataloader: batches for `model(**batch).loss`, or for `loss_fn`; read `epochs` times; an iterator's are kept.
        epochs: how often.
        learning_rate: of AdamW, without warm-up or decay.
        num_batches: read so many batches in each epoch only, on each process; None for all.
        loss_fn: called as `loss_fn(model, batch)`; returns the mean loss of the batch.
        adapter_name: whose head.
        show_progress: show a progress bar, on the first process.

    Returns:
        The mean loss of the last epoch.

    Raises:
        SelectionError: no such adapter, or it trains no module whole, is merged or trained already; a model that is
            wrapped already, processes that differ or of which one has failed.
        UnsupportedError: the model's weights are divided among processes already.
        ScoreError: no epochs, or a learning rate that is not above 0; the data give no finite loss, or none that
            depends on the head.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from peft_childtune import ChildTuningConfig
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> config = ChildTuningConfig(target_modules=["0"], modules_to_save=["1"])
        >>> model = get_peft_model(base, config)
        >>> x = torch.randn(8, 4)
        >>> batches = [(x, (x[:, 0] > 0).long())]
        >>> loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> fit_head(model, batches, epochs=50, loss_fn=loss_fn, show_progress=False) < 0.7
        True

    Source: linear probing before fine-tuning, Kumar et al. 2022 (arXiv:2202.10054).
    """
    model, config = ready_model(model, adapter_name, caller="fit_head", needs_weights=True)
    with failing_together():
        check_untrained(model, adapter_name, config)
        check_schedule(epochs, learning_rate)
        check_data(dataloader, num_batches=num_batches)
        heads = list(heads_of(model, adapter_name).values())
        if not heads:
            raise SelectionError(
                f"adapter {adapter_name!r} trains no module whole, so there is no head to fit; name it in "
                "`modules_to_save`, or go on to `select_child_network`."
            )
    home = next(model.parameters()).device
    loss, before = float("nan"), [head.detach().clone() for head in heads]
    data = rereadable(without_repeats(dataloader), num_batches)
    with BaseAlone(model, adapter_name), preserved(model, home):
        for head in heads:
            head.requires_grad = True
        training = ShortTraining(model, heads, learning_rate=learning_rate, loss_fn=loss_fn)
        hidden = not (show_progress and is_first_rank())
        try:
            for _ in tqdm(range(epochs), desc="Fitting the head", unit="epoch", disable=hidden):
                loss = training.epoch(data, num_batches=num_batches)
        except BaseException:
            for head, old in zip(heads, before, strict=True):
                head.data.copy_(old)
            raise
    return loss
