"""Asking whether a model is the base that a saved adapter was made for, before or after loading it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..errors import BaseMismatchError, FormatError, UnsupportedError
from ..files import load_tensors
from ..ranks import unwrapped
from ..seal import Seal, Sealed, name_hash, read_seal, sealed_file_tensor
from ..untrusted import PEFT_PREFIX
from ..verification import base_mismatch, verify_seal
from ..weights import Fingerprint, is_sharded
from .adopting import check_no_base_weights
from .config import ChildTuningConfig
from .gathered import is_partitioned
from .layer import ChildTuningLayer
from .offload import onloaded, out_of_reach

__all__ = ["verify_base"]

logger = logging.getLogger(__name__)


def verify_base(model: nn.Module, adapter_dir: str | os.PathLike[str], *, full: bool = False) -> None:
    """Check that a model is the base that a saved adapter was made for; loading does the same, without `full`.

    Args:
        model: the base, plain or with adapters, those of this method merged or not; it is left as it is.
        adapter_dir: a local folder with an adapter.
        full: compare every entry of the tensors that the adapter covers, not only those of the child and 1024 others
            of each tensor. That takes a base of the dtype that it had when the adapter was saved.

    Raises:
        BaseMismatchError: a tensor differs, or is not there.
        FormatError, IntegrityError: the adapter is damaged.
        UnsupportedError: weights of the model are not in this process.

    Example:
        >>> from peft_childtune import verify_base
        >>> verify_base(nn.Linear(2, 2), "no_such_folder")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no_such_folder/adapter_model.safetensors: there is no such file.
    """
    path = Path(adapter_dir) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    tensors, _ = load_tensors(path)
    config = ChildTuningConfig.from_pretrained(str(adapter_dir))
    seals = [tensor for key, tensor in tensors.items() if key.endswith(".child_tuning_seal")]
    if len(seals) != 1 or config.child is None:
        raise FormatError(f"{path}: is not an adapter of this method, or an incomplete one; fetch it again.")
    base = _base_tensors(model)
    if absent := [name for name in config.child if name not in base]:
        raise BaseMismatchError(
            f"{absent[0]}: the model has no such parameter, and the adapter covers it; load it onto {config.made_for}."
        )
    children = {}
    for name in config.child:
        module, _, parameter = name.rpartition(".")
        code, values = (
            tensors.get(f"{PEFT_PREFIX}{module}.child_tuning_{kind}.{parameter}") for kind in ("code", "values")
        )
        found = sealed_file_tensor(name, code, values, base=base[name], whole=full)
        children[name] = Sealed(found.code, found.values, cache(found.fingerprint))
    saved = read_seal(seals[0])
    rest = {key.removeprefix(PEFT_PREFIX): tensor for key, tensor in tensors.items() if ".child_tuning_" not in key}
    heads = {name: tensor for name, tensor in rest.items() if name_hash(name) in saved.heads}
    check_no_base_weights(_base_model(model), rest, set(heads))
    verify_seal(seals[0], children, heads, config=config.file_digest, made_for=config.made_for)
    if full:
        _compare_all(saved, {name: entry.fingerprint() for name, entry in children.items()}, config)


def _compare_all(saved: Seal, found: Mapping[str, Fingerprint], config: ChildTuningConfig) -> None:
    by_sample = []
    for name, now in found.items():
        _, then = saved.children[name_hash(name)]
        if now.dtype != then.dtype:
            by_sample.append(name)
        elif now.whole != then.whole:
            raise base_mismatch(name, config.made_for)
    if by_sample:
        logger.warning(
            "%s and %d more tensors were not compared entry by entry: the base has another dtype than the one that "
            "the adapter was saved with. Load it in that dtype.",
            by_sample[0],
            len(by_sample) - 1,
        )


def _base_model(model: nn.Module) -> nn.Module:
    root = unwrapped(model)
    return root.get_base_model() if hasattr(root, "get_base_model") else root  # type: ignore[operator]


def _base_tensors(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Return a function for each base parameter, by the base model's own name, that gives it as it is unmerged."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path, module in _base_model(model).named_modules(remove_duplicate=False):
        if isinstance(module, ChildTuningLayer):
            for parameter in module.covered:
                found[module.full_name(parameter)] = partial(_unmerged, module, parameter)
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            name = f"{path}.{parameter}".lstrip(".").replace(".base_layer.", ".")
            found.setdefault(name, partial(_here, name, tensor))
    return found


def _unmerged(layer: ChildTuningLayer, parameter: str) -> Tensor:
    with onloaded(layer):
        return _here(layer.full_name(parameter), layer.unmerged_base(parameter))


def _here(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise out_of_reach(f"{name}: the base weight")
    if is_sharded(tensor) or is_partitioned(tensor):
        raise UnsupportedError(f"{name}: is divided among processes; check the base in one process, as loaded there.")
    return tensor.detach()
