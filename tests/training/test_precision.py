"""Training in low precision: float32 deltas over any base, autocast, gradient scalers, and steps that they skip."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_childtune import ChildTuningConfig, get_child_network, get_deltas, select_child_network
from peft_childtune.codec import read_step
from peft_childtune.sparse import bernoulli_mask
from peft_childtune.tuner import ChildTuningLayer
from tests.training.runs import CHECKPOINT, KINDS, base, batches, differences, state_of, tensors_of, trainer_for

_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
_LOW = [torch.bfloat16, torch.float16]
_SEED, _DENSITY = 3, 0.5


def _counters(model):
    layers = [m for m in model.modules() if isinstance(m, ChildTuningLayer)]
    return {read_step(layer.child_tuning_code["default"].get(p)) for layer in layers for p in layer.covered}


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


# ---- one linear layer, of which everything is known by algebra


class Ones(nn.Module):
    """A layer of ones: `model(identity)` returns the weight, transposed."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        nn.init.ones_(self.fc.weight)

    def forward(self, x):
        return self.fc(x)


def _ones(kind, device, dtype=torch.float32):
    settings = {"target_modules": ["fc"], "density": _DENSITY, "seed": _SEED} | KINDS[kind]
    model = get_peft_model(Ones().to(device, dtype), ChildTuningConfig(**settings))
    if kind == "D":
        child = get_child_network(get_peft_model(Ones(), ChildTuningConfig(**(settings | KINDS["fixed F"]))))
        select_child_network(model, network=child)
    return model.train()


def _times_kept(kind, model, steps):
    """How often each weight of the layer was trained in so many steps, and by which factor its gradient was scaled."""
    if kind != "per-step F":
        times = torch.zeros(64)
        times[get_child_network(model).indices["fc.weight"]] = steps
        return times.view(8, 8), 1.0
    masks = [bernoulli_mask(64, _DENSITY, seed=_SEED, stream=0, step=step) for step in range(steps)]
    return sum(masks, torch.zeros(64)).view(8, 8), 1 / _DENSITY


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=["bf16 base", "fp16 base", "bf16 autocast", "fp16 autocast"],
)
def test_a_thousand_steps_too_small_for_the_dtype_add_up_and_appear_in_the_weight(kind, dtype, autocast, device):
    low = autocast or dtype
    rate = torch.finfo(low).eps / 512  # of the spacing of numbers from 1 upwards: powers of two, so all sums are exact
    assert torch.ones((), dtype=low) + rate == 1
    model = _ones(kind, device, dtype)
    optimizer = torch.optim.SGD(_trained(model), lr=rate)
    identity = torch.eye(8, device=device, dtype=dtype)
    seen = {}
    for step in range(1001):
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            weight = model(identity).T
        if step in (0, 64, 256, 257, 1000):
            seen[step] = weight.detach().cpu()
        optimizer.zero_grad()
        (-weight.float().sum()).backward()  # the gradient of every weight is -1
        if step < 1000:
            optimizer.step()
    for step, weight in seen.items():
        times, factor = _times_kept(kind, model, step)
        assert weight.dtype == low
        assert torch.equal(weight, (1 + times * factor * rate).to(low))
    assert (seen[64] == 1).all()
    delta = get_deltas(model)["fc.weight"]
    times, factor = _times_kept(kind, model, 1000)
    assert delta.values.dtype == torch.float32
    assert torch.equal(delta.to_dense().cpu(), times * factor * rate)
    assert (seen[1000] > 1).sum() == (times > 0).sum()
    assert (model.get_base_model().fc.base_layer.weight == 1).all()


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_too_small_for_float16_is_trained_with_a_scaler_and_lost_without(kind, device):
    tiny = 2.0**-26  # float16 ends at 2 ** -24
    for scale, expected in ((1.0, 0.0), (2.0**16, tiny)):
        model = _ones(kind, device)
        optimizer, scaler = torch.optim.SGD(_trained(model), lr=1.0), torch.amp.GradScaler(device, init_scale=scale)
        with torch.autocast(device, dtype=torch.float16):
            out = model(torch.eye(8, device=device))
        scaler.scale(-out.float().sum() * tiny).backward()
        scaler.step(optimizer)
        scaler.update()
        times, factor = _times_kept(kind, model, 1)
        assert torch.equal(get_deltas(model)["fc.weight"].to_dense().cpu(), times * factor * expected)


_OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    "adamw, fused": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("optimizer", _OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_overflows_float16_leaves_no_trace(kind, optimizer, device):
    """A scale of 2 ** 16 takes gradients of one beyond float16, and is halved, but for the skipped step the same."""

    def run(scale, steps):
        model = _ones(kind, device)
        stepper = _OPTIMIZERS[optimizer](_trained(model))
        scaler = torch.amp.GradScaler(device, init_scale=scale, backoff_factor=0.5, growth_interval=1000)
        masks, counters = [], []
        for _ in range(steps):
            stepper.zero_grad()
            with torch.autocast(device, dtype=torch.float16):
                out = model(torch.eye(8, device=device))
            scaler.scale(out.float().sum()).backward()
            masks.append([p.grad.ne(0).cpu() for p in _trained(model)])
            overflow = any(not p.grad.isfinite().all() for p in _trained(model))
            if "fused" not in optimizer:  # unscaling first would take the overflow out of the fused step's hands
                scaler.unscale_(stepper)
                torch.nn.utils.clip_grad_norm_(_trained(model), 1.0)
            before = tensors_of(model)
            scaler.step(stepper)
            scaler.update()
            if overflow:
                assert differences({"tensors": before}, {"tensors": tensors_of(model)}) == []
            counters.append((overflow, _counters(model) if kind == "per-step F" else None))
        state = {f"{i}.{k}": v for i, s in stepper.state_dict()["state"].items() for k, v in s.items()}
        return {"tensors": tensors_of(model) | state}, masks, counters

    skipping, masks, counters = run(2.0**16, 4)
    plain, plain_masks, plain_counters = run(2.0**15, 3)
    assert [overflow for overflow, _ in counters] == [True, False, False, False]
    assert counters[1:] == plain_counters
    if kind == "per-step F":
        assert [steps for _, steps in counters] == [{0}, {1}, {2}, {3}]
        assert torch.equal(masks[0][0], masks[1][0]) and not torch.equal(masks[1][0], masks[2][0])
    for mine, other in zip(masks[1:], plain_masks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert differences(skipping, plain) == []


# ---- an encoder


def _encoder(kind, dtype, device="cpu"):
    # without a task type the head is frozen; PEFT trains it in the base's own dtype, where Adam's moments underflow
    settings = {"density": 0.3, "seed": _SEED} | KINDS[kind]
    model = get_peft_model(base(hidden_dropout_prob=0.0).to(device, dtype), ChildTuningConfig(**settings))
    if kind == "D":
        select_child_network(model, batches(), show_progress=False)
    return model.train()


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", _LOW, ids=str)
def test_deltas_gradients_and_moments_over_a_low_precision_base_are_float32(kind, dtype, device):
    model = _encoder(kind, dtype, device)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-3)
    for batch in batches():
        model(**{key: tensor.to(device) for key, tensor in batch.items()}).loss.backward()
        held = {name: p for name, p in model.named_parameters() if ".child_tuning_values." in name}
        assert {p.dtype for p in held.values()} | {p.grad.dtype for p in held.values()} == {torch.float32}
        optimizer.step()
        optimizer.zero_grad()
    assert {s.dtype for p in held.values() for s in optimizer.state[p].values()} == {torch.float32}
    after = {name: p for name, p in model.named_parameters() if name in before}
    assert differences({"tensors": before}, {"tensors": after}) == []
    assert {p.dtype for name, p in after.items()} == {dtype}
    deltas = get_deltas(model)
    weights = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in before.items()}
    merged = dict(model.merge_and_unload().named_parameters())
    assert len(deltas) > 10
    for name, delta in deltas.items():
        composed = (weights[name].float() + delta.to_dense().float()).to(dtype)
        assert torch.equal(merged[name], composed)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_asks_for_deltas_in_the_dtype_of_the_base_gets_them_also_of_a_child_chosen_by_data(kind):
    """As TRL does under DeepSpeed ZeRO-3, which gathers parameters of one dtype only."""
    config = ChildTuningConfig(**({"density": 0.3} | KINDS[kind]))
    model = get_peft_model(base().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    if kind == "D":
        select_child_network(model, batches(), show_progress=False)
    assert {p.dtype for p in _trained(model)} == {torch.bfloat16}


def _of_length(length, size, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 40, (size, length), generator=generator)
    return {"input_ids": tokens, "labels": torch.randint(0, 2, (size,), generator=generator)}


@pytest.mark.parametrize("clip", [None, 1e-3])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_the_mask_of_a_step_depends_on_nothing_but_the_step(autocast, clip):
    """Not on the number, the sizes or the lengths of the batches that it adds up, nor on clipping."""

    def masks_of(steps):
        model = _encoder("per-step F", torch.float32)
        optimizer = torch.optim.AdamW(_trained(model), lr=1e-3)
        values = {n: p for n, p in model.named_parameters() if ".child_tuning_values." in n}
        found = []
        for parts in steps:
            for length, size in parts:
                with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                    model(**_of_length(length, size, seed=length)).loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(_trained(model), clip)
            found.append({name: p.grad.ne(0) for name, p in values.items()})
            optimizer.step()
            optimizer.zero_grad()
        return found

    even = masks_of([[(6, 4)], [(6, 4)], [(6, 4)]])
    uneven = masks_of([[(3, 1), (9, 5)], [(12, 2)], [(2, 3), (7, 1), (5, 4)]])
    weights = [name for name in even[0] if name.endswith(".weight") and "LayerNorm" not in name]
    assert len(weights) == 12
    streams = {name: number for number, name in enumerate(even[0])}
    for step, (one, other) in enumerate(zip(even, uneven, strict=True)):
        for name in weights:
            expected = bernoulli_mask(one[name].numel(), 0.3, seed=_SEED, stream=streams[name], step=step)
            for found in (one[name], other[name]):
                assert not (found & ~expected).any()
                # under autocast, a few of the kept gradients are so small that they are rounded to zero
                assert found.sum() > 0.95 * expected.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_trainer_over_a_bf16_base_resumes_bit_for_bit(kind, tmp_path):
    def trainer(name):
        return trainer_for(_encoder(kind, torch.bfloat16), tmp_path / name, bf16=True)

    whole = trainer("whole")
    whole.train()
    end = state_of(whole)
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CHECKPOINT}"))
    assert differences(state_of(resumed), end) == []
