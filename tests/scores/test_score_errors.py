"""Every way to call for scores that cannot be computed raises an error that says what to do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from peft_childtune.errors import ScoreError
from peft_childtune.scores import DATA_SCORES, score_parameters

ALL = pytest.mark.parametrize("score", sorted(DATA_SCORES))


def mean_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean()


def compute(dataloader, *, model=None, parameters=None, loss_fn=mean_loss, score="fisher", **options):
    model = model if model is not None else nn.Linear(3, 2)
    parameters = parameters if parameters is not None else dict(model.named_parameters())
    return score_parameters(
        model, parameters, dataloader, score=score, loss_fn=loss_fn, show_progress=False, **options
    )


@ALL
def test_an_empty_dataloader_raises(score):
    with pytest.raises(ScoreError, match=r"yields no batch; scores need data"):
        compute([], score=score)


@ALL
def test_a_used_up_iterator_raises_and_is_called_one(score):
    batches = iter([torch.ones(2, 3)])
    next(batches)
    with pytest.raises(ScoreError, match="an iterator, which can be read only once"):
        compute(batches, score=score)


@pytest.mark.parametrize("num_batches", [0, -1])
def test_fewer_than_one_batch_raises(num_batches):
    with pytest.raises(ScoreError, match=f"num_batches={num_batches} reads no data; use at least 1"):
        compute([torch.ones(2, 3)], num_batches=num_batches)


@pytest.mark.parametrize("score", ["magnitude", "random", "Fisher"])
def test_a_score_that_needs_no_data_or_is_unknown_raises_with_the_known_ones(score):
    with pytest.raises(ScoreError, match=r"use one of \['fisher', 'fisher_batch', 'gradient'\]"):
        compute([torch.ones(2, 3)], score=score)


@pytest.mark.parametrize("dataloader", [{"x": torch.ones(2, 3)}, None])
def test_a_single_batch_or_nothing_in_place_of_a_dataloader_raises(dataloader):
    with pytest.raises(ScoreError, match="not an iterable of batches; pass a DataLoader, or a list"):
        compute(dataloader)


@ALL
def test_a_batch_that_is_no_mapping_raises_without_a_loss_fn(score):
    with pytest.raises(ScoreError, match=r"batch 0: is a tuple.*pass loss_fn="):
        compute([(torch.ones(2, 3),)], loss_fn=None, score=score)


@ALL
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "the model returned no loss; pass labels in the batch or loss_fn="),
        (1.5, "the loss is a float, not a tensor"),
        (torch.ones(2), r"the loss has shape \(2,\), not one number; reduce it to its mean"),
    ],
)
def test_a_loss_that_is_missing_or_not_one_number_raises(score, value, message):
    with pytest.raises(ScoreError, match=f"batch 0: {message}"):
        compute([torch.ones(2, 3)], loss_fn=lambda model, batch: value, score=score)


@ALL
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_and_names_the_batch(score, value):
    good, bad = torch.ones(2, 3), torch.ones(2, 3)
    bad[1, 0] = value
    with pytest.raises(ScoreError, match=r"batch 2: the loss.* is (nan|-?inf)"):
        compute([good, good, bad], score=score)


def test_a_loss_that_is_not_finite_names_the_example():
    bad = torch.ones(4, 3)
    bad[2, 0] = math.inf
    with pytest.raises(ScoreError, match="batch 1: the loss of example 2 is"):
        compute([torch.ones(4, 3), bad])


class Root(nn.Module):
    """Has a finite value and an infinite gradient where a weight meets only zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad = nn.Linear(3, 1), nn.Linear(3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.good(x) + self.bad(x).abs().sqrt()


@ALL
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_score_that_is_not_finite_raises_and_names_the_batch_and_the_parameter(score, place):
    batches = [torch.rand(2, 3) + 0.1 for _ in range(3)]
    batches[place][1] = 0.0
    with pytest.raises(ScoreError, match=f"batch {place}: a gradient of bad.weight is not finite"):
        compute(batches, model=Root(), score=score)


@ALL
@pytest.mark.parametrize("size", [1, 4])
def test_a_loss_without_the_parameters_raises_after_the_first_batch(score, size):
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    read = []

    def batches():
        for _ in range(3):
            read.append(1)
            yield torch.randn(size, 3)

    with pytest.raises(ScoreError, match="does not depend on any of the 2 parameters"):
        compute(
            batches(),
            model=model,
            parameters=dict(model["unused"].named_parameters()),
            loss_fn=lambda model, batch: model["used"](batch).mean(),
            score=score,
        )
    assert len(read) == 1


@ALL
def test_a_loss_without_a_graph_raises(score):
    with pytest.raises(ScoreError, match="does not depend on any of the 2 parameters"):
        compute([torch.ones(2, 3)], loss_fn=lambda model, batch: model(batch).mean().detach(), score=score)


@ALL
def test_data_without_any_label_raises(score):
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"])

    batch = {"x": torch.ones(2, 3), "labels": torch.tensor([-100, -100])}
    with pytest.raises(ScoreError, match="No label counts towards the loss in any of 2 examples"):
        compute([batch], loss_fn=loss, score=score)


def test_a_batch_of_unknown_size_raises():
    with pytest.raises(ScoreError, match="batch 0: nothing in it tells how many examples it holds"):
        compute([{"scale": 2}], loss_fn=lambda model, batch: model(torch.ones(1, 3)).mean())


def test_no_parameters_raise():
    with pytest.raises(ScoreError, match="no parameters to score"):
        compute([torch.ones(2, 3)], parameters={})


def test_a_parameter_of_another_model_raises_and_is_named():
    with pytest.raises(ScoreError, match="stranger: is no parameter of the model"):
        compute([torch.ones(2, 3)], parameters={"stranger": nn.Parameter(torch.ones(2))})


def test_an_integer_parameter_raises_and_is_named():
    model = nn.Linear(3, 2)
    model.quantised = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ScoreError, match=r"quantised: has dtype torch.int8"):
        compute([torch.ones(2, 3)], model=model)
