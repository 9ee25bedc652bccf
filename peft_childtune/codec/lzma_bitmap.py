"""A general compressor over the bitmap: for children that cluster, where it beats coding gap by gap."""

from __future__ import annotations

import lzma

import numpy as np

from ..errors import FormatError
from .bits import Bytes

# The decoder of version 1 allocates this dictionary and no more, whatever the payload says.
_DICTIONARY = 1 << 20
_DECODE = [{"id": lzma.FILTER_LZMA2, "dict_size": _DICTIONARY}]
_SAMPLES, _SAMPLE_BYTES = 4, 1 << 14


def compress_bitmap(bitmap: Bytes) -> bytes:
    """Return the bitmap as one raw LZMA2 stream."""
    return lzma.compress(bitmap.tobytes(), format=lzma.FORMAT_RAW, filters=_encoder())


def decompress_bitmap(payload: Bytes, *, size: int) -> Bytes:
    """Return the bitmap of exactly `size` bytes.

    Raises:
        FormatError: no LZMA2 stream, another size, or bytes after its end.
    """
    decoder = lzma.LZMADecompressor(format=lzma.FORMAT_RAW, filters=_DECODE)
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
    """Return whether a sample of the bitmap compresses about as well as the `rival` size of all of it, or better."""
    if bitmap.size <= 2 * _SAMPLES * _SAMPLE_BYTES:
        return True
    starts = np.linspace(0, bitmap.size - _SAMPLE_BYTES, _SAMPLES, dtype=np.int64)
    sample = sum(len(compress_bitmap(bitmap[start : start + _SAMPLE_BYTES])) for start in starts)
    return sample * bitmap.size < 1.15 * rival * _SAMPLES * _SAMPLE_BYTES


def _encoder() -> list[dict[str, int]]:
    # a bitmap has no text-like alignment: short matches and a shallow search find what there is
    return [
        {
            "id": lzma.FILTER_LZMA2,
            "dict_size": _DICTIONARY,
            "lc": 0,
            "lp": 0,
            "pb": 0,
            "mode": lzma.MODE_NORMAL,
            "mf": lzma.MF_BT4,
            "nice_len": 64,
            "depth": 16,
        }
    ]
