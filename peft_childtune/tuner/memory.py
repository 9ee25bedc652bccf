"""How much memory it takes to choose and to train a child, computed from shapes alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from ..sparse import UnitGrid, budgets_of
from .config import ChildTuningConfig
from .install import covered_tensors, grids_of
from .targets import block_names, block_of

__all__ = ["MemoryEstimate", "estimate_memory"]

_HEADER = 128  # bytes of a code beside its payload, and of the code of a random child
_RICE = 1.05  # bits of a Rice code for each bit of entropy, at most, of children that are spread evenly
_INT32 = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device, by what they are for; `str()` of it is a table. Activations are not in it.

    Attributes:
        covered: weights of the targeted modules, a count.
        nnz: trained ones among them, a count; all of them if `resample`.
        base: parameters and buffers of the base model.
        values: the delta, fp32.
        gradients: of the delta.
        optimizer: state for the delta.
        code: the coded child, which is also what a file holds of it.
        positions: the decoded child.
        whole: copies, gradients and optimizer state of `modules_to_save`.
        working: what comes and goes within a step, at its largest.
        selection: the peak while the child is chosen, base included.
        selection_host: what the choice takes in the host's memory; where the model is on a CPU, that is one memory.
    """

    covered: int
    nnz: int
    base: int
    values: int
    gradients: int
    optimizer: int
    code: int
    positions: int
    whole: int
    working: int
    selection: int
    selection_host: int

    @property
    def kept(self) -> int:
        """Bytes that stay from step to step."""
        parts = (self.base, self.values, self.gradients, self.optimizer, self.code, self.positions, self.whole)
        return sum(parts)

    @property
    def training(self) -> int:
        """Bytes at the peak of a training step, without activations."""
        return self.kept + self.working

    def __str__(self) -> str:
        """Return a table with one part a line."""
        lines = [f"{self.nnz:,} of {self.covered:,} covered weights are trained; without activations:"]
        for name in ("base", "values", "gradients", "optimizer", "code", "positions", "whole", "working", "training"):
            lines.append(f"  {name:<14} {_readable(getattr(self, name)):>11}")
        lines.append(f"  {'selection':<14} {_readable(self.selection):>11}")
        lines.append(f"  {'  on the host':<14} {_readable(self.selection_host):>11}")
        return "\n".join(lines)


def estimate_memory(
    model: nn.Module,
    config: ChildTuningConfig,
    *,
    optimizer_bytes: float = 8,
    shards: int = 1,
    scores_on_host: bool = False,
) -> MemoryEstimate:
    """Return the memory that it takes to choose and train a child of a base model, which is left as it is.

    The model may be on the meta device, where weights have shapes but take no memory:
    `with torch.device("meta"): model = AutoModelForCausalLM.from_config(...)`.

    With n trained of N covered weights (n = N if `resample`), in bytes:

    - base: as it is stored; values `4 n`; gradients `4 n`; optimizer `optimizer_bytes n`
    - positions: `4 n` (8 in tensors of more than 2^31 - 1 entries), 0 if `resample`
    - code: in each tensor of M units, m kept, the least of `m log2 M`, `M` and `1.05 M H(m / M)` bits, with H the
      binary entropy, in bits; nothing to speak of for random children. Children that cluster take less
    - whole: for each entry of `modules_to_save` a copy and a gradient of its dtype, and `optimizer_bytes`
    - working: the largest, over the covered tensors, of its composed weight (while others are dropped; in the
      backward a dense gradient follows it) and of two fp32 temporaries of the optimizer. A base of 16 bits adds 18
      bytes for each trained weight of that tensor; `resample` makes it 8 bytes a weight, 10 for a base of 16 bits
    - selection: base, copies of `modules_to_save`, and the larger of `4 N` (fp32 scores) with the chosen units
      (`8 n` for single entries) or one more weight, and of `4 n` with the code. Random children have no scores;
      `movement` takes `12 N` more while it trains (`16 N` in half precision), and two fp32 copies of the largest
      weight. Scores of your own are taken to need what `fisher` does
    - selection_host: `24 n` for single entries, `8 n` for larger units: lists of positions, to report and to return

    Not in it: activations; the input and output of the model; the lines of each weight that the child uses (8 bytes
    each, below a thousandth); another copy of the largest weight under autocast; 256 MiB of products in a Fisher pass
    on an accelerator; torch's AdamW with `foreach`, its default on accelerators, which adds `4 n` within a step
    (`fused=True` does not); the buckets of DistributedDataParallel, `4 n`.

    Args:
        model: the base model, not wrapped; any floating-point dtypes.
        config: what `get_peft_model` would be given.
        optimizer_bytes: optimizer state for each trained weight: 8 for AdamW, 4 for momentum, about 2 for 8-bit AdamW.
        shards: over how many devices FSDP2 or DeepSpeed's ZeRO-3 divide weights, values, gradients and optimizer
            state; the child itself is on all of them, and two blocks are gathered at a time. The child is chosen
            before, on the whole model. Under DistributedDataParallel this stays 1.
        scores_on_host: whether the child is chosen with `scores_device="cpu"`.

    Returns:
        Bytes on each device. `nnz` is what the selection will give, where all units that share a budget are of one
        size; elsewhere it is the budget, which the selection misses by less than one of the largest units.

    Raises:
        ConfigError: an option that makes no sense.
        UnsupportedError: the model is wrapped already.
        BudgetError: the density keeps nothing.
        TargetError: as from `get_peft_model`.

    Example:
        >>> with torch.device("meta"):
        ...     base = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
        >>> estimate = estimate_memory(base, ChildTuningConfig(target_modules=["0", "2"], density=0.01))
        >>> estimate.nnz, estimate.values, estimate.optimizer
        (83937, 335748, 671496)
    """
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise ConfigError(f"shards={shards!r} is no number of devices; use an integer >= 1.")
    if not isinstance(optimizer_bytes, int | float) or not 0 <= optimizer_bytes < math.inf:
        raise ConfigError(f"optimizer_bytes={optimizer_bytes!r} is no size; use 8 for AdamW.")
    if not isinstance(config, ChildTuningConfig):
        raise ConfigError(f"config: {type(config).__name__} is no ChildTuningConfig.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {type(model).__name__} is no model; build one, on the meta device if it is large.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UnsupportedError("the model is wrapped already; give the base model: `model.unload()` returns it.")
    wrapped = _wrapped_skeleton(model, config)
    grids = grids_of(wrapped, "default", config)
    tensors: dict[str, Tensor] = {
        name: layer.base_parameter(parameter) for name, layer, parameter in covered_tensors(wrapped, "default")
    }
    blocks = block_names(model)
    kept, nnz = _kept(grids, config, {name: block_of(name, blocks) for name in grids})
    is_random = config.mode == "task_free" or config.score == "random"
    units = {name: kept[name] / math.prod(grid.tile) for name, grid in grids.items()}
    whole = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    copies = sum(_bytes(parameter) for parameter in whole)
    trained_whole = sum(2 * _bytes(parameter) + optimizer_bytes * parameter.numel() for parameter in whole)
    base = sum(map(_bytes, (*model.parameters(), *model.buffers())))
    working = max(
        *(_working(tensor, kept[name], is_resampled=config.resample) for name, tensor in tensors.items()),
        *(8 * parameter.numel() for parameter in whole),
        0,
    )
    if shards > 1:
        working += _gathered(model, blocks, per_weight=4 * nnz / sum(grid.numel for grid in grids.values()))
    code = sum(_HEADER if is_random else _code(grid.num_units, units[name]) for name, grid in grids.items())
    scores = 0 if is_random else 4 * sum(grid.numel for grid in grids.values())
    chosen = 0 if is_random else 8 * sum(units.values())
    one_more = 0 if is_random else max(map(_bytes, tensors.values()))
    here = one_more if scores_on_host else scores + max(chosen, one_more)
    if config.score == "movement" and not is_random:  # gradients and AdamW's state; the scores' place holds a copy
        in_fp32 = sum(4 * t.numel() for t in tensors.values() if t.dtype in (torch.bfloat16, torch.float16))
        here = (0 if scores_on_host else scores) + 3 * scores + in_fp32 + 8 * max(t.numel() for t in tensors.values())
        here += 16 * sum(parameter.numel() for parameter in whole)  # heads move, too
    lists = 0 if config.resample else 8 * nnz + 16 * sum(units.values())
    return MemoryEstimate(
        covered=sum(grid.numel for grid in grids.values()),
        nnz=nnz,
        base=_divided(base, shards),
        values=_divided(4 * nnz, shards),
        gradients=_divided(4 * nnz, shards),
        optimizer=_divided(optimizer_bytes * nnz, shards),
        code=round(code),
        positions=0
        if config.resample
        else round(sum(kept[n] * (8 if g.numel > _INT32 else 4) for n, g in grids.items())),
        whole=_divided(trained_whole, shards),
        working=round(working),
        selection=round(base + copies + max(here, 4 * nnz + code)),
        selection_host=round(max(lists, scores + chosen if scores_on_host else 0)),
    )


def _wrapped_skeleton(model: nn.Module, config: ChildTuningConfig) -> nn.Module:
    """Return a copy of the model without memory, wrapped: what is covered is then what PEFT will cover."""
    shared: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        shared[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    for module in model.modules():  # accelerate's hooks may hold offloaded weights
        if (hook := getattr(module, "_hf_hook", None)) is not None:
            shared[id(hook)] = hook
    undecided = copy.deepcopy(config)
    undecided.mode, undecided.score, undecided.resample = "task_driven", "fisher", False  # nothing is chosen yet
    undecided.child, undecided.inference_mode = None, False
    return get_peft_model(copy.deepcopy(model, shared), undecided)


def _kept(
    grids: Mapping[str, UnitGrid], config: ChildTuningConfig, groups: Mapping[str, str]
) -> tuple[dict[str, float], int]:
    """Return how many entries of each tensor are kept, a budget spread evenly, and how many in all."""
    if config.resample:
        return {name: float(grid.numel) for name, grid in grids.items()}, sum(grid.numel for grid in grids.values())
    kept: dict[str, float] = {}
    total = 0
    for names, nnz in budgets_of(grids, density=config.density, scope=config.budget_scope, groups=groups):
        share = nnz / max(1, sum(grids[name].numel for name in names))
        kept |= {name: share * grids[name].numel for name in names}
        total += nnz
    return kept, total


def _working(tensor: Tensor, kept: float, *, is_resampled: bool) -> float:
    """Return what a tensor takes while its delta is used, on top of what stays."""
    numel, is_narrow = tensor.numel(), tensor.element_size() < 4
    step = 8 * kept  # AdamW's square root and its quotient
    if is_resampled:  # base, sum and result of the composition; of a wide base less than the optimizer's
        return numel * (10 if is_narrow else 8)
    # positions as int64, and the entries before and after: compose_entries of a narrow base
    return max(_bytes(tensor) + (18 * kept if is_narrow else 0), step)


def _gathered(model: nn.Module, blocks: list[str], *, per_weight: float) -> float:
    """Return the bytes of what is gathered at once: all outside the blocks, the block at work and the next."""
    sizes: dict[str, float] = dict.fromkeys((*blocks, ""), 0.0)
    for name, parameter in model.named_parameters():
        block = block_of(name, blocks)
        sizes[block] += _bytes(parameter) + (per_weight * parameter.numel() if block else 0)
    return sizes.pop("") + sum(sorted(sizes.values())[-2:])


def _code(units: int, kept: float) -> float:
    if not kept:
        return 0.0
    share = kept / units
    entropy = 0.0 if share >= 1 else -share * math.log2(share) - (1 - share) * math.log2(1 - share)
    return _HEADER + min(kept * math.log2(max(units, 2)), units, _RICE * units * entropy) / 8


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _divided(size: float, shards: int) -> int:
    return math.ceil(size / shards)


def _readable(size: int) -> str:
    unit = next((power for power in (3, 2, 1) if size >= 1024**power), 0)
    return f"{size:,} B" if unit == 0 else f"{size / 1024**unit:,.2f} {' KMG'[unit]}iB"
