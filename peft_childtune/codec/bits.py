"""Bit fields and variable-length integers: least significant bit first, little-endian, vectorised with numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import FormatError

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]
_CHUNK = 1 << 15  # fields or bytes at a time, within the cache: twice as fast as 2^20
MAX_WIDTH = 62  # bits of one field


def pack_fields(values: Ints, widths: int | Ints) -> Bytes:
    """Return the lowest `width` bits of each value, one field after the other, padded with zeros to a whole byte.

    Args:
        values: `(n,)`, not negative.
        widths: bits of every field, or of each, at most `MAX_WIDTH`.
    """
    if isinstance(widths, int):
        ends: Ints | None = None
        total = values.size * widths
    else:
        ends = np.cumsum(widths, dtype=np.int64)
        total = int(ends[-1]) if ends.size else 0
    words = np.zeros(total // 64 + 2, dtype=np.uint64)
    for start in range(0, values.size if total else 0, _CHUNK):
        stop = min(start + _CHUNK, values.size)
        width = widths if isinstance(widths, int) else widths[start:stop]
        at = np.arange(start, stop) * width if ends is None else ends[start:stop] - width
        field = (values[start:stop] & ((np.int64(1) << width) - 1)).view(np.uint64)
        word, shift = at >> 6, (at & 63).astype(np.uint64)
        heads = np.flatnonzero(np.diff(word, prepend=-1))  # the first field in each word
        # disjoint bits: the sum of the fields in a word is their union
        words[word[heads]] |= np.add.reduceat(field << shift, heads)
        over = np.flatnonzero((at & 63) + width > 64)
        words[word[over] + 1] |= field[over] >> (np.uint64(64) - shift[over])
    return words.astype("<u8", copy=False).view(np.uint8)[: -(-total // 8)].copy()


def unpack_fields(packed: Bytes, widths: int | Ints, *, count: int) -> Ints:
    """Return `count` fields; the inverse of `pack_fields`.

    Raises:
        FormatError: another length than those fields have, or padding bits that are not zero.
    """
    ends = None if isinstance(widths, int) else np.cumsum(widths, dtype=np.int64)
    total = count * widths if isinstance(widths, int) else int(ends[-1]) if ends is not None and ends.size else 0
    check_padding(packed, total)
    padded = np.zeros((total // 64 + 2) * 8, dtype=np.uint8)
    padded[: packed.size] = packed
    words = padded.view("<u8").astype(np.uint64, copy=False)
    values = np.zeros(count, dtype=np.int64)
    for start in range(0, count if total else 0, _CHUNK):
        stop = min(start + _CHUNK, count)
        width = widths if isinstance(widths, int) else widths[start:stop]
        at = np.arange(start, stop) * width if ends is None else ends[start:stop] - width
        word, shift = at >> 6, (at & 63).astype(np.uint64)
        low = words[word] >> shift
        # two shifts, since a shift by 64 is undefined
        high = (words[word + 1] << (np.uint64(63) - shift)) << np.uint64(1)
        values[start:stop] = (low | high).view(np.int64) & ((np.int64(1) << width) - 1)
    return values


def pack_unary(numbers: Ints) -> Bytes:
    """Return each number as that many zero bits and a one, padded with zeros to a whole byte."""
    ends = np.cumsum(numbers + 1)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, dtype=np.uint8)
    bits[ends - 1] = 1
    return np.packbits(bits, bitorder="little")


def unpack_unary(packed: Bytes, *, count: int) -> Ints:
    """Return `count` numbers; the inverse of `pack_unary`.

    Raises:
        FormatError: another number of ones than `count`, or bytes after the last one.
    """
    ones = one_bits(packed)
    if ones.size != count:
        raise FormatError(f"unary part: {ones.size} numbers where the header declares {count}; the code is damaged.")
    if packed.size != (int(ones[-1]) // 8 + 1 if count else 0):
        raise FormatError(f"unary part: {packed.size} bytes, some after its end; the code is damaged.")
    numbers = ones.copy()
    numbers[1:] -= ones[:-1] + 1
    return numbers


def one_bits(packed: Bytes) -> Ints:
    """Return the positions of the ones, strictly increasing."""
    found: list[Ints] = []
    for start in range(0, packed.size, _CHUNK):
        bits = np.unpackbits(packed[start : start + _CHUNK], bitorder="little")
        found.append(np.flatnonzero(bits.view(np.bool_)).astype(np.int64, copy=False) + start * 8)
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


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
