"""What DistributedDataParallel does not see to: deltas made after it, and children that differ between processes."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import SelectionError
from ..ranks import agree
from ..weights import digest

__all__ = ["DIFFERENT_CHILDREN", "check_synchronised", "children_of"]

_KNOWN: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()  # what each synchronises, by ids of parameters


def check_synchronised(values: Tensor, name: str) -> None:
    """Raise if a trained delta takes part in a forward of a DistributedDataParallel that does not synchronise it.

    At the first such forward of a model its children are compared over its processes, which is a collective.

    Raises:
        SelectionError: the delta was made, or made active, after the model was wrapped, so each process would train
            its own; or the processes hold different children.
    """
    active: Any = DistributedDataParallel._active_ddp_module
    if active is None:
        return
    if active not in _KNOWN:
        agree(children_of(active.module), what=DIFFERENT_CHILDREN, group=active.process_group)
        # not `_module_parameters`, which has those, too, that were frozen when the model was wrapped
        buckets = active.reducer._get_zeros_like_grad_buckets()
        _KNOWN[active] = frozenset(id(parameter) for bucket in buckets for parameter in bucket.parameters())
    if id(values) not in _KNOWN[active]:
        raise SelectionError(
            f"{name}: its delta was made, or made active, after the model was wrapped in DistributedDataParallel, "
            "which does not synchronise its gradient; choose the child, add, load and activate adapters before "
            "(before `accelerator.prepare`)."
        )


DIFFERENT_CHILDREN = (
    "the children that are trained together have to be the same: give every process the same configuration, `seed` "
    "above all, the same base model, and the same active adapters."
)


def children_of(model: nn.Module) -> str:
    """Return a digest of the children in a model, and of which of them are trained."""
    codes = [buffer for name, buffer in model.named_buffers() if ".child_tuning_code." in name]
    trained = [name for name, p in model.named_parameters() if p.requires_grad and ".child_tuning_values." in name]
    return f"children {digest(' '.join(trained), *codes).hex()}"
