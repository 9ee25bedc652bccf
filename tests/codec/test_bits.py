"""Bit fields and variable-length integers against strings of zeros and ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import peft_childtune.codec.bits as bits_module
from peft_childtune.codec.bits import (
    Reader,
    one_bits,
    pack_fields,
    pack_positions,
    pack_unary,
    unpack_fields,
    unpack_unary,
    write_varint,
)
from peft_childtune.errors import FormatError

fields = st.lists(st.integers(0, 62).flatmap(lambda w: st.tuples(st.integers(0, max(2**w - 1, 0)), st.just(w))))


def to_bytes(bits: str) -> bytes:
    """Fills each byte from its least significant bit."""
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


def ints(values) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@given(fields)
def test_fields_follow_one_another_least_significant_bit_first(pairs):
    expected = to_bytes("".join(format(value, f"0{width}b")[::-1] if width else "" for value, width in pairs))
    values, widths = ints([p[0] for p in pairs]), ints([p[1] for p in pairs])
    assert pack_fields(values, widths).tobytes() == expected


@given(st.integers(0, 62).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, 2**w - 1)))))
def test_fields_of_one_width_come_back(width_and_values):
    width, values = width_and_values
    packed = pack_fields(ints(values), width)
    assert unpack_fields(packed, width, count=len(values)).tolist() == values


@given(fields)
def test_fields_of_different_widths_come_back(pairs):
    values, widths = ints([p[0] for p in pairs]), ints([p[1] for p in pairs])
    assert unpack_fields(pack_fields(values, widths), widths, count=len(pairs)).tolist() == values.tolist()


@pytest.mark.parametrize("widths", ["equal", "mixed"])
def test_fields_of_several_chunks_are_packed_as_in_one(monkeypatch, widths):
    generator = np.random.default_rng(0)
    values = generator.integers(0, 2**13, 1000)
    width = 13 if widths == "equal" else generator.integers(13, 40, 1000)
    whole = pack_fields(values, width).tobytes()
    monkeypatch.setattr(bits_module, "_CHUNK", 64)
    packed = pack_fields(values, width)
    assert packed.tobytes() == whole
    assert np.array_equal(unpack_fields(packed, width, count=1000), values)


@given(st.lists(st.integers(0, 40)))
def test_unary_numbers_are_zeros_and_a_one(numbers):
    packed = pack_unary(ints(numbers))
    assert packed.tobytes() == to_bytes("".join("0" * number + "1" for number in numbers))
    assert unpack_unary(packed, count=len(numbers)).tolist() == numbers


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
