"""Which weight an example has in its batch is found out by comparison, and anew when that becomes unclear."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_childtune.scores import score_parameters


class Tagger(nn.Module):
    """Labels tokens; counts its calls; takes the mean over tokens, over examples, or sums."""

    def __init__(self, average: str) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.average, self.calls = average, 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        logits = self.head(torch.tanh(self.inner(x)))
        if self.average == "shifted":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if self.average == "examples":
            losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
            return {"loss": (losses / labels.ne(-100).sum(1).clamp(min=1)).mean()}
        if self.average == "squared":
            losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
            return {"loss": losses.square().sum().sqrt()}
        reduction = "sum" if self.average == "sum" else "mean"
        return {
            "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction)
        }


def batch(*counts: int, length: int = 8) -> dict[str, Tensor]:
    """Return a batch whose examples have so many labels each, at the end."""
    labels = torch.randint(0, 3, (len(counts), length))
    for i, count in enumerate(counts):
        labels[i, : length - count] = -100
    return {"x": torch.randn(len(counts), length, 4), "labels": labels}


def named_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch)["loss"]


def assert_equals_loop(model, batches, loop_fisher):
    expected = loop_fisher(model, batches, named_loss)
    model.calls = 0
    result = score_parameters(model, dict(model.named_parameters()), batches, show_progress=False)
    for name, scores in expected.items():
        torch.testing.assert_close(result.scores[name].double(), scores, rtol=1e-4, atol=1e-9)  # fp32 sums


@pytest.mark.parametrize("average", ["tokens", "shifted", "examples", "sum"])
def test_every_way_to_average_is_recognised_from_one_batch(average, loop_fisher):
    model = Tagger(average)
    assert_equals_loop(model, [batch(2, 5, 8), batch(7, 1, 8, 4), batch(3, 8)], loop_fisher)
    # the first batch: 3 examples one by one, 4 weightings to try, and the right one again unless
    # it was the last, "mean"; then one call a batch
    assert model.calls == 3 + 4 + (average != "examples") + 1 + 1


@pytest.mark.parametrize("average", ["tokens", "shifted", "examples"])
def test_a_batch_that_tells_the_remaining_weightings_apart_is_scored_both_ways(average, loop_fisher):
    model = Tagger(average)
    even, uneven = batch(8, 8), batch(2, 5, 8)
    assert_equals_loop(model, [even, even, uneven, uneven], loop_fisher)
    # even: 2 one by one, and "mean" (with the labels') and "sum" to try; uneven: 3 one by one, 3 left to try, and the
    # right one again unless it was the last, "mean"
    assert model.calls == (2 + 2) + 1 + (3 + 3 + (average != "examples")) + 1


def test_a_loss_that_is_no_weighted_sum_is_scored_one_by_one(loop_fisher, caplog):
    model = Tagger("squared")
    with caplog.at_level(logging.INFO, logger="peft_childtune"):
        assert_equals_loop(model, [batch(2, 5, 8), batch(7, 1)], loop_fisher)
    assert [r.message for r in caplog.records if "example by example" in r.message and "batch 0 differs" in r.message]
    # all weightings are tried once on the first batch, which then takes its examples again, as every other batch
    assert model.calls == 3 + 4 + 3 + 2


def test_a_weighting_that_is_nearly_right_is_dropped_for_the_one_that_is(loop_fisher):
    model = Tagger("tokens")
    assert_equals_loop(model, [batch(4000, 3999, length=4000), batch(2, 5, 8)], loop_fisher)
    # "mean" and "shifted labels" are 2e-4 off on the first batch; kept, they would cost a comparison on the second
    assert model.calls == 2 + 3 + 1 + 1


@pytest.mark.parametrize("average", ["tokens", "shifted"])
@pytest.mark.parametrize("place", [0, 1])
def test_an_example_without_labels_adds_nothing_and_counts(average, place, loop_fisher):
    model = Tagger(average)
    batches = [batch(2, 5, 8), batch(4, 3, 8)]
    batches[place] = batch(2, 0, 8)
    assert_equals_loop(model, batches, loop_fisher)  # the reference skips an example whose loss is NaN, and counts it


def test_a_batch_without_any_label_adds_nothing_and_counts(loop_fisher):
    model = Tagger("tokens")
    assert_equals_loop(model, [batch(2, 5, 8), batch(0, 0), batch(4, 4)], loop_fisher)


def test_the_loss_is_the_mean_over_examples():
    model = Tagger("examples").eval()
    batches = [batch(2, 5, 8), batch(7, 1)]
    with torch.no_grad():
        losses = [
            model(**{k: v[i : i + 1] for k, v in b.items()})["loss"] for b in batches for i in range(len(b["x"]))
        ]
    result = score_parameters(model, dict(model.named_parameters()), batches, show_progress=False)
    assert result.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
