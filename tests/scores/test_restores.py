"""A scoring pass leaves a model and its surroundings as they were, whether it succeeds or fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from peft_childtune.errors import ScoreError
from peft_childtune.ranks import unwrapped
from peft_childtune.scores import DATA_SCORES, score_parameters


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.drop, self.norm, self.head = (
            nn.Linear(3, 4),
            nn.Dropout(0.5),
            nn.BatchNorm1d(4),
            nn.Linear(4, 2),
        )
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyError("on purpose")
        return {"loss": nn.functional.cross_entropy(self.head(self.norm(self.drop(self.inner(x)))), labels)}

    fails_at = -1


@pytest.fixture
def model() -> Model:
    model = Model()
    model.train()
    model.norm.eval()
    model.inner.bias.requires_grad = False
    model.head.weight.grad = torch.full((2, 4), 7.0)
    return model


def loader() -> DataLoader:
    data = TensorDataset(torch.randn(8, 3), torch.randint(0, 2, (8,)))
    return DataLoader(
        data,
        batch_size=4,
        shuffle=True,
        collate_fn=lambda rows: dict(x=torch.stack([r[0] for r in rows]), labels=torch.stack([r[1] for r in rows])),
    )


# the calls of a pass over two batches of 4: 4 one by one, 2 weightings to compare, then one for the second batch
OUTCOMES = {"success": -1, "in the loop": 3, "while comparing": 5, "in one pass": 7}


@pytest.fixture(params=[(score, end) for score in sorted(DATA_SCORES) for end in OUTCOMES], ids=str)
def run(request, model):
    score, end = request.param
    model.fails_at = OUTCOMES[end] if score == "fisher" else min(2, OUTCOMES[end])

    batches = loader()

    def act() -> None:
        try:
            score_parameters(model, dict(model.named_parameters()), batches, score=score, show_progress=False)
        except KeyError:
            assert end != "success"
        else:
            assert end == "success"

    return act


def test_training_flags_are_restored(run, model):
    before = {name: module.training for name, module in model.named_modules()}
    run()
    assert {name: module.training for name, module in model.named_modules()} == before


def test_requires_grad_is_restored(run, model):
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    run()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_gradients_are_neither_touched_nor_made(run, model):
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    run()
    assert all(parameter.grad is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(model.head.weight.grad, torch.full((2, 4), 7.0))


def test_no_hook_stays_behind(run, model):
    run()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_weights_and_buffers_keep_every_bit(run, model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_random_state_is_restored(run):
    before = torch.get_rng_state()
    run()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("score", sorted(DATA_SCORES))
def test_a_surrounding_no_grad_changes_nothing(model, score):
    batches, parameters = list(loader()), dict(model.named_parameters())
    expected = score_parameters(model, parameters, batches, score=score, show_progress=False)
    with torch.no_grad():
        found = score_parameters(model, parameters, batches, score=score, show_progress=False)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(found.scores[name], expected.scores[name]) for name in parameters)


def test_a_surrounding_inference_mode_raises(model):
    with torch.inference_mode(), pytest.raises(ScoreError, match="inference_mode"):
        score_parameters(model, dict(model.named_parameters()), [], show_progress=False)


def test_a_model_made_in_inference_mode_raises():
    with torch.inference_mode():
        model = Model()
    with pytest.raises(ScoreError, match="inference_mode"):
        score_parameters(model, dict(model.named_parameters()), [], show_progress=False)


def test_scores_do_not_depend_on_dropout_or_on_the_random_state(model):
    batches, parameters = list(loader()), dict(model.named_parameters())
    torch.manual_seed(1)
    first = score_parameters(model, parameters, batches, show_progress=False)
    torch.manual_seed(2)
    second = score_parameters(model, parameters, batches, show_progress=False)
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in parameters)


def test_scores_do_not_depend_on_what_was_trainable(model):
    batches, parameters = list(loader()), dict(model.named_parameters())
    first = score_parameters(model, parameters, batches, show_progress=False)
    model.requires_grad_(False)
    second = score_parameters(model, parameters, batches, show_progress=False)
    assert all(torch.equal(first.scores[name], second.scores[name]) for name in parameters)


def test_a_train_method_that_does_more_than_set_a_flag_is_not_called(model):
    def train(mode: bool = True) -> nn.Module:
        raise AssertionError("called")

    model.inner.train = train
    score_parameters(model, dict(model.named_parameters()), loader(), show_progress=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inside torch
def test_a_compiled_model_is_scored_uncompiled(model):
    assert unwrapped(torch.compile(model, backend="eager")) is model
