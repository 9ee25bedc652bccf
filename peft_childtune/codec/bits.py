"""Unary numbers, bitmaps and variable-length integers: least significant bit first, vectorised with numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ..errors import FormatError

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.signedinteger]  # int64, or int32 where all numbers fit and speed matters
_CHUNK = 1 << 13  # bytes at a time: within the cache


def pack_unary(numbers: Ints) -> Bytes:
    """Return each number as that many zero bits and a one, padded with zeros to a whole byte."""
    if numbers.size == 0:
        return np.zeros(0, dtype=np.uint8)
    steps = numbers.astype(np.int64)
    steps[1:] += 1
    ones = running_sum_(steps)
    bits = np.zeros(int(ones[-1]) + 1, dtype=np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little")


def unpack_unary(packed: Bytes, *, count: int) -> Ints:
    """Return where the `count` numbers end: the positions of the ones; the `i`-th number is what lies between, zeros.

    Raises:
        FormatError: another number of ones than `count`, or bytes after the last one.
    """
    ones = one_bits(packed, count=count, what="unary part: {} numbers")
    if packed.size != (int(ones[-1]) // 8 + 1 if count else 0):
        raise FormatError(f"unary part: {packed.size} bytes, some after its end; the code is damaged.")
    return ones


def running_sum_(steps: Ints) -> Ints:
    """Replace int64 steps by the sums of the first, the first two, ..., and return them."""
    torch.from_numpy(steps).cumsum_(0)  # five times as fast as numpy on one thread
    return steps


def one_bits(packed: Bytes, *, count: int | None = None, what: str = "payload: {} units") -> Ints:
    """Return the positions of the ones, int64, strictly increasing.

    Args:
        packed: the bits.
        count: how many ones there must be; checked before they are listed, which takes 64 times the memory.
        what: they are, for the error.

    Raises:
        FormatError: another number of ones than `count`.
    """
    chunks = [packed[start : start + _CHUNK] for start in range(0, packed.size, _CHUNK)]
    counts = [int(np.count_nonzero(np.unpackbits(chunk))) for chunk in chunks]
    if count is not None and sum(counts) != count:
        raise FormatError(f"{what.format(sum(counts))} where the header declares {count}; the code is damaged.")
    ones = np.empty(sum(counts), dtype=np.int64)
    filled = 0
    for number, (chunk, inside) in enumerate(zip(chunks, counts, strict=True)):
        found = np.flatnonzero(np.unpackbits(chunk, bitorder="little").view(np.bool_))
        np.add(found, number * _CHUNK * 8, out=ones[filled : filled + inside])
        filled += inside
    return ones


def pack_positions(positions: Ints, *, length: int) -> Bytes:
    """Return a bitmap of `length` bits with ones at `positions`, padded with zeros to a whole byte."""
    bitmap = np.zeros(-(-length // 8), dtype=np.uint8)
    byte = positions >> 3
    heads = np.flatnonzero(np.diff(byte, prepend=-1))
    if heads.size:
        bits = (np.uint8(1) << (positions & 7).astype(np.uint8)).astype(np.uint8)
        bitmap[byte[heads]] = np.bitwise_or.reduceat(bits, heads)
    return bitmap


def check_padding(packed: Bytes, bits: int) -> None:
    """Raise `FormatError` unless `packed` holds exactly `bits` bits and zeros up to a whole byte."""
    if packed.size != -(-bits // 8):
        raise FormatError(f"payload: {packed.size} bytes where {bits} bits need {-(-bits // 8)}; the code is damaged.")
    if bits % 8 and int(packed[-1]) >> (bits % 8):
        raise FormatError(f"payload: a bit after the last of {bits} is set; the code is damaged.")


def write_varint(number: int) -> bytes:
    """Return an unsigned integer in base 128, least significant digit first, the top bit set on all but the last."""
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


class Reader:
    """Reads a code from its front and refuses to read past its end.

    Args:
        code: the whole code.
    """

    def __init__(self, code: Bytes) -> None:
        self._code = code
        self._at = 0
        self.size = code.size

    def take(self, count: int, what: str) -> Bytes:
        """Return the next `count` bytes as a view."""
        if count > self.left:
            raise FormatError(f"{what}: {count} bytes where {self.left} are left; the code is cut off or damaged.")
        self._at += count
        return self._code[self._at - count : self._at]

    def byte(self, what: str) -> int:
        """Return the next byte."""
        return int(self.take(1, what)[0])

    def varint(self, what: str, *, limit: int) -> int:
        """Return the next variable-length integer, at most `limit`."""
        number = shift = 0
        while True:
            digit = self.byte(what)
            number |= (digit & 0x7F) << shift
            shift += 7
            if number > limit or shift > 70:
                raise FormatError(f"{what}: at least {number}, above its limit {limit}; the code is damaged.")
            if digit < 0x80:
                break
        if digit == 0 and shift > 7:
            raise FormatError(f"{what}: {number} is not in its shortest form; the code is damaged.")
        return number

    def rest(self) -> Bytes:
        """Return all bytes that are left."""
        return self.take(self.left, "payload")

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return self._code.size - self._at

    def expect_end(self) -> None:
        """Raise `FormatError` if bytes are left."""
        if self.left:
            raise FormatError(f"code: {self.left} bytes after its end; the code is damaged.")
