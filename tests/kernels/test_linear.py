"""The linear layer over a composed weight, against dense autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from peft_childtune.kernels import Edit, child_linear, hull_of, use_kernels

_IN, _OUT = 5, 3
_INDICES = torch.tensor([0, 4, 7, 14])


def _arguments(transposed, dtype=torch.float64, lead=(2, 4)):
    shape = (_IN, _OUT) if transposed else (_OUT, _IN)
    x, weight, bias, values = (torch.randn(s, dtype=dtype) for s in [(*lead, _IN), shape, (_OUT,), (4,)])
    return x, weight, bias, values


def _dense(x, weight, bias, values, transposed):
    full = torch.zeros(weight.numel(), dtype=values.dtype).index_put((_INDICES,), values).view(weight.shape)
    composed = weight + full
    return F.linear(x, composed.t() if transposed else composed, bias)


_NEEDS = [
    (needs, with_bias)
    for needs in itertools.product([False, True], repeat=4)
    for with_bias in (True, False)
    if any(needs) and (with_bias or not needs[2])
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("needs", "with_bias"), _NEEDS)
def test_outputs_and_every_wanted_gradient_equal_dense_autograd(transposed, needs, with_bias):
    arguments = _arguments(transposed)
    found = [a.clone().requires_grad_(n) for a, n in zip(arguments, needs, strict=True)]
    expected = [a.clone().requires_grad_(n) for a, n in zip(arguments, needs, strict=True)]
    upstream = torch.randn(2, 4, _OUT, dtype=torch.float64)
    bias = found[2] if with_bias else None
    out = child_linear(found[0], found[1], bias, [Edit(found[3], _INDICES)], transposed=transposed)
    reference = _dense(*expected[:2], expected[2] if with_bias else None, expected[3], transposed)
    torch.testing.assert_close(out, reference, rtol=1e-13, atol=1e-13)
    (out * upstream).sum().backward()
    (reference * upstream).sum().backward()
    for one, other, wanted in zip(found, expected, needs, strict=True):
        assert (one.grad is not None) == wanted
        if wanted:
            # another order of summation: some units in the last place of double precision
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck_passes_in_double_precision(transposed):
    arguments = [a.requires_grad_() for a in _arguments(transposed, lead=(2,))]
    assert torch.autograd.gradcheck(
        lambda x, w, b, v: child_linear(x, w, b, [Edit(v, _INDICES)], transposed=transposed), arguments
    )


@pytest.mark.parametrize("lead", [(), (7,), (2, 3, 2), (0,), (2, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_inputs_of_any_number_of_dimensions_are_served(lead, transposed):
    x, weight, bias, values = _arguments(transposed, lead=lead)
    x.requires_grad_()
    values.requires_grad_()
    out = child_linear(x, weight, bias, [Edit(values, _INDICES)], transposed=transposed)
    assert out.shape == (*lead, _OUT)
    torch.testing.assert_close(out, _dense(x, weight, bias, values, transposed), rtol=1e-13, atol=1e-13)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert values.grad.shape == values.shape


def test_a_weight_that_is_not_contiguous_is_read_by_logical_position():
    x, weight, bias, values = _arguments(False)
    strided = weight.t().contiguous().t()
    assert not strided.is_contiguous()
    one, other = (values.clone().requires_grad_() for _ in range(2))
    out = child_linear(x, strided, bias, [Edit(one, _INDICES)])
    reference = _dense(x, weight, bias, other, False)
    torch.testing.assert_close(out, reference, rtol=1e-13, atol=1e-13)
    out.square().sum().backward()
    reference.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_several_adapters_are_added_in_order_and_each_gets_its_own_gradient():
    x, weight, bias, _ = _arguments(False)
    indices = [torch.tensor([0, 3]), torch.tensor([3, 4, 9])]
    found = [torch.randn(i.numel(), dtype=torch.float64, requires_grad=True) for i in indices]
    expected = [v.detach().clone().requires_grad_() for v in found]
    out = child_linear(x, weight, bias, [Edit(v, i) for v, i in zip(found, indices, strict=True)])
    composed = weight
    for v, i in zip(expected, indices, strict=True):
        composed = composed + torch.zeros(15, dtype=torch.float64).index_put((i,), v).view(3, 5)
    reference = F.linear(x, composed, bias)
    out.square().sum().backward()
    reference.square().sum().backward()
    torch.testing.assert_close(out, reference, rtol=1e-13, atol=1e-13)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_output_is_bit_equal_to_the_merged_layer(dtype, transposed):
    x, weight, bias, values = (a.to(dtype) for a in _arguments(transposed, torch.float32, lead=(3, 7)))
    values = values.float()
    merged = weight.clone().view(-1)
    merged[_INDICES] = (merged[_INDICES].float() + values).to(dtype)
    merged = merged.view(weight.shape)
    out = child_linear(x, weight, bias, [Edit(values, _INDICES)], transposed=transposed)
    if transposed:
        expected = torch.addmm(bias, x.view(-1, _IN), merged).view(3, 7, _OUT)
    else:
        expected = F.linear(x, merged, bias)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
def test_between_forward_and_backward_nothing_new_of_the_weights_size_is_kept(transposed, with_bias):
    x, weight, bias, values = _arguments(transposed, torch.float32)
    x.requires_grad_()
    values.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        child_linear(x, weight, bias if with_bias else None, [Edit(values, _INDICES)], transposed=transposed)
    own = {t.data_ptr() for t in (x, weight, values, _INDICES)}
    assert kept
    assert [t.shape for t in kept if t.data_ptr() not in own] == []


def test_the_weight_and_its_gradient_flag_are_left_alone():
    x, weight, bias, values = _arguments(False)
    before = weight.clone()
    child_linear(x, weight, bias, [Edit(values.requires_grad_(), _INDICES)]).sum().backward()
    assert torch.equal(weight, before)
    assert weight.grad is None


def test_autocast_multiplies_in_bfloat16_and_returns_gradients_in_the_dtypes_of_the_inputs():
    x, weight, bias, values = _arguments(False, torch.float32, lead=(8,))
    found, expected = ([a.clone().requires_grad_() for a in (x, values)] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        out = child_linear(found[0], weight, bias, [Edit(found[1], _INDICES)])
        reference = _dense(expected[0], weight, bias, expected[1], False)
    assert out.dtype == reference.dtype == torch.bfloat16
    assert torch.equal(out, reference)
    out.float().square().sum().backward()
    reference.float().square().sum().backward()
    for one, other in zip(found, expected, strict=True):
        assert one.grad.dtype == torch.float32
        # products in bfloat16 (8 bits of mantissa), summed over up to 8 terms in either order
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-2)


def test_second_derivatives_are_refused_instead_of_being_wrong():
    x, weight, bias, values = _arguments(False)
    values.requires_grad_()
    out = child_linear(x, weight, bias, [Edit(values, _INDICES)])
    (gradient,) = torch.autograd.grad(out.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("path", ["gather", "hull", "sampled", None])
@pytest.mark.parametrize("transposed", [False, True])
def test_of_an_input_of_its_own_a_layer_keeps_the_used_columns_alone(transposed, path):
    x, weight, bias, _ = _arguments(transposed)
    positions = torch.arange(weight.numel()).view(weight.shape)
    indices = (positions[[1, 3]] if transposed else positions[:, [1, 3]]).reshape(-1)
    hull = hull_of(indices, weight.shape)
    gradients, kept = [], []
    for owns_input in (False, True):
        own, values = x.clone().requires_grad_(), torch.zeros(6, dtype=torch.float64, requires_grad=True)
        with (
            use_kernels(weight_gradient=path),
            torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
        ):
            kept.clear()
            edits = [Edit(values, indices, hull=hull)]
            out = child_linear(own, weight, bias, edits, transposed=transposed, owns_input=owns_input)
            out.square().sum().backward()
        gradients.append((own.grad, values.grad))
    assert ((8, 2) in [t.shape for t in kept]) == (path != "gather")  # 2 of the 5 columns of 8 tokens
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_base_that_is_trained_too_needs_the_whole_input():
    x, weight, bias, values = _arguments(False)
    indices = torch.tensor([1, 6])
    edit = Edit(values[:2].clone().requires_grad_(), indices, hull=hull_of(indices, weight.shape))
    weight.requires_grad_()
    child_linear(x, weight, bias, [edit], owns_input=True).sum().backward()
    torch.testing.assert_close(weight.grad, x.reshape(-1, _IN).sum(0).expand(_OUT, _IN), rtol=1e-12, atol=1e-12)


def test_a_path_that_is_forced_after_the_forward_finds_what_the_forward_has_kept():
    x, weight, bias, values = _arguments(False)
    indices = torch.tensor([1, 6])
    gradients = []
    for path in (None, "gather"):
        delta = values[:2].clone().requires_grad_()
        edit = Edit(delta, indices, hull=hull_of(indices, weight.shape))
        out = child_linear(x, weight, bias, [edit], owns_input=True)
        with use_kernels(weight_gradient=path):
            out.square().sum().backward()
        gradients.append(delta.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_an_input_that_no_gradient_needs_is_not_kept():
    x, weight, bias, values = _arguments(False)
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        child_linear(x, weight, bias, [Edit(values, _INDICES)]).sum().backward()
    assert x.shape not in kept and x.reshape(-1, x.shape[-1]).shape not in kept
    assert x.grad is not None
