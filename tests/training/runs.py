"""Short `Trainer` runs of a tiny encoder with dropout, and everything in which two of them can differ."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from peft_childtune import ChildTuningConfig, get_child_network

KINDS: dict[str, dict[str, Any]] = {
    "D": {"score": "fisher"},
    "fixed F": {"mode": "task_free"},
    "per-step F": {"mode": "task_free", "resample": True},
}
STEPS, CHECKPOINT = 6, 3

ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": CHECKPOINT,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 5,
    "logging_strategy": "no",
}


def base(**options: Any) -> nn.Module:
    """Return the encoder: with dropout, so that the random state matters."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.2,
    }
    config = BertConfig(**(settings | options))
    return BertForSequenceClassification(config).eval()


def rows(seed: int = 0, count: int = 20) -> list[dict[str, Any]]:
    """Return labelled rows of one length."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 40, (count, 6), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return [{"input_ids": t, "labels": int(y)} for t, y in zip(tokens, labels, strict=True)]


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    """Return the rows in batches of four."""
    table = rows(seed)
    return [
        {
            "input_ids": torch.stack([row["input_ids"] for row in table[i : i + 4]]),
            "labels": torch.tensor([row["labels"] for row in table[i : i + 4]]),
        }
        for i in range(0, len(table), 4)
    ]


def wrapped(kind: str = "D", *, layers: int = 2, **options: Any) -> nn.Module:
    """Return the encoder with an adapter of a kind; a task-driven one has no child yet."""
    settings = {"task_type": "SEQ_CLS", "density": 0.2} | KINDS[kind] | options
    return get_peft_model(base(num_hidden_layers=layers), ChildTuningConfig(**settings))


def trainer_for(
    model: nn.Module,
    folder: Path | str,
    *,
    callbacks: list[Any] | None = None,
    compute_metrics: Any = None,
    **options: Any,
) -> Trainer:
    """Return a trainer of six steps over two micro-batches each, a checkpoint in the middle of the first epoch."""
    table = rows()
    arguments = TrainingArguments(str(folder), **(ARGUMENTS | {"warmup_steps": 2} | options))
    return Trainer(
        model,
        arguments,
        train_dataset=table,
        eval_dataset=table[:8],
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of every weight, delta and code of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def state_of(trainer: Trainer) -> dict[str, Any]:
    """Return what a run ends with: every weight, delta and code, the optimizer, the schedule, all random states."""
    optimizer = trainer.optimizer.state_dict()
    tensors = tensors_of(trainer.model)
    for number, state in optimizer["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value.clone() for key, value in state.items()}
    tensors["random.torch"] = torch.get_rng_state()
    # numpy's and Python's states are tuples
    others = {"random.python": random.getstate(), "random.numpy": np.random.get_state()[1].tolist()}
    return {
        "tensors": tensors,
        "groups": optimizer["param_groups"],
        "schedule": trainer.lr_scheduler.state_dict(),
        "steps": trainer.state.global_step,
        "child": get_child_network(trainer.model).digest(),
        **others,
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of all that is not the same, bit for bit."""
    first, second = one["tensors"], other["tensors"]
    found = sorted(set(first) ^ set(second))
    found += [name for name in first if name in second and not _same_bits(first[name], second[name])]
    return found + [key for key in one if key != "tensors" and one[key] != other[key]]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
