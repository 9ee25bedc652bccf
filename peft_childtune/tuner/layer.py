"""What an adapted module does: its deltas in the forward, merging, unmerging."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..codec import step_view
from ..errors import UnsupportedError
from ..kernels import Edit, StepGate, compose_parameter, take_entries
from ..ranks import world_size
from ..sparse import compose_entries
from ..weights import Replaced, is_sharded, merge_, restore_
from .ddp import check_synchronised
from .gathered import is_partitioned, remember_base
from .holder import AdapterHolder
from .offload import follow_tied_, is_away, onloaded, out_of_reach
from .targets import covered_names

__all__ = ["COMPOSE_CACHE_TOKENS", "ChildTuningLayer", "child_layers", "outer_modules"]

COMPOSE_CACHE_TOKENS = 512  # above, composing takes less than a twentieth of the product's time on a CPU


class ChildTuningLayer(AdapterHolder):
    """An adapted module: `Linear` and `Module` in `modules.py` add the forward."""

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and verify what a loader has just put here: transformers runs no other hook after loading."""
        self._compose_cache.clear()
        for adapter_name in list(self._pending):
            self.resolve_pending(adapter_name, may_be_empty=True)
        for holder in self._held("child_tuning_values").values() if mode else ():
            # a hook on a module above would exchange the deltas for copies, whose gradients are lost unseen
            if not is_away(holder) and any(p.is_meta and p.requires_grad for p in holder.parameters()):
                raise out_of_reach(f"{self._module_name}: a delta that is to be trained")
        return super().train(mode)  # type: ignore[misc]

    def _edits(self, parameter: str, adapters: list[str]) -> list[Edit]:
        """Return what some adapters do to a parameter, in their order."""
        module = self.get_base_layer()
        base = module._parameters[parameter]
        owner, parameter = self._tied.get(parameter, (self, parameter))
        holders = owner._held("child_tuning_values")
        edits = []
        for adapter_name in adapters:
            holder = holders.get(adapter_name)
            if holder is None or parameter not in holder._parameters:
                continue
            values = holder._parameters[parameter]  # not `get`: ZeRO-3 gathers what is read like this
            # in training without gradients, too: reentrant checkpointing takes them later, outside of DDP's forward
            if not _is_traced() and values.requires_grad and (torch.is_grad_enabled() or self.training):
                check_synchronised(values, owner.full_name(parameter))
            found = owner.decoded(adapter_name, parameter, base)  # type: ignore[arg-type]  # as its delta, it is there
            if "_hf_hook" in module.__dict__:  # an offloaded base comes to its execution device, the delta does not
                values = values.to(found.device)
            if (rule := found.resampled) is None:
                edits.append(Edit(values, found.indices, hull=found.hull))
                continue
            if torch.is_grad_enabled() and values.requires_grad:
                owner._count_steps(adapter_name, parameter)
            gate = StepGate(rule.seed, rule.stream, rule.density, step_view(owner._code(adapter_name).get(parameter)))
            edits.append(Edit(values, None, gate))
        return edits

    def uses_compose_cache(self, tokens: int = 0) -> bool:
        """Return whether a forward may keep a composed weight for the next one: in evaluation, for few tokens.

        Not in one of several processes, which may have the weight for the length of this forward only: what is kept
        would become the whole of a model that was divided because it is too large.
        """
        if _is_traced() or torch.is_grad_enabled() or self.training:
            return False
        return tokens <= COMPOSE_CACHE_TOKENS and world_size() == 1 and "ds_id" not in self.__dict__  # ZeRO-3's mark

    def composed(self, parameter: str, edits: list[Edit]) -> Tensor:
        """Return a parameter with edits composed into it, or what is kept of that."""
        base = self.base_parameter(parameter)
        if self.uses_compose_cache():
            return self._compose_cache.compose(parameter, base, edits)
        return compose_parameter(base, edits)

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
        owner = self._tied.get(parameter, (self, parameter))[0]
        working = [] if self._disable_adapters or self.merged else self.active_adapters
        for adapter_name in working:
            owner.resolve_pending(adapter_name, may_be_empty=True)
        with onloaded(self):
            ready = [name for name in working if owner.has_child(name) and name not in owner._pending]
            if "ds_id" in self.__dict__ and not _is_traced():
                remember_base(self, ready)
            edits = self._edits(parameter, ready)
            return self.composed(parameter, edits) if edits else self.base_parameter(parameter)

    def _merge_plan(self, adapter_name: str) -> Iterator[tuple[str, Tensor, Tensor | None, Tensor]]:
        """Yield name, base, positions and delta of every parameter that an adapter changes."""
        self._require_child(adapter_name)
        held = self._values(adapter_name)
        for parameter in self.covered:
            values = held.get(parameter)
            if is_partitioned(base := self.base_parameter(parameter)) or is_sharded(base):
                raise UnsupportedError(
                    f"{self.full_name(parameter)}: is divided among processes; save the adapter, and merge it into a "
                    "base that one process has loaded (under ZeRO-3, `deepspeed.zero.GatheredParameters` does, too)."
                )
            if values is not None:
                yield parameter, base, self.decoded(adapter_name, parameter, base).indices, values.detach()

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
        self._compose_cache.clear()
        with onloaded(self, writes=True):
            try:
                for adapter_name in check_adapters_to_merge(self, adapter_names):
                    for owner in self._owners():
                        if adapter_name in owner._held("child_tuning_values"):
                            self._merge_one(adapter_name, safe_merge)
                            break
                follow_tied_(self)
            except BaseException:
                self.unmerge_to(before)
                raise

    def _merge_one(self, adapter_name: str, safe_merge: bool) -> None:
        plan = list(self._merge_plan(adapter_name)) if adapter_name in self._held("child_tuning_values") else []
        if safe_merge and not all(self._merges_finite(*step) for step in plan):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        self.merged_adapters.append(adapter_name)
        self._replaced[adapter_name] = []
        for parameter, base, indices, values in plan:
            merge_(base, indices, values, record=partial(self._record, adapter_name, parameter))

    def _record(self, adapter_name: str, parameter: str, replaced: Replaced) -> None:
        self._replaced[adapter_name].append((parameter, replaced))

    @staticmethod
    def _merges_finite(_: str, base: Tensor, indices: Tensor | None, values: Tensor) -> bool:
        entries = base.detach().reshape(-1) if indices is None else take_entries(base, indices)
        return bool(torch.isfinite(compose_entries(entries, values.to(entries.device))).all())

    def unmerge(self) -> None:
        """Restore the base weights bit for bit, by writing back the entries that the merges replaced."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.unmerge_to([])

    def unmerge_to(self, remaining: list[str]) -> None:
        """Undo the last merges until only `remaining` are left, or none of them if one cannot be undone."""
        if len(self.merged_adapters) <= len(remaining):
            return
        before = list(self.merged_adapters)
        with onloaded(self, writes=True):
            try:
                while len(self.merged_adapters) > len(remaining):
                    adapter_name = self.merged_adapters[-1]
                    for parameter, replaced in self._replaced.get(adapter_name, []):
                        restore_(self.base_parameter(parameter), replaced)
                    self.merged_adapters.pop()  # not before: if a restoration fails, it can be tried again
                    self._replaced.pop(adapter_name, None)
                follow_tied_(self)
            except BaseException:
                self.merge_back(before)
                raise

    def merge_back(self, before: list[str]) -> None:
        """Bring back the merges that `unmerge_to` has undone, the last one in part perhaps.

        Args:
            before: the adapters that were merged, in their order.
        """
        with onloaded(self, writes=True):
            for adapter_name in self.merged_adapters[-1:]:
                for parameter, replaced in self._replaced.get(adapter_name, []):
                    values = self._values(adapter_name).get(parameter)
                    assert values is not None  # it was merged
                    delta, entries = values.detach().to(replaced.entries.device), replaced.entries
                    merged = compose_entries(entries.reshape(-1), delta).view(entries.shape)
                    restore_(self.base_parameter(parameter), replace(replaced, entries=merged))
            for adapter_name in before[len(self.merged_adapters) :]:
                self._merge_one(adapter_name, safe_merge=False)
            follow_tied_(self)

    def unmerged_base(self, parameter: str, base: Tensor | None = None) -> Tensor:
        """Return a base tensor as it is without any merge: itself, or a copy if something is merged.

        Args:
            parameter: its name in the base layer.
            base: the tensor to look at; None for the base layer's own (a gathered state dict may hold the whole of a
                shard).

        Raises:
            UnsupportedError: it is on the meta device.
        """
        weight = self.base_parameter(parameter).detach() if base is None else base
        if weight.is_meta:
            raise out_of_reach(f"{self.full_name(parameter)}: the base weight")
        if not self.merged:
            return weight
        weight = weight.clone()
        for adapter_name in reversed(self.merged_adapters):
            for name, replaced in self._replaced.get(adapter_name, []):
                if name == parameter:
                    restore_(weight, replaced)
        return weight

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
        if not _is_traced() and (torch.is_grad_enabled() or self.training):
            self._compose_cache.clear()
        if self.merged:
            return []
        working = self._working_adapters()
        if "ds_id" in self.__dict__ and not _is_traced():
            remember_base(self, working)
        return working

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


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None  # the latter: `torch.jit.trace`


def outer_modules(model: nn.Module) -> list[nn.Module]:
    """Return a model's modules, each once, in its own order, but for what adapted layers hold beside their base.

    Faster than `model.modules()`, which shows when adapters are switched.
    """
    found: list[nn.Module] = []
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        found.append(module)
        inside = module._modules
        if "child_tuning_values" in inside:
            waiting.append(inside["base_layer"])
        elif inside:
            waiting.extend(reversed(inside.values()))
    return found


def child_layers(model: nn.Module) -> list[ChildTuningLayer]:
    """Return a model's adapted layers, each once, in its own order: of tied ones the first serves the others."""
    return [module for module in outer_modules(model) if isinstance(module, ChildTuningLayer)]
