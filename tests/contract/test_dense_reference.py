"""Training a child equals training the dense model with a mask on its gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peft_childtune import get_child_network
from peft_childtune.sparse import bernoulli_mask
from tests.contract.families import FAMILIES, train, wrap

# All weights and deltas are fp64, so only the order of summation differs (1e-16 relative). In fp32 Adam would divide
# the rounding noise of near-zero gradients (key biases: zero in exact arithmetic) by itself and make steps of it; an
# eps of 1e-6 keeps that noise, here 1e-17, from being amplified.
EPS, TOLERANCE = 1e-6, 1e-10
CHILDREN = {
    "magnitude": {"score": "magnitude"},
    "random rows": {"score": "random", "granularity": "row"},
    "task_free": {"mode": "task_free", "density": 0.3},
}


def dense_twin(base: nn.Module, covered: set[str], heads: tuple[str, ...]) -> nn.Module:
    """Return a copy of the base of which the covered tensors and the heads are dense parameters, the rest frozen."""
    twin = copy.deepcopy(base)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in covered or (bool(heads) and name.startswith(heads)))
    return twin


def to_double(batch):
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def compare(trained: dict, reference: nn.Module, base: nn.Module, covered, *, atol: float) -> None:
    before = dict(base.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            trained[name], parameter.detach(), rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    moved = max(float((trained[name] - before[name]).detach().abs().max()) for name in covered)
    assert moved > 1e-2  # the two agree about something


def wrap_in_fp64(base: nn.Module, family, options) -> nn.Module:
    model = wrap(base, family, **options)
    for name, parameter in model.named_parameters():
        if ".child_tuning_values." in name:
            parameter.data = parameter.data.double()
    return model


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("options", CHILDREN.values(), ids=CHILDREN)
def test_training_a_child_equals_masking_the_gradients_of_a_dense_model(name, options):
    family = FAMILIES[name]
    base = family.build().double()
    model = wrap_in_fp64(copy.deepcopy(base), family, options)
    child = get_child_network(model)
    reference = dense_twin(base, set(child.shapes), family.heads)
    masks = {}
    for key, shape in child.shapes.items():
        masks[key] = torch.zeros(shape, dtype=torch.float64)
        masks[key].view(-1)[child.indices[key]] = 1.0

    def mask_gradients(step: int) -> None:
        for key, parameter in reference.named_parameters():
            if key in masks:
                parameter.grad *= masks[key]

    batches = [to_double(batch) for batch in family.batches()]
    options = {"steps": 20, "weight_decay": 0.0, "eps": EPS}
    train(reference, batches, before_step=mask_gradients, **options)
    train(model, batches, **options)

    compare(model.merge_and_unload().state_dict(), reference, base, child.shapes, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_child_tuning_f_equals_a_new_scaled_bernoulli_mask_on_the_dense_gradients_of_each_step(name, accumulate):
    family, density, seed = FAMILIES[name], 0.3, 11
    base = family.build().double()
    options = {"mode": "task_free", "resample": True, "density": density, "seed": seed}
    model = wrap_in_fp64(copy.deepcopy(base), family, options)
    covered = get_child_network(model).shapes
    reference = dense_twin(base, set(covered), family.heads)
    streams = {key: stream for stream, key in enumerate(covered)}

    def mask_gradients(step: int) -> None:
        for key, parameter in reference.named_parameters():
            if key in streams:
                mask = bernoulli_mask(parameter.numel(), density, seed=seed, stream=streams[key], step=step)
                parameter.grad *= mask.view_as(parameter)
                parameter.grad /= density

    batches = family.batches(5)
    options = {"steps": 20, "accumulate": accumulate, "weight_decay": 0.0, "eps": EPS}
    train(reference, batches, before_step=mask_gradients, **options)
    train(model, batches, **options)

    compare(model.merge_and_unload().state_dict(), reference, base, covered, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_first_step_in_fp32_equals_the_masked_dense_step_up_to_one_rounding(name):
    family = FAMILIES[name]
    base = family.build()
    model = wrap(copy.deepcopy(base), family, score="magnitude")
    child = get_child_network(model)
    reference = dense_twin(base, set(child.shapes), family.heads)
    batch = family.batch()
    reference(**batch).loss.backward()
    model.train()(**batch).loss.backward()

    dense = dict(reference.named_parameters())
    gradients = dict(model.named_parameters())
    checked = 0
    for key, indices in child.indices.items():
        path, _, parameter = key.rpartition(".")
        values = gradients.get(f"base_model.model.{path}.child_tuning_values.default.{parameter}")
        if values is None:
            assert not len(indices)
            continue
        # the same sums of at most 18 products in another order: a few ulp of the largest gradient
        torch.testing.assert_close(values.grad, dense[key].grad.reshape(-1)[indices], rtol=1e-5, atol=1e-7)
        checked += 1
    assert checked
