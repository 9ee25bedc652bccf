"""An optimizer that was made before the child was chosen is noticed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_childtune import ChildTuningConfig, ConfigError, select_child_network

BATCHES = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4))]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def wrapped() -> nn.Module:
    base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    config = ChildTuningConfig(target_modules=["0"], modules_to_save=["2"], score="fisher", density=0.5)
    return get_peft_model(base, config)


def train(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], steps: int = 3) -> None:
    for _ in range(steps):
        loss_of(model, BATCHES[0]).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def test_an_optimizer_made_before_the_selection_is_reported() -> None:
    model = wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    select_child_network(model, BATCHES, loss_fn=loss_of, show_progress=False)
    with pytest.warns(UserWarning, match="after `select_child_network`"):
        train(model, [optimizer])


def test_an_optimizer_made_after_the_selection_is_not_reported() -> None:
    model = wrapped()
    select_child_network(model, BATCHES, loss_fn=loss_of, show_progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)])


def test_one_optimizer_for_the_head_and_one_for_the_child_are_not_reported() -> None:
    model = wrapped()
    select_child_network(model, BATCHES, loss_fn=loss_of, show_progress=False)
    child = [p for n, p in model.named_parameters() if "child_tuning_values" in n]
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, [torch.optim.SGD(head, lr=0.1), torch.optim.SGD(child, lr=0.1)])


def test_a_child_network_in_the_place_of_the_data_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="network="):
        select_child_network(wrapped(), "child.safetensors")
