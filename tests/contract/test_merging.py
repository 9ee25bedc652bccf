"""Merged and unmerged models answer the same bits, and the base comes back bit for bit."""

from __future__ import annotations

import copy
import pickle

import accelerate
import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_childtune import ChildTuningConfig, select_child_network
from peft_childtune.weights import merge_
from tests.contract.families import FAMILIES, add_noise, base_state, differing, output, same_bits, snapshot, wrap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def in_dtype(batch, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


def changed_base(model, before):
    now = base_state(model)
    assert set(now) == set(before)
    return [name for name in before if not same_bits(before[name], now[name])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_merged_and_unmerged_outputs_are_the_same_bits(name, dtype):
    family = FAMILIES[name]
    base = family.build().to(dtype)
    batch = in_dtype(family.batch(), dtype)
    plain = output(base, batch)
    model = add_noise(wrap(base, family, score="magnitude", density=0.3))
    unmerged = output(model, batch)
    assert unmerged.isfinite().all()
    assert not same_bits(unmerged, plain)

    model.merge_adapter()
    merged = output(model, batch)
    model.unmerge_adapter()
    again = output(model, batch)
    unloaded = model.merge_and_unload()

    assert same_bits(unmerged, merged)
    assert same_bits(unmerged, again)
    assert same_bits(unmerged, output(unloaded, batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_unmerge_restores_the_base_bit_for_bit_after_any_number_of_cycles(name, dtype):
    family = FAMILIES[name]
    base = family.build().to(dtype)
    before = snapshot(base)
    model = add_noise(wrap(base, family, score="random", density=0.3), scale=3.0)
    for cycle in range(1, 51):
        model.merge_adapter()
        assert cycle > 1 or changed_base(model, before)
        model.unmerge_adapter()
        if cycle in (1, 5, 50):
            assert changed_base(model, before) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]], ids="-".join)
def test_two_adapters_merge_in_both_orders_as_the_base_composes_them_and_unmerge_exactly(order, dtype):
    family = FAMILIES["gpt2"]
    base = family.build().to(dtype)
    before = snapshot(base)
    model = wrap(base, family, adapter_name="one", score="random", density=0.4, seed=1)
    model.add_adapter("two", ChildTuningConfig(task_type="CAUSAL_LM", score="magnitude", density=0.4))
    add_noise(model, "one", seed=3), add_noise(model, "two", seed=4)
    batch = family.batch()
    layer = model.base_model.model.transformer.h[0].mlp.c_proj
    expected = before[family.weight].clone()
    for adapter in order:
        expected = (expected.float() + layer.get_delta_weight(adapter)).to(dtype)

    model.merge_adapter(order)
    assert same_bits(layer.base_layer.weight, expected)
    merged = output(model, batch)
    model.unmerge_adapter()

    assert changed_base(model, before) == []
    model.base_model.set_adapter(order)
    assert same_bits(output(model, batch), merged)


def with_a_broken_last_delta(name, value):
    """Return a model of which only the last delta is not finite: all other layers merge before it is found."""
    family = FAMILIES[name]
    base = family.build()
    before = snapshot(base)
    model = add_noise(wrap(base, family, score="magnitude"))
    with torch.no_grad():
        [p for n, p in model.named_parameters() if ".child_tuning_values." in n][-1][-1] = value
    return model, before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_safe_merge_refuses_a_delta_that_is_not_finite_and_leaves_the_base_as_it_was(name, value):
    model, before = with_a_broken_last_delta(name, value)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert changed_base(model, before) == []


def test_safe_merge_and_unload_of_a_delta_that_is_not_finite_leaves_the_wrapped_model_as_it_was():
    model, before = with_a_broken_last_delta("bert", float("nan"))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert [type(module) for module in model.modules()] == kinds
    assert changed_base(model, before) == []


def test_a_delta_beyond_the_range_of_a_float16_base_is_refused_by_safe_merge():
    family = FAMILIES["llama"]
    model = wrap(family.build().half(), family, score="magnitude")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".child_tuning_values." in n)[0] = 1e5  # finite in float32 only
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_safe_merge_of_a_sound_delta_equals_merge(name):
    family = FAMILIES[name]
    model = add_noise(wrap(family.build(), family, score="magnitude"))
    safe = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    assert differing(model.merge_and_unload(), snapshot(safe)) == []


@pytest.mark.parametrize("name", list(FAMILIES))
def test_disable_adapter_answers_as_the_base_does_bit_for_bit(name):
    family = FAMILIES[name]
    batch = family.batch()
    base = family.build()
    expected = output(base, batch)
    model = add_noise(wrap(base, family, score="magnitude"))
    tuned = output(model, batch)
    with model.disable_adapter():
        assert same_bits(output(model, batch), expected)
    assert same_bits(output(model, batch), tuned)
    assert not same_bits(tuned, expected)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_new_adapter_changes_no_bit_of_the_output(name):
    family = FAMILIES[name]
    batch = family.batch()
    base = family.build()
    expected = output(base, batch)
    assert same_bits(output(wrap(base, family), batch), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_low_precision_base_keeps_float32_deltas_that_still_move_when_updates_are_tiny(dtype):
    family = FAMILIES["llama"]
    model = wrap(family.build().to(dtype), family, score="magnitude")
    deltas = [p for n, p in model.named_parameters() if ".child_tuning_values." in n]
    assert {p.dtype for p in deltas} == {torch.float32}
    optimizer = torch.optim.SGD(deltas, lr=1e-6)
    model.train()
    for seed in range(3):
        model(**family.batch(seed)).loss.backward()
        optimizer.step()
    assert any(bool(p.detach().any()) for p in deltas)


def test_selecting_while_merged_is_refused():
    family = FAMILIES["bert"]
    model = wrap(family.build(), family)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge"):
        select_child_network(model, family.batches(), show_progress=False)


def test_a_convolution_in_channels_last_is_merged_and_restored_too():
    base = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    before = base[0].weight.clone()
    model = add_noise(get_peft_model(base, ChildTuningConfig(target_modules=["0"], score="random", density=0.5)))
    weight = model.base_model.model[0].base_parameter("weight")
    delta = model.base_model.model[0].get_delta_weight("default")
    model.merge_adapter()
    assert not weight.is_contiguous()
    assert same_bits(weight, before + delta)
    model.unmerge_adapter()
    assert same_bits(weight, before)


def test_a_merge_that_fails_half_way_leaves_the_base_as_it_was(monkeypatch):
    family = FAMILIES["bert"]
    base = family.build()
    before = snapshot(base)
    model = add_noise(wrap(base, family, score="random", density=0.3))
    writes = iter(range(10))

    def failing(*args, **options):
        if next(writes) == 5:  # in the middle of a layer: one write for each weight and bias
            raise MemoryError
        return merge_(*args, **options)

    monkeypatch.setattr("peft_childtune.tuner.layer.merge_", failing)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert changed_base(model, before) == []


def test_a_restored_base_does_not_depend_on_the_child_that_is_held_by_then():
    family = FAMILIES["bert"]
    base = family.build()
    before = snapshot(base)
    model = add_noise(wrap(base, family, score="random", density=0.3))
    model.merge_adapter()
    for buffer in model.buffers():
        if buffer.dtype == torch.uint8:
            buffer.zero_()
    model.unmerge_adapter()
    assert changed_base(model, before) == []


def test_a_model_that_was_cast_while_merged_is_restored_to_its_cast_base():
    family = FAMILIES["bert"]
    base = family.build()
    expected = copy.deepcopy(base).bfloat16()
    model = add_noise(wrap(base, family, score="random", density=0.3))
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert changed_base(model, snapshot(expected)) == []


def test_a_restoration_that_fails_can_be_tried_again(monkeypatch):
    family = FAMILIES["bert"]
    base = family.build()
    before = snapshot(base)
    model = add_noise(wrap(base, family, score="random", density=0.3))
    model.merge_adapter()
    with monkeypatch.context() as patch:
        patch.setattr("peft_childtune.tuner.layer.restore_", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            model.unmerge_adapter()
    model.unmerge_adapter()
    assert changed_base(model, before) == []


@pytest.mark.parametrize("way", ["unmerge", "disable", "unload"])
def test_offloaded_weights_are_merged_and_restored_where_they_are(way):
    family = FAMILIES["bert"]
    base = family.build()
    batch = family.batch()
    plain = output(base, batch)
    model = add_noise(wrap(base, family, score="random", density=0.3))
    merged = output(model, batch)
    accelerate.cpu_offload(model, execution_device="cpu")
    if way == "unload":
        assert same_bits(output(model.merge_and_unload(safe_merge=True), batch), merged)
        return
    model.merge_adapter()
    assert same_bits(output(model, batch), merged)
    if way == "unmerge":
        model.unmerge_adapter()
    with model.disable_adapter():
        assert same_bits(output(model, batch), plain)


def test_a_merged_resampled_child_keeps_the_weights_it_replaced_and_no_positions():
    base = nn.Sequential(nn.Linear(6, 4))
    before = base[0].weight.clone()
    config = ChildTuningConfig(target_modules=["0"], mode="task_free", resample=True, density=0.5)
    model = add_noise(get_peft_model(base, config))
    layer = model.base_model.model[0]
    model.merge_adapter()
    assert all(replaced.indices is None for _, replaced in layer._replaced["default"])
    assert same_bits(layer.base_parameter("weight"), before + layer.get_delta_weight("default"))
    model.unmerge_adapter()
    assert same_bits(layer.base_parameter("weight"), before)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_merged_model_can_be_unmerged(copied):
    family = FAMILIES["bert"]
    base = family.build()
    before = snapshot(base)
    model = add_noise(wrap(base, family, score="magnitude", density=0.3))
    model.merge_adapter()
    other = copied(model)
    assert changed_base(other, before)
    other.unmerge_adapter()
    assert changed_base(other, before) == []
    assert changed_base(model, before)
