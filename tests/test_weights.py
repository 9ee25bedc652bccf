"""Deltas into weights and out again, exactly; and what a fingerprint can tell apart."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
import torch

from peft_childtune.weights import (
    FINGERPRINT_BYTES,
    SAMPLES,
    Fingerprint,
    digest,
    fingerprint,
    matches,
    merge_,
    restore_,
)

_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
_SPECIAL = [-0.0, 0.0, 1e-42, -1e-45, 6e-8, float("inf"), -float("inf"), 1.0, 65504.0, 3.0e38, -1.5, 2.0**-126]


def _bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).tolist()


def _special(dtype):
    return torch.tensor(_SPECIAL, dtype=dtype).view(3, 4)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_restore_undoes_merge_bit_for_bit_also_for_extreme_entries(dtype):
    weight = _special(dtype)
    before = _bits(weight)
    indices = torch.tensor([0, 1, 2, 3, 5, 7, 8, 9, 11])
    values = torch.tensor([1.0, -0.0, 1e-42, 1e30, -float("inf"), 1e-9, 1e5, 3e38, -1.0])
    for _ in range(3):
        replaced = merge_(weight, indices, values)
        restore_(weight, replaced)
        assert _bits(weight) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_rounds_the_float32_sum_once_and_touches_nothing_else(dtype):
    generator = np.random.default_rng(0)
    base = torch.from_numpy(generator.standard_normal(200).astype(np.float32)).to(dtype)
    indices = torch.from_numpy(np.sort(generator.choice(200, 90, replace=False)))
    values = torch.from_numpy((generator.standard_normal(90) * 0.01).astype(np.float32))
    weight = base.clone().view(10, 20)
    merge_(weight, indices, values)
    expected = base.clone()
    for index, value in zip(indices.tolist(), values.tolist(), strict=True):
        total = np.float32(float(base[index])) + np.float32(value)
        expected[index] = torch.tensor(float(total), dtype=torch.float32).to(dtype)
    assert torch.equal(weight.view(-1), expected)


def test_a_delta_of_zero_keeps_the_sign_of_zero_only_where_arithmetic_does():
    weight = torch.tensor([-0.0, -0.0])
    merge_(weight, torch.tensor([0]), torch.tensor([0.0]))
    assert _bits(weight)[4:] == _bits(torch.tensor([-0.0]))  # untouched; -0.0 + 0.0 is 0.0 by IEEE 754
    assert weight[0] == 0


def test_merges_of_several_deltas_are_undone_in_reverse_order():
    weight = torch.randn(4, 4)
    before = _bits(weight)
    first, second = torch.tensor([1, 5, 9]), torch.tensor([5, 9, 10])
    one = merge_(weight, first, torch.randn(3))
    two = merge_(weight, second, torch.randn(3))
    restore_(weight, two)
    restore_(weight, one)
    assert _bits(weight) == before


def test_merging_a_parameter_leaves_its_gradient_flag_alone():
    weight = torch.nn.Parameter(torch.randn(3))
    merge_(weight, torch.tensor([1]), torch.tensor([1.0]))
    assert weight.requires_grad
    assert weight.is_leaf


@pytest.mark.parametrize("change", ["name", "value", "sign of zero", "order", "split"])
def test_a_digest_depends_on_everything(change):
    one, two = torch.tensor([0.0, 1.0]), torch.tensor([2.0])
    reference = digest("w", one, two)
    changed = {
        "name": lambda: digest("v", one, two),
        "value": lambda: digest("w", torch.tensor([0.0, 1.5]), two),
        "sign of zero": lambda: digest("w", torch.tensor([-0.0, 1.0]), two),
        "order": lambda: digest("w", two, one),
        "split": lambda: digest("w", torch.tensor([0.0]), torch.tensor([1.0, 2.0])),
    }[change]()
    assert len(reference) == 16
    assert changed != reference


def test_a_fingerprint_comes_back_from_its_bytes():
    found = fingerprint(torch.randn(7), torch.tensor([2]), whole=True)
    raw = found.to_bytes()
    assert len(raw) == FINGERPRINT_BYTES == 33
    assert raw[1:] == struct.pack("<4Q", *found.hashes, found.whole)
    assert Fingerprint.from_bytes(raw) == found


@pytest.mark.parametrize("dtype", _DTYPES)
def test_a_fingerprint_sees_every_touched_entry(dtype):
    base = torch.randn(5000).to(dtype)
    indices = torch.arange(1, 5000, 97)
    reference = fingerprint(base, indices)
    for index in indices.tolist():
        other = base.clone()
        other.view(torch.uint8)[index * base.element_size()] ^= 1  # the last bit of the mantissa
        assert matches(reference, fingerprint(other, indices)) is False


def test_a_fingerprint_samples_untouched_entries_evenly():
    numel = 10 * SAMPLES
    base = torch.randn(numel)
    none = torch.zeros(0, dtype=torch.int64)
    seen = 0
    for index in range(0, numel, 37):
        other = base.clone()
        other[index] += 1
        seen += matches(fingerprint(base, none), fingerprint(other, none)) is False
    assert seen == len([i for i in range(0, numel, 37) if i % 10 == 0])


def test_a_small_base_is_compared_whole():
    base, none = torch.randn(SAMPLES), torch.zeros(0, dtype=torch.int64)
    for index in (0, 511, SAMPLES - 1):
        other = base.clone()
        other[index] += 1
        assert matches(fingerprint(base, none), fingerprint(other, none)) is False


def test_a_fingerprint_looks_at_values_and_not_at_strides():
    base = torch.randn(6, 8)
    indices = torch.tensor([3, 20])
    assert fingerprint(base.t().contiguous().t(), indices) == fingerprint(base, indices)


@pytest.mark.parametrize(("saved", "found"), list(itertools.product(_DTYPES, _DTYPES)))
def test_one_base_in_two_precisions_matches_unless_nothing_can_be_said(saved, found):
    narrowest = torch.bfloat16 if torch.bfloat16 in (saved, found) else saved if found == torch.float64 else found
    published = torch.randn(50).to(narrowest)  # what both were loaded from holds no more than the narrower one
    if {saved, found} == {torch.bfloat16, torch.float16}:
        published = torch.randn(50)
    indices = torch.tensor([3, 17])
    same = matches(fingerprint(published.to(saved), indices), fingerprint(published.to(found), indices))
    assert same is (None if {saved, found} == {torch.bfloat16, torch.float16} else True)


@pytest.mark.parametrize(("wide", "narrow"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)])
def test_a_float32_base_matches_its_own_rounding_and_no_other(wide, narrow):
    base, indices = torch.randn(50, dtype=wide), torch.tensor([1])
    other = base.clone()
    other[1] *= 1.5
    for first, second, expected in [(base, base, True), (base, other, False), (other, base, False)]:
        assert matches(fingerprint(first, indices), fingerprint(second.to(narrow), indices)) is expected
        assert matches(fingerprint(first.to(narrow), indices), fingerprint(second, indices)) is expected


def test_float32_and_float64_are_compared_as_bfloat16():
    base, indices = torch.randn(50), torch.tensor([1])
    nudged = base.double()
    nudged[1] *= 1 + 1e-9
    assert matches(fingerprint(base, indices), fingerprint(nudged, indices)) is True
    nudged[1] *= 1.5
    assert matches(fingerprint(base, indices), fingerprint(nudged, indices)) is False
