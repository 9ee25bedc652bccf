"""A general compressor over the bitmap: for children that cluster, where it beats coding gap by gap."""

from __future__ import annotations

import lzma
import zlib

import numpy as np

from ..errors import FormatError
from .bits import Bytes, Ints, one_bits
from .rice import gaps_of, plan_block_rice, plan_rice

# The decoder of version 1 allocates this dictionary and no more, whatever the payload says.
_DICTIONARY = 1 << 20
_DECODER = [{"id": lzma.FILTER_LZMA2, "dict_size": _DICTIONARY}]
_ENCODER = [
    {
        "id": lzma.FILTER_LZMA2,
        "dict_size": _DICTIONARY,
        "lc": 0,  # the byte before says little about the bits of a byte
        "lp": 0,
        "pb": 0,  # a bitmap has no alignment of words
        "mode": lzma.MODE_NORMAL,
        "mf": lzma.MF_BT4,
        "nice_len": 273,  # alike lines are long
        "depth": 16,
    }
]
_SAMPLED_GAPS, _SAMPLED_LINES = 128, 4  # at least, in each slice
_SLICES = 4
_LEAST_SLICE, _MOST_SLICE, _SHARE = 1 << 12, 1 << 14, 32  # bytes of a bitmap in each slice, and its share


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


def is_repetitive(gaps: Ints, *, lines: int) -> bool:
    """Return whether a fast compressor beats Rice coding on a sample of the gaps, as it never does on random ones.

    Compressing a bitmap takes some 100 ns per entry of the weight, all other codings together some 15 ns per kept one.

    Args:
        gaps: of all kept units.
        lines: how many lines of units the gaps span; the sample holds several at a time, since lines may be alike.
    """
    length = max(_SAMPLED_GAPS, _SAMPLED_LINES * gaps.size // lines)
    if gaps.size > _SLICES * length:
        step = (gaps.size - length) // (_SLICES - 1)
        gaps = np.concatenate([gaps[i * step : i * step + length] for i in range(_SLICES)])
    parameter, size = plan_rice(gaps)
    shift = max(parameter - 4, 0)  # the lower bits of a gap are as good as random
    tops = np.minimum(gaps >> shift, 255).astype(np.uint8)
    return len(zlib.compress(tops.tobytes())) + gaps.size * shift // 8 < size


def is_worth_trying(bitmap: Bytes) -> bool:
    """Return whether a sample of the bitmap is shorter compressed than in another coding."""
    length = min(max(_LEAST_SLICE, bitmap.size // _SHARE), _MOST_SLICE)
    if bitmap.size <= 2 * _SLICES * length:
        return True
    step = (bitmap.size - length) // (_SLICES - 1)
    sample = np.concatenate([bitmap[i * step : i * step + length] for i in range(_SLICES)])
    gaps = gaps_of(one_bits(sample))
    if gaps.size == 0:
        return True
    return len(compress_bitmap(sample)) < min(plan_rice(gaps)[1], plan_block_rice(gaps)[1], sample.size)
