"""Scores that users register: from the function to the child, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from peft_childtune import (
    ChildTuningConfig,
    ConfigError,
    ScoreError,
    SelectionError,
    get_child_network,
    register_score,
    select_child_network,
)
from peft_childtune.scores import registry


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


def _base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def _config(score, **options):
    return ChildTuningConfig(target_modules=["0", "2"], score=score, density=0.2, **options)


def _loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 6, generator=generator), torch.randint(2, (4,), generator=generator)) for _ in range(3)]


def test_a_score_without_data_chooses_the_child_when_the_model_is_wrapped():
    register_score("small", lambda i: {n: -w.detach().abs() for n, w in i.parameters.items()}, needs_data=False)
    base = _base()
    smallest = torch.cat([p.detach().abs().flatten() for p in base.parameters()]).sort().values[:8]
    child = get_child_network(get_peft_model(base, _config("small")))
    kept = torch.cat([base.get_parameter(name).flatten()[at] for name, at in _in(base, child)])
    torch.testing.assert_close(kept.abs().sort().values, smallest)


def _in(base, child):
    for name, at in child.indices.items():
        place, _, parameter = name.partition(".")
        yield f"{place}.base_layer.{parameter}", at


def test_a_score_of_data_waits_for_it_and_can_build_on_a_built_in_one():
    register_score("twice", lambda inputs: {n: 2 * s for n, s in inputs.compute("fisher").scores.items()})
    model, fisher = get_peft_model(_base(), _config("twice")), get_peft_model(_base(), _config("fisher"))
    with pytest.raises(SelectionError, match="select_child_network"):
        model(torch.ones(1, 6))
    with pytest.raises(SelectionError, match=r"looks at data.*dataloader"):
        select_child_network(model)
    chosen = select_child_network(model, _batches(), loss_fn=_loss, show_progress=False)
    assert chosen == select_child_network(fisher, _batches(), loss_fn=_loss, show_progress=False)


def test_a_score_sees_the_base_in_eval_mode_and_leaves_flags_and_random_state_alone():
    seen = {}

    def score(inputs):
        seen["training"] = any(module.training for module in inputs.model.modules())
        seen["names"] = list(inputs.parameters)
        for weight in inputs.parameters.values():
            weight.requires_grad = True
        inputs.model.train()
        return {name: torch.rand(weight.shape) for name, weight in inputs.parameters.items()}

    register_score("careless", score)
    model = get_peft_model(_base(), _config("careless")).eval()
    state = torch.get_rng_state()
    select_child_network(model, _batches(), show_progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == {"training": False, "names": ["0.weight", "0.bias", "2.weight", "2.bias"]}
    assert not any(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad and "child_tuning" not in n] == []


def test_an_adapter_loads_where_its_score_is_not_registered(tmp_path, monkeypatch):
    register_score("small", lambda i: {n: -w.detach().abs() for n, w in i.parameters.items()}, needs_data=False)
    model = get_peft_model(_base(), _config("small", init_weights=False))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    loaded = PeftModel.from_pretrained(_base(), tmp_path)
    assert get_child_network(loaded) == get_child_network(model)
    x = torch.ones(2, 6)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_a_name_that_nobody_has_registered_is_refused_with_the_ones_there_are():
    with pytest.raises(ConfigError, match=r"score='mine' is not one of 'fisher'.*register_score"):
        _config("mine")


@pytest.mark.parametrize("name", ["fisher", "random", "movement", "", 3, " mine ", "a\nb", "x" * 129])
def test_a_name_that_is_built_in_or_none_cannot_be_registered(name):
    with pytest.raises(ConfigError):
        register_score(name, lambda inputs: {})


def test_a_name_is_replaced_only_on_demand():
    register_score("mine", lambda inputs: {})
    with pytest.raises(ConfigError, match="replace=True"):
        register_score("mine", lambda inputs: {})
    register_score("mine", lambda inputs: {}, replace=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: list(scores.values()), "list"),
        (lambda scores: scores | {"0.weight": scores["0.weight"][:1]}, r"0\.weight.*\(1, 6\) for \(4, 6\)"),
        (lambda scores: scores | {"0.weight": scores["0.weight"].long()}, r"0\.weight.*int64"),
        (lambda scores: scores | {"0.weight": scores["0.weight"] * float("nan")}, r"0\.weight.*NaN"),
        (lambda scores: scores | {"0.weight": scores["0.weight"] / 0}, r"0\.weight.*\+inf"),
        (lambda scores: scores | {"0.weight": scores["0.weight"].to_sparse()}, r"0\.weight.*sparse"),
        (lambda scores: scores | {"9.weight": scores["0.weight"]}, r"9\.weight.*no covered parameter"),
        (lambda scores: {"0.weight": scores["0.weight"]}, r"0\.bias.*no scores"),
    ],
    ids=["no dict", "shape", "dtype", "nan", "inf", "sparse", "too many", "too few"],
)
def test_what_a_score_returns_is_checked_before_anything_is_chosen(change, message):
    register_score("wrong", lambda i: change({n: torch.ones(w.shape) for n, w in i.parameters.items()}))
    model = get_peft_model(_base(), _config("wrong"))
    with pytest.raises(ScoreError, match=message):
        select_child_network(model, _batches(), show_progress=False)
    with pytest.raises(SelectionError):
        get_child_network(model)


def test_a_score_declared_without_data_is_told_so_when_it_asks_for_some():
    register_score("sly", lambda inputs: inputs.compute("fisher").scores, needs_data=False)
    with pytest.raises(ScoreError, match="needs_data=True"):
        get_peft_model(_base(), _config("sly"))


@pytest.mark.parametrize("score", ["random", "nobody"])
def test_what_cannot_be_built_upon_is_said(score):
    register_score("on", lambda inputs: inputs.compute(score).scores)
    with pytest.raises(ScoreError, match="only fisher, fisher_batch, gradient, movement and magnitude"):
        select_child_network(get_peft_model(_base(), _config("on")), _batches(), show_progress=False)


@pytest.mark.parametrize("options", [{"epochs": 2}, {"learning_rate": 1e-3}], ids=str)
@pytest.mark.parametrize("score", ["fisher", "magnitude"])
def test_options_of_movement_are_refused_for_other_scores(score, options):
    register_score("trains", lambda inputs: inputs.compute(score, **options).scores)
    with pytest.raises(ScoreError, match=f"{score}' takes no {next(iter(options))}; only 'movement' trains"):
        select_child_network(get_peft_model(_base(), _config("trains")), _batches(), show_progress=False)


def test_gradients_and_buffers_are_put_back_for_a_score():
    def score(inputs):
        for weight in inputs.parameters.values():
            weight.requires_grad = True
        inputs.model.train()
        _loss(inputs.model, _batches()[0]).backward()
        return {name: weight.grad.abs() for name, weight in inputs.parameters.items()}

    register_score("grads", score)
    base = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = [buffer.clone() for buffer in base[1].buffers()]
    model = get_peft_model(base, _config("grads"))
    select_child_network(model, _batches(), show_progress=False)
    assert all(p.grad is None for p in model.parameters())
    assert all(map(torch.equal, base[1].buffers(), before))


@pytest.mark.parametrize("score", ["movement", "magnitude", "plain"])
def test_scores_are_of_the_base_where_another_adapter_is_merged_and_it_stays_merged(score):
    register_score("plain", lambda i: {n: w.detach().abs() for n, w in i.parameters.items()}, needs_data=False)

    def chosen(*, merged):
        model = get_peft_model(_base(), _config("random", init_weights=False))
        model.add_adapter("b", _config(score))
        if merged:
            model.base_model.merge_adapter(["default"])
        before = [p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name]
        torch.manual_seed(3)  # of the dropout in the short training
        data = _batches() if score == "movement" else None
        child = select_child_network(model, data, adapter_name="b", loss_fn=_loss, show_progress=False)
        after = [p for name, p in model.named_parameters() if "base_layer" in name]
        assert all(map(torch.equal, after, before))
        return model, child

    (model, child), (_, expected) = chosen(merged=True), chosen(merged=False)
    assert child == expected
    assert model.base_model.model[0].merged_adapters == ["default"]
    model.unmerge_adapter()
    restored = [p for name, p in model.named_parameters() if "base_layer" in name]
    assert all(map(torch.equal, restored, _base().parameters()))


def test_the_head_of_the_adapter_that_is_chosen_for_counts_whichever_is_active():
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"body": nn.Linear(6, 4), "head": nn.Linear(4, 2)})

    def loss(model, batch):
        inner = model.base_model.model if hasattr(model, "base_model") else model
        return F.cross_entropy(inner["head"](inner["body"](batch[0])), batch[1])

    options = {"target_modules": ["body"], "modules_to_save": ["head"], "density": 0.3}
    children = []
    for active in ("default", "b"):
        model = get_peft_model(base(), ChildTuningConfig(score="random", **options))
        model.add_adapter("b", ChildTuningConfig(score="fisher", **options))
        with torch.no_grad():
            model.base_model.model["head"].modules_to_save["default"].weight.normal_()
        model.set_adapter(active)
        children.append(select_child_network(model, _batches(), adapter_name="b", loss_fn=loss, show_progress=False))
        assert model.base_model.model["head"].active_adapters == [active]
    assert children[0] == children[1]


def test_a_loaded_adapter_of_an_unknown_score_says_how_another_child_gets_in(tmp_path, monkeypatch):
    register_score("small", lambda i: {n: -w.detach().abs() for n, w in i.parameters.items()}, needs_data=False)
    get_peft_model(_base(), _config("small")).save_pretrained(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    loaded = PeftModel.from_pretrained(_base(), tmp_path)
    with pytest.raises(ConfigError, match="'small' is not registered here.*network="):
        select_child_network(loaded, _batches(), loss_fn=_loss)


def test_a_score_that_fails_leaves_the_model_as_it_was():
    def broken(inputs):
        inputs.model.train()
        raise RuntimeError("no")

    register_score("broken", broken)
    model = get_peft_model(_base(), _config("broken")).eval()
    with pytest.raises(RuntimeError, match="no"):
        select_child_network(model, _batches(), show_progress=False)
    assert not model.training and not model.base_model.model[1].training
