"""Whether the same child would be chosen again: on other data, and with another fresh head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ScoreError, SelectionError
from ..network import ChildNetwork
from ..ranks import failing_together, world_size
from ..scores import check_data
from .base_alone import heads_of
from .choosing import children_by_data
from .readiness import ready_model
from .shards import without_repeats

__all__ = ["SelectionStability", "selection_stability"]


@dataclass(frozen=True)
class SelectionStability:
    """How much two children that should be alike have in common: shares of the smaller one, in [0, 1].

    Attributes:
        halves: of the children that two halves of the batches choose.
        heads: of the children that are chosen under two heads; None if the adapter has no head of its own.
        chance: of two children of this density that have nothing to do with each other.
    """

    halves: float
    heads: float | None
    chance: float

    def __str__(self) -> str:
        """Return it as a line of text."""
        heads = "no head" if self.heads is None else f"{self.heads:.2f} with another draw of the head"
        return f"overlap {self.halves:.2f} between two halves of the data, {heads}; {self.chance:.2f} by chance"


def selection_stability(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    num_batches: int | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    adapter_name: str = "default",
    scores_device: torch.device | str | None = None,
    show_progress: bool = True,
) -> SelectionStability:
    """Choose the child several times, install none, and compare: on two halves of the data, and under another head.

    A score whose child follows a random head, or the sample, is one to doubt: fit the head first (`fit_head`), or take
    more data. It takes as long as one selection; with a head, as three.

    Args:
        model: a model with a `ChildTuningConfig` adapter whose score looks at data. It is left as it was.
        dataloader: as for `select_child_network`. It is read once, and its batches are kept meanwhile; every other one
            makes up a half.
        num_batches: look at so many batches only; None for all.
        loss_fn: as for `select_child_network`.
        adapter_name: whose child.
        scores_device: where the scores are kept, as for `select_child_network`.
        show_progress: show progress bars.

    Returns:
        The overlaps. The other head has the values of the first one in another order, tensor by tensor: as random as a
        fresh one, and of the same size.

    Raises:
        SelectionError: no such adapter, or its score does not look at data; a model that is wrapped already, processes
            that differ or of which one has failed.
        UnsupportedError: the model's weights are divided among processes already.
        ScoreError: there are fewer than two batches, or the data give no finite loss or score.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_childtune import ChildTuningConfig
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> config = ChildTuningConfig(target_modules=["0", "2"], score="fisher", scope="global", density=0.5)
        >>> model = get_peft_model(base, config)
        >>> batches = [(torch.randn(8, 4), torch.randint(2, (8,))) for _ in range(4)]
        >>> loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        >>> selection_stability(model, batches, loss_fn=loss_fn, show_progress=False).halves > 0.5
        True

    Source: Xu et al. 2021 (arXiv:2109.05687) compare the children of tasks by their overlap.
    """
    model, config = ready_model(model, adapter_name, caller="selection_stability", needs_weights=True)
    with failing_together():
        if not config.needs_data:
            raise SelectionError(
                f"{config.chosen_by} does not look at data, so the same child is chosen again; compare children of "
                "two seeds by `ChildNetwork.overlap`."
            )
        check_data(dataloader, num_batches=num_batches)
        batches = list(islice(without_repeats(dataloader), num_batches))
        if len(batches) < 2 and world_size() == 1:
            raise ScoreError(f"{len(batches)} batches make no two halves; give two or more, or smaller ones.")

    def chosen(data: list[Any]) -> ChildNetwork:
        children, _ = children_by_data(
            model,
            adapter_name,
            config,
            dataloader=data,
            loss_fn=loss_fn,
            scores_device=scores_device,
            show_progress=show_progress,
        )
        return ChildNetwork(children)

    heads = heads_of(model, adapter_name)
    overlap = None
    halves = chosen(batches[::2]).overlap(chosen(batches[1::2]))
    if heads:
        first = chosen(batches)
        with _in_another_order(heads.values()):
            overlap = first.overlap(chosen(batches))
    return SelectionStability(halves, overlap, config.density)


@contextmanager
def _in_another_order(heads: Iterable[nn.Parameter]) -> Iterator[None]:
    """Permute the values of each head within it, the same way in every process; then put them back."""
    generator = torch.Generator().manual_seed(0)
    before = [(head, head.detach().clone()) for head in heads]
    try:
        for head, old in before:
            order = torch.randperm(old.numel(), generator=generator).to(old.device)
            head.data.copy_(old.flatten()[order].view_as(old))
        yield
    finally:
        for head, old in before:
            head.data.copy_(old)
