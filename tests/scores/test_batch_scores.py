"""Scores that take whole batches, and the one that takes no data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_childtune.scores import DATA_SCORES, ScoreResult, magnitude_scores, score_parameters


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 3), torch.randn(n, 2)) for n in (5, 2, 1)]


def batch_gradients(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    model.eval()
    names = [name for name, _ in model.named_parameters()]
    return [
        dict(zip(names, torch.autograd.grad(loss(model, batch), list(model.parameters())), strict=True))
        for batch in batches
    ]


def score(model: nn.Module, batches: object, name: str, **options: object) -> ScoreResult:
    parameters = dict(model.named_parameters())
    return score_parameters(model, parameters, batches, score=name, loss_fn=loss, show_progress=False, **options)


def test_fisher_batch_is_the_mean_over_batches_of_the_squared_batch_gradient(model, batches):
    gradients = batch_gradients(model, batches)
    found = score(model, batches, "fisher_batch")
    for name in dict(model.named_parameters()):
        expected = torch.stack([g[name].square() for g in gradients]).mean(0)
        torch.testing.assert_close(found.scores[name], expected)


def test_gradient_is_the_absolute_value_of_the_mean_over_examples(model, batches):
    everything = (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
    (gradient,) = batch_gradients(model, [everything])
    found = score(model, batches, "gradient")
    for name in dict(model.named_parameters()):
        torch.testing.assert_close(found.scores[name], gradient[name].abs())


@pytest.mark.parametrize("name", sorted(DATA_SCORES))
def test_counts_and_loss_tell_what_was_read(name, model, batches):
    model.eval()
    found = score(model, batches, name)
    everything = (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
    assert (found.num_examples, found.num_batches) == (8, 3)
    assert found.loss == pytest.approx(loss(model, everything).item(), rel=1e-5)


@pytest.mark.parametrize("name", sorted(DATA_SCORES))
def test_num_batches_reads_the_first_batches_and_not_one_more(name, model, batches):
    taken = iter(batches)
    found = score(model, taken, name, num_batches=2)
    expected = score(model, batches[:2], name)
    assert all(torch.equal(found.scores[key], expected.scores[key]) for key in expected.scores)
    assert len(list(taken)) == 1


def test_num_batches_beyond_the_end_reads_what_there_is(model, batches):
    assert score(model, batches, "fisher", num_batches=100).num_batches == 3


def test_fisher_does_not_depend_on_how_examples_are_batched(model, batches):
    everything = (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
    found, expected = score(model, batches, "fisher"), score(model, [everything], "fisher")
    for key, scores in expected.scores.items():
        torch.testing.assert_close(found.scores[key], scores)


def test_magnitude_is_the_absolute_value_in_fp32_and_changes_nothing():
    weight = nn.Parameter(torch.tensor([[-1.5, 2.0]], dtype=torch.bfloat16))
    found = magnitude_scores({"w": weight})["w"]
    assert torch.equal(found, torch.tensor([[1.5, 2.0]])) and found.dtype is torch.float32
    assert weight.tolist() == [[-1.5, 2.0]]


def test_magnitude_of_fp32_weights_is_a_tensor_of_its_own():
    weight = nn.Parameter(torch.tensor([-1.5, 2.0]))
    magnitude_scores({"w": weight})["w"].zero_()
    assert weight.tolist() == [-1.5, 2.0]


def test_a_progress_bar_names_the_score_and_the_number_of_batches(model, batches, capsys):
    parameters = dict(model.named_parameters())
    score_parameters(model, parameters, batches, loss_fn=loss)
    shown = capsys.readouterr().err
    assert "Fisher information" in shown and "3/3" in shown


def test_no_progress_bar_is_shown_when_it_is_not_wanted(model, batches, capsys):
    score(model, batches, "fisher")
    assert capsys.readouterr() == ("", "")
