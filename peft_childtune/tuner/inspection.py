"""Asking a model for its child: the positions, what was learnt at them, and how they spread."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import ConfigError, SelectionError
from ..network import ChildNetwork
from ..ranks import unwrapped
from ..sparse import SparseDelta, TensorChild
from .config import ChildTuningConfig
from .gathered import shape_of
from .install import covered_tensors, grids_of
from .sharding import refuse_sharded
from .targets import block_names, block_of

__all__ = ["config_of", "get_child_network", "get_deltas", "groups_of", "selection_report"]


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


def selection_report(model: nn.Module, adapter_name: str = "default") -> str:
    """Return a few lines of text: how much of the model is covered, and how the child spreads over blocks and tensors.

    Raises:
        SelectionError: there is no such adapter, or no child yet.
    """
    network = get_child_network(model, adapter_name)
    model = unwrapped(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    total = sum(
        math.prod(shape_of(p))
        for name, p in base.named_parameters()
        if ".child_tuning_" not in name and ".modules_to_save." not in name
    )
    lines = [
        f"Child network: {network.nnz:,} of {network.numel:,} covered weights ({network.density:.3%}); "
        f"{network.numel / total:.1%} of the model's {total:,} weights are covered."
    ]
    by_block: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    groups = groups_of(model, network.children)
    for name, child in network.children.items():
        block = groups[name]
        kind = name.removeprefix(f"{block}.") if block else name
        for table, key in ((by_block, block or "outside blocks"), (by_kind, kind)):
            table[key][0] += child.nnz
            table[key][1] += child.grid.numel
    for title, table in (("block", by_block), ("tensor", by_kind)):
        width = max(map(len, table))
        lines.append(f"{title:<{width}}  share of child  density")
        lines += [
            f"{key:<{width}}  {kept / max(1, network.nnz):>14.1%}  {kept / numel:>7.2%}"
            for key, (kept, numel) in table.items()
        ]
    return "\n".join(lines)
