"""State and life of the adapters on one adapted module."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..codec import step_view
from ..errors import SelectionError, UnsupportedError
from ..kernels import ComposedWeights, Edit, StepGate, compose_parameter
from ..sparse import SparseDelta, TensorChild, compose_entries
from ..weights import merge_, restore_
from .state import ChildCode, ChildValues
from .steps import count_steps
from .targets import covered_names

if TYPE_CHECKING:
    from .loading import PendingLoad

__all__ = ["REUSE_TOKENS", "ChildTuningLayer", "child_layers"]

REUSE_TOKENS = 512  # above, composing takes less than a twentieth of the product's time on a CPU

_NOT_SELECTED = """{name}: adapter {adapter!r} has no child network yet, so nothing to train, merge or save. Call

    from peft_childtune import select_child_network
    select_child_network(model, train_dataloader{argument})

before training. (score="magnitude", "random" and mode="task_free" need no data.)"""


class ChildTuningLayer(BaseTunerLayer):
    """The adapters of one module: `Linear` and `Module` in `modules.py` add the forward."""

    adapter_layer_names: tuple[str, ...] = ("child_tuning_values",)
    other_param_names: tuple[str, ...] = ("child_tuning_code", "child_tuning_seal", "_pending", "_replaced")

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
        self._tied: dict[str, tuple[ChildTuningLayer, str]] = {}  # parameters that another layer's child serves
        self._pending: dict[str, PendingLoad] = {}
        self._replaced: dict[str, list[tuple[str, Tensor, Tensor]]] = {}  # parameter, positions, entries
        self._composed = ComposedWeights()
        self.in_features, self.out_features = _features(base_layer)

    def update_layer(self, adapter_name: str, *, inference_mode: bool = False) -> None:
        """Add an adapter that has no child yet."""
        self.child_tuning_values[adapter_name] = ChildValues()
        self.child_tuning_code[adapter_name] = ChildCode()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    @property
    def covered(self) -> list[str]:
        """Names of the base layer's parameters that this layer's children cover."""
        return [name for name in covered_names(self.get_base_layer()) if name not in self._tied]

    def full_name(self, parameter: str) -> str:
        """Return the base model's own name of a parameter of this layer."""
        return f"{self._module_name}.{parameter}"

    def get_base_layer(self) -> nn.Module:
        """Return the wrapped module."""
        base: nn.Module = self._modules["base_layer"]
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
        shape = tuple(self.base_parameter(parameter).shape)
        return self._code(adapter_name).child(parameter, shape, self.full_name(parameter))

    def indices_in(self, base: Tensor, adapter_name: str, parameter: str) -> Tensor:
        """Return an adapter's kept positions in a base tensor, which may be gathered from shards, on its device."""
        return self._code(adapter_name).indices(parameter, base, self.full_name(parameter))

    def delta(self, adapter_name: str, parameter: str) -> SparseDelta:
        """Return an adapter's delta of one parameter, as copies."""
        self._require_child(adapter_name)
        shape = tuple(self.base_parameter(parameter).shape)
        values = self._values(adapter_name).get(parameter)
        if values is None:
            return SparseDelta(shape, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        child = self._code(adapter_name).child(parameter, shape, self.full_name(parameter))
        assert child is not None  # selected together with the values
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

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and verify what a loader has just put here: transformers runs no other hook after loading."""
        self._composed.clear()
        for adapter_name in list(self._pending):
            self.resolve_pending(adapter_name, may_be_empty=True)
        return super().train(mode)  # type: ignore[misc]

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _count_steps(self, adapter_name: str, parameter: str) -> None:
        """Let the optimizer steps of a resampled child count: `torch.compile` asks for it while it traces."""
        values = self._values(adapter_name).get(parameter)
        assert values is not None  # it is about to be trained
        count_steps(values, self._code(adapter_name), parameter)

    def _edits(self, parameter: str, adapters: list[str]) -> list[Edit]:
        """Return what some adapters do to a parameter, in their order."""
        owner, parameter = self._tied.get(parameter, (self, parameter))
        base, name = owner.base_parameter(parameter), owner.full_name(parameter)
        holders = owner._held("child_tuning_values")
        edits = []
        for adapter_name in adapters:
            holder = holders.get(adapter_name)
            values = None if holder is None else holder._parameters.get(parameter)
            if values is None:
                continue
            code = owner._code(adapter_name)
            found = code.decoded(parameter, base, name)
            assert found is not None  # a delta has a child
            if (rule := found.resampled) is None:
                edits.append(Edit(values, found.indices, hull=found.hull))
                continue
            if torch.is_grad_enabled() and values.requires_grad:
                owner._count_steps(adapter_name, parameter)
            gate = StepGate(rule.seed, rule.stream, rule.density, step_view(code.get(parameter)))
            edits.append(Edit(values, None, gate))
        return edits

    def reuses_composed(self, tokens: int = 0) -> bool:
        """Return whether a forward may keep a composed weight for the next one: in evaluation, for few tokens."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:  # nor under `torch.jit.trace`
            return False
        if torch.is_grad_enabled() or self.training:
            self._composed.clear()
            return False
        return tokens <= REUSE_TOKENS

    def composed(self, parameter: str, edits: list[Edit]) -> Tensor:
        """Return a parameter with edits composed into it, or what is kept of that."""
        compose = partial(self._composed.compose, parameter) if self.reuses_composed() else compose_parameter
        return compose(self.base_parameter(parameter), edits)

    def _owners(self) -> list[ChildTuningLayer]:
        """Return the layers whose children act on this one: itself, and those that serve its tied parameters."""
        return [self, *(owner for owner, _ in self._tied.values())]

    def _working_adapters(self) -> list[str]:
        """Return the active adapters that take part in this layer's forward; raise where one cannot."""
        if self._disable_adapters:
            return []
        owners = self._owners()
        working = []
        for adapter_name in self.active_adapters:
            for owner in owners:
                if adapter_name not in owner._held("child_tuning_code"):
                    continue
                owner.resolve_pending(adapter_name)
                if owner.has_child(adapter_name):
                    working.append(adapter_name)
                elif self.training:
                    owner._require_child(adapter_name)
                break
        return working

    @property
    def weight(self) -> Any:
        """The weight with the active adapters' deltas, for model code that reads it instead of calling the layer."""
        return self._as_read("weight")

    @property
    def bias(self) -> Any:
        """The bias, likewise."""
        return self._as_read("bias")

    def _as_read(self, parameter: str) -> Any:
        base = self.get_base_layer()
        if parameter not in covered_names(base):
            return getattr(base, parameter)
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters or self.merged:
            return self.base_parameter(parameter)
        owner = self._tied.get(parameter, (self, parameter))[0]
        for adapter_name in self.active_adapters:
            owner.resolve_pending(adapter_name, may_be_empty=True)
        ready = [name for name in self.active_adapters if owner.has_child(name) and name not in owner._pending]
        edits = self._edits(parameter, ready)
        return self.composed(parameter, edits) if edits else self.base_parameter(parameter)

    def _merge_plan(self, adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        self._require_child(adapter_name)
        for parameter in self.covered:
            values = self._values(adapter_name).get(parameter)
            if values is not None:
                weight = self.base_parameter(parameter)
                yield parameter, self.indices_in(weight, adapter_name, parameter), values.detach().to(weight.device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weights in place, at the child's positions only.

        Args:
            safe_merge: first check that every merged entry is finite, and leave this layer as it is if one is not.
            adapter_names: the adapters, in this order; None for the active ones.

        Raises:
            ValueError: `safe_merge` found an entry that is not finite.
            SelectionError: an adapter has no child yet.
        """
        before = list(self.merged_adapters)
        self._composed.clear()
        try:
            for adapter_name in check_adapters_to_merge(self, adapter_names):
                if not any(adapter_name in owner.child_tuning_values for owner in self._owners()):
                    continue
                plan = list(self._merge_plan(adapter_name)) if adapter_name in self.child_tuning_values else []
                if safe_merge and not all(self._merges_finite(*step) for step in plan):
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    )
                self.merged_adapters.append(adapter_name)
                done = self._replaced[adapter_name] = []
                for parameter, indices, values in plan:
                    done.append((parameter, indices, merge_(self.base_parameter(parameter), indices, values)))
        except BaseException:
            self.unmerge_to(before)
            raise

    def _merges_finite(self, parameter: str, indices: Tensor, values: Tensor) -> bool:
        entries = self.base_parameter(parameter).detach().reshape(-1)[indices]
        return bool(torch.isfinite(compose_entries(entries, values)).all())

    def unmerge(self) -> None:
        """Restore the base weights bit for bit, by writing back the entries that the merges replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.unmerge_to([])

    def unmerge_to(self, remaining: list[str]) -> None:
        """Undo the last merges until only `remaining` are left."""
        while len(self.merged_adapters) > len(remaining):
            adapter_name = self.merged_adapters.pop()
            for parameter, indices, entries in self._replaced.pop(adapter_name, []):
                restore_(self.base_parameter(parameter), indices, entries)

    def unmerged_base(self, parameter: str, base: Tensor | None = None) -> Tensor:
        """Return a base tensor as it is without any merge: itself, or a copy if something is merged.

        Args:
            parameter: its name in the base layer.
            base: the tensor to look at; None for the base layer's own (a gathered state dict may hold the whole of a
            shard).
        """
        weight = self.base_parameter(parameter).detach() if base is None else base
        if not self.merged:
            return weight
        weight = weight.clone()
        for adapter_name in reversed(self.merged_adapters):
            for name, indices, entries in self._replaced.get(adapter_name, []):
                if name == parameter:
                    restore_(weight, indices, entries)
        return weight

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Overridden because PEFT also casts to the base's dtype: deltas stay float32, or small updates are lost.
        own = next(iter(self.get_base_layer().parameters(recurse=False)), None)
        target = device if device is not None else None if own is None else own.device
        if target is None or target.type == "meta":
            return
        for holder in (self.child_tuning_values, self.child_tuning_code):
            if adapter_name in holder and not any(p.device.type == "meta" for p in holder[adapter_name].parameters()):
                holder[adapter_name].to(target)

    def _adapters_of_forward(self, kwargs: dict[str, Any]) -> list[str]:
        """Return the adapters whose deltas a forward must add: none if disabled or merged, else the active ones."""
        if "adapter_names" in kwargs:
            raise UnsupportedError(
                "adapter_names: one batch with several adapters is not supported; call `set_adapter` and run "
                "each part on its own."
            )
        if getattr(self, "_is_replica", False):
            raise UnsupportedError(
                f"{self._module_name}: nn.DataParallel hands its copies no parameters to train; run one process per "
                "device (`accelerate launch`, `torchrun`), or show the program one GPU (CUDA_VISIBLE_DEVICES=0)."
            )
        if self._disable_adapters and self.merged:
            self.unmerge()
        return [] if self.merged else self._working_adapters()

    def __getattr__(self, name: str) -> Any:
        """Return what the base layer has under that name: model code asks its layers for `eps` and the like."""
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return self._as_read(name)

    def __repr__(self) -> str:
        """Return the wrapped module's description under this method's name."""
        return "child_tuning." + super().__repr__()


def child_layers(model: nn.Module) -> list[ChildTuningLayer]:
    """Return a model's adapted layers in its own order, each once.

    Faster than `model.modules()`, which shows when adapters are switched: what adapters hold is not searched.
    """
    found: list[ChildTuningLayer] = []
    seen: set[int] = set()
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, ChildTuningLayer):
            found.append(module)
            waiting.append(module.base_layer)
        else:
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return found


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
