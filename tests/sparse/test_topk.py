"""Exact top-k over many tensors against sorting everything."""

from __future__ import annotations

import math
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_childtune.sparse.topk as topk
from peft_childtune.errors import BudgetError, ScoreError
from peft_childtune.sparse import select_topk

# few different numbers, so that ties are the rule; denormals and both zeros lie at the edges of the histogram's digits
AWKWARD = st.sampled_from([0.0, -0.0, 1e-40, -1e-40, 1.0, 1.0078125, -1.0, 65504.0, -65504.0, math.inf, -math.inf])
tensors = st.lists(st.lists(AWKWARD | st.floats(-4, 4, width=16), max_size=12), max_size=4)
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


def sort_everything(scores: dict[str, torch.Tensor], k: int) -> dict[str, list[int]]:
    entries = [
        (-value, order, position)
        for order, tensor in enumerate(scores.values())
        for position, value in enumerate(tensor.flatten().double().tolist())
    ]
    best = sorted(entries)[:k]
    return {name: sorted(p for _, o, p in best if o == order) for order, name in enumerate(scores)}


def as_lists(selected: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: positions.tolist() for name, positions in selected.items()}


@pytest.mark.parametrize("few", [0, 1 << 20], ids=["all digits", "sort the last few"])
@given(tensors, dtypes, st.floats(0, 1))
@settings(deadline=None, max_examples=150)
def test_the_largest_are_kept_and_the_first_among_equals(few, lists, dtype, share):
    scores = {str(i): torch.tensor(values, dtype=dtype) for i, values in enumerate(lists)}
    k = round(share * sum(map(len, lists)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_FEW", few)
        assert as_lists(select_topk(scores, k)) == sort_everything(scores, k)


@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_equal_scores_are_taken_from_the_lowest_position(k):
    assert select_topk({"w": torch.ones(2, 4)}, k)["w"].tolist() == list(range(k))


@pytest.mark.parametrize("k", [1, 999, 300_000, 700_001])
def test_tensors_of_several_chunks_agree_with_one_sort(k):
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.randn(700, 500, generator=generator), "b": torch.randn(400_000, generator=generator)}
    selected = select_topk(scores, k)
    merged = torch.cat([selected["a"], selected["b"] + 350_000])
    expected = torch.cat([scores["a"].flatten(), scores["b"]]).sort(descending=True, stable=True).indices[:k]
    assert torch.equal(merged, expected.sort().values)


@pytest.mark.parametrize("k", [1, 262_145, 500_000])
def test_ties_across_chunks_and_tensors_are_taken_in_order(k):
    selected = select_topk({"a": torch.zeros(300_000), "b": torch.zeros(300_000)}, k)
    assert [len(selected["a"]), len(selected["b"])] == [min(k, 300_000), max(k - 300_000, 0)]
    assert selected["a"].tolist() == list(range(min(k, 300_000)))


def test_fp64_scores_that_fp32_would_call_equal_are_told_apart():
    scores = torch.tensor([1.0, 1.0 + 1e-12, 1.0 - 1e-12], dtype=torch.float64)
    assert select_topk({"w": scores}, 1)["w"].tolist() == [1]


def test_fp32_and_fp64_tensors_are_compared_with_one_another():
    scores = {"a": torch.tensor([1.0]), "b": torch.tensor([1.0 + 1e-12, 0.5], dtype=torch.float64)}
    assert as_lists(select_topk(scores, 1)) == {"a": [], "b": [0]}


def test_a_transposed_tensor_is_counted_row_major():
    assert select_topk({"w": torch.tensor([[1.0, 9.0], [5.0, 2.0]]).t()}, 1)["w"].tolist() == [2]


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_nan_is_refused_with_the_name_of_its_tensor(k, dtype):
    scores = {"fine": torch.ones(1, dtype=dtype), "broken": torch.tensor([1.0, math.nan], dtype=dtype)}
    with pytest.raises(ScoreError, match=r"^broken: a score is NaN"):
        select_topk(scores, k)


def test_a_negative_nan_is_refused():
    with pytest.raises(ScoreError, match="NaN"):
        select_topk({"w": torch.tensor([1.0, -math.nan])}, 1)


@pytest.mark.parametrize("k", [-1, 5])
def test_more_than_there_is_is_refused(k):
    with pytest.raises(BudgetError, match="0 <= k <= 4"):
        select_topk({"w": torch.ones(4)}, k)


def test_integer_scores_are_refused():
    with pytest.raises(ScoreError, match="floating point"):
        select_topk({"w": torch.ones(4, dtype=torch.int64)}, 1)


def test_no_tensors_give_no_positions():
    assert select_topk({}, 0) == {}


@pytest.mark.parametrize("k", [1, 1000, 40_000])
def test_the_scores_are_not_copied(k):
    scores = {str(i): torch.randn(1_000_000).square_() for i in range(4)}
    tracemalloc.start()  # sees numpy's arrays, with which the CPU computes, from the chunks to the positions
    try:
        select_topk(scores, k)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 8 * k <= peak < 0.4 * sum(tensor.nbytes for tensor in scores.values())


def test_the_scores_stay_as_they_were():
    scores = torch.tensor([-0.0, 1.0, -2.0])
    before = scores.clone()
    select_topk({"w": scores}, 2)
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_selects_the_same():
    scores = {"a": torch.randn(1000, 300).half().float(), "b": torch.randn(7)}
    there = select_topk({name: tensor.cuda() for name, tensor in scores.items()}, 12345)
    assert as_lists(there) == as_lists(select_topk(scores, 12345))
