"""Several adapters on one model, and what is left when they go: as with PEFT's own methods."""

from __future__ import annotations

import copy

import pytest
from peft import (
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.save_and_load import get_base_model_state_dict

from peft_childtune import (
    TargetError,
    get_child_network,
    get_deltas,
)
from tests.contract.families import (
    FAMILIES,
    add_noise,
    base_state,
    config_of,
    differing,
    output,
    same_bits,
    snapshot,
    train,
    with_two_adapters,
    wrap,
)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_set_adapter_switches_between_children_as_between_two_models(name):
    family = FAMILIES[name]
    model = with_two_adapters(name)
    batch = family.batch()
    answers = {}
    for adapter, options in (("one", {"score": "magnitude"}), ("two", {"score": "random", "seed": 1})):
        alone = wrap(family.build(), family, adapter_name=adapter, **options)
        set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name=adapter), adapter_name=adapter)
        answers[adapter] = output(alone, batch)
    assert not same_bits(answers["one"], answers["two"])
    for adapter in ("one", "two", "one"):
        model.set_adapter(adapter)
        assert model.active_adapters == [adapter]
        assert same_bits(output(model, batch), answers[adapter])


def test_only_the_active_adapter_is_trained():
    family = FAMILIES["bert"]
    model = with_two_adapters("bert")
    model.set_adapter("two")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, family.batches(), steps=2)
    changed = {name for name, p in model.named_parameters() if not same_bits(before[name], p)}
    assert changed and all(".two." in name for name in changed)


def test_two_adapters_have_children_of_their_own():
    model = with_two_adapters("gpt2", density=0.05)
    one, two = get_child_network(model, "one"), get_child_network(model, "two")
    assert one.shapes == two.shapes
    assert one.nnz > 3 * two.nnz


@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize(("deleted", "left"), [("one", "two"), ("two", "one")])
def test_deleting_an_adapter_leaves_the_other_one_working(name, deleted, left):
    family = FAMILIES[name]
    model = with_two_adapters(name)
    batch = family.batch()
    model.set_adapter(left)
    expected = output(model, batch)
    model.set_adapter("one")
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [left]
    model.set_adapter(left)
    assert same_bits(output(model, batch), expected)
    assert not any(f".{deleted}." in key for key in model.state_dict())


def test_deleting_the_active_adapter_activates_the_other_one():
    model = with_two_adapters("gpt2")
    batch = FAMILIES["gpt2"].batch()
    model.set_adapter("two")
    expected = output(model, batch)
    model.set_adapter("one")
    with pytest.warns(UserWarning, match="Setting active adapter"):
        model.delete_adapter("one")
    assert model.active_adapters == ["two"]
    assert same_bits(output(model, batch), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_deleting_the_last_adapter_leaves_the_base(name):
    family = FAMILIES[name]
    base = family.build()
    expected = output(base, family.batch())
    model = add_noise(wrap(base, family))
    model.delete_adapter("default")
    assert model.peft_config == {}
    assert same_bits(output(model.base_model.model, family.batch()), expected)


def test_deleting_a_merged_adapter_does_not_lose_the_base():
    family = FAMILIES["gpt2"]
    base = family.build()
    before = snapshot(base)
    model = add_noise(wrap(base, family))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert [name for name, tensor in base_state(model).items() if not same_bits(before[name], tensor)] == []


def test_an_adapter_that_is_added_over_other_targets_changes_those_only():
    family = FAMILIES["llama"]
    model = wrap(family.build(), family, adapter_name="one", score="magnitude", target_modules=["q_proj"])
    before = snapshot(family.build())
    model.add_adapter("two", config_of(family, target_modules=["down_proj"]))
    add_noise(model, "two")
    model.set_adapter("two")
    merged = model.merge_and_unload().state_dict()
    assert {name.split(".")[-2] for name in before if not same_bits(before[name], merged[name])} == {"down_proj"}


def test_an_adapter_that_cannot_be_added_leaves_the_first_as_it_was():
    family = FAMILIES["bert"]
    model = add_noise(wrap(family.build(), family))
    before, answer = snapshot(model), output(model, family.batch())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TargetError):
        model.add_adapter("two", config_of(family, target_modules=["query", "nowhere"]))
    assert list(model.peft_config) == ["default"]
    assert differing(model, before) == []
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert same_bits(output(model, family.batch()), answer)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_unload_gives_the_base_back_in_its_own_classes_and_bits(name):
    family = FAMILIES[name]
    base = family.build()
    before, kinds = snapshot(base), [type(module) for module in base.modules()]
    unloaded = add_noise(wrap(base, family)).unload()
    trained_whole = [name for name in before if name.startswith(family.heads)]  # PEFT leaves these in place
    assert differing(unloaded, before) == trained_whole
    assert [type(module) for module in unloaded.modules()] == kinds


@pytest.mark.parametrize("name", list(FAMILIES))
def test_merge_and_unload_gives_the_classes_of_the_base_and_the_sum_of_base_and_delta(name):
    family = FAMILIES[name]
    base = family.build()
    before, kinds = snapshot(base), [type(module) for module in base.modules()]
    model = add_noise(wrap(base, family))
    deltas = get_deltas(model)
    merged = model.merge_and_unload()
    assert [type(module) for module in merged.modules()] == kinds
    now = merged.state_dict()
    for key, delta in deltas.items():
        assert same_bits(now[key], before[key] + delta.to_dense()), key


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_get_base_model_state_dict_is_that_of_the_base(name):
    family = FAMILIES[name]
    base = family.build()
    before = snapshot(base)
    found = get_base_model_state_dict(add_noise(wrap(base, family)))
    assert set(found) == set(before)
    assert all(same_bits(found[key], before[key]) for key in before)


def test_injection_without_a_peft_model_trains_and_round_trips_through_its_state_dict():
    family = FAMILIES["llama"]
    config = config_of(family, task_type=None)
    model = inject_adapter_in_model(config, family.build())
    train(model, family.batches(), steps=2)
    tensors = get_peft_model_state_dict(model)
    twin = inject_adapter_in_model(copy.deepcopy(config), family.build())
    set_peft_model_state_dict(twin, tensors)
    assert same_bits(output(twin, family.batch()), output(model, family.batch()))
    assert not same_bits(output(model, family.batch()), output(family.build(), family.batch()))


def test_a_config_can_be_used_for_several_models():
    family = FAMILIES["bert"]
    config = config_of(family)
    first, second = get_peft_model(family.build(), config), get_peft_model(family.build(), config)
    assert get_child_network(first) == get_child_network(second)


def test_model_status_knows_the_method():
    model = with_two_adapters("gpt2")
    status = model.get_model_status()
    assert status.peft_types == {"one": "CHILD_TUNING", "two": "CHILD_TUNING"}
    assert status.active_adapters == ["one"]
    assert status.merged_adapters == []
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["one"]


def test_trainable_parameters_are_counted_as_the_kept_entries():
    family = FAMILIES["gpt2"]
    model = wrap(family.build(), family)
    assert model.get_nb_trainable_parameters()[0] == get_child_network(model).nnz
