"""What injecting an adapter changes beside adding modules, to be put back when the adapter is refused."""

from __future__ import annotations

import copy

from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .layer import ChildTuningLayer

__all__ = ["Snapshot"]


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
