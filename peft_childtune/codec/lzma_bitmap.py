"""A general compressor over the bitmap: for children that cluster, where it beats coding gap by gap."""

from __future__ import annotations

import lzma

import numpy as np

from ..errors import FormatError
from .bits import Bytes, one_bits
from .rice import gaps_of, plan_block_rice, plan_rice

# The decoder of version 1 allocates this dictionary and no more, whatever the payload says.
_DICTIONARY = 1 << 20
_DECODER = [{"id": lzma.FILTER_LZMA2, "dict_size": _DICTIONARY}]
_ENCODER = [
    {
        "id": lzma.FILTER_LZMA2,
        "dict_size": _DICTIONARY,
        "lc": 3,
        "lp": 0,
        "pb": 0,  # a bitmap has no alignment of words
        "mode": lzma.MODE_NORMAL,
        "mf": lzma.MF_BT4,
        "nice_len": 64,
        "depth": 16,
    }
]
_SLICES, _LEAST_SLICE, _SAMPLED_SHARE = 4, 1 << 12, 8  # of a bitmap, compressed before all of it is
_SPARSE = 8  # bitmap bytes per byte of the rival coding, above which compressing is cheap and samples mislead


def compress_bitmap(bitmap: Bytes) -> bytes:
    """Return the bitmap as one raw LZMA2 stream."""
    return lzma.compress(bitmap.tobytes(), format=lzma.FORMAT_RAW, filters=_ENCODER)


def decompress_bitmap(payload: Bytes, *, size: int) -> Bytes:
    """Return the bitmap of exactly `size` bytes.

    Raises:
        FormatError: no LZMA2 stream, another size, or bytes after its end.
    """
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_DECODER)
    try:
        bitmap = decoder.decompress(payload.tobytes(), max_length=size)
        # the end marker may lie beyond the last byte of output
        surplus = b"" if decoder.eof else decoder.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise FormatError(f"payload: not an LZMA2 stream ({error}); the code is damaged.") from error
    if len(bitmap) != size or surplus or not decoder.eof or decoder.unused_data:
        raise FormatError(f"payload: does not hold a bitmap of exactly {size} bytes; the code is damaged.")
    return np.frombuffer(bitmap, dtype=np.uint8)


def is_worth_trying(bitmap: Bytes, *, rival: int) -> bool:
    """Return whether a sample of the bitmap is shorter compressed than in another coding.

    Compressing costs some 50 ns per entry of the weight, ten times as much as all other codings together, and on a
    child that does not cluster it is never shorter.

    Args:
        bitmap: all of it.
        rival: bytes of the shortest other coding of all of it.
    """
    length = max(_LEAST_SLICE, bitmap.size // (_SLICES * _SAMPLED_SHARE))
    if bitmap.size <= 2 * _SLICES * length:
        return True
    starts = np.linspace(0, bitmap.size - length, _SLICES, dtype=np.int64)
    sample = np.concatenate([bitmap[start : start + length] for start in starts])
    gaps = gaps_of(one_bits(sample))
    if gaps.size == 0:
        return True
    tolerance = 1.15 if bitmap.size > _SPARSE * rival else 1.0
    return len(compress_bitmap(sample)) < tolerance * min(plan_rice(gaps)[1], plan_block_rice(gaps)[1], sample.size)
