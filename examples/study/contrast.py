"""A loss without a head, so that a child that is chosen by it does not follow the head that chance has made."""

from __future__ import annotations

from typing import Any

import torch
from data import mean_pooled
from torch import Tensor, nn

TEMPERATURE = 0.1


def contrastive_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Return how poorly the texts of a batch are told apart by label: the supervised contrastive loss.

    Texts are compared by the cosine of their mean-pooled last hidden states.

    Source: equation 2 of Khosla et al. 2020 (arXiv:2004.11362), as GPS uses it, Zhang et al. 2024 (arXiv:2312.10136).
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    pooled = nn.functional.normalize(mean_pooled(hidden, batch["attention_mask"]), dim=-1)
    alone = torch.eye(len(pooled), dtype=torch.bool, device=pooled.device)
    logs = (pooled @ pooled.T / TEMPERATURE).masked_fill(alone, -torch.inf).log_softmax(1).masked_fill(alone, 0.0)
    alike = (batch["labels"][:, None] == batch["labels"]) & ~alone
    return -((logs * alike).sum(1) / alike.sum(1).clamp(min=1)).mean()
