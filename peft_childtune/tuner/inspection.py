"""Asking a model for its child: the positions, and what was learnt at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import ConfigError, SelectionError
from ..network import ChildNetwork
from ..ranks import unwrapped
from ..sparse import SparseDelta, TensorChild
from .config import ChildTuningConfig
from .install import covered_tensors, grids_of
from .sharding import refuse_sharded
from .targets import block_names, block_of

__all__ = ["config_of", "get_child_network", "get_deltas", "groups_of"]


def config_of(model: nn.Module, adapter_name: str) -> ChildTuningConfig:
    """Return the configuration of an adapter.

    Raises:
        SelectionError: there is no such adapter.
        ConfigError: it is of another method.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or adapter_name not in configs:
        known = f"it has {sorted(configs)}" if isinstance(configs, Mapping) else "it has none"
        raise SelectionError(
            f"the model has no adapter {adapter_name!r} ({known}); wrap it first: get_peft_model(base, "
            "ChildTuningConfig(...))."
        )
    config = configs[adapter_name]
    if not isinstance(config, ChildTuningConfig):
        raise ConfigError(
            f"adapter {adapter_name!r} is a {type(config).__name__}, not a ChildTuningConfig; it has no child network."
        )
    return config


def groups_of(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return the transformer block of each base tensor, by its name; empty outside of blocks."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    blocks = block_names(base)
    return {name: block_of(name, blocks) for name in names}


def get_child_network(model: nn.Module, adapter_name: str = "default") -> ChildNetwork:
    """Return the child network of an adapter.

    Raises:
        SelectionError: there is no such adapter, or no child yet.
    """
    model = unwrapped(model)
    grids = grids_of(model, adapter_name, config_of(model, adapter_name))
    children = {}
    for name, layer, parameter in covered_tensors(model, adapter_name):
        layer._require_child(adapter_name)
        child = layer.child(adapter_name, parameter)
        children[name] = child or TensorChild(grids[name], torch.zeros(0, dtype=torch.int64))
    return ChildNetwork(children)


def get_deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, SparseDelta]:
    """Return the trained delta of every covered base tensor, by the base model's own name, as copies.

    Raises:
        SelectionError: there is no such adapter, or no child yet.
        UnsupportedError: the model's weights are divided among processes.
    """
    model = unwrapped(model)
    config_of(model, adapter_name)
    refuse_sharded(
        model, what="get_deltas", instead="save the adapter and load it in one process (README, several processes)."
    )
    return {
        name: layer.delta(adapter_name, parameter) for name, layer, parameter in covered_tensors(model, adapter_name)
    }
