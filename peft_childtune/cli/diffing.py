"""`childtune diff`: a full fine-tune becomes an adapter: what it changed, or the largest part of that."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DeltaError, TargetError
from ..network import ChildNetwork
from ..sparse import TensorChild, UnitGrid, compose_entries, select_children
from ..tuner import ChildTuningConfig, select_child_network
from ..tuner.install import covered_tensors
from ..tuner.loading import head_tensors
from ..tuner.targets import covered_names, default_targets
from .checkpoint import CheckpointError, model_class
from .output import new_folder

__all__ = ["Diff", "diff_models"]

logger = logging.getLogger(__name__)

_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
_WITH_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
_SAVED_BY_PEFT = ("classifier", "score", "qa_outputs")  # whole, in any case, by the tasks that have them
# settings that change no output of the blocks: of the head, of training, of the library that wrote them
_NO_MATTER = {"architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id", "num_labels"}
_NO_MATTER |= {"problem_type", "finetuning_task", "use_cache", "initializer_range", "gradient_checkpointing"}
_NAMED = 3  # tensors that a message names, at most

Bar = Callable[[Collection[str]], Iterable[str]]


@dataclass(frozen=True)
class Diff:
    """What became of a fine-tune.

    Attributes:
        kept: entries in the child.
        changed: entries of the covered tensors that the fine-tune changed.
        numel: entries of the covered tensors.
        rounded: kept entries that base and delta give only up to rounding.
        largest: the largest error among these.
        left_out: tensors outside of the covered ones that differ, and are not in the adapter.
        heads: modules that are stored whole.
        dtype: of the fine-tune, in which the base has to be loaded to get its very weights; None if it is in it.
    """

    kept: int
    changed: int
    numel: int
    rounded: int
    largest: float
    left_out: list[str]
    heads: list[str]
    dtype: torch.dtype | None


def diff_models(
    base: Path, tuned: Path, target: Path, *, density: float | None, name: str | None = None, bar: Bar = iter
) -> Diff:
    """Save an adapter that makes the model in `base` the one in `tuned`.

    Args:
        base: a checkpoint folder.
        tuned: a checkpoint folder of the same architecture, perhaps with another head.
        target: the folder to make.
        density: keep the largest deltas, so many of the covered weights; None for every change, exactly.
        name: what the adapter's configuration calls the base; its folder if not given.
        bar: shows progress over names of tensors.

    Raises:
        CheckpointError: transformers cannot load one of them.
        TargetError: they are of different architectures, or the same model.
        DeltaError: `density` is None, and float32 deltas cannot hold the change exactly; nothing is written.
        FileExistsError: `target` exists and is not empty.
    """
    before, after, info = _load(base, tuned)
    dtype = _published_dtype(base, after)
    before.name_or_path = str(base) if name is None else name  # what PEFT writes into the configuration
    heads = _heads(before, after, info)
    differing = _differing(before, after, heads, bar)
    wanted = sorted({owner for owner, _ in map(_split, differing)}) if density is None else default_targets(before)
    targets = [path for path in wanted if path and not _inside(path, heads)]
    if density is None:
        if any(not path for path in wanted):
            raise TargetError(f"{differing[0]}: belongs to the model itself, not to a module of it, and differs.")
        if not targets:
            raise TargetError(f"{tuned}: has the very weights of {base}; there is nothing to keep.")
    deltas, found = _deltas(before, after, targets, density, bar)
    covered = set(deltas)
    left_out = [name for name in differing if name not in covered]
    kept = sum(child.nnz for child in found.children.values())
    if kept == 0:
        raise TargetError(f"{tuned}: has the very weights of {base} in all covered tensors; there is nothing to keep.")
    rounded, largest = _check(before, after, deltas, found, exact=density is None)
    config = ChildTuningConfig(
        task_type=next((task for end, task in _TASKS if type(before).__name__.endswith(end)), None),
        target_modules=targets,
        modules_to_save=[path for path in heads if path not in _SAVED_BY_PEFT] or None,
        score="magnitude",
        density=found.density,
    )
    how = "every change" if density is None else f"the largest {density:g}"
    _save(before, after, config, found, deltas, target, {"source": "diff", "kept": how, "tuned": tuned.name})
    changed = sum(int((delta != 0).sum()) for delta in deltas.values())
    return Diff(kept, changed, found.numel, rounded, largest, left_out, heads, dtype)


def _load(base: Path, tuned: Path) -> tuple[Any, Any, dict[str, Any]]:
    config, kind = model_class(tuned)
    own = model_class(base)[0]
    if own.model_type != config.model_type:
        raise TargetError(
            f"{tuned}: is of type {config.model_type}, the base of {own.model_type}; a diff needs one type."
        )
    _warn_of_other_settings(base, own, tuned, config)
    try:
        after = kind.from_pretrained(tuned, config=config).eval()
        before, info = kind.from_pretrained(
            base, config=config, dtype=after.dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{base} or {tuned}: cannot be loaded ({str(error).splitlines()[0]}).") from error
    return before.eval(), after, info


def _warn_of_other_settings(base: Path, ours: Any, tuned: Path, theirs: Any) -> None:
    """Warn if two configurations make different models of the same weights: an adapter holds weights only."""
    one, two = ours.to_dict(), theirs.to_dict()
    names = [
        name
        for name in sorted({*one, *two} - _NO_MATTER)
        if one.get(name) != two.get(name)
        and not (name.startswith("_") or "dropout" in name or name.endswith(("token_id", "pdrop")))
    ]
    if names:
        shown = ", ".join(f"{name} ({one.get(name)} and {two.get(name)})" for name in names[:_NAMED])
        logger.warning(
            "%s and %s differ in %s%s: an adapter does not hold these, so load the base with the settings of the "
            "fine-tune.",
            base,
            tuned,
            shown,
            "" if len(names) <= _NAMED else f" and {len(names) - _NAMED} more settings",
        )


def _published_dtype(base: Path, after: Any) -> torch.dtype | None:
    own = model_class(base)[0].dtype
    return after.dtype if own is not None and own != after.dtype else None


def _split(name: str) -> tuple[str, str]:
    owner, _, parameter = name.rpartition(".")
    return owner, parameter


def _inside(path: str, modules: Collection[str]) -> bool:
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _heads(before: nn.Module, after: nn.Module, info: dict[str, Any]) -> list[str]:
    """Return the modules to be stored whole: those the base has not, or of another shape, and changed statistics."""
    tied = getattr(after, "all_tied_weights_keys", {})
    new = {name for name in info["missing_keys"] if name not in tied}
    new |= {entry[0] for entry in info["mismatched_keys"]}
    ours, theirs = dict(before.named_buffers()), dict(after.named_buffers())
    new |= {name for name, buffer in theirs.items() if not torch.equal(buffer, ours[name])}
    owners = sorted({_split(name)[0] for name in new})
    embeddings = {id(after.get_input_embeddings()), id(after.get_output_embeddings())}  # type: ignore[operator]
    for owner in owners:
        if not owner or id(after.get_submodule(owner)) in embeddings:
            raise TargetError(
                f"{owner or min(new)}: is new, or of another shape than in the base; give the base the same "
                "vocabulary first (`resize_token_embeddings`, then `save_pretrained`)."
            )
    if not type(after).__name__.endswith(_WITH_HEADS):
        return owners
    saved = [name for name in _SAVED_BY_PEFT if hasattr(after, name)]
    return [name for name in owners if not _inside(name, saved)] + saved


def _differing(before: nn.Module, after: nn.Module, heads: list[str], bar: Bar) -> list[str]:
    ours = dict(before.named_parameters())
    theirs = dict(after.named_parameters())
    return [name for name in bar(ours) if not _inside(name, heads) and not torch.equal(ours[name], theirs[name])]


def _deltas(
    before: nn.Module, after: nn.Module, targets: list[str], density: float | None, bar: Bar
) -> tuple[dict[str, Tensor], ChildNetwork]:
    """Return the deltas of all covered tensors, float32 and whole, and which entries are kept."""
    names = [f"{path}.{name}" for path in targets for name in covered_names(before.get_submodule(path))]
    first = {name for name, _ in before.named_parameters()}  # a tied tensor has one child, under its first name
    deltas = {}
    for name in bar([name for name in names if name in first]):
        one, two = before.get_parameter(name).detach(), after.get_parameter(name).detach()
        delta = (two.to(torch.float64) - one.to(torch.float64)).to(torch.float32)
        if not bool(torch.isfinite(delta).all()):
            raise DeltaError(f"{name}: an entry of the base or the fine-tune is not finite; no delta leads there.")
        deltas[name] = delta
    grids = {name: UnitGrid(tuple(delta.shape)) for name, delta in deltas.items()}
    if density is None:
        units = {name: delta.reshape(-1).nonzero().flatten() for name, delta in deltas.items()}
    else:
        chosen = select_children({n: d.abs() for n, d in deltas.items()}, grids=grids, density=density)
        units = {}
        for name, child in chosen.items():
            positions = child.indices()
            units[name] = positions[deltas[name].reshape(-1)[positions] != 0]
    return deltas, ChildNetwork({name: TensorChild(grids[name], units[name]) for name in deltas})


def _check(
    before: nn.Module, after: nn.Module, deltas: dict[str, Tensor], network: ChildNetwork, *, exact: bool
) -> tuple[int, float]:
    """Return how many kept entries are only near the fine-tune's, and the largest error.

    Raises:
        DeltaError: there are some, and there should be none.
    """
    wrong: dict[str, tuple[int, float]] = {}
    for name, child in network.children.items():
        at = child.indices()
        base = before.get_parameter(name).detach().reshape(-1)[at]
        tuned = after.get_parameter(name).detach().reshape(-1)[at]
        errors = (compose_entries(base, deltas[name].reshape(-1)[at]).double() - tuned.double()).abs()
        if count := int((errors != 0).sum()):
            wrong[name] = (count, float(errors.max()))
    total, largest = sum(n for n, _ in wrong.values()), max((e for _, e in wrong.values()), default=0.0)
    if wrong and exact:
        named = "; ".join(
            f"{name}: {count} entries, error up to {error:.3g}" for name, (count, error) in wrong.items()
        )
        if len(wrong) > _NAMED:
            named = "; ".join(named.split("; ")[:_NAMED]) + f"; and {len(wrong) - _NAMED} more tensors"
        raise DeltaError(
            f"{named}: no float32 delta leads from the base to these {total} of {network.nnz} changed entries exactly "
            "(where an entry changes its sign or shrinks to a fraction, the delta needs more digits than it has); "
            "--density 1 keeps every change inside the repeated blocks, with such errors."
        )
    return total, largest


@torch.no_grad()
def _save(
    before: nn.Module,
    after: nn.Module,
    config: ChildTuningConfig,
    network: ChildNetwork,
    deltas: dict[str, Tensor],
    target: Path,
    how: dict[str, str],
) -> None:
    from peft import get_peft_model

    model = get_peft_model(before, config)
    names = [name for name, _, _ in covered_tensors(model, "default")]
    if missing := [name for name in deltas if name not in names]:
        raise ConfigError(f"{missing[0]}: cannot be covered; PEFT keeps this module whole (`modules_to_save`).")
    select_child_network(model, network=network)
    for name, layer, parameter in covered_tensors(model, "default"):
        values = layer._values("default").get(parameter)
        if values is not None:
            values.copy_(deltas[name].reshape(-1)[network.children[name].indices()])
    state = after.state_dict()
    for name, (_, tensor) in head_tensors(model, "default").items():
        tensor.copy_(state[name])
    config.selection = {**(config.selection or {}), **how}
    with new_folder(target) as folder:
        model.save_pretrained(str(folder))
