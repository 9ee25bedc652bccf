"""Choosing the child network."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SelectionError
from ..network import ChildNetwork
from ..ranks import agree, failing_together, is_first_rank
from ..sparse import TensorChild
from .choosing import children_by_data, data_free_children
from .diagnosis import selection_report, warnings_of
from .install import grids_of, install_children, layers_of
from .readiness import check_untrained, ready_model
from .steps import watch_optimizers

__all__ = ["select_child_network"]

logger = logging.getLogger(__name__)


def select_child_network(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    *,
    network: ChildNetwork | str | os.PathLike[str] | None = None,
    num_batches: int | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    adapter_name: str = "default",
    scores_device: torch.device | str | None = None,
    show_progress: bool = True,
) -> ChildNetwork:
    """Choose the child network of an adapter, make it the one that is trained, and return it.

    Scores are taken on the base model, all adapters off, in eval mode; every flag and gradient is put back. Those by
    `movement`, the default, are taken in train mode: it trains all covered weights, and what `modules_to_save` names,
    for four passes over the data, and takes that back; `num_batches` bounds each pass. Call `fit_head` first where a
    head is new. Make the optimizer afterwards: one that was made before does not hold the child's deltas.

    With several processes this is a collective: call it on every one (not only on the main one, and not under
    `main_process_first`), before the model is wrapped for training (before `accelerator.prepare`). Each scores its
    share of the data: a dataloader that accelerate or Trainer has prepared. (The whole of the data on every process
    gives the same child, only later.) The sums are added up, every example counting once, and every process installs
    the same child: the one that a single process would choose, except that scores which agree to float32 rounding may
    change places, as their sums are taken in another order. Equal scores are taken in the order of tensors and
    positions. (By `movement` they train together, in as many times fewer steps on larger batches, each with dropout of
    its own: all get the same child, which is not the one that a single process would choose.)

    Args:
        model: a model with a `ChildTuningConfig` adapter that has not been trained yet.
        dataloader: batches for `model(**batch).loss`, or for `loss_fn`; needed by the scores that look at data.
        network: a child network, or the path of one, to be used instead of choosing.
        num_batches: look at so many batches only, on each process; None for all.
        loss_fn: called as `loss_fn(model, batch)`; returns the mean loss of the batch.
        adapter_name: whose child.
        scores_device: where the scores are kept, 4 bytes for each covered weight; `"cpu"` where an accelerator has no
            room for them. None keeps each beside its weight.
        show_progress: show a progress bar, on the first process.

    Returns:
        The child network, with one entry per covered base tensor.

    Raises:
        SelectionError: no such adapter, no dataloader where one is needed, an adapter that is merged or trained
        already, a model that is wrapped already, or processes that differ or of which one has failed.
        UnsupportedError: the model's weights are divided among processes already.
        ScoreError: the data give no finite loss or score.
        BudgetError: the density keeps nothing.
        DeltaError: `network` does not fit the model.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_childtune import ChildTuningConfig
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> config = ChildTuningConfig(target_modules=["0", "2"], score="fisher", density=0.2)
        >>> model = get_peft_model(base, config)
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(3)]
        >>> loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> select_child_network(model, batches, loss_fn=loss_fn, show_progress=False)
        ChildNetwork(4 tensors, 6 of 30 entries, density 0.2)

    Source: Child-Tuning-D, Xu et al. 2021 (arXiv:2109.05687), section 3.2.
    """
    if isinstance(dataloader, str | os.PathLike | ChildNetwork):
        raise ConfigError("dataloader: a child network goes to `network`: select_child_network(model, network=...).")
    model, config = ready_model(
        model, adapter_name, caller="select_child_network", needs_weights=None if network is None else False
    )
    with failing_together():
        check_untrained(model, adapter_name, config)
    with failing_together():
        if network is not None:
            grids = grids_of(model, adapter_name, config)
            children = _given(network, dataloader, shapes={name: grid.shape for name, grid in grids.items()})
            how: dict[str, Any] = {"source": "given"}
        elif not config.needs_data:
            children = data_free_children(model, adapter_name, config)
            if dataloader is not None and is_first_rank():
                warnings.warn(
                    f"{config.chosen_by} chooses without data, so the dataloader is not read; the paper's child is "
                    'that of ChildTuningConfig(score="fisher").',
                    stacklevel=2,
                )
            how = {"source": "random" if config.mode == "task_free" else config.score}
        else:
            if dataloader is None:
                raise SelectionError(
                    f'score="{config.score}" looks at data: call select_child_network(model, dataloader); '
                    '"magnitude" and "random" do not.'
                )
            children, how = children_by_data(
                model,
                adapter_name,
                config,
                dataloader=dataloader,
                num_batches=num_batches,
                loss_fn=loss_fn,
                scores_device=scores_device,
                show_progress=show_progress,
            )
        # from an accelerator, where the scores were, to where all else of a child network is kept
        children = {name: _on_cpu(child) for name, child in children.items()}
        chosen = ChildNetwork(children)
    rule = f" of seed {config.seed} and density {config.density}" if config.resample else ""
    agree(f"child {chosen.digest()}{rule}", what="the processes chose different children; none can be trained.")
    with failing_together():
        install_children(model, adapter_name, children, config=config)
    layers = layers_of(model, adapter_name).values()
    deltas = [
        values for layer in layers for values in layer._values(adapter_name).parameters() if values.requires_grad
    ]
    watch_optimizers(model, deltas, adapter_name)
    config.selection = {
        "torch_seed": torch.initial_seed(),
        **how,
        "density": chosen.density,
        "digest": chosen.digest(),
    }
    if is_first_rank():
        if logger.isEnabledFor(logging.INFO):
            logger.info("%s", selection_report(model, adapter_name))
        if config.needs_data and network is None:
            sizes = {name: (child.nnz, child.grid.numel) for name, child in chosen.children.items()}
            for warning in warnings_of(sizes):
                warnings.warn(warning, stacklevel=2)
    return chosen


def _on_cpu(child: TensorChild) -> TensorChild:
    return TensorChild(child.grid, child.units.cpu() if isinstance(child.units, Tensor) else child.units)


def _given(
    network: ChildNetwork | str | os.PathLike[str], dataloader: Any, *, shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, TensorChild]:
    if dataloader is not None:
        raise ConfigError("network: a given child is used as it is; pass either a dataloader or a network, not both.")
    return (network if isinstance(network, ChildNetwork) else ChildNetwork.load(network, shapes=shapes)).children
