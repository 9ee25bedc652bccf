"""What the adapters on one module hold: their deltas, their children, and the base parameters these belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import SelectionError
from ..kernels import ComposeCache
from ..sparse import SparseDelta, TensorChild
from ..weights import Fingerprint, Replaced
from .gathered import shape_of
from .offload import onloaded, out_of_reach
from .state import ChildCode, ChildValues, Decoded
from .steps import count_steps
from .targets import covered_names

if TYPE_CHECKING:
    from .loading import PendingLoad

__all__ = ["AdapterHolder"]

_NOT_SELECTED = """{name}: adapter {adapter!r} has no child network yet, so nothing to train, merge or save. Call

    from peft_childtune import select_child_network
    select_child_network(model, train_dataloader{argument})

before training; where a trainer wraps the model itself, as TRL's do, give it callbacks=[ChildTuningCallback()].
(score="magnitude", "random" and mode="task_free" need no data.)"""


class _Plain:
    """First among the bases: `fully_shard` changes a layer's class, which Python allows only below a plain one."""


class AdapterHolder(_Plain, BaseTunerLayer):
    """The state of the adapters on one module; `ChildTuningLayer` computes with it."""

    adapter_layer_names: tuple[str, ...] = ("child_tuning_values",)
    other_param_names: tuple[str, ...] = (
        "child_tuning_code",
        "child_tuning_seal",
        "_pending",
        "_replaced",
        "_fingerprints",
    )

    base_layer: nn.Module
    child_tuning_values: nn.ModuleDict
    child_tuning_code: nn.ModuleDict

    def _set_up(self, base_layer: nn.Module, module_name: str) -> None:
        self.base_layer = base_layer
        self.child_tuning_values = nn.ModuleDict()
        self.child_tuning_code = nn.ModuleDict()
        self.child_tuning_seal = BufferDict(persistent=True)  # filled only between creation and verification of a load
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._module_name = module_name
        self._tied: dict[str, tuple[AdapterHolder, str]] = {}  # parameters that another layer's child serves
        self._pending: dict[str, PendingLoad] = {}
        self._replaced: dict[str, list[tuple[str, Replaced]]] = {}  # by adapter: parameter, what was in it
        # by adapter and parameter, with the positions for which they hold; see `gathered.py`
        self._fingerprints: dict[str, dict[str, tuple[Tensor | None, Fingerprint]]] = {}
        self._compose_cache = ComposeCache()
        self.in_features, self.out_features = _features(base_layer)

    def update_layer(self, adapter_name: str, *, inference_mode: bool = False) -> None:
        """Add an adapter that has no child yet."""
        self.child_tuning_values[adapter_name] = ChildValues()
        self.child_tuning_code[adapter_name] = ChildCode()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter away."""
        self._compose_cache.clear()
        super().delete_adapter(adapter_name)

    @property
    def covered(self) -> list[str]:
        """Names of the base layer's parameters that this layer's children cover."""
        return [name for name in covered_names(self.get_base_layer()) if name not in self._tied]

    def full_name(self, parameter: str) -> str:
        """Return the base model's own name of a parameter of this layer."""
        return f"{self._module_name}.{parameter}"

    def get_base_layer(self) -> nn.Module:
        """Return the wrapped module."""
        base: nn.Module = self.__dict__["_modules"]["base_layer"]
        return base.get_base_layer() if isinstance(base, BaseTunerLayer) else base

    def base_parameter(self, parameter: str) -> nn.Parameter:
        """Return a parameter of the base layer."""
        found = self.get_base_layer()._parameters[parameter]
        assert found is not None  # by construction of `covered`
        return found

    def has_child(self, adapter_name: str) -> bool:
        """Whether the adapter's child is selected, or loaded."""
        code = self._held("child_tuning_code").get(adapter_name)
        return code is not None and bool(code.selected)

    def _held(self, kind: str) -> dict[str, Any]:
        # without the detours of `nn.Module` and `nn.ModuleDict`: at few tokens they would show
        held: dict[str, Any] = self.__dict__["_modules"][kind].__dict__["_modules"]
        return held

    def _code(self, adapter_name: str) -> ChildCode:
        code: ChildCode = self._held("child_tuning_code")[adapter_name]
        return code

    def _values(self, adapter_name: str) -> ChildValues:
        values: ChildValues = self._held("child_tuning_values")[adapter_name]
        return values

    def child(self, adapter_name: str, parameter: str) -> TensorChild | None:
        """Return an adapter's child of one parameter, or None where nothing was kept."""
        shape = shape_of(self.base_parameter(parameter))
        with onloaded(self):
            return self._code(adapter_name).child(parameter, shape, self.full_name(parameter))

    def decoded(self, adapter_name: str, parameter: str, base: Tensor) -> Decoded:
        """Return an adapter's decoded child of a parameter of which it has a delta, on the device of `base`."""
        found = self._code(adapter_name).decoded(parameter, base, self.full_name(parameter))
        assert found is not None  # a delta has a child
        return found

    def indices_in(self, base: Tensor, adapter_name: str, parameter: str) -> Tensor:
        """Return an adapter's kept positions in a base tensor, which may be gathered from shards, on its device."""
        return self._code(adapter_name).indices(parameter, base, self.full_name(parameter))

    def delta(self, adapter_name: str, parameter: str) -> SparseDelta:
        """Return an adapter's delta of one parameter, as copies."""
        self._require_child(adapter_name)
        shape = shape_of(self.base_parameter(parameter))
        with onloaded(self):
            values = self._values(adapter_name).get(parameter)
            if values is None:
                return SparseDelta(shape, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
            child = self._code(adapter_name).child(parameter, shape, self.full_name(parameter))
            assert child is not None  # selected together with the values
            if values.is_meta:
                raise out_of_reach(f"{self.full_name(parameter)}: the delta")
            return SparseDelta(shape, child.indices(device=values.device).to(values.device), values.detach().clone())

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return an adapter's delta of the weight as a dense tensor of the weight's shape, zero outside the child."""
        parameter = "weight" if "weight" in self.covered else self.covered[0]
        return self.delta(adapter_name, parameter).to_dense()

    def _require_child(self, adapter_name: str) -> None:
        self.resolve_pending(adapter_name)
        if not self.has_child(adapter_name):
            argument = "" if adapter_name == "default" else f", adapter_name={adapter_name!r}"
            raise SelectionError(_NOT_SELECTED.format(name=self._module_name, adapter=adapter_name, argument=argument))

    def resolve_pending(self, adapter_name: str, *, may_be_empty: bool = False) -> None:
        """Verify an adapter whose tensors a loader has put here, and take the adapter away if they are not sound."""
        if (pending := self._pending.get(adapter_name)) is not None:
            pending.resolve(may_be_empty=may_be_empty)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _count_steps(self, adapter_name: str, parameter: str) -> None:
        """Let the optimizer steps of a resampled child count: `torch.compile` asks for it while it traces."""
        count_steps(self._values(adapter_name), self._code(adapter_name), parameter)

    def _owners(self) -> list[AdapterHolder]:
        """Return the layers whose children act on this one: itself, and those that serve its tied parameters."""
        return [self, *(owner for owner, _ in self._tied.values())]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Overridden because PEFT also casts to the base's dtype: deltas stay float32, or small updates are lost.
        own = next(iter(self.get_base_layer().parameters(recurse=False)), None)
        target = device if device is not None else None if own is None else own.device
        if target is None or target.type == "meta":
            return
        for holder in (self.child_tuning_values, self.child_tuning_code):
            if adapter_name in holder and not any(p.device.type == "meta" for p in holder[adapter_name].parameters()):
                holder[adapter_name].to(target)


def _features(base: nn.Module) -> tuple[int | None, int | None]:
    for names in (
        ("in_features", "out_features"),
        ("in_channels", "out_channels"),
        ("num_embeddings", "embedding_dim"),
    ):
        if all(hasattr(base, name) for name in names):
            return getattr(base, names[0]), getattr(base, names[1])
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim == 0:
        return None, None
    if isinstance(base, Conv1D):
        return weight.shape[0], weight.shape[1]
    return weight.shape[-1], weight.shape[0]
