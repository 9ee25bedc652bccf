"""The layers that stand in for adapted modules: what their forward computes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedError
from ..kernels import child_conv, child_linear, compose_parameter, plain_linear
from .layer import ChildTuningLayer
from .offload import forward_onloaded, must_onload
from .targets import covered_names

__all__ = ["Conv", "Linear", "Module", "find_own_inputs", "wrap"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _hooks(base: nn.Module, kind: str) -> dict[int, Any]:
    """Return a module's hooks, without those of ZeRO-3.

    These gather the parameters of a module that is called; a layer reads its base's, which gathers them as well.
    """
    hooks: dict[int, Any] = getattr(base, kind)
    if "ds_id" not in base.__dict__:
        return hooks
    own = ((key, hook) for key, hook in hooks.items() if not str(hook.__module__).startswith("deepspeed."))
    return OrderedDict(own)


def _has_hooks(base: nn.Module) -> bool:
    return any(_hooks(base, kind) for kind in _HOOKS)


def _stand_in(base: nn.Module, parameters: dict[str, Any]) -> nn.Module:
    """Return a shallow copy of a module with other parameters.

    The module itself is never touched, and its class's own forward runs, with its hooks, so that merged and unmerged
    outputs agree in every bit.
    """
    stand_in = copy.copy(base)
    stand_in.__dict__ |= {"_parameters": parameters, **{kind: _hooks(base, kind) for kind in _HOOKS}}
    # a forward that was set on the instance is bound to the module itself; FSDP1 sets plain tensors of these names
    for name in ("forward", *parameters):
        stand_in.__dict__.pop(name, None)
    return stand_in


class Linear(ChildTuningLayer, nn.Module):
    """An adapted `nn.Linear` or GPT-2 `Conv1D`: composes, multiplies, and keeps nothing of the weight's size."""

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self._set_up(base_layer, module_name)
        self._transposed = isinstance(self.get_base_layer(), Conv1D)
        self._owns_input = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output with the active adapters' deltas on the weights: disabled, merged, then active."""
        adapters = self._adapters_of_forward(kwargs)
        if not adapters:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        base = self.get_base_layer()
        if "_hf_hook" in base.__dict__ and must_onload(self, adapters):
            return forward_onloaded(Linear.forward, self, x, *args, **kwargs)  # type: ignore[no-any-return]
        edits = self._edits("weight", adapters)
        bias_edits = self._edits("bias", adapters) if base.bias is not None else []
        if not edits and not bias_edits:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        bias = self.composed("bias", bias_edits) if bias_edits else base.bias
        if _has_hooks(base):  # their owner expects them to run at every forward
            weight = compose_parameter(self.base_parameter("weight"), edits)
            return _stand_in(base, {"weight": weight, "bias": bias})(x, *args, **kwargs)  # type: ignore[no-any-return]
        if edits and not self.uses_compose_cache(x.numel() // max(x.shape[-1], 1)):
            kind = {"transposed": self._transposed, "owns_input": self._owns_input}
            return child_linear(x, base.weight, bias, edits, **kind)  # type: ignore[arg-type]
        weight = self.composed("weight", edits) if edits else self.base_parameter("weight")
        return plain_linear(x, weight, bias, transposed=self._transposed)  # type: ignore[arg-type]


def find_own_inputs(model: nn.Module) -> None:
    """Tell each adapted linear layer whether it is the only one of its input width beside its siblings.

    Query, key and value keep one input between them for the backward; the layer that leads out of an MLP has its own.
    """
    siblings: dict[tuple[str, int | None], list[Linear]] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            siblings.setdefault((path.rpartition(".")[0], module.in_features), []).append(module)
    for group in siblings.values():
        for layer in group:
            layer._owns_input = len(group) == 1


class _Watched(dict[str, Any]):
    """Parameters that remember which of them were read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


class Module(ChildTuningLayer, nn.Module):
    """Any other adapted module, a norm or an embedding, say: its own forward runs over composed weights."""

    def __init__(self, base_layer: nn.Module, module_name: str) -> None:
        super().__init__()
        self._set_up(base_layer, module_name)
        self._proven: set[str] = set()  # parameters that the forward was seen to read

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output with the active adapters' deltas on the weights: disabled, merged, then active."""
        adapters = self._adapters_of_forward(kwargs)
        base = self.get_base_layer()
        if "_hf_hook" in base.__dict__ and must_onload(self, adapters):
            return forward_onloaded(Module.forward, self, *args, **kwargs)
        composed = {}
        for name in covered_names(base) if adapters else ():
            if edits := self._edits(name, adapters):
                composed[name] = self.composed(name, edits)
        if not composed:
            return self.base_layer(*args, **kwargs)
        if torch.compiler.is_compiling() and all(self._names(name) for name in composed):
            return torch.func.functional_call(base, composed, args, kwargs)
        parameters = {**base._parameters, **composed}
        if self._proven.issuperset(composed):
            return _stand_in(base, parameters)(*args, **kwargs)
        watched = _Watched(parameters)
        out = _stand_in(base, watched)(*args, **kwargs)
        if unread := set(composed) - watched.read:
            raise UnsupportedError(
                f"{self._module_name}: the forward of {type(base).__name__} does not read `{min(unread)}` from "
                "itself, so its delta would be ignored; take this module out of `target_modules`."
            )
        self._proven |= set(composed)
        return out

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _names(self, parameter: str) -> bool:
        """Return whether the forward surely reads a parameter: tracing cannot watch it, but its code has names."""
        code = getattr(type(self.get_base_layer()).forward, "__code__", None)
        return parameter in self._proven or (code is not None and parameter in code.co_names)


class Conv(Module):
    """An adapted convolution: composes, convolves, and keeps nothing of the weight's size.

    Where it pads with anything but a number of zeros, or is compiled, the composed weight is kept for the backward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output with the active adapters' deltas on the weights: disabled, merged, then active."""
        base: Any = self.get_base_layer()
        is_plain = base.padding_mode == "zeros" and isinstance(base.padding, tuple) and len(args) == 1 and not kwargs
        if not is_plain or not torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_hooks(base):
            return super().forward(*args, **kwargs)
        adapters = self._adapters_of_forward(kwargs)
        if "_hf_hook" in base.__dict__ and must_onload(self, adapters):
            return forward_onloaded(Conv.forward, self, *args)
        if not adapters or not (edits := self._edits("weight", adapters)):
            return super().forward(*args)
        bias_edits = self._edits("bias", adapters) if base.bias is not None else []
        bias = self.composed("bias", bias_edits) if bias_edits else base.bias
        window = ([*base.stride], [*base.padding], [*base.dilation], base.groups)
        return child_conv(args[0], base.weight, bias, edits, window=window)


_FORWARDS: dict[Any, type[Linear | Module]] = {
    (nn.Linear.forward, None): Linear,
    (Conv1D.forward, None): Linear,
    # a class may standardise its weight in `_conv_forward`, and leave `forward` as it is
    **{(kind.forward, kind._conv_forward): Conv for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
}


def wrap(target: nn.Module, module_name: str) -> Linear | Module:
    """Return the layer that stands in for `target`, a plain module."""
    kind = type(target)
    return _FORWARDS.get((kind.forward, getattr(kind, "_conv_forward", None)), Module)(target, module_name)
