"""Composed weights and their gradients against dense autograd."""

from __future__ import annotations

import pytest
import torch

from peft_childtune.kernels import Edit, compose_parameter

_SHAPE = (4, 6)


def _indices(*positions):
    return torch.tensor(positions, dtype=torch.int64)


def _dense(base, edits):
    """The slow way: differentiable dense additions."""
    for values, indices in edits:
        indices = torch.arange(base.numel()) if indices is None else indices
        base = base + torch.zeros(base.numel(), dtype=values.dtype).index_put((indices,), values).view(base.shape)
    return base


@pytest.mark.parametrize("indices", [[_indices(0, 7, 23)], [_indices(1), _indices(1, 2)], [None], [None, _indices(5)]])
def test_values_and_gradients_equal_dense_addition(indices):
    base = torch.randn(_SHAPE, dtype=torch.float64)
    values = [torch.randn(base.numel() if i is None else i.numel(), dtype=torch.float64) for i in indices]
    target = torch.randn(_SHAPE, dtype=torch.float64)
    found, expected = [v.clone().requires_grad_() for v in values], [v.clone().requires_grad_() for v in values]
    out = compose_parameter(base, [Edit(v, i) for v, i in zip(found, indices, strict=True)])
    reference = _dense(base, list(zip(expected, indices, strict=True)))
    (out.sin() * target).sum().backward()
    (reference.sin() * target).sum().backward()
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-15)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("indices", [_indices(0, 7, 23), None])
def test_gradcheck_passes_in_double_precision(indices):
    base = torch.randn(_SHAPE, dtype=torch.float64, requires_grad=True)
    count = base.numel() if indices is None else indices.numel()
    values = torch.randn(count, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, v: compose_parameter(b, [Edit(v, indices)]), (base, values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_entries_outside_the_child_keep_every_bit(dtype):
    base = torch.tensor([-0.0, float("inf"), 1e-7, float("nan"), 1.0]).to(dtype)
    out = compose_parameter(base, [Edit(torch.tensor([0.5]), _indices(4))])
    assert torch.equal(out[:4].view(torch.uint8), base[:4].view(torch.uint8))
    assert out[4] == 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_after_each_adapter(dtype):
    base = torch.tensor([1.0], dtype=dtype)
    half = torch.finfo(dtype).eps / 2  # half a unit in the last place: rounds to even, so it vanishes each time
    edit = Edit(torch.tensor([half]), _indices(0))
    assert compose_parameter(base, [edit, edit]).item() == 1.0
    assert compose_parameter(base, [Edit(torch.tensor([2 * half]), _indices(0))]).item() > 1.0


def test_the_base_is_never_written_to():
    base = torch.randn(_SHAPE)
    before = base.clone()
    compose_parameter(base, [Edit(torch.ones(24), None)]).add_(1)
    assert torch.equal(base, before)


def test_a_base_with_strides_is_composed_by_logical_position():
    base = torch.arange(6.0).view(2, 3).t()
    out = compose_parameter(base, [Edit(torch.tensor([10.0]), _indices(1))])
    expected = base.clone()
    expected[0, 1] += 10
    assert torch.equal(out, expected)


def test_gradients_arrive_at_the_child_only():
    base = torch.randn(_SHAPE)
    frozen, trained = torch.randn(2), torch.randn(2, requires_grad=True)
    out = compose_parameter(base, [Edit(frozen, _indices(0, 1)), Edit(trained, _indices(2, 3))])
    out.square().sum().backward()
    assert base.grad is None
    assert frozen.grad is None
    assert torch.equal(trained.grad, 2 * out.detach().view(-1)[2:4])


def test_gradients_have_the_dtype_of_the_delta():
    values = torch.zeros(2, requires_grad=True)
    compose_parameter(torch.ones(4, dtype=torch.bfloat16), [Edit(values, _indices(1, 3))]).sum().backward()
    assert values.grad.dtype == torch.float32
    assert values.grad.tolist() == [1.0, 1.0]


def test_a_sparse_gradient_of_an_embedding_is_understood():
    values = torch.zeros(3, requires_grad=True)
    table = compose_parameter(torch.randn(5, 2), [Edit(values, _indices(0, 5, 9))])
    torch.nn.functional.embedding(torch.tensor([0, 2, 2]), table, sparse=True).sum().backward()
    assert values.grad.tolist() == [1.0, 2.0, 0.0]


def test_nothing_of_the_weights_size_is_kept_for_the_backward():
    base = torch.randn(_SHAPE)
    kept: list[torch.Tensor] = []
    values = torch.randn(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        compose_parameter(base, [Edit(values, _indices(0, 1))])
    assert [t.numel() for t in kept] == [2, 2]
