"""Trainer in several processes: cases for `cases.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_childtune import get_child_network, select_child_network
from tests.distributed.training import GLOBAL_BATCH, child_model, collate, place, rows, state_of

__all__ = ["trained_by_trainer"]


def _trainer(model: nn.Module, folder: Path, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": GLOBAL_BATCH // place()[1],
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "epoch",
        # Trainer multiplies the loss by the number of processes, for models that divide it by all their tokens; BERT's
        # classifier does not
        "average_tokens_across_devices": False,
        **options,
    }
    return Trainer(
        model=model, args=TrainingArguments(str(folder), **settings), train_dataset=rows(), data_collator=collate
    )


def trained_by_trainer(kind: str, folder: Path) -> dict[str, Any]:
    """Select on the trainer's own dataloader, train, save; and once more from the checkpoint of the second epoch."""
    found = {}
    for run in ("whole", "resumed"):
        model = child_model(kind, selects=False)
        trainer = _trainer(model, folder / kind / "whole")
        if kind == "d":
            select_child_network(model, trainer.get_train_dataloader(), show_progress=False)
        checkpoint = sorted((folder / kind / "whole").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
        trainer.train(resume_from_checkpoint=str(checkpoint[1]) if run == "resumed" else None)
        trainer.save_model(str(folder / kind / run))
        found[run] = {"digest": get_child_network(model).digest(), **state_of(model)}
        found[run]["optimizer"] = [
            {key: torch.as_tensor(value) for key, value in state.items()} for state in trainer.optimizer.state.values()
        ]
    return found
