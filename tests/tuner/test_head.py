"""Fitting the head: what plain training of the head alone gives, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_childtune import ChildTuningConfig, ScoreError, SelectionError, fit_head, select_child_network


def _base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def _wrapped(**options):
    given = {"target_modules": ["0"], "modules_to_save": ["2"], "score": "fisher"} | options
    return get_peft_model(_base(), ChildTuningConfig(**given))


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _batches():
    torch.manual_seed(1)
    return [(torch.randn(4, 6), torch.randint(2, (4,))) for _ in range(3)]


def _head(model):
    return model.base_model.model[2].modules_to_save["default"]


def test_the_head_is_trained_as_a_plain_loop_trains_it():
    model, plain, batches = _wrapped(), _base().eval(), _batches()
    found = fit_head(model, batches, epochs=2, learning_rate=1e-2, loss_fn=_loss, show_progress=False)
    optimizer = torch.optim.AdamW(plain[2].parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = _loss(plain, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(_head(model).weight.detach(), plain[2].weight.detach())
    torch.testing.assert_close(_head(model).bias.detach(), plain[2].bias.detach())
    assert found == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_nothing_but_the_head_moves_and_flags_stay():
    model = _wrapped().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    fit_head(model, _batches(), loss_fn=_loss, show_progress=False)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".modules_to_save.default." in name}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.training and all(p.grad is None for p in model.parameters())


def test_the_child_follows_the_fitted_head():
    children = []
    for fits in (False, True):
        model = _wrapped(density=0.3)
        if fits:
            fit_head(model, _batches(), epochs=30, learning_rate=0.1, loss_fn=_loss, show_progress=False)
        children.append(select_child_network(model, _batches(), loss_fn=_loss, show_progress=False))
    assert children[0] != children[1]


def test_batches_of_different_sizes_each_take_a_step_of_their_own_mean():
    model, twin = _wrapped(), copy.deepcopy(_wrapped())
    short = [(x[:1], y[:1]) for x, y in _batches()[:1]]
    fit_head(model, [*_batches(), *short], epochs=1, loss_fn=_loss, show_progress=False)
    fit_head(twin, [*_batches(), *[(x.repeat(3, 1), y.repeat(3)) for x, y in short]], epochs=1, loss_fn=_loss)
    torch.testing.assert_close(_head(model).weight, _head(twin).weight)


def test_the_number_of_batches_bounds_every_epoch():
    model, twin = _wrapped(), _wrapped()
    fit_head(model, _batches(), num_batches=2, loss_fn=_loss, show_progress=False)
    fit_head(twin, _batches()[:2], loss_fn=_loss, show_progress=False)
    assert torch.equal(_head(model).weight, _head(twin).weight)


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"epochs": 2.5}, {"learning_rate": 0.0}, {"learning_rate": float("inf")}], ids=str
)
def test_a_schedule_that_fits_nothing_is_refused(options):
    model = _wrapped()
    before = _head(model).weight.clone()
    with pytest.raises(ScoreError, match="a whole epoch or more, and a rate above 0"):
        fit_head(model, _batches(), loss_fn=_loss, **options)
    assert torch.equal(_head(model).weight, before)


def test_the_batches_of_an_iterator_are_kept_for_every_epoch():
    model, twin = _wrapped(), _wrapped()
    fit_head(model, iter(_batches()), loss_fn=_loss, show_progress=False)
    fit_head(twin, _batches(), loss_fn=_loss, show_progress=False)
    assert torch.equal(_head(model).weight, _head(twin).weight)


def test_a_head_is_as_it_was_if_fitting_breaks_off():
    model = _wrapped()
    before, calls = _head(model).weight.clone(), iter(range(5))

    def breaks(model, batch):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return _loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        fit_head(model, _batches(), loss_fn=breaks, show_progress=False)
    assert torch.equal(_head(model).weight, before)
    assert _head(model).weight.requires_grad and _head(model).weight.grad is None


def test_a_head_is_not_fitted_beside_a_trained_delta():
    model = _wrapped()
    select_child_network(model, _batches(), loss_fn=_loss, show_progress=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.requires_grad)
    with pytest.raises(SelectionError, match="has been trained already"):
        fit_head(model, _batches(), loss_fn=_loss, show_progress=False)


@pytest.mark.parametrize("way", ["another adapter's head is active", "adapters are disabled"])
def test_another_adapters_head_changes_neither_head_nor_child(way):
    def chosen(model, name):
        fit_head(model, _batches(), loss_fn=_loss, adapter_name=name, show_progress=False)
        return select_child_network(model, _batches(), loss_fn=_loss, adapter_name=name, show_progress=False)

    options = {"target_modules": ["0"], "modules_to_save": ["2"], "score": "fisher", "density": 0.3}
    model, twin = _wrapped(density=0.3), _wrapped(density=0.3)
    expected = chosen(twin, "default")
    if way == "adapters are disabled":
        with model.disable_adapter():
            found = chosen(model, "default")
            assert model.base_model.model[2].disable_adapters
    else:
        with torch.no_grad():
            _head(model).weight.neg_()
        model.add_adapter("b", ChildTuningConfig(**options))
        found = chosen(model, "b")
        assert model.base_model.model[2].active_adapter == "default"
    assert found == expected


def test_the_base_alone_has_the_bases_head():
    model, twin = _wrapped(), _wrapped(modules_to_save=None, density=0.3)
    with torch.no_grad():
        _head(model).weight.neg_()
    model.add_adapter("b", ChildTuningConfig(target_modules=["0"], score="fisher", density=0.3))
    found = select_child_network(model, _batches(), loss_fn=_loss, adapter_name="b", show_progress=False)
    assert found == select_child_network(twin, _batches(), loss_fn=_loss, show_progress=False)


def test_scores_are_not_sent_to_where_nothing_is_kept():
    model = _wrapped(score="movement")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ScoreError, match="scores_device='meta' keeps no scores"):
        select_child_network(model, _batches(), loss_fn=_loss, scores_device="meta")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapter_without_a_head_is_refused():
    with pytest.raises(SelectionError, match="modules_to_save"):
        fit_head(_wrapped(modules_to_save=None), _batches(), loss_fn=_loss)


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ([], _loss, "no batch"),
        (iter([]), _loss, "no batch"),
        (3, _loss, "not an iterable"),
        (_batches(), lambda m, b: torch.ones(()), "does not depend on any of the 2 tensors"),
        (_batches(), lambda m, b: _loss(m, b) * float("nan"), "the loss is nan"),
    ],
    ids=["empty", "used up", "number", "constant", "nan"],
)
def test_data_that_fit_nothing_are_refused(data, loss, message):
    with pytest.raises(ScoreError, match=message):
        fit_head(_wrapped(), data, loss_fn=loss, show_progress=False)
