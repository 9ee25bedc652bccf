"""The step counter at the end of the code of a resampled child."""

from __future__ import annotations

import pytest
import torch

from peft_childtune.codec import advance_step_, decode_child, encode_child, read_step, step_view, write_step_
from peft_childtune.errors import FormatError
from peft_childtune.sparse import ResampledUnits, TensorChild, UnitGrid

SHAPES = [(), (3,), (2, 3), (300, 4), (300, 400), (70_000, 70_000)]


def code_of(shape=(2, 3), seed=5):
    return encode_child(TensorChild(UnitGrid(shape), ResampledUnits(seed, 1, 0.3)))


def misaligned(code):
    return torch.cat([torch.zeros(3, dtype=torch.uint8), code])[3:]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_code_is_at_step_0(shape):
    assert read_step(code_of(shape)) == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 200, 2**64 - 1])
def test_the_step_is_aligned_in_a_new_code(shape, seed):
    code = code_of(shape, seed)
    assert code.numel() % 8 == 0
    assert step_view(code).data_ptr() == code.data_ptr() + code.numel() - 8


@pytest.mark.parametrize("place", [lambda code: code, misaligned, lambda code: code.repeat_interleave(2)[::2]])
@pytest.mark.parametrize("step", [0, 1, 255, 256, 2**40 + 3, 2**63 - 1])
def test_a_written_step_is_read_back(place, step):
    code = place(code_of())
    write_step_(code, step)
    assert read_step(code) == step
    assert bytes(code[-8:].tolist()) == step.to_bytes(8, "little")


@pytest.mark.parametrize("place", [lambda code: code, misaligned])
@pytest.mark.parametrize("by", [1, 0, 300, torch.tensor(1), torch.tensor([1.0]), torch.tensor(0.0)])
def test_advancing_adds_in_place(place, by):
    code = place(code_of())
    write_step_(code, 250)
    advance_step_(code, by)
    assert read_step(code) == 250 + int(by)


def test_advancing_counts_by_one():
    code = code_of()
    for _ in range(300):
        advance_step_(code)
    assert read_step(code) == 300


def test_a_view_follows_the_code():
    code = code_of()
    view = step_view(code)
    advance_step_(code)
    assert view.tolist() == [1]


def test_the_step_is_not_part_of_the_child():
    code = code_of()
    advance_step_(code, 7)
    assert decode_child(code, shape=(2, 3)).units == ResampledUnits(5, 1, 0.3)


@pytest.mark.parametrize("act", [read_step, lambda code: write_step_(code, 1)])
@pytest.mark.parametrize(
    "code",
    [
        encode_child(TensorChild(UnitGrid((2, 3)), torch.tensor([1]))),
        torch.zeros(32, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(32),
    ],
)
def test_other_codes_have_no_step(act, code):
    with pytest.raises(FormatError, match="not of a resampled child"):
        act(code)


@pytest.mark.parametrize("code", [torch.zeros(7, dtype=torch.uint8), torch.zeros(16), torch.zeros(2, 8).byte()])
def test_what_is_no_code_has_no_view(code):
    with pytest.raises(FormatError):
        step_view(code)


@pytest.mark.parametrize("step", [-1, 2**63])
def test_a_step_out_of_range_is_refused(step):
    with pytest.raises(FormatError, match="out of range"):
        write_step_(code_of(), step)


def test_a_negative_step_is_refused():
    code = code_of()
    code[-1] = 255
    with pytest.raises(FormatError, match="step: -"):
        read_step(code)
