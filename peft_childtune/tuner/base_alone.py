"""The base model by itself, under its adapters, and the head that one of them trains."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .layer import ChildTuningLayer

__all__ = ["BaseAlone", "heads_of"]


class BaseAlone:
    """Every adapter of a model switched off and unmerged, heads those of one adapter; and back to how it was."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        self.adapter_name = adapter_name

    def __enter__(self) -> None:
        self.before = [layer._disable_adapters for layer in self.layers]
        self.heads_before = [(head._active_adapter, head._disable_adapters) for head in self.heads]
        children = [layer for layer in self.layers if isinstance(layer, ChildTuningLayer)]
        self.merged = [(layer, list(layer.merged_adapters)) for layer in children if layer.merged]
        for layer, _ in self.merged:
            layer.unmerge()
        for layer in self.layers:
            layer._disable_adapters = True
        for head in self.heads:  # that of another adapter gives way to the base's own
            head._disable_adapters = self.adapter_name not in head.modules_to_save
            if not head._disable_adapters:
                head._active_adapter = [self.adapter_name]

    def __exit__(self, *_: object) -> None:
        for layer, flag in zip(self.layers, self.before, strict=True):
            layer._disable_adapters = flag
        for head, (active, flag) in zip(self.heads, self.heads_before, strict=True):
            head._active_adapter, head._disable_adapters = active, flag
        for layer, merged in self.merged:
            layer.merge(adapter_names=merged)


def heads_of(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Return what an adapter trains whole: fresh heads in its `modules_to_save`."""
    kept = f".modules_to_save.{adapter_name}."
    return {name: p for name, p in model.named_parameters() if kept in f".{name}" and p.is_floating_point()}
