"""The share of the gradient that a child holds, and the learning rate that follows from it."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_childtune import (
    ChildTuningConfig,
    ConfigError,
    SelectionError,
    register_score,
    select_child_network,
    suggest_learning_rate,
)
from peft_childtune.scores import registry


def _selected(**options):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), ChildTuningConfig(target_modules=["0", "1"], **options)
    )
    batch = (torch.randn(1, 6), torch.tensor([1]))
    loss = {"loss_fn": lambda m, b: F.cross_entropy(m(b[0]), b[1]), "show_progress": False}
    child = select_child_network(model, [batch] if model.peft_config["default"].needs_data else None, **loss)
    return model, child, batch


@pytest.mark.parametrize("score", ["fisher", "fisher_batch", "gradient"])
def test_the_share_is_that_of_the_gradients_absolute_values(score):
    model, child, batch = _selected(score=score, density=0.2)
    base = model.get_base_model()
    grads = {}
    for layer in (base[0], base[1]):
        layer.base_layer.requires_grad_(True)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for place in ("0", "1"):
        for name, p in base[int(place)].base_layer.named_parameters():
            grads[f"{place}.{name}"] = p.grad.abs().flatten()
    kept = sum(float(grads[name][at].sum()) for name, at in child.indices.items())
    share = kept / sum(float(g.sum()) for g in grads.values())
    config = model.peft_config["default"]
    assert config.selection["gradient_share"] == pytest.approx(share, rel=1e-4)
    assert share > 0.2
    assert suggest_learning_rate(config, full=2e-4) == pytest.approx(2e-4 / share, rel=1e-4)


def test_the_share_of_a_child_by_movement_is_that_of_the_movement():
    model, child, batch = _selected(score="movement", density=0.2)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-4, weight_decay=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(plain(batch[0]), batch[1]).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().flatten() for name, p in plain.named_parameters()}
    kept = sum(float(moved[name][at].sum()) for name, at in child.indices.items())
    share = kept / sum(float(each.sum()) for each in moved.values())
    assert suggest_learning_rate(model.peft_config["default"]) == pytest.approx(1e-4 / share, rel=1e-3)


def test_a_score_of_ones_own_that_is_a_built_in_one_tells_its_share():
    register_score("slow", lambda inputs: inputs.compute("movement", learning_rate=2e-4), replace=True)
    register_score("other", lambda inputs: dict(inputs.compute("movement").scores), replace=True)
    try:
        own, built_in = (_selected(score=name, scope="tensor", density=0.2)[0] for name in ("slow", "movement"))
        other, _, _ = _selected(score="other", scope="tensor", density=0.2)
    finally:
        registry._registered.clear()
    shares = [m.peft_config["default"].selection.get("gradient_share") for m in (own, built_in, other)]
    assert shares[0] == shares[1] and shares[2] is None


def test_a_given_child_is_said_to_be_given():
    model, child, _ = _selected(score="fisher", density=0.2)
    select_child_network(model, network=child)
    with pytest.raises(SelectionError, match="network=: nothing is known"):
        suggest_learning_rate(model.peft_config["default"])


@pytest.mark.parametrize("options", [{"score": "random"}, {"score": "magnitude"}, {"mode": "task_free"}])
def test_a_child_that_was_chosen_without_gradients_is_taken_to_hold_its_density_of_them(options):
    model, child, _ = _selected(density=0.25, **options)
    assert suggest_learning_rate(model.peft_config["default"]) == pytest.approx(1e-4 * child.numel / child.nnz)


def test_a_mask_that_is_drawn_at_each_step_takes_the_rate_of_full_fine_tuning():
    assert suggest_learning_rate(ChildTuningConfig(mode="task_free", resample=True, density=0.1)) == 1e-4


def test_a_child_that_is_not_chosen_yet_is_refused():
    with pytest.raises(SelectionError, match="select_child_network first"):
        suggest_learning_rate(ChildTuningConfig(score="fisher", density=0.1))


@pytest.mark.parametrize("full", [0, -1e-4, float("nan"), float("inf"), True, "1e-4", None])
def test_a_rate_of_full_fine_tuning_that_is_none_is_refused(full):
    with pytest.raises(ConfigError, match="full="):
        suggest_learning_rate(ChildTuningConfig(score="random"), full=full)


@pytest.mark.parametrize("share", ["x", True, -1, 5, float("nan"), 1e-30])
def test_a_damaged_share_is_refused(share):
    config = ChildTuningConfig(selection={"source": "fisher", "gradient_share": share})
    with pytest.raises(ConfigError, match="gradient_share=.*choose the child anew"):
        suggest_learning_rate(config)


def test_where_nothing_is_known_of_the_share_a_range_is_given_and_no_number():
    model, child, _ = _selected(score="fisher", density=0.2)
    other = get_peft_model(
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)),
        ChildTuningConfig(target_modules=["0", "1"], score="fisher", density=0.5),
    )
    select_child_network(other, network=child)
    with pytest.raises(SelectionError, match=r"begin at 0\.0001.*not above 0\.0002"):
        suggest_learning_rate(other.peft_config["default"])


def test_a_configuration_that_is_used_again_forgets_the_child_before():
    model, _, _ = _selected(score="fisher", density=0.2)
    config = model.peft_config["default"]
    get_peft_model(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), config)
    with pytest.raises(SelectionError, match="select_child_network first"):
        suggest_learning_rate(config)


def test_a_model_in_place_of_its_configuration_is_refused():
    with pytest.raises(ConfigError, match=r"model\.peft_config"):
        suggest_learning_rate(nn.Linear(2, 2))


def test_a_loaded_adapter_still_tells_its_share(tmp_path):
    model, _, _ = _selected(score="fisher", density=0.2)
    model.save_pretrained(tmp_path)
    found = ChildTuningConfig.from_pretrained(tmp_path)
    assert suggest_learning_rate(found) == suggest_learning_rate(model.peft_config["default"])
