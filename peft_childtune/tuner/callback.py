"""Choosing the child inside a `Trainer`, for those whose trainer wraps the model itself, as TRL's do."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import SelectionError
from ..ranks import agree
from ..scores import rereadable
from .config import ChildTuningConfig
from .head import fit_head
from .install import layers_of
from .selection import select_child_network

__all__ = ["ChildTuningCallback"]

logger = logging.getLogger(__name__)


class ChildTuningCallback(TrainerCallback):
    """Chooses the child of every adapter that has none yet, when the trainer is made.

    For trainers that are given `peft_config=` and wrap the model themselves. It acts at `on_init_end`, the only event
    before the optimizer is made and the model distributed; callbacks that are added later come too late. Children that
    are there already, loaded or in no need of data, stay as they are. Resuming brings the checkpoint's child along: it
    replaces the one chosen here, and where `args.resume_from_checkpoint` names a checkpoint, none is chosen at all.
    (A `model_init` makes another model when training starts: choose inside it.) The loss is the model's own, not what
    a trainer's `compute_loss` or label smoothing makes of it: pass `loss_fn` for another.

    Args:
        dataloader: batches to choose by, or a function without arguments that returns them, called only if they are
            needed. None: the trainer's own `get_train_dataloader()`.
        num_batches: look at so many batches only; None for all.
        loss_fn: called as `loss_fn(model, batch)`; returns the mean loss of the batch. None: `model(**batch).loss`.
        adapter_name: whose child; None for every adapter.
        scores_device: as in `select_child_network`.
        head_epochs: passes of `fit_head` over the batches, before anything is chosen; 3 are its default, and belong
            before `movement` wherever a head is new. 0 leaves heads as they are, and is right where there are none.
        show_progress: show progress bars, unless the trainer's own are off.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> config = ChildTuningConfig(target_modules=["0", "2"], score="fisher", density=0.2)
        >>> model = get_peft_model(base, config)
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]
        >>> callback = ChildTuningCallback(
        ...     batches, loss_fn=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        ... )
        >>> arguments = TrainingArguments("runs", report_to=[], use_cpu=True, disable_tqdm=True)
        >>> trainer = Trainer(model, arguments, callbacks=[callback])
        >>> model.print_trainable_parameters()
        trainable params: 6 || all params: 36 || trainable%: 16.6667
    """

    def __init__(
        self,
        dataloader: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        *,
        num_batches: int | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        adapter_name: str | None = None,
        scores_device: torch.device | str | None = None,
        head_epochs: int = 0,
        show_progress: bool = True,
    ) -> None:
        self.dataloader = dataloader
        self.num_batches = num_batches
        self.loss_fn = loss_fn
        self.adapter_name = adapter_name
        self.scores_device = scores_device
        self.head_epochs = head_epochs
        self.show_progress = show_progress

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose, on the model that the trainer holds.

        Raises:
            SelectionError: the model has no such adapter, the trainer is not to be found, or the checkpoint to resume
                from is there for some processes only; and what `fit_head` and `select_child_network` raise.
        """
        model: nn.Module = kwargs["model"]
        if not (waiting := self._without_child(model)):
            if self.head_epochs:
                logger.warning(
                    "head_epochs=%s: no adapter waits for its child to be chosen by data, so no head is fitted; call "
                    "fit_head before the trainer is made.",
                    self.head_epochs,
                )
            return
        checkpoint = args.resume_from_checkpoint
        resumes = checkpoint is not None and os.path.isdir(checkpoint)
        agree(
            "a checkpoint to resume from" if resumes else "none to resume from",
            what="what `args.resume_from_checkpoint` names has to be there for all, or for none.",
        )
        if resumes:
            logger.info("%s brings its child along, so none is chosen.", checkpoint)
            return
        given = _training_batches() if self.dataloader is None else self.dataloader
        for adapter_name in waiting:
            dataloader = given() if callable(given) else given
            same: dict[str, Any] = {
                "num_batches": self.num_batches,
                "loss_fn": self.loss_fn,
                "adapter_name": adapter_name,
                "show_progress": self.show_progress and not args.disable_tqdm,
            }
            if self.head_epochs:
                dataloader = rereadable(dataloader, self.num_batches)
                fit_head(model, dataloader, epochs=self.head_epochs, **same)
            select_child_network(model, dataloader, scores_device=self.scores_device, **same)

    def _without_child(self, model: nn.Module) -> list[str]:
        configs = getattr(model, "peft_config", None)
        configs = configs if isinstance(configs, Mapping) else {}
        ours = [name for name, config in configs.items() if isinstance(config, ChildTuningConfig)]
        wanted = ours if self.adapter_name is None else [name for name in ours if name == self.adapter_name]
        if not wanted:
            which = "Child-Tuning adapter" if self.adapter_name is None else f"adapter {self.adapter_name!r} of ours"
            raise SelectionError(
                f"the trainer's {type(model).__name__} has no {which} (it has {sorted(configs)}); wrap it with "
                "get_peft_model(base, ChildTuningConfig(...)), or give TRL's trainers "
                "peft_config=ChildTuningConfig(...)."
            )
        waiting = []
        for name in wanted:
            layers = layers_of(model, name).values()
            for layer in layers:
                layer.resolve_pending(name)
            if not all(layer.has_child(name) for layer in layers):
                waiting.append(name)
        return waiting


def _training_batches() -> Callable[[], Iterable[Any]]:
    """Return how the trainer whose event this is gets its training batches.

    The event hands over everything but the trainer, and its data only once the optimizer is made: too late. So look
    for it among the callers, of which the nearest that trains is it.
    """
    frame = sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        trainer = frame.f_locals.get("self")
        if callable(getattr(type(trainer), "get_train_dataloader", None)):
            return trainer.get_train_dataloader  # type: ignore[union-attr,no-any-return]
    raise SelectionError(
        "the event does not come from a Trainer, so its training data are out of reach; pass them: "
        "ChildTuningCallback(dataloader)."
    )
