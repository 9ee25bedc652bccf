"""Batches, the training loop and predictions, the same for all methods of the study."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import assets
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding, get_linear_schedule_with_warmup, set_seed

BATCH, EPOCHS, MAX_LENGTH, WARMUP = 16, 4, 64, 0.1
Record = dict[str, Any]
Batch = dict[str, Tensor]


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """Return the pinned encoder's tokenizer."""
    return AutoTokenizer.from_pretrained(assets.encoder_dir())


def make_batches(records: Sequence[Record], device: str, *, size: int = BATCH) -> list[Batch]:
    """Return the records in batches, in their order."""
    collate = DataCollatorWithPadding(tokenizer())
    return [collate(records[at : at + size]).to(device) for at in range(0, len(records), size)]


def train(
    model: nn.Module,
    records: Sequence[Record],
    learning_rate: float,
    weight_decay: float = 0.0,
    *,
    epochs: int,
    seed: int,
    device: str,
) -> float:
    """Train in place what is trainable; return the mean loss of the last epoch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(records) // BATCH)
    schedule = get_linear_schedule_with_warmup(optimizer, int(WARMUP * steps), steps)
    rng = random.Random(seed)
    set_seed(seed)  # the same dropout, whatever the selection has drawn
    model.train()
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for batch in _epoch(records, device, rng):
            loss = model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def predict(model: nn.Module, records: Sequence[Record], device: str) -> list[int]:
    """Return the predicted label of each row, in the rows' order."""
    model.eval()
    order = sorted(range(len(records)), key=lambda place: len(records[place]["input_ids"]))
    batches = make_batches([records[place] for place in order], device, size=64)
    labels = [label for batch in batches for label in model(**batch).logits.argmax(-1).tolist()]
    return [label for _, label in sorted(zip(order, labels, strict=True))]


def _epoch(records: Sequence[Record], device: str, rng: random.Random) -> list[Batch]:
    """Return an epoch's batches: rows of similar length together, in an order and with neighbours of chance."""
    noisy = sorted(records, key=lambda record: len(record["input_ids"]) + rng.uniform(-3, 3))
    batches = make_batches(noisy, device)
    rng.shuffle(batches)
    return batches
