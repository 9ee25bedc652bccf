"""The scoring pass over a dataloader, for every score that needs data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_childtune.errors import ScoreError
from peft_childtune.scores.batch import detached_to, loss_of
from peft_childtune.scores.batchwise import BatchFisher, BatchGradients, MeanGradient
from peft_childtune.scores.fisher import PerExampleFisher
from peft_childtune.scores.preserve import preserved
from peft_childtune.scores.result import ScoreResult

__all__ = ["DATA_SCORES", "score_parameters"]

_TITLES = {"fisher": "Fisher information", "fisher_batch": "Batch Fisher information", "gradient": "Mean gradient"}

_BATCHWISE: dict[str, type[BatchGradients]] = {"fisher_batch": BatchFisher, "gradient": MeanGradient}

DATA_SCORES = frozenset(_TITLES)


def score_parameters(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any],
    *,
    score: str = "fisher",
    num_batches: int | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    scores_device: torch.device | str | None = None,
    show_progress: bool = True,
) -> ScoreResult:
    """Return how much each weight matters for the loss on the data.

    The pass runs in eval mode (with dropout, two passes disagree on a tenth of a Fisher child), sums up in fp32, and
    leaves the model as it found it: flags, gradients, hooks and random state, also when it fails.

    Args:
        model: any module; `model(**batch)` returns a loss, or `loss_fn` computes one.
        parameters: name to parameter, anywhere in `model`, trainable or not.
        dataloader: yields batches; tensors are moved to the model's device. Read once.
        score: `fisher`, mean over examples of the squared gradient of that example's own loss, equal to a loop over
            batches of one; an example of which every label is ignored adds nothing and counts.
            `fisher_batch`, mean over batches of the squared batch gradient, the authors' estimate.
            `gradient`, absolute value of the mean gradient.
        num_batches: read at most so many batches; None reads all.
        loss_fn: takes the model and a batch, returns a scalar.
        scores_device: where the sums are kept, 4 bytes a weight: `"cpu"` leaves an accelerator with one gradient at a
            time. None keeps each beside its parameter.
        show_progress: show a progress bar.

    Returns:
        The scores, fp32, by the same names as `parameters`, and what they were computed from.

    Raises:
        ScoreError: there are no batches; the loss is missing, not one number, not finite, or depends on none of the
            parameters; a score is not finite; or gradients are impossible here.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batches = [(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([3.0, 3.0]))]
        >>> loss = lambda model, batch: (model(batch[0]).squeeze(1) * batch[1]).mean()
        >>> weights = dict(model.named_parameters())
        >>> score_parameters(model, weights, batches, loss_fn=loss, show_progress=False).scores
        {'weight': tensor([[ 9., 18.]])}

    Source: the empirical Fisher information of Child-Tuning-D, Xu et al. 2021 (arXiv:2109.05687), section 2.2.
    """
    if score not in DATA_SCORES:
        raise ScoreError(f"score={score!r} is not computed from data; use one of {sorted(DATA_SCORES)}.")
    if num_batches is not None and num_batches < 1:
        raise ScoreError(f"num_batches={num_batches} reads no data; use at least 1, or None for all of it.")
    if isinstance(dataloader, Mapping) or not isinstance(dataloader, Iterable):
        raise ScoreError(
            f"dataloader is a {type(dataloader).__name__}, not an iterable of batches; pass a DataLoader, or a list."
        )
    model = _unwrapped(model)
    distinct = _distinct(model, parameters)
    device = next(parameter.device for parameter in model.parameters())
    kept_on = None if scores_device is None else torch.device(scores_device)
    with preserved(model, device):

        def loss_of_batch(batch: Any, index: int) -> Tensor:
            return loss_of(model, batch, loss_fn=loss_fn, index=index)

        scorer: PerExampleFisher | BatchGradients
        if score == "fisher":
            scorer = PerExampleFisher(model, distinct, loss_of_batch, device=kept_on)
        else:
            scorer = _BATCHWISE[score](distinct, loss_of_batch, device=kept_on)
        num_examples, index, losses = 0, -1, []
        batches = _batches(dataloader, num_batches, title=_TITLES[score] if show_progress else None)
        for index, batch in enumerate(batches):
            size, loss = scorer.add(detached_to(batch, device), index)
            num_examples += size
            losses.append((loss, size))
            if index == 0 and not math.isnan(loss):  # at once, not after a pass over all the data
                _check_not_all_zero(scorer.sums)
    if index < 0:
        used_up = " (it is an iterator, which can be read only once)" if isinstance(dataloader, Iterator) else ""
        raise ScoreError(f"The dataloader yields no batch{used_up}; scores need data.")
    means = scorer.means(num_examples=num_examples, num_batches=index + 1)
    counted = [(loss, size) for loss, size in losses if not math.isnan(loss)]
    if not counted:
        raise ScoreError(f"No label counts towards the loss in any of {num_examples} examples; look at the labels.")
    _check_not_all_zero(means)
    names = {id(parameter): name for name, parameter in distinct.items()}
    return ScoreResult(
        scores={name: means[names[id(parameter)]] for name, parameter in parameters.items()},
        num_examples=num_examples,
        num_batches=index + 1,
        loss=sum(loss * size for loss, size in counted) / sum(size for _, size in counted),
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel or `torch.compile`, in which no hook of ours would run."""
    inner = (
        model.module if isinstance(model, nn.parallel.DistributedDataParallel) else getattr(model, "_orig_mod", None)
    )
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _distinct(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return `parameters` with each parameter once, under its first name."""
    if not parameters:
        raise ScoreError("There are no parameters to score.")
    known = {id(parameter) for parameter in model.parameters()}
    distinct: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if id(parameter) not in known:
            raise ScoreError(f"{name}: is no parameter of the model; take parameters from model.named_parameters().")
        if not parameter.is_floating_point():
            raise ScoreError(f"{name}: has dtype {parameter.dtype}, and only floating-point weights have gradients.")
        distinct.setdefault(id(parameter), (name, parameter))
    return dict(distinct.values())


def _batches(dataloader: Iterable[Any], limit: int | None, *, title: str | None) -> Iterator[Any]:
    total = limit
    if isinstance(dataloader, Sized):
        try:
            total = len(dataloader) if limit is None else min(limit, len(dataloader))
        except (TypeError, NotImplementedError):  # a DataLoader over an iterable dataset
            pass
    yield from tqdm(islice(dataloader, limit), total=total, desc=title, unit="batch", disable=title is None)


def _check_not_all_zero(scores: Mapping[str, Tensor]) -> None:
    if not any(bool(each.any()) for each in scores.values()):
        raise ScoreError(
            f"The loss does not depend on any of the {len(scores)} parameters: every gradient is zero. Look at "
            "what the loss is computed from, and whether the modules to be trained take part in it."
        )
