"""Trainer in several processes: cases for `cases.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from peft_childtune import get_child_network, select_child_network
from tests.distributed.training import GLOBAL_BATCH, child_model, collate, place, rows, state_of

__all__ = ["trained_by_trainer"]


def _trainer(model: nn.Module, folder: Path, state_dict_type: str | None) -> Trainer:
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
    }
    if state_dict_type is not None:
        wrapping = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
        sharding = {"version": 2, "state_dict_type": state_dict_type, "cpu_ram_efficient_loading": False}
        settings |= {"fsdp": True, "fsdp_config": wrapping | sharding}
    arguments = TrainingArguments(str(folder), **settings)
    if state_dict_type is not None:
        assert arguments.device.type == "cpu"
        # accelerate shards over accelerators only, and would train without sharding over CPU processes
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate)


def trained_by_trainer(kind: str, state_dict_type: str | None, folder: Path) -> dict[str, Any]:
    """Select on the trainer's own dataloader, train, save; and once more from the checkpoint of the second epoch.

    Args:
        kind: of the child.
        state_dict_type: shard by FSDP2, with this type of checkpoints; None trains by DDP.
        folder: checkpoints go to `folder/kind/whole`, the final adapters there and to `folder/kind/resumed`.
    """
    found = {}
    folder = folder / f"{kind}_{state_dict_type}"
    for run in ("whole", "resumed"):
        model = child_model(kind, selects=False)
        trainer = _trainer(model, folder / "whole", state_dict_type)
        if kind == "d":
            select_child_network(model, trainer.get_train_dataloader(), show_progress=False)
        checkpoints = sorted((folder / "whole").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        trainer.train(resume_from_checkpoint=str(checkpoints[1]) if run == "resumed" else None)
        is_sharded = any(type(p.data).__name__ == "DTensor" for p in trainer.model.parameters())
        assert is_sharded == (state_dict_type is not None)
        trainer.save_model(str(folder / run))
        found[run] = {"digest": get_child_network(model).digest(), **state_of(trainer.model)}
        found[run]["optimizer"] = [
            {key: _local(value) for key, value in state.items()} for state in trainer.optimizer.state.values()
        ]
    return found


def _local(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else torch.as_tensor(value)
