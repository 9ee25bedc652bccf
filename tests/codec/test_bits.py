"""Bit fields and variable-length integers against strings of zeros and ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peft_childtune.codec.fields as fields_module
from peft_childtune.codec.bits import Reader, one_bits, pack_positions, pack_unary, unpack_unary, write_varint
from peft_childtune.codec.fields import BLOCK, pack_blocks, pack_fields, unpack_blocks, unpack_fields
from peft_childtune.errors import FormatError


def to_bytes(bits: str) -> bytes:
    """Fills each byte from its least significant bit."""
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


def ints(values) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def in_bits(values, widths) -> str:
    """Writes each field from its least significant bit."""
    pairs = zip(values, widths, strict=True)
    return "".join(format(int(value), f"0{width}b")[::-1] if width else "" for value, width in pairs)


def drawn(count: int, widths) -> np.ndarray:
    """Numbers below 2^62, shorter than `widths` bits or not."""
    return np.random.default_rng(count).integers(0, 2**62, count) >> np.random.default_rng(0).integers(0, 62, count)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 100])
@pytest.mark.parametrize("width", range(63))
def test_fields_follow_one_another_least_significant_bit_first(width, count):
    values = drawn(count, width) & (2**width - 1)
    packed = pack_fields(values, width)
    assert packed.tobytes() == to_bytes(in_bits(values, [width] * count))
    assert unpack_fields(packed, width, count=count).tolist() == values.tolist()


@pytest.mark.parametrize("width", [0, 1, 5, 8, 13, 31, 32, 33, 62])
def test_bits_above_the_width_of_a_field_are_left_out(width):
    values = drawn(50, width)
    assert np.array_equal(pack_fields(values, width), pack_fields(values & (2**width - 1), width))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_fields_are_the_same_in_either_dtype(dtype):
    values = np.arange(1000)
    assert np.array_equal(pack_fields(values.astype(dtype), 10), pack_fields(values, 10))


@given(st.lists(st.integers(0, 62), max_size=6), st.integers(0, BLOCK - 1), st.integers(0, 99))
def test_blocks_of_fields_have_a_width_of_their_own(widths, missing, seed):
    count = max(len(widths) * BLOCK - missing, 0)
    per_value = [width for width in widths for _ in range(BLOCK)][:count]
    random = np.random.default_rng(seed)
    values = ints([int(random.integers(0, 2**width)) for width in per_value])
    packed = pack_blocks(values, ints(widths))
    assert packed.tobytes() == to_bytes(in_bits(values, per_value))
    assert unpack_blocks(packed, ints(widths), count=count).tolist() == values.tolist()


@pytest.mark.parametrize("width", [3, 13, 40])
def test_fields_of_several_chunks_are_packed_as_in_one(monkeypatch, width):
    values = np.random.default_rng(0).integers(0, 2**width, 1000)
    whole = pack_fields(values, width).tobytes()
    monkeypatch.setattr(fields_module, "_GROUPS", 8)
    packed = pack_fields(values, width)
    assert packed.tobytes() == whole
    assert np.array_equal(unpack_fields(packed, width, count=1000), values)


@given(st.lists(st.integers(0, 40)))
def test_unary_numbers_are_zeros_and_a_one(numbers):
    packed = pack_unary(ints(numbers))
    assert packed.tobytes() == to_bytes("".join("0" * number + "1" for number in numbers))
    ends = [sum(numbers[: i + 1]) + i for i in range(len(numbers))]
    assert unpack_unary(packed, count=len(numbers)).tolist() == ends


@given(st.sets(st.integers(0, 99)))
def test_a_bitmap_has_ones_at_the_positions(positions):
    packed = pack_positions(ints(sorted(positions)), length=100)
    assert packed.tobytes() == to_bytes("".join("1" if i in positions else "0" for i in range(100)))
    assert one_bits(packed).tolist() == sorted(positions)


@given(st.integers(0, 2**64 - 1))
def test_a_varint_comes_back(number):
    reader = Reader(np.frombuffer(write_varint(number), dtype=np.uint8))
    assert reader.varint("number", limit=2**64 - 1) == number
    reader.expect_end()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "cut off"),
        ("80", "cut off"),
        ("ffffffffffffffffffff7f", "above its limit"),
        ("ff" * 40, "above its limit"),
        ("80" * 40, "above its limit"),
        ("8000", "shortest form"),
        ("65", "above its limit 100"),
    ],
)
def test_a_broken_varint_is_refused(code, message):
    with pytest.raises(FormatError, match=message):
        Reader(np.frombuffer(bytes.fromhex(code), dtype=np.uint8)).varint("number", limit=100)
