"""Convolutions over a composed weight, against dense autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from peft_childtune.kernels import Edit, StepGate, child_conv

_INDICES = torch.tensor([0, 4, 7, 11])
_PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WINDOWS = {"plain": (1, 0, 1, 1), "strided": (2, 1, 1, 1), "dilated": (1, 2, 2, 1), "grouped": (1, 0, 1, 2)}


def _arguments(sizes, groups, dtype=torch.float64, batch=(3,)):
    x = torch.randn(*batch, 4, *[6] * sizes, dtype=dtype)
    weight = torch.randn(2, 4 // groups, *[3] * sizes, dtype=dtype)
    return x, weight, torch.randn(2, dtype=dtype), torch.randn(4, dtype=dtype)


def _dense(x, weight, bias, values, window):
    full = torch.zeros(weight.numel(), dtype=values.dtype).index_put((_INDICES,), values).view(weight.shape)
    stride, padding, dilation, groups = window
    return _PLAIN[weight.ndim - 2](x, weight + full, bias, stride, padding, dilation, groups)


def _window(name, sizes):
    stride, padding, dilation, groups = _WINDOWS[name]
    return [stride] * sizes, [padding] * sizes, [dilation] * sizes, groups


@pytest.mark.parametrize("batch", [(3,), ()], ids=["batch", "single"])
@pytest.mark.parametrize("name", _WINDOWS)
@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_outputs_and_gradients_equal_dense_autograd(sizes, name, batch):
    window = _window(name, sizes)
    arguments = _arguments(sizes, window[3], batch=batch)
    found, expected = ([a.clone().requires_grad_() for a in arguments] for _ in range(2))
    out = child_conv(*found[:3], [Edit(found[3], _INDICES)], window=window)
    reference = _dense(*expected, window)
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    (out * upstream).sum().backward()
    (reference * upstream).sum().backward()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-11)  # sums in another order


@pytest.mark.parametrize("needs", [n for n in itertools.product([False, True], repeat=4) if any(n)])
def test_only_the_wanted_gradients_are_there(needs):
    window = _window("plain", 2)
    x, weight, bias, values = (a.requires_grad_(wanted) for a, wanted in zip(_arguments(2, 1), needs, strict=True))
    child_conv(x, weight, bias, [Edit(values, _INDICES)], window=window).sum().backward()
    assert [a.grad is not None for a in (x, weight, bias, values)] == list(needs)


def test_the_gate_of_the_step_masks_the_gradient():
    window = _window("plain", 1)
    x, weight, _, _ = _arguments(1, 1)
    gate = StepGate(1, 0, 0.5, torch.tensor([3]))
    gradients = []
    for one in (None, gate):
        values = torch.zeros(weight.numel(), dtype=torch.float64, requires_grad=True)
        child_conv(x, weight, None, [Edit(values, None, one)], window=window).sum().backward()
        gradients.append(values.grad)
    assert torch.equal(gradients[1], gate(gradients[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_bit_equal_to_the_merged_layer(dtype):
    window = _window("strided", 2)
    x, weight, bias, values = (a.to(dtype) for a in _arguments(2, 1, torch.float32))
    merged = weight.clone().view(-1)
    merged[_INDICES] = (merged[_INDICES].float() + values.float()).to(dtype)
    expected = F.conv2d(x, merged.view(weight.shape), bias, *window)
    assert torch.equal(child_conv(x, weight, bias, [Edit(values.float(), _INDICES)], window=window), expected)


def test_between_forward_and_backward_nothing_new_of_the_weights_size_is_kept():
    window = _window("plain", 2)
    x, weight, bias, values = _arguments(2, 1)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        child_conv(x, weight, bias, [Edit(values.requires_grad_(), _INDICES)], window=window)
    own = {t.data_ptr() for t in (x, weight, values, _INDICES)}
    assert kept
    assert [t.shape for t in kept if t.data_ptr() not in own] == []
