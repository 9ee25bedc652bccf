"""The tuner: wraps the base model's modules, and answers PEFT's calls."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _set_adapter
from torch import Tensor, nn

from ..errors import ConfigError, TargetError, UnsupportedError
from ..untrusted import shown
from .adopting import adopt_state_dict
from .choosing import data_free_children
from .config import ChildTuningConfig
from .install import install_children, layers_of, prepare_places
from .layer import ChildTuningLayer, child_layers, outer_modules
from .loading import PendingLoad, begin_load, remove_adapter
from .modules import find_own_inputs, wrap
from .native import watch
from .offload import bring_in_
from .registration import PREFIX
from .saving import adapter_state_dict, drop_base_weights_
from .sharding import ZERO3, compare_divided, is_in_engine, keep_codes_out_of_ddp, sharding_of
from .snapshot import Snapshot
from .targets import block_names, block_of, default_targets, unsupported_reason
from .tying import tie_layers

__all__ = ["ChildTuningModel"]

_MANY_TARGETS = 100


def _places(model: nn.Module) -> dict[nn.Module | None, list[tuple[nn.Module, str]]]:
    """Return where each module hangs in the tree; searched once a target, wrapping a 70B took 17 s instead of 3."""
    places: dict[nn.Module | None, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        if not isinstance(module, ChildTuningLayer):
            for name, child in module._modules.items():
                places.setdefault(child, []).append((module, name))
    return places


@contextmanager
def _all_or_none(layers: list[ChildTuningLayer]) -> Iterator[None]:
    """Let layers be merged, or unmerged, within this block; if it is broken off, bring each back to what it was."""
    before = [(layer, list(layer.merged_adapters)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, merged in before:
            if len(layer.merged_adapters) < len(merged):
                layer.merge_back(merged)
            else:
                layer.unmerge_to(merged)
        raise


class ChildTuningModel(BaseTuner):
    """Trains a child network of a frozen base model.

    Args:
        model ([`torch.nn.Module`]): The base model.
        config ([`ChildTuningConfig`]): The configuration.
        adapter_name (`str`): The adapter's name. Defaults to `"default"`.
        low_cpu_mem_usage (`bool`, *optional*): Create the adapter's deltas on the meta device, to be loaded.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> model = get_peft_model(base, ChildTuningConfig(target_modules=["0"], score="magnitude", density=0.25))
        >>> model.print_trainable_parameters()
        trainable params: 9 || all params: 55 || trainable%: 16.3636

    Source: Xu et al. 2021 (arXiv:2109.05687).
    """

    prefix: str = PREFIX
    tuner_layer_cls = ChildTuningLayer
    target_module_mapping: dict[str, list[str]] = {}  # targets are found by structure, not by model type
    _unloaded: list[tuple[nn.Module, str, nn.Module]] | None = None  # parent, name and layer, while unloading

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # `PeftModel` hands over a table of configurations, direct injection (transformers, diffusers) a single one
        self._by_peft_model = isinstance(peft_config, dict)
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the target modules, then choose the child if that needs no data, or make room for one to be loaded.

        Raises:
            TargetError: a target matches nothing or cannot be adapted; the model is as it was.
        """
        config: ChildTuningConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        if not isinstance(config, ChildTuningConfig):
            raise ConfigError(f"adapter {adapter_name!r}: {type(config).__name__} is no ChildTuningConfig.")
        divided_by = "DeepSpeed" if is_in_engine(model) else sharding_of(model)
        if divided_by not in (None, ZERO3):  # models that are built under `deepspeed.zero.Init` can have adapters
            raise UnsupportedError(
                f"adapter {adapter_name!r}: {divided_by} has the model in hand already; add and "
                "load adapters before the model is wrapped (before `accelerator.prepare`)."
            )
        before = Snapshot(model)
        self._places = _places(model)
        try:
            self._check_targets(model, config)
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            tie_layers(model, adapter_name)
            find_own_inputs(model)
            if config.child is None:
                config.selection = None  # of another model, if this configuration was used before
            if config.child is not None:
                prepare_places(model, adapter_name, config, meta=low_cpu_mem_usage)
            elif not config.needs_data:
                children = data_free_children(model, adapter_name, config)
                install_children(model, adapter_name, children, config=config, meta=low_cpu_mem_usage)
            if config.child is not None or config.inference_mode:
                pending = PendingLoad(adapter_name, model, self.peft_config, before, sized=config.child is not None)
                begin_load(pending, by_peft_model=self._by_peft_model)
                if not self._by_peft_model:
                    watch(pending)
            keep_codes_out_of_ddp(model)
        except BaseException as error:
            remove_adapter(model, adapter_name, dict(self.peft_config))
            before.restore_()
            if isinstance(error, NoMatchingPeftModuleError) and config.child is not None:
                raise TargetError(
                    f"target_modules={shown(config.target_modules)}: none of these modules is in this "
                    f"{type(model).__name__}, so the adapter was made for another base model, or its "
                    "adapter_config.json is damaged; load it onto the base named there, or fetch it again."
                ) from error
            raise
        finally:
            del self._places

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = self._default_targets(self.model, peft_config)
        return peft_config

    def _default_targets(self, model: nn.Module, config: ChildTuningConfig) -> set[str]:
        targets = default_targets(model)
        wanted = config.layers_to_transform
        if wanted is None:
            return set(targets)
        numbers = {wanted} if isinstance(wanted, int) else set(wanted)
        patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
        blocks = block_names(model)

        def is_wanted(name: str) -> bool:
            owner, _, number = block_of(name, blocks).rpartition(".")
            fits = not patterns or any(re.search(rf"(^|\.){pattern}$", owner) for pattern in patterns)
            return fits and number.isdigit() and int(number) in numbers

        kept = {name for name in targets if is_wanted(name)}
        if not kept:
            raise TargetError(
                f"layers_to_transform={wanted!r} (layers_pattern={config.layers_pattern!r}) names none of the "
                f"{len(blocks)} blocks, {blocks[0]} to {blocks[-1]}. Please specify `target_modules` in "
                "`peft_config`, or other layers."
            )
        return kept

    def _check_targets(self, model: nn.Module, config: ChildTuningConfig) -> None:
        """Raise if one of several target names matches nothing: PEFT itself is content when any of them matches."""
        if not isinstance(config.target_modules, set | list | tuple):
            return
        endings = set()
        for name, _ in model.named_modules(remove_duplicate=False):
            while name:
                endings.add(name)
                name = name.partition(".")[2]
        absent = sorted(target for target in config.target_modules if target not in endings)
        # PEFT has a good message for "none at all", but compares each name with each module first
        if absent and (len(absent) < len(config.target_modules) or len(absent) > _MANY_TARGETS):
            raise TargetError(
                f"target_modules: {', '.join(map(shown, absent[:5]))}{' ...' * (len(absent) > 5)} match no module of "
                f"{type(model).__name__}; remove or correct them."
            )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        options = {
            name: getattr(peft_config, name)
            for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
        }
        found = check_target_module_exists(
            SimpleNamespace(**options, layers_to_transform=None, layers_pattern=None), key
        )
        if not found or peft_config.layers_to_transform is None or not isinstance(found, bool):
            return found
        # PEFT numbers blocks for name endings only, and only in lists below the top of the model
        options |= {"target_modules": {key.rpartition(".")[2]}, "exclude_modules": None}
        numbers = {name: getattr(peft_config, name) for name in ("layers_to_transform", "layers_pattern")}
        return check_target_module_exists(SimpleNamespace(**options, **numbers), f"model.{key}")

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ChildTuningLayer):
            target.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
            return
        if isinstance(target, BaseTunerLayer):
            raise UnsupportedError(
                f"{current_key}: is adapted by {type(target).__module__} already; merge or unload that adapter "
                "first, or adapt other modules."
            )
        if (reason := unsupported_reason(target)) is not None:
            raise TargetError(f"{current_key}: {type(target).__name__} {reason}.")
        layer = wrap(target, current_key)
        layer._active_adapter = self.active_adapters
        layer.update_layer(adapter_name, inference_mode=peft_config.inference_mode)
        layer.train(target.training)
        # one module may hang in several places of the tree, as the repeated layers of some models do
        for module, name in self._places[target]:
            if (module, name) != (parent, target_name):
                module._modules[name] = layer
        self._replace_module(parent, target_name, layer, target)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters, as PEFT does it, but without a search of what the adapters hold."""
        modules = outer_modules(self.model)
        for module in modules:
            if isinstance(module, AuxiliaryTrainingWrapper):
                _set_adapter(module, adapter_name, inference_mode=inference_mode)
        for module in modules:
            if isinstance(module, ChildTuningLayer):
                if module.merged:
                    warnings.warn(
                        "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2
                    )
                    module.unmerge()
                module.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge on every layer of this method, or, if `safe_merge` finds an entry that is not finite, on none."""
        layers = child_layers(self.model)
        with _all_or_none(layers):
            for layer in layers:
                layer.merge(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base weights bit for bit, or leave everything merged if a layer cannot be restored."""
        layers = child_layers(self.model)
        with _all_or_none(layers):
            for layer in layers:
                layer.unmerge()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if self._unloaded is not None:
            self._unloaded.append((parent, child_name, child))
        # when it unloads, PEFT copies `weight` and `bias` over, which not every module or head has
        if isinstance(child, ChildTuningLayer | ModulesToSaveWrapper):
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(  # type: ignore[override]  # annotated as returning nothing in PEFT
        self, *args: Any, **kwargs: Any
    ) -> nn.Module:
        layers = child_layers(self.model)
        if kwargs.get("merge", True) and kwargs.get("safe_merge") and not any(layer.merged for layer in layers):
            # a trial on all layers first: PEFT merges, and replaces, one layer after the other
            self.merge_adapter(adapter_names=kwargs.get("adapter_names"), safe_merge=True)
            for layer in layers:
                layer.unmerge_to([])
        self._unloaded = []
        with _all_or_none(layers):
            try:
                unloaded: nn.Module = super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[assignment]
            except BaseException:
                for parent, name, module in reversed(self._unloaded):
                    setattr(parent, name, module)
                raise
            finally:
                self._unloaded = None
        for module in list(unloaded.modules()):  # the further places of shared modules
            for name, child in list(module._modules.items()):
                if isinstance(child, ChildTuningLayer):
                    module._modules[name] = child.get_base_layer()
        return unloaded

    def _check_merge_allowed(self) -> None:
        """Allow merging with tied embeddings: one storage has one child here, so nothing diverges."""

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Accept tied targets, see `tie_layers`."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in child_layers(self.model):  # the deltas are float32 unless a user asks for the base's own dtype
            if adapter_name in layer.child_tuning_values:
                layer._values(adapter_name).in_base_dtype = True
                for parameter, values in layer._values(adapter_name)._parameters.items():
                    values.data = values.data.to(layer.base_parameter(parameter).dtype)  # type: ignore[union-attr]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedError(
                "adapter_names: one batch with several adapters is not supported; call `set_adapter` and run "
                "each part on its own."
            )
        compare_divided(self.model)
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        bring_in_(state_dict, model, adapter_name)
        saved = adapter_state_dict(model, config, adapter_name, state_dict)
        drop_base_weights_(state_dict, model)
        return saved

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        sound = adopt_state_dict(model, config, adapter_name, state_dict)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, sound)
        layers = {module: path for path, module in layers_of(model, adapter_name).items()}
        for path, module in model.named_modules(remove_duplicate=False):
            if layers.get(module, path) != path:  # a shared module is filled at all its places, or PEFT warns
                first = f"{layers[module]}.child_tuning_"
                mapped |= {
                    f"{path}.child_tuning_{key.removeprefix(first)}": tensor
                    for key, tensor in mapped.items()
                    if key.startswith(first)
                }
        return mapped
