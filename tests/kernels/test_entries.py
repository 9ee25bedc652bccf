"""Entries read and written one by one, by the extension and by torch."""

from __future__ import annotations

from ctypes import c_bool

import pytest
import torch

from peft_childtune.kernels import load_extension, merge_entries_, put_entries_, take_entries, use_kernels

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=[True, False], ids=["extension", "torch"], autouse=True)
def _kernels(request):
    with use_kernels(extension=request.param):
        if request.param and load_extension() is None:
            pytest.skip("needs a C compiler")
        yield


def _tensor(dtype, layout="rows"):
    """Return a tensor that is larger than what one thread moves alone."""
    tensor = torch.randn(30, 10, 6, 7).to(dtype)
    return tensor.to(memory_format=torch.channels_last) if layout == "channels_last" else tensor


def _positions(count, index_dtype=torch.int64):
    return torch.randperm(12600)[:count].sort().values.to(index_dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 17, 5000])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_entries_are_read_and_written_at_their_row_major_positions(dtype, index_dtype, layout, count, threads):
    tensor, indices = _tensor(dtype, layout), _positions(count, index_dtype)
    entries = torch.randn(count).to(dtype)
    expected = tensor.reshape(-1).tolist()
    torch.set_num_threads(threads)
    try:
        found = take_entries(tensor, indices).tolist()
        put_entries_(tensor, indices, entries)
    finally:
        torch.set_num_threads(1)
    assert found == [expected[i] for i in indices.tolist()]
    for i, entry in zip(indices.tolist(), entries.tolist(), strict=True):
        expected[i] = entry
    assert tensor.reshape(-1).tolist() == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 17, 5000])
@pytest.mark.parametrize("layout", ["rows", "channels_last"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_merged_entries_are_sums_that_were_rounded_once(dtype, index_dtype, layout, count, threads):
    tensor, indices, values = _tensor(dtype, layout), _positions(count, index_dtype), torch.randn(count)
    before = tensor.reshape(-1).clone()
    replaced, is_written = torch.empty(count, dtype=dtype), c_bool(False)
    torch.set_num_threads(threads)
    try:
        merge_entries_(tensor, indices, values, replaced=replaced, is_written=is_written)
    finally:
        torch.set_num_threads(1)
    assert is_written.value
    assert torch.equal(replaced, before[indices.long()])
    wide = torch.promote_types(dtype, torch.float32)
    expected = before.clone()
    for place, entry, value in zip(indices.tolist(), replaced, values, strict=True):
        expected[place] = (entry.to(wide) + value.to(wide)).to(dtype)
    assert torch.equal(tensor.reshape(-1), expected)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_merge_that_would_write_outside_writes_nothing(index_dtype):
    tensor, indices = _tensor(torch.float32), _positions(5000, index_dtype)
    indices[-1] = 12600
    before, is_written = tensor.clone(), c_bool(False)
    with pytest.raises(IndexError):
        merge_entries_(tensor, indices, torch.ones(5000), replaced=torch.empty(5000), is_written=is_written)
    assert torch.equal(tensor, before)
    assert not is_written.value


@pytest.mark.parametrize("dtype", _DTYPES)
def test_every_bit_of_an_entry_is_kept(dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.arange(200 * size, dtype=torch.int64).mul(37).to(torch.uint8)
    entries, tensor = raw.view(dtype), torch.zeros(500, dtype=dtype)  # NaNs of every kind among them
    put_entries_(tensor, torch.arange(0, 400, 2), entries)
    assert torch.equal(take_entries(tensor, torch.arange(0, 400, 2)).view(torch.uint8), raw)


@pytest.mark.parametrize("outside", [12600, 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_position_outside_is_refused(outside, index_dtype):
    tensor, indices = _tensor(torch.float32), _positions(5000, index_dtype)
    indices[-1] = outside
    with pytest.raises(IndexError):
        take_entries(tensor, indices)
    with pytest.raises(IndexError):
        put_entries_(tensor, indices, torch.ones(5000))


@pytest.mark.parametrize("outside", [-1, -(2**31), 12600, 2**31 - 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_the_extension_writes_nothing_if_a_position_lies_outside(outside, index_dtype):
    tensor, indices = _tensor(torch.float32), _positions(5000, index_dtype)
    indices[-1] = outside
    before = tensor.clone()
    with use_kernels(extension=True), pytest.raises(IndexError, match="outside of 12600"):
        if load_extension() is None:
            pytest.skip("needs a C compiler")
        put_entries_(tensor, indices, torch.ones(5000))
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_a_part_of_a_larger_tensor_is_all_that_is_touched(index_dtype):
    whole = torch.zeros(3, 40)
    put_entries_(whole[1], torch.tensor([0, 39], dtype=index_dtype), torch.ones(2))
    put_entries_(whole[:, 3], torch.tensor([2], dtype=index_dtype), torch.ones(1))
    assert whole.nonzero().tolist() == [[1, 0], [1, 39], [2, 3]]


def test_a_parameter_is_written_unseen_by_autograd():
    parameter = torch.nn.Parameter(torch.zeros(4))
    loss = (parameter * parameter).sum()
    put_entries_(parameter, torch.tensor([1]), torch.ones(1))
    assert not take_entries(parameter, torch.tensor([1])).requires_grad
    loss.backward()  # would fail if the write counted as a change of what was saved
    assert parameter.grad.tolist() == [0, 2, 0, 0]


def test_entries_of_a_negated_view_are_its_logical_ones():
    negated = torch.randn(6, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    expected = negated.tolist()
    assert take_entries(negated.clone(), torch.arange(6)).tolist() == expected
    assert take_entries(negated, torch.arange(6)).tolist() == expected
