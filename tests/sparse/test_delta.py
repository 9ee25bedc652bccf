"""A sparse delta, and adding it to the base."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_childtune.errors import DeltaError
from peft_childtune.sparse import SparseDelta, compose, compose_entries

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def test_a_dense_delta_is_zero_outside_the_child():
    delta = SparseDelta((2, 3), torch.tensor([1, 5]), torch.tensor([0.5, -1.0]))
    assert delta.to_dense().tolist() == [[0.0, 0.5, 0.0], [0.0, 0.0, -1.0]]


def test_a_dense_delta_has_the_dtype_asked_for():
    delta = SparseDelta((4,), torch.tensor([2]), torch.tensor([0.1]))
    assert torch.equal(delta.to_dense(torch.bfloat16), torch.tensor([0, 0, 0.1, 0], dtype=torch.bfloat16))


@pytest.mark.parametrize(("shape", "expected"), [((2, 4), 0.25), ((0, 3), 0.0), ((), 0.0)])
def test_density_is_the_kept_share(shape, expected):
    nnz = 2 if shape == (2, 4) else 0
    delta = SparseDelta(shape, torch.arange(nnz), torch.zeros(nnz))
    assert delta.density == expected


@pytest.mark.parametrize(
    ("shape", "indices", "values"),
    [
        ((4,), torch.tensor([1, 1]), torch.zeros(2)),
        ((4,), torch.tensor([2, 1]), torch.zeros(2)),
        ((4,), torch.tensor([4]), torch.zeros(1)),
        ((4,), torch.tensor([-1]), torch.zeros(1)),
        ((4,), torch.tensor([1], dtype=torch.int32), torch.zeros(1)),
        ((4,), torch.tensor([[1]]), torch.zeros(1, 1)),
        ((4,), torch.tensor([1]), torch.zeros(2)),
        ((4,), torch.tensor([1]), torch.zeros(1, dtype=torch.int64)),
        ((-1, 4), torch.tensor([1]), torch.zeros(1)),
        ((0,), torch.tensor([0]), torch.zeros(1)),
    ],
    ids=[
        "repeated",
        "descending",
        "beyond",
        "negative",
        "int32",
        "2-D",
        "lengths",
        "int-values",
        "shape",
        "no-entries",
    ],
)
def test_parts_that_do_not_fit_are_refused(shape, indices, values):
    with pytest.raises(DeltaError):
        SparseDelta(shape, indices, values)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sum_is_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2000, generator=generator).to(dtype)
    values = torch.randn(2000, generator=generator) * 1e-3
    wide = np.float64 if dtype == torch.float64 else np.float32
    summed = base.double().numpy().astype(wide) + values.numpy().astype(wide)
    assert torch.equal(compose_entries(base, values), torch.from_numpy(summed).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_composing_changes_the_child_only(dtype):
    base = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    indices = torch.tensor([0, 3, 34])
    composed = compose(base, indices, torch.ones(3))
    expected = base.clone()
    for index in indices.tolist():
        expected[index // 7, index % 7] = (base[index // 7, index % 7].double() + 1.0).to(dtype)
    assert torch.equal(composed, expected)


def test_composing_leaves_the_base_as_it_was():
    base = torch.ones(3, 3)
    compose(base, torch.tensor([4]), torch.tensor([1.0]))
    assert torch.equal(base, torch.ones(3, 3))


def test_composing_a_transposed_base_counts_positions_row_major():
    base = torch.arange(6.0).view(2, 3).t()
    composed = compose(base, torch.tensor([1]), torch.tensor([10.0]))
    assert composed.tolist() == [[0.0, 13.0], [1.0, 4.0], [2.0, 5.0]]


def test_composing_gives_a_contiguous_tensor():
    assert compose(torch.zeros(3, 2).t(), torch.tensor([1]), torch.ones(1)).is_contiguous()


def test_composing_an_empty_delta_copies_the_base():
    base = torch.randn(3, 3)
    assert torch.equal(compose(base, torch.empty(0, dtype=torch.int64), torch.empty(0)), base)
