"""A small model, data of uneven lengths, and a training loop that takes the same steps in any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForSequenceClassification

from peft_childtune import ChildTuningConfig, select_child_network

ROWS, GLOBAL_BATCH = 24, 12

# key biases have no gradient in exact arithmetic: Adam turns the rounding noise in theirs into steps
CONFIGS: dict[str, dict[str, Any]] = {
    "d": {"score": "fisher", "density": 0.05},
    "f_fixed": {"mode": "task_free", "density": 0.05},
    "f_resampled": {"mode": "task_free", "resample": True, "density": 0.3},
}


def base_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config)


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 13, (ROWS,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(1, 40, (length,), generator=generator),
            "labels": torch.randint(3, (), generator=generator),
        }
        for length in lengths
    ]


def collate(part: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in part], batch_first=True)
    labels = torch.stack([row["labels"] for row in part])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(batch_size: int = 4) -> list[dict[str, Tensor]]:
    """Return this process's batches: every batch of one process's whole list goes to one of them in turn."""
    rank, world = place()
    whole = rows()
    batches = [collate(whole[i : i + batch_size]) for i in range(0, ROWS, batch_size)]
    return batches[rank::world]


def child_model(kind: str, *, selects: bool = True, **options: Any) -> nn.Module:
    """Return a wrapped model with its child."""
    settings = {"task_type": "SEQ_CLS", "exclude_modules": r".*\.key", **CONFIGS[kind], **options}
    config = ChildTuningConfig(**settings)
    model = get_peft_model(base_model(), config)
    if config.needs_data and selects:
        select_child_network(model, shard(), show_progress=False)
    return model


def wrapped(model: nn.Module, how: str | None) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp1":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=fsdp_auto_wrap_policy(model),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
    if how == "fsdp2":
        for layer in model.get_base_model().bert.encoder.layer:
            fully_shard(layer)
        fully_shard(model)
    return model


def global_batches(steps: int, parts: int) -> Iterator[list[dict[str, Tensor]]]:
    """Yield for each step this process's part of the same global batch, cut for accumulation; equal shares."""
    rank, world = place()
    whole, share = rows(), GLOBAL_BATCH // parts
    for step in range(steps):
        start = step * GLOBAL_BATCH % ROWS
        micro = [whole[start + i * share : start + (i + 1) * share] for i in range(parts)]
        yield [collate(part[rank::world]) for part in micro]


def train(model: nn.Module, *, steps: int = 5, parts: int = 2, fused: bool = False) -> None:
    """Train with accumulation over `parts` and clipping."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=fused)
    model.train()
    for micro in global_batches(steps, parts):
        for number, batch in enumerate(micro):
            is_last = number == len(micro) - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(is_last)
            can_wait = isinstance(model, DistributedDataParallel | FullyShardedDataParallel) and not is_last
            waits = model.no_sync() if can_wait else nullcontext()
            with waits:
                (model(**batch).loss / len(micro)).backward()
        if isinstance(model, FullyShardedDataParallel):
            model.clip_grad_norm_(0.5)
        else:
            nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        optimizer.zero_grad()


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def state_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return what was trained, what was not, and the coded children, whole."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return _state_of(model.module)
    return _state_of(model.module if isinstance(model, DistributedDataParallel) else model)


def _state_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    parameters = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
    buffers = {name.replace("_fsdp_wrapped_module.", ""): b for name, b in model.named_buffers()}
    return {
        "trained": {name: full(p) for name, p in parameters.items() if p.requires_grad},
        "frozen": {name: full(p) for name, p in parameters.items() if not p.requires_grad},
        "codes": {name: b.clone() for name, b in buffers.items() if ".child_tuning_code." in name},
    }
