"""Overlaps of children that are chosen again: what choosing by hand gives, and nothing is left of it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_childtune import (
    ChildTuningConfig,
    ScoreError,
    SelectionError,
    fit_head,
    get_child_network,
    select_child_network,
    selection_stability,
)


def _wrapped(**options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    given = {"target_modules": ["0", "2"], "modules_to_save": ["4"], "score": "fisher", "density": 0.2} | options
    return get_peft_model(base, ChildTuningConfig(**given))


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _batches(count=8):
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(8, 12, generator=generator) for _ in range(count)]
    return [(each, each[:, :3].argmax(1)) for each in x]


def _stability(model, batches=None, **options):
    return selection_stability(model, batches or _batches(), loss_fn=_loss, show_progress=False, **options)


def test_the_overlap_of_halves_is_that_of_children_chosen_on_every_other_batch():
    children = []
    for part in (_batches()[::2], _batches()[1::2]):
        model = _wrapped()
        children.append(select_child_network(model, part, loss_fn=_loss, show_progress=False))
    found = _stability(_wrapped())
    assert found.halves == children[0].overlap(children[1])
    assert found.chance == 0.2 < found.halves < 1


def test_equal_halves_choose_the_same_child():
    batches = [batch for batch in _batches(3) for _ in range(2)]
    assert _stability(_wrapped(), batches).halves == 1


def test_another_head_chooses_another_child():
    model = _wrapped()
    found = _stability(model)
    assert found.chance < found.heads < 1
    assert f"{found.heads:.2f} with another draw of the head" in str(found)


def test_an_adapter_without_a_head_has_no_second_one():
    found = _stability(_wrapped(modules_to_save=None))
    assert found.heads is None
    assert "no head" in str(found)


def test_the_data_are_read_once_and_only_as_far_as_asked():
    model = _wrapped()
    assert _stability(model, iter(_batches())).halves == _stability(model).halves
    assert _stability(model, num_batches=4).halves == _stability(model, _batches()[:4]).halves


@pytest.mark.parametrize("score", ["fisher", "movement"])
def test_nothing_is_installed_and_the_head_is_as_it_was(score):
    model = _wrapped(score=score)
    fit_head(model, _batches(), loss_fn=_loss, show_progress=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _stability(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], old) for name, old in before.items())
    with pytest.raises(SelectionError):
        get_child_network(model)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ScoreError, match="1 batches make no two halves"):
        _stability(_wrapped(), _batches(1))
    with pytest.raises(SelectionError, match='score="random" does not look at data'):
        _stability(_wrapped(score="random"))


@pytest.mark.parametrize("look", [selection_stability, fit_head])
def test_a_model_in_an_engine_is_refused(look, monkeypatch):
    monkeypatch.setattr("peft_childtune.tuner.readiness.is_in_engine", lambda model: True)
    with pytest.raises(SelectionError, match=f"call {look.__name__} before `deepspeed.initialize`"):
        look(_wrapped(), _batches(), loss_fn=_loss)
