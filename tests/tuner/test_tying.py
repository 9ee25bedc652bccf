"""Tied weights: one storage has one child, whichever of the modules that share it is called."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

from peft_childtune import ChildTuningConfig, TargetError, get_child_network, get_deltas
from peft_childtune.tuner import ChildTuningLayer


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.fc(self.embed(ids))))


class _Shared(nn.Module):
    """One block in two places of the tree, called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.ModuleDict({"same": self.first})

    def forward(self, x):
        return self.again["same"](torch.tanh(self.first(x)))


_IDS = torch.tensor([[0, 3, 6], [3, 3, 1]])
_X = torch.linspace(-1, 1, 8).view(2, 4)


def _make(kind):
    torch.manual_seed(0)
    return kind()


def _wrapped(base, targets, **options):
    options = {"score": "random", "density": 0.5, "init_weights": False} | options
    return get_peft_model(base, ChildTuningConfig(target_modules=targets, **options))


def _dense(kind, deltas):
    """A copy of the base with the deltas in its weights, still tied."""
    out = _make(kind)
    named = dict(out.named_parameters(remove_duplicate=False))
    for name, delta in deltas.items():
        with torch.no_grad():
            named[name].view(-1)[delta.indices] += delta.values
    return out


_CASES = [
    (_Tied, ["embed"], _IDS),
    (_Tied, ["head"], _IDS),
    (_Tied, ["embed", "head", "fc"], _IDS),
    (_Shared, ["first"], _X),
]


@pytest.mark.parametrize(("kind", "targets", "inputs"), _CASES)
def test_all_uses_see_one_delta_and_merging_changes_no_bit(kind, targets, inputs):
    model = _wrapped(_make(kind), targets).eval()
    reference = _dense(kind, get_deltas(model))
    out = model(inputs)
    assert torch.equal(out, reference(inputs))
    assert not torch.equal(out, _make(kind)(inputs))
    model.merge_adapter()
    assert torch.equal(model(inputs), out)
    model.unmerge_adapter()
    assert torch.equal(model(inputs), out)
    with model.disable_adapter():
        assert torch.equal(model(inputs), _make(kind)(inputs))


@pytest.mark.parametrize(("kind", "targets", "inputs"), _CASES)
def test_the_gradient_is_the_sum_over_all_uses(kind, targets, inputs):
    model = _wrapped(_make(kind), targets).train()
    deltas = get_deltas(model)
    reference = _dense(kind, deltas)
    reference(inputs).square().sum().backward()
    model(inputs).square().sum().backward()
    named = dict(reference.named_parameters(remove_duplicate=False))
    layers = {m._module_name: m for m in model.modules() if isinstance(m, ChildTuningLayer)}
    for name, delta in deltas.items():
        module, _, parameter = name.rpartition(".")
        if delta.nnz:
            found = layers[module].child_tuning_values["default"].get(parameter).grad
            expected = named[name].grad.view(-1)[delta.indices]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32, another order of summation


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"]])
def test_a_tied_weight_has_one_entry_under_the_name_of_a_target(targets):
    child = get_child_network(_wrapped(_make(_Tied), targets))
    tied = [name for name, shape in child.shapes.items() if shape == (7, 4)]
    assert len(tied) == 1
    assert tied[0].removesuffix(".weight") in targets


def test_a_shared_module_is_wrapped_once_in_all_its_places():
    model = _wrapped(_make(_Shared), ["first"])
    base = model.get_base_model()
    assert base.first is base.again["same"]
    assert isinstance(base.first, ChildTuningLayer)
    assert list(get_child_network(model).shapes) == ["first.weight", "first.bias"]


@pytest.mark.parametrize(("kind", "targets", "inputs"), _CASES)
@pytest.mark.parametrize("merge", [False, True])
def test_unloading_puts_every_module_back_and_keeps_the_tie(kind, targets, inputs, merge):
    base = _make(kind)
    classes = [type(m) for m in base.modules()]
    model = _wrapped(base, targets).eval()
    out = model(inputs)
    unloaded = model.merge_and_unload() if merge else model.unload()
    assert [type(m) for m in unloaded.modules()] == classes
    assert torch.equal(unloaded(inputs), out if merge else _make(kind)(inputs))
    if kind is _Tied:
        assert unloaded.head.weight is unloaded.embed.weight
    else:
        assert unloaded.first is unloaded.again["same"]


@pytest.mark.parametrize(("kind", "targets", "inputs"), _CASES)
def test_a_tied_adapter_is_saved_and_loaded(kind, targets, inputs, tmp_path):
    model = _wrapped(_make(kind), targets).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_make(kind), tmp_path)
    assert torch.equal(loaded(inputs), model(inputs))


def test_a_second_adapter_on_the_other_end_of_the_tie_shares_the_storage_too():
    model = _wrapped(_make(_Tied), ["embed"]).eval()
    model.add_adapter(
        "other", ChildTuningConfig(target_modules=["head"], score="random", density=0.5, seed=1, init_weights=False)
    )
    model.set_adapter("other")
    out = model(_IDS)
    deltas = get_deltas(model, "other")
    assert torch.equal(out, _dense(_Tied, deltas)(_IDS))
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(merged(_IDS), out)


def test_deleting_the_adapter_gives_the_base_back():
    model = _wrapped(_make(_Tied), ["embed"]).eval()
    model.add_adapter("other", ChildTuningConfig(target_modules=["embed"], score="random", density=0.5))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(model(_IDS), _make(_Tied)(_IDS))


def test_a_copy_is_tied_within_itself():
    model = _wrapped(_make(_Tied), ["embed"]).eval()
    copied = copy.deepcopy(model)
    out = model(_IDS)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert torch.equal(model(_IDS), out)
    assert torch.equal(copied(_IDS), _dense(_Tied, get_deltas(copied))(_IDS))


def test_a_module_that_shares_a_covered_weight_and_cannot_be_wrapped_is_refused_by_name(bits):
    class Awkward(_Tied):
        def __init__(self):
            super().__init__()
            self.other = nn.Embedding(7, 4, max_norm=1.0)
            self.other.weight = self.embed.weight

    base = _make(Awkward)
    before = bits(base)
    with pytest.raises(TargetError, match=r"^other: shares `weight` with embed\.weight, but .*max_norm"):
        _wrapped(base, ["embed"])
    assert bits(base) == before
    assert not [m for m in base.modules() if isinstance(m, ChildTuningLayer)]


def test_a_parametrised_module_next_to_a_tie_does_not_disturb_it():
    class Beside(_Tied):
        def __init__(self):
            super().__init__()
            self.extra = parametrizations.weight_norm(nn.Linear(7, 7))

        def forward(self, ids):
            return self.extra(super().forward(ids))

    model = _wrapped(_make(Beside), ["embed"]).eval()
    out = model(_IDS)
    model.merge_adapter()
    assert torch.equal(model(_IDS), out)


def test_a_language_model_with_tied_embeddings_works_from_either_end(family):
    ids = torch.tensor([[1, 5, 9, 2]])
    for targets in (["wte"], ["lm_head"], ["wte", "lm_head"]):
        model = get_peft_model(
            family("gpt2"),
            ChildTuningConfig(target_modules=targets, score="random", density=0.2, init_weights=False),
        ).eval()
        assert list(get_child_network(model).shapes.values()) == [(40, 16)]
        out = model(input_ids=ids).logits
        assert torch.equal(model.merge_and_unload()(input_ids=ids).logits, out)
