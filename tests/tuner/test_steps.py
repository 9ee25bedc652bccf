"""The step counter of Child-Tuning-F: one new gradient mask for each optimizer step, and never another."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

from peft_childtune import ChildTuningConfig, get_deltas
from peft_childtune.codec import read_step
from peft_childtune.sparse import bernoulli_mask
from peft_childtune.tuner import ChildTuningLayer

_DENSITY, _SEED = 0.5, 7


def _resampled(base, **options):
    config = ChildTuningConfig(mode="task_free", resample=True, density=_DENSITY, seed=_SEED, **options)
    return get_peft_model(base, config).train()


def _layers(model):
    return {m._module_name: m for m in model.modules() if isinstance(m, ChildTuningLayer)}


def _steps(model, adapter="default"):
    """The counter of every covered tensor, in the model's order."""
    return [
        read_step(layer.child_tuning_code[adapter].get(name))
        for layer in _layers(model).values()
        for name in layer.covered
    ]


def _values(model, adapter="default"):
    return [
        layer.child_tuning_values[adapter].get(name) for layer in _layers(model).values() for name in layer.covered
    ]


def _sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def _backward(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return [p.grad.clone() for p in _values(model)]


def _masks(gradients):
    return [g != 0 for g in gradients]


def _expected(model, step):
    """The mask that the method promises for each tensor: its number is its stream."""
    return [
        bernoulli_mask(p.numel(), _DENSITY, seed=_SEED, stream=stream, step=step)
        for stream, p in enumerate(_values(model))
    ]


def _equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_delta_is_dense_and_the_mask_that_of_the_step(toy, batches):
    model = _resampled(toy())
    assert [p.numel() for p in _values(model)] == [36, 6, 6, 6] * 2
    optimizer = _sgd(model)
    for step in range(4):
        assert _steps(model) == [step] * 8
        assert _equal(_masks(_backward(model, batches[0])), _expected(model, step))
        optimizer.step()
    assert len({tuple(m[0].tolist()) for m in (_expected(model, s) for s in range(4))}) == 4


def test_kept_gradients_are_those_of_the_dense_model_over_the_density(toy, batches):
    dense = toy()
    dense(**batches[0]).loss.backward()
    model = _resampled(toy())
    found = _backward(model, batches[0])
    names = [layer.full_name(name) for layer in _layers(model).values() for name in layer.covered]
    gradients = dict(dense.named_parameters())
    for name, gradient, mask in zip(names, found, _expected(model, 0), strict=True):
        expected = gradients[name].grad.view(-1) * mask / _DENSITY
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)  # float32, another order of summation


def test_accumulated_micro_batches_share_one_mask(toy, batches):
    model = _resampled(toy())
    masks = [_masks(_backward(model, batch)) for batch in batches]
    assert _equal(masks[0], masks[1])
    assert _equal(masks[0], masks[2])
    _sgd(model).step()
    assert not _equal(masks[0], _masks(_backward(model, batches[0])))


def test_looking_at_the_model_takes_no_step(toy, batches):
    model = _resampled(toy())
    with torch.no_grad():
        model(**batches[0])
    model.eval()(**batches[0])
    _backward(model.train(), batches[0])
    get_deltas(model)
    assert _steps(model) == [0] * 8


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_sees_the_same_mask(toy, batches, use_reentrant):
    plain, checkpointed = _resampled(toy()), _resampled(toy())
    base = checkpointed.get_base_model()
    for block in base.layers:
        inner = block.forward
        block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=use_reentrant)
    base.embed.register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    optimizers = _sgd(plain), _sgd(checkpointed)
    for batch in batches:
        assert _equal(_backward(plain, batch), _backward(checkpointed, batch))
        for optimizer in optimizers:
            optimizer.step()
    assert _steps(checkpointed) == [3] * 8


def test_training_resumed_from_a_file_takes_the_same_path_as_one_without_a_break(toy, batches, tmp_path):
    def train(model, some):
        optimizer = _sgd(model)
        for batch in some:
            _backward(model, batch)
            optimizer.step()
        return model

    whole = train(_resampled(toy()), batches + batches[:2])
    first = train(_resampled(toy()), batches)
    first.save_pretrained(tmp_path)
    resumed = PeftModel.from_pretrained(toy(), tmp_path, is_trainable=True).train()
    assert _steps(resumed) == [3] * 8
    train(resumed, batches[:2])
    assert _steps(resumed) == _steps(whole) == [5] * 8
    assert _equal(_values(resumed), _values(whole))
    again = train(_resampled(toy()), batches[:1])  # and into a model that lives already, as a Trainer resumes
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert _steps(again) == [3] * 8
    train(again.train(), batches[:2])
    assert _equal(_values(again), _values(whole))


def test_a_state_dict_brings_the_counter_along(toy, batches):
    one, other = _resampled(toy()), _resampled(toy())
    optimizer = _sgd(one)
    for batch in batches:
        _backward(one, batch)
        optimizer.step()
    _backward(other, batches[0])
    other.load_state_dict(one.state_dict())
    assert _steps(other) == [3] * 8
    assert _equal(_masks(_backward(other, batches[0])), _expected(other, 3))


def _fused(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)


@pytest.mark.parametrize("make", [_sgd, _fused], ids=["skipped by the scaler", "skipped inside a fused optimizer"])
def test_a_step_that_was_skipped_for_an_overflow_does_not_count(toy, batches, make):
    model = _resampled(toy())
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow, expected in [(True, 0), (False, 1), (True, 1), (True, 1), (False, 2)]:
        optimizer.zero_grad()
        scaler.scale(model(**batches[0]).loss).backward()
        if overflow:
            _values(model)[0].grad[0] = float("inf")
        before = [p.detach().clone() for p in _values(model)]
        scaler.step(optimizer)
        scaler.update()
        assert _equal(before, _values(model)) is overflow
        assert _steps(model) == [expected] * 8


def test_each_tensor_counts_the_steps_of_the_optimizer_that_holds_it(toy, batches):
    model = _resampled(toy())
    values = _values(model)
    first, second = torch.optim.SGD(values[:3], lr=0.1), torch.optim.AdamW(values[3:], lr=0.1)
    _backward(model, batches[0])
    first.step()
    assert _steps(model) == [1] * 3 + [0] * 5
    second.step()
    assert _steps(model) == [1] * 8


def test_several_parameter_groups_are_one_step(toy, batches):
    model = _resampled(toy())
    values = _values(model)
    optimizer = torch.optim.AdamW([{"params": values[:2]}, {"params": values[2:], "lr": 0.5}], lr=0.1)
    _backward(model, batches[0])
    optimizer.step()
    assert _steps(model) == [1] * 8


def test_an_optimizer_of_other_weights_does_not_count(toy, batches):
    model = _resampled(toy(), modules_to_save=["head"])
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert head
    _backward(model, batches[0])
    torch.optim.SGD(head, lr=0.1).step()
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1).step()
    assert _steps(model) == [0] * 8


def test_a_copy_has_a_counter_of_its_own(toy, batches):
    model = _resampled(toy())
    _backward(model, batches[0])
    copied = copy.deepcopy(model)
    optimizer = _sgd(copied)
    for _ in range(2):
        _backward(copied, batches[0])
        optimizer.step()
    assert (_steps(model), _steps(copied)) == ([0] * 8, [2] * 8)
    _sgd(model).step()
    assert (_steps(model), _steps(copied)) == ([1] * 8, [2] * 8)


def test_two_adapters_count_apart(toy, batches):
    model = _resampled(toy())
    model.add_adapter("other", ChildTuningConfig(mode="task_free", resample=True, density=_DENSITY, seed=1))
    for adapter in ("other", "other", "default"):
        model.set_adapter(adapter)
        model.zero_grad()
        model(**batches[0]).loss.backward()
        torch.optim.SGD(_values(model, adapter), lr=0.1).step()
    assert (_steps(model), _steps(model, "other")) == ([1] * 8, [2] * 8)


def test_a_fixed_random_child_has_no_mask_and_no_counter(toy, batches):
    model = get_peft_model(toy(), ChildTuningConfig(mode="task_free", density=_DENSITY)).train()
    codes = [layer.child_tuning_code["default"].get("weight").clone() for layer in _layers(model).values()]
    optimizer = _sgd(model)
    model(**batches[0]).loss.backward()
    assert all((p.grad != 0).all() for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert _equal(codes, [layer.child_tuning_code["default"].get("weight") for layer in _layers(model).values()])


def test_resampling_is_announced_with_what_it_does_to_the_file(toy, caplog):
    _resampled(toy())
    assert "the saved delta is dense, 108 values" in caplog.text


class _Wrapper(torch.optim.Optimizer):
    """Calls another optimizer on the same parameters, as Lookahead and ZeroRedundancyOptimizer do."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure=None):
        self.inner.step()


class _Derived(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", ["wrapper", "derived", "derived of one that is in use"])
def test_a_step_inside_of_a_step_is_not_counted_again(kind, toy, batches):
    model = _resampled(toy())
    parameters = [p for p in model.parameters() if p.requires_grad]
    if kind == "derived of one that is in use":
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)  # torch adds its hooks to a class on first use
    optimizer = _Wrapper(_sgd(model)) if kind == "wrapper" else _Derived(parameters, lr=0.1)
    for _ in range(3):
        _backward(model, batches[0])
        optimizer.step()
    assert set(_steps(model)) == {3}


def test_a_step_that_raises_leaves_the_next_one_counted(toy, batches):
    model = _resampled(toy())
    optimizer = _sgd(model)

    def closure():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(closure)
    _backward(model, batches[0])
    optimizer.step()
    assert set(_steps(model)) == {1}
