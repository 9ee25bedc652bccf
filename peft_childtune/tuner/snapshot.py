"""What adding or loading an adapter changes, to be put back when that fails."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .layer import ChildTuningLayer

__all__ = ["AdapterBefore", "Snapshot"]


class Snapshot:
    """Which parameters of a model were trainable, and which adapters active."""

    def __init__(self, root: nn.Module) -> None:
        self._trainable = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._active = [
            (module, copy.copy(module._active_adapter))
            for module in root.modules()
            if isinstance(module, ChildTuningLayer | ModulesToSaveWrapper)
        ]

    def restore_(self) -> None:
        """Put it back, in place."""
        for module, names in self._active:
            module._active_adapter = names
        for parameter, flag in self._trainable:
            parameter.requires_grad_(flag)


class AdapterBefore:
    """The tensors of an adapter, as copies: its deltas, its coded children, its heads."""

    def __init__(self, layers: Sequence[ChildTuningLayer], adapter_name: str, heads: Sequence[Tensor]) -> None:
        self._codes = [(code, code.selected) for code in (layer._code(adapter_name) for layer in layers)]
        tables: list[dict[str, Any]] = [layer._values(adapter_name)._parameters for layer in layers]
        tables += [code._buffers for code, _ in self._codes]
        self._tables = [(table, dict(table)) for table in tables]
        held = [tensor for _, table in self._tables for tensor in table.values() if tensor is not None]
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in (*held, *heads)]

    def restore_(self) -> None:
        """Put them back, in place."""
        for table, content in self._tables:
            table.clear()
            table.update(content)
        for tensor, values in self._tensors:
            tensor.data.copy_(values)
        for code, selected in self._codes:
            code.selected = selected
            code.forget()
