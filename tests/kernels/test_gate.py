"""The gradient mask of Child-Tuning-F at one optimizer step."""

from __future__ import annotations

import pytest
import torch

from peft_childtune.kernels import Edit, StepGate, child_linear, compose_parameter


def _gate(step, *, seed=1, stream=2, density=0.25):
    return StepGate(seed, stream, density, torch.tensor([step]))


def test_kept_gradients_are_scaled_by_one_over_the_density_and_the_others_are_zero():
    gradient = torch.randn(40, 50)
    out = _gate(3)(gradient)
    kept = out != 0
    torch.testing.assert_close(out[kept], gradient[kept] / 0.25, rtol=1e-6, atol=0)
    # 2000 draws of p = 1/4: five standard deviations of the share are 0.048
    assert abs(kept.double().mean().item() - 0.25) < 0.048


def test_the_mask_depends_on_step_seed_and_stream_and_on_nothing_else():
    ones = torch.ones(4000)
    reference = _gate(3)(ones)
    assert torch.equal(_gate(3)(ones), reference)
    torch.randn(7)  # the global random state plays no part
    assert torch.equal(_gate(3)(ones), reference)
    for other in (_gate(4), _gate(3, seed=2), _gate(3, stream=3)):
        share = ((other(ones) != 0) & (reference != 0)).double().mean().item()
        assert abs(share - 0.25**2) < 0.02  # independent masks share a quarter of a quarter; five deviations are 0.019


def test_the_step_is_read_when_the_gradient_is_computed():
    step = torch.tensor([0])
    values = torch.zeros(64, requires_grad=True)
    out = compose_parameter(torch.zeros(8, 8), [Edit(values, None, StepGate(5, 0, 0.5, step))])
    step += 7
    out.sum().backward()
    assert torch.equal(values.grad, StepGate(5, 0, 0.5, torch.tensor([7]))(torch.ones(64)))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gate_masks_the_gradient_of_the_delta_and_not_that_of_the_input(transposed):
    weight = torch.randn((5, 3) if transposed else (3, 5))
    gate = _gate(1, density=0.5)
    results = []
    for edit_gate in (None, gate):
        x, values = torch.ones(4, 5, requires_grad=True), torch.zeros(15, requires_grad=True)
        child_linear(x, weight, None, [Edit(values, None, edit_gate)], transposed=transposed).square().sum().backward()
        results.append((x.grad, values.grad))
    (x_plain, values_plain), (x_gated, values_gated) = results
    assert torch.equal(x_plain, x_gated)
    assert torch.equal(values_gated, gate(values_plain))


def test_a_density_of_one_keeps_every_gradient_as_it_is():
    gradient = torch.randn(33)
    assert torch.equal(_gate(0, density=1.0)(gradient), gradient)


def test_the_gradient_itself_is_left_as_it_was():
    gradient = torch.randn(33)
    before = gradient.clone()
    _gate(0)(gradient)
    assert torch.equal(gradient, before)


def test_the_mean_over_steps_is_the_gradient():
    gradient = torch.randn(50)
    mean = torch.stack([_gate(step, density=0.5)(gradient) for step in range(2000)]).mean(0)
    # g * M / p has the standard deviation |g| at p = 1/2; five of them over sqrt(2000)
    assert bool(((mean - gradient).abs() <= 5 * gradient.abs() / 2000**0.5).all())


@pytest.mark.parametrize("overflow", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_outside_the_mask_is_masked_like_any_other(overflow):
    expected = _gate(3)(torch.ones(1000))
    gradient = torch.ones(1000).where(expected != 0, overflow)
    assert gradient.isfinite().sum() < 1000
    assert torch.equal(_gate(3)(gradient), expected)
