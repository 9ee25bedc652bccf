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
from peft_childtune.ranks import agree, failing_together, is_first_rank, sum_over_ranks_, unwrapped
from peft_childtune.scores.batch import detached_to, loss_of
from peft_childtune.scores.batchwise import BatchFisher, BatchGradients, MeanGradient
from peft_childtune.scores.fisher import PerExampleFisher
from peft_childtune.scores.preserve import preserved
from peft_childtune.scores.result import ScoreResult

__all__ = ["DATA_SCORES", "check_data", "no_batches", "read_batches", "score_parameters"]

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

    With several processes (torch.distributed) this is a collective: each scores the batches of its own dataloader,
    which may be of different lengths or even empty, and gets the scores of all batches together.

    Args:
        model: any module; `model(**batch)` returns a loss, or `loss_fn` computes one.
        parameters: name to parameter, anywhere in `model`, trainable or not.
        dataloader: yields batches; tensors are moved to the model's device. Read once. If its `is_read_together` is
            true, every process has to read all of it, and does, even one that fails.
        score: `fisher`, mean over examples of the squared gradient of that example's own loss, equal to a loop over
            batches of one; an example of which every label is ignored adds nothing and counts.
            `fisher_batch`, mean over batches of the squared batch gradient, the authors' estimate.
            `gradient`, absolute value of the mean gradient.
        num_batches: read at most so many batches, in each process; None reads all.
        loss_fn: takes the model and a batch, returns a scalar.
        scores_device: where the sums are kept, 4 bytes a weight: `"cpu"` leaves an accelerator with one gradient at a
            time. None keeps each beside its parameter.
        show_progress: show a progress bar, in the first process.

    Returns:
        The scores, fp32, by the same names as `parameters`, and what they were computed from.

    Raises:
        SelectionError: another process has failed.
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
    check_data(dataloader, num_batches=num_batches)
    with failing_together():  # nobody waits below for a process that has failed
        distinct = _distinct(unwrapped(model), parameters)
    with failing_together():  # apart: a dataloader may begin with a collective of its own
        scorer, tally = _pass(
            unwrapped(model),
            distinct,
            dataloader,
            score=score,
            num_batches=num_batches,
            loss_fn=loss_fn,
            device=None if scores_device is None else torch.device(scores_device),
            show_progress=show_progress and is_first_rank(),
        )
    agree(f"{score} of {len(distinct)} tensors", what="all have to score the same parameters.")
    for total in (*scorer.sums.values(), tally):
        sum_over_ranks_(total)
    num_examples, batches_read, loss, counted = tally.tolist()
    if not batches_read:
        raise no_batches(dataloader)
    if not counted:
        raise ScoreError(f"No label counts towards the loss in any of {num_examples:g} examples; look at the labels.")
    means = scorer.means(num_examples=int(num_examples), num_batches=int(batches_read))
    _check_not_all_zero(means)
    names = {id(parameter): name for name, parameter in distinct.items()}
    return ScoreResult(
        scores={name: means[names[id(parameter)]] for name, parameter in parameters.items()},
        num_examples=int(num_examples),
        num_batches=int(batches_read),
        loss=loss / counted,
    )


def _pass(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    dataloader: Iterable[Any],
    *,
    score: str,
    num_batches: int | None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    device: torch.device | None,
    show_progress: bool,
) -> tuple[PerExampleFisher | BatchGradients, Tensor]:
    """Score this process's share of the data.

    Returns:
        What has added it up; and float64 `(4,)`: examples, batches, the losses' sum over examples that have one, and
        how many have.
    """
    home = next(parameter.device for parameter in model.parameters())
    tally = torch.zeros(4, dtype=torch.float64)
    with preserved(model, home):

        def loss_of_batch(batch: Any, index: int) -> Tensor:
            return loss_of(model, batch, loss_fn=loss_fn, index=index)

        scorer: PerExampleFisher | BatchGradients
        if score == "fisher":
            scorer = PerExampleFisher(model, parameters, loss_of_batch, device=device)
        else:
            scorer = _BATCHWISE[score](parameters, loss_of_batch, device=device)
        batches = read_batches(dataloader, num_batches, title=_TITLES[score] if show_progress else None)
        try:
            for index, batch in enumerate(batches):
                size, loss = scorer.add(detached_to(batch, home), index)
                tally += torch.tensor([size, 1, 0, 0] if math.isnan(loss) else [size, 1, loss * size, size])
                if index == 0 and not math.isnan(loss):  # at once, not after a pass over all the data
                    _check_not_all_zero(scorer.sums)
        except Exception:
            if getattr(dataloader, "is_read_together", False):  # the other processes would wait for this one's part
                for _ in batches:
                    pass
            raise
    return scorer, tally


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


def check_data(dataloader: Iterable[Any] | None, *, num_batches: int | None) -> None:
    """Raise unless a dataloader can be read.

    Raises:
        ScoreError: it cannot.
    """
    if num_batches is not None and num_batches < 1:
        raise ScoreError(f"num_batches={num_batches} reads no data; use at least 1, or None for all of it.")
    if isinstance(dataloader, Mapping) or not isinstance(dataloader, Iterable):
        raise ScoreError(
            f"dataloader is a {type(dataloader).__name__}, not an iterable of batches; pass a DataLoader, or a list."
        )


def no_batches(dataloader: object) -> ScoreError:
    """Return the error of a dataloader that yields nothing."""
    used_up = " (it is an iterator, which can be read only once)" if isinstance(dataloader, Iterator) else ""
    return ScoreError(f"The dataloader yields no batch{used_up}; scores need data.")


def read_batches(dataloader: Iterable[Any], limit: int | None, *, title: str | None) -> Iterator[Any]:
    """Yield the first batches of a dataloader, None for all, under a progress bar unless `title` is None."""
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
