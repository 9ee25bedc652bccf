"""Which child a configuration asks for; nothing is installed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ScoreError, TargetError
from ..scores import DATA_SCORES, ScoreInputs, compute_scores
from ..sparse import ResampledUnits, TensorChild, UnitGrid, select_children, select_random_children
from .base_alone import BaseAlone, heads_of
from .config import ChildTuningConfig
from .inspection import groups_of
from .install import covered_tensors, grids_of
from .learning_rate import gradient_share
from .shards import without_repeats

__all__ = ["children_by_data", "data_free_children"]

logger = logging.getLogger(__name__)


def children_by_data(
    model: nn.Module,
    adapter_name: str,
    config: ChildTuningConfig,
    *,
    dataloader: Iterable[Any],
    num_batches: int | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    scores_device: torch.device | str | None = None,
    show_progress: bool = True,
) -> tuple[dict[str, TensorChild], dict[str, Any]]:
    """Return the child that a score of data chooses, and what to record of the choice.

    Scores are taken on the base model, all adapters off; see `select_child_network` for arguments and errors.
    """
    if scores_device is not None and torch.device(scores_device).type == "meta":
        raise ScoreError("scores_device='meta' keeps no scores; give a device that does, such as 'cpu'.")
    with BaseAlone(model, adapter_name):
        inputs = ScoreInputs(
            model,
            _parameters(model, adapter_name),
            heads=heads_of(model, adapter_name),
            dataloader=without_repeats(dataloader),
            num_batches=num_batches,
            loss_fn=loss_fn,
            scores_device=scores_device,
            show_progress=show_progress,
        )
        result = compute_scores(config.score, inputs)
    children = select_children(
        result.scores,
        grids=grids_of(model, adapter_name, config),
        density=config.density,
        scope=config.budget_scope,
        groups=groups_of(model, result.scores),
    )
    idle = [name for name, each in result.scores.items() if children[name].nnz and not bool(each.any())]
    if idle:
        logger.warning(
            "%d tensors have scores of zero only, so what was chosen of them is their first entries, for example of "
            "%s. If the loss does not depend on them, leave them out: exclude_modules, or scope='global'.",
            len(idle),
            idle[0],
        )
    how: dict[str, Any] = {"source": config.score, "scope": config.budget_scope}
    if result.num_batches:
        how |= {"examples": result.num_examples, "loss": result.loss}
    if result.source in (*DATA_SCORES, "movement"):  # means of gradients, of their squares, or what they add up to
        squared = result.source not in ("gradient", "movement")
        how["gradient_share"] = gradient_share(result.scores, children, squared=squared)
    return children, how


def data_free_children(model: nn.Module, adapter_name: str, config: ChildTuningConfig) -> dict[str, TensorChild]:
    """Return the child that a configuration asks for where no data is needed: random, resampled or by magnitude."""
    grids = grids_of(model, adapter_name, config)
    if config.mode == "task_free" and config.resample:
        logger.warning(
            "resample=True trains every covered weight, a new random %g of them at each step: the saved delta is "
            "dense, %d values long. For a small file keep one random child (resample=False) or choose one by data.",
            config.density,
            sum(grid.numel for grid in grids.values()),
        )
        return {
            name: TensorChild(UnitGrid(grid.shape), ResampledUnits(config.seed, stream, config.density))
            for stream, (name, grid) in enumerate(grids.items())
        }
    groups = groups_of(model, grids)
    if config.mode == "task_free" or config.score == "random":
        return select_random_children(
            grids=grids, density=config.density, scope=config.budget_scope, groups=groups, seed=config.seed
        )
    with BaseAlone(model, adapter_name):
        scores = compute_scores(config.score, ScoreInputs(model, _parameters(model, adapter_name))).scores
    return select_children(scores, grids=grids, density=config.density, scope=config.budget_scope, groups=groups)


def _parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    found = {name: layer.base_parameter(parameter) for name, layer, parameter in covered_tensors(model, adapter_name)}
    for name, parameter in found.items():
        if parameter.is_meta or parameter.numel() == 0:
            raise TargetError(
                f"{name}: the base weight is on the meta device, or empty, so it cannot be scored; choose the child "
                "on the whole model first and pass it here: select_child_network(model, "
                "network=ChildNetwork.load(path))."
            )
    return found
