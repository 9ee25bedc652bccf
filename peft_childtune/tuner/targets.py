"""Which modules of a base model can be adapted, and which are when nobody says."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import TargetError

__all__ = ["block_names", "block_of", "covered_names", "default_targets", "unsupported_reason"]

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def covered_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a module owns itself, such as `["weight", "bias"]`."""
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def unsupported_reason(module: nn.Module) -> str | None:
    """Return why a module cannot be adapted, or None if it can."""
    own = covered_names(module)
    if not own:
        return "has no weights of its own; name the modules inside it that have"
    for name in own:
        dtype = module._parameters[name].dtype  # type: ignore[union-attr]
        if dtype not in _DTYPES:
            return f"stores `{name}` as {dtype}; a delta needs a floating-point weight, so load the base unquantised"
    if any(n.endswith(("_g", "_v", "_orig")) and n.rpartition("_")[0] not in own for n in own) or hasattr(
        module, "parametrizations"
    ):
        return "computes its weight from a parametrisation; remove that first (remove_parametrizations)"
    if isinstance(module, nn.RNNBase):
        return "hands its weights to one fused call over all time steps; adapt other modules"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "rewrites its own weights in every forward (max_norm); the base would not stay frozen"
    own_forward = vars(module).get("forward")
    is_foreign = own_forward is not None and getattr(own_forward, "__func__", None) is not type(module).forward
    if is_foreign and not hasattr(module, "_hf_hook"):  # accelerate's only moves tensors, and is undone by the class's
        return "has a forward of its own set on the instance, which knows no delta; remove it or adapt other modules"
    return None


def _is_block_list(module: nn.Module) -> bool:
    children = list(module.children())
    if not children or any(not list(child.children()) for child in children):
        return False  # a list of plain layers is no list of blocks
    if not all(any(True for _ in child.parameters()) for child in children):
        return False
    if isinstance(module, nn.ModuleList):
        return True
    return isinstance(module, nn.Sequential) and len(children) > 1 and len({type(child) for child in children}) == 1


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the repeated blocks, such as `encoder.layer.0`: the items of the outermost lists of modules.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> block_names(nn.ModuleDict({"embed": nn.Embedding(3, 2), "layers": nn.ModuleList([block(), block()])}))
        ['layers.0', 'layers.1']
    """
    found: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, BaseTunerLayer):
                continue
            if _is_block_list(child):
                found.extend(f"{path}.{item}" for item, _ in child.named_children())
            else:
                visit(child, f"{path}.")

    visit(model, "")
    return found


def block_of(name: str, blocks: list[str]) -> str:
    """Return the block that a module or tensor lies in, or an empty string for those outside all blocks."""
    return next((block for block in blocks if name.startswith(f"{block}.")), "")


def _owners(block: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        path = f"{prefix}.{name}"
        base = child.get_base_layer() if isinstance(child, BaseTunerLayer) else child
        if covered_names(base):
            yield path, base
        if not isinstance(child, BaseTunerLayer):
            yield from _owners(child, path)


def default_targets(model: nn.Module) -> list[str]:
    """Return the names of all modules with weights inside the repeated transformer blocks.

    The paper adapts the encoder's layers and leaves embeddings, pooler and head out; here the blocks are found by
    structure, so that the same holds for any architecture. What cannot be adapted is left out with a warning.

    Raises:
        TargetError: there are no blocks.

    Source: Xu et al. 2021 (arXiv:2109.05687); the authors test for `'layer' in name`, which finds nothing in GPT-2.
    """
    blocks = block_names(model)
    targets, left_out = [], {}
    for block in blocks:
        module = model.get_submodule(block)
        if covered_names(module):
            left_out[block] = "owns weights itself, beside those of the modules in it"
        for name, owner in _owners(module, block):
            reason = unsupported_reason(owner)
            if reason is None and any(True for c in owner.children() for _ in c.parameters()):
                reason = "owns weights itself, beside those of the modules in it"
            if reason is None:
                targets.append(name)
            else:
                left_out[name] = reason
    if not targets:
        raise TargetError(
            f"{type(model).__name__} has no repeated blocks in which to look for weights. Please specify "
            "`target_modules` in "
            '`peft_config`, for example target_modules="all-linear".'
        )
    for name, reason in list(left_out.items())[:5]:
        logger.warning("%s is left out of the child network: it %s.", name, reason)
    if len(left_out) > 5:
        logger.warning("... and %d more modules are left out of the child network.", len(left_out) - 5)
    return targets
