"""Children that are chosen in the middle of training: once after a warm-up, or a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_childtune import ChildNetwork, ChildTuningConfig, get_deltas, select_child_network

Train = Callable[[nn.Module], object]  # an epoch


def chosen_after_warm_up(
    model: nn.Module, config: ChildTuningConfig, batches: Iterable[Any], train: Train
) -> nn.Module:
    """Choose the child on a model that has been trained for an epoch, then go back to the pretrained weights.

    What is trained first is a random child of the same size and the head; the head keeps what it has learned.

    Source: RoSA takes its mask after a warm-up, Nikdan et al. 2024 (arXiv:2401.04679).
    """
    pretrained = _copies(model)
    warm = get_peft_model(model, replace(config, score="random", scope="global"))
    train(warm)
    chosen: nn.Module = get_peft_model(warm.merge_and_unload(), config)  # type: ignore[operator]
    select_child_network(chosen, batches, show_progress=False)
    _put_back(pretrained)
    return chosen


def chosen_again(model: nn.Module, config: ChildTuningConfig, batches: Iterable[Any], train: Train) -> nn.Module:
    """Train a random child for an epoch, keep the half of each tensor that moved most, and choose the rest anew.

    The other half goes back to its pretrained values; in its place come the weights of the highest score on the model
    as it is then. The head and the kept half keep what they have learned, the optimizer does not.

    Source: drop and grow, RigL, Evci et al. 2020 (arXiv:1911.11134).
    """
    pretrained = _copies(model)
    first = get_peft_model(model, replace(config, score="random", scope="tensor"))
    train(first)
    kept = {name: _largest_half(delta.indices, delta.values) for name, delta in get_deltas(first).items()}
    half = replace(config, density=config.density / 2)
    second = get_peft_model(first.merge_and_unload(), half)  # type: ignore[operator]
    grown = select_child_network(second, batches, show_progress=False)
    base: nn.Module = second.unload()  # type: ignore[operator]
    _put_back(pretrained)
    union = {name: torch.cat([kept[name][0], grown.indices[name]]).unique() for name in kept}
    both: nn.Module = get_peft_model(base, replace(config, score="random", scope="global"))
    select_child_network(both, network=ChildNetwork.from_indices(union, grown.shapes))
    with torch.no_grad():
        for name, (positions, values) in kept.items():
            module, parameter = name.rsplit(".", 1)
            held = both.get_submodule(f"base_model.model.{module}.child_tuning_values.default")
            held.get_parameter(parameter)[torch.searchsorted(union[name], positions)] = values
    return both


def _copies(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    return {parameter: parameter.detach().clone() for parameter in model.parameters()}


def _put_back(copies: dict[nn.Parameter, Tensor]) -> None:
    for parameter, copy in copies.items():
        parameter.data.copy_(copy)


def _largest_half(positions: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions, in order, and values of the half that is largest in size."""
    held = values.abs().topk(len(values) // 2).indices.sort().values
    return positions[held], values[held]
