"""How a chosen child spreads over the model, and whether a part of it has taken over."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..network import ChildNetwork
from ..ranks import unwrapped
from ..sparse import TensorChild
from .gathered import shape_of
from .inspection import config_of, get_child_network, groups_of
from .install import grids_of

__all__ = ["SelectionDiagnosis", "diagnose_selection", "selection_report", "warnings_of"]

_TAKES_OVER = 0.5  # of the child, in one tensor
_TIMES_ITS_SHARE = 5  # and so many times the tensor's share of the covered weights
_FEW = 100  # entries of a child, below which such a share is chance


@dataclass(frozen=True, eq=False)
class SelectionDiagnosis:
    """How a child network spreads.

    Attributes:
        nnz: its entries.
        covered: weights that it could have been chosen from.
        total: weights of the base model.
        blocks: (entries, weights) of each transformer block, in the model's order.
        kinds: (entries, weights) of each kind of tensor, over all blocks.
        tensors: (entries, weights) of each covered tensor.
        lines: by `"rows"` and `"columns"`, the least share of them that holds half of what a matrix keeps, the mean
            over the child's entries; empty without matrices. 0.5 at most; near 0 where few rows (output neurons) or
            columns (inputs) take nearly all. Compare it with a random child's of the same density: with few entries a
            line, chance alone leaves many lines empty.
    """

    nnz: int
    covered: int
    total: int
    blocks: dict[str, tuple[int, int]]
    kinds: dict[str, tuple[int, int]]
    tensors: dict[str, tuple[int, int]]
    lines: dict[str, float]

    @property
    def largest(self) -> tuple[str, float, float]:
        """The tensor with most entries, its share of the child, and its share of the covered weights."""
        return _largest(self.tensors)

    @property
    def empty(self) -> list[str]:
        """Covered tensors of which nothing was chosen."""
        return [name for name, (kept, _) in self.tensors.items() if not kept]

    @property
    def warnings(self) -> list[str]:
        """What a user should look at before training, each with a way out; none where all is well."""
        return warnings_of(self.tensors)

    def __str__(self) -> str:
        """Return it as a few lines of text."""
        name, share, weights = self.largest
        lines = [
            f"Child network: {self.nnz:,} of {self.covered:,} covered weights ({self.nnz / self.covered:.3%}); "
            f"{self.covered / self.total:.1%} of the model's {self.total:,} weights are covered.",
            f"{len(self.tensors) - len(self.empty)} of {len(self.tensors)} tensors have a part in it; the largest "
            f"part, {share:.1%}, is in {name} ({weights:.1%} of the covered weights).",
        ]
        if self.lines:
            lines.append(
                f"Half of what a matrix keeps lies in {self.lines['rows']:.1%} of its rows and in "
                f"{self.lines['columns']:.1%} of its columns."
            )
        for title, table in (("block", self.blocks), ("tensor", self.kinds)):
            width = max(map(len, [title, *table]))
            lines.append(f"{title:<{width}}  share of child  density")
            lines += [
                f"{key:<{width}}  {kept / max(1, self.nnz):>14.1%}  {kept / max(1, numel):>7.2%}"
                for key, (kept, numel) in table.items()
            ]
        return "\n".join(lines + [f"Look at this: {warning}" for warning in self.warnings])


def warnings_of(tensors: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return what a user should look at before training.

    Args:
        tensors: (entries, weights) of each covered tensor.
    """
    name, share, weights = _largest(tensors)
    few = sum(kept for kept, _ in tensors.values()) < _FEW
    if few or len(tensors) < 2 or share < _TAKES_OVER or share < _TIMES_ITS_SHARE * weights:
        return []
    return [
        f"{name}: holds {share:.0%} of the child and {weights:.1%} of the covered weights; its scores may be on "
        'another scale than the others\'. Share the budget more finely (scope="tensor" or "row"), or leave it out '
        "(exclude_modules)."
    ]


def _largest(tensors: Mapping[str, tuple[int, int]]) -> tuple[str, float, float]:
    name = max(tensors, key=lambda each: tensors[each][0])
    kept, numel = (sum(column) for column in zip(*tensors.values(), strict=True))
    return name, tensors[name][0] / max(1, kept), tensors[name][1] / max(1, numel)


def diagnose_selection(model: nn.Module, adapter_name: str = "default") -> SelectionDiagnosis:
    """Return how the child network of an adapter spreads over blocks, tensors, rows and columns.

    Raises:
        SelectionError: there is no such adapter, or no child yet.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_childtune import ChildTuningConfig
        >>> base = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> config = ChildTuningConfig(target_modules=["0", "2"], score="magnitude", density=0.25)
        >>> diagnosis = diagnose_selection(get_peft_model(base, config))
        >>> diagnosis.nnz, diagnosis.covered, list(diagnosis.tensors)
        (12, 46, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    network = get_child_network(model, adapter_name)
    model = unwrapped(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    total = sum(
        math.prod(shape_of(p))
        for name, p in base.named_parameters()
        if ".child_tuning_" not in name and ".modules_to_save." not in name
    )
    grids = grids_of(model, adapter_name, config_of(model, adapter_name))
    transposed = {name for name, grid in grids.items() if grid.transposed}
    return diagnosis_of(network, groups=groups_of(model, network.children), total=total, transposed=transposed)


def diagnosis_of(
    network: ChildNetwork, *, groups: Mapping[str, str], total: int, transposed: Container[str] = ()
) -> SelectionDiagnosis:
    """Return the diagnosis of a child network.

    Args:
        network: it.
        groups: the block of each tensor, empty outside of blocks.
        total: weights of the model.
        transposed: the tensors whose rows are inputs, as in GPT-2's `Conv1D`.
    """
    blocks: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    tensors = {}
    counts: dict[str, list[float]] = {"rows": [], "columns": []}
    for name, child in network.children.items():
        block, count = groups[name], child.nnz
        tensors[name] = (count, child.grid.numel)
        kind = name.removeprefix(f"{block}.") if block else name
        for table, key in ((blocks, block or "outside blocks"), (kinds, kind)):
            table[key][0] += count
            table[key][1] += child.grid.numel
        if len(child.grid.shape) > 1 and count:
            for side, per_line in zip(counts, _per_line(child, transposed=name in transposed), strict=True):
                counts[side].append(count * _share_of_half(per_line))
    in_matrices = sum(kept for name, (kept, _) in tensors.items() if len(network.children[name].grid.shape) > 1)
    return SelectionDiagnosis(
        nnz=sum(kept for kept, _ in tensors.values()),
        covered=sum(numel for _, numel in tensors.values()),
        total=total,
        blocks={key: (kept, numel) for key, (kept, numel) in blocks.items()},
        kinds={key: (kept, numel) for key, (kept, numel) in kinds.items()},
        tensors=tensors,
        lines={side: sum(each) / in_matrices for side, each in counts.items()} if in_matrices else {},
    )


def selection_report(model: nn.Module, adapter_name: str = "default") -> str:
    """Return `diagnose_selection` as a few lines of text.

    Raises:
        SelectionError: there is no such adapter, or no child yet.
    """
    return str(diagnose_selection(model, adapter_name))


def _per_line(child: TensorChild, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Return how many entries each row and each column of a weight, read as a matrix, keeps; rows are outputs."""
    height, width = child.grid.matrix_shape
    positions = child.indices()
    outer = torch.bincount(positions // width, minlength=height)
    inner = torch.bincount(positions % width, minlength=width)
    return (inner, outer) if transposed else (outer, inner)


def _share_of_half(counts: Tensor) -> float:
    """Return the least share of lines that holds half of the entries, from the number in each line, not all zero."""
    ordered = counts.sort(descending=True).values.cumsum(0)
    return (int(torch.searchsorted(ordered, float(ordered[-1]) / 2)) + 1) / ordered.numel()
