r"""The seal of an adapter: digests of what a weights file holds and fingerprints of the base it was made for.

The seal is one uint8 tensor, stored in the file only. Layout, little-endian, 24 + 49 n + 33 m bytes:

    8   magic "CTSEAL\0" and the format's major version
    4   n, the number of covered base tensors
    4   m, the number of `modules_to_save` tensors
    n x 49   hash of the name (8), digest of code and values (16), fingerprint of the base tensor (25)
    m x 33   hash of the name (8), fingerprint of the whole tensor (25)
    8   xxh3-64 of everything before it

Records are sorted by the hash of their name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from .errors import BaseMismatchError, FormatError, IntegrityError
from .weights import FINGERPRINT_BYTES, Fingerprint, digest, fingerprint, matches

__all__ = ["Sealed", "make_seal", "seal_bytes", "verify_seal"]

logger = logging.getLogger(__name__)

_MAGIC = b"CTSEAL\0\x01"
_CHILD_RECORD = 8 + 16 + FINGERPRINT_BYTES
_HEAD_RECORD = 8 + FINGERPRINT_BYTES


@dataclass(frozen=True, eq=False)
class Sealed:
    """What the seal vouches for, of one covered base tensor.

    Attributes:
        code: uint8, the coded child, as stored; empty where nothing was kept.
        values: `(nnz,)`, the delta, as stored; empty where nothing was kept.
        fingerprint: called for the base tensor's fingerprint: it needs the child's positions, thus a sound code.
    """

    code: Tensor
    values: Tensor
    fingerprint: Callable[[], Fingerprint]


def _hash(name: str) -> bytes:
    return xxhash.xxh3_64_digest(name.encode())


def _digest(name: str, entry: Sealed) -> bytes:
    # float32 holds every value of the narrower dtypes exactly, so a loader that widens does not break the digest
    return digest(name, entry.code, entry.values.to(torch.float32))


def _head_fingerprint(tensor: Tensor) -> Fingerprint:
    if not tensor.is_floating_point():  # a counter, say: its bits are the same in every precision
        bits = int.from_bytes(digest("", tensor)[:8], "little")
        return Fingerprint(0, (bits, bits, bits))
    return fingerprint(tensor, torch.arange(tensor.numel(), device=tensor.device))


def seal_bytes(children: int, heads: int) -> int:
    """Return the length of the seal of so many covered tensors and `modules_to_save` tensors."""
    return len(_MAGIC) + 8 + children * _CHILD_RECORD + heads * _HEAD_RECORD + 8


def make_seal(children: Mapping[str, Sealed], heads: Mapping[str, Tensor]) -> Tensor:
    """Return the seal, uint8 `(seal_bytes(...),)`, of what is about to be saved.

    Args:
        children: every covered base tensor, by the base model's own name of it.
        heads: every `modules_to_save` tensor, by the base model's own name of it.
    """
    out = bytearray(_MAGIC + len(children).to_bytes(4, "little") + len(heads).to_bytes(4, "little"))
    for name in sorted(children, key=_hash):
        entry = children[name]
        out += _hash(name) + _digest(name, entry) + entry.fingerprint().to_bytes()
    for name in sorted(heads, key=_hash):
        out += _hash(name) + _head_fingerprint(heads[name]).to_bytes()
    out += xxhash.xxh3_64_digest(bytes(out))
    return torch.frombuffer(out, dtype=torch.uint8).clone()


def _read(seal: Tensor) -> tuple[dict[bytes, tuple[bytes, Fingerprint]], dict[bytes, Fingerprint]]:
    raw = bytes(seal.detach().cpu().contiguous().numpy().tobytes()) if seal.dtype is torch.uint8 else b""
    start = len(_MAGIC) + 8
    if len(raw) < start or raw[: len(_MAGIC)] != _MAGIC:
        raise FormatError(
            "child_tuning_seal: is not a seal of format version 1; the file is damaged or was written by a newer "
            "release."
        )
    n, m = (int.from_bytes(raw[i : i + 4], "little") for i in (len(_MAGIC), len(_MAGIC) + 4))
    if len(raw) != seal_bytes(n, m):
        raise FormatError(
            f"child_tuning_seal: {len(raw)} bytes, but {n} children and {m} heads need {seal_bytes(n, m)}; "
            "the file is damaged, fetch it again."
        )
    if xxhash.xxh3_64_digest(raw[:-8]) != raw[-8:]:
        raise IntegrityError("child_tuning_seal: differs from what was saved; the file is damaged, fetch it again.")
    children: dict[bytes, tuple[bytes, Fingerprint]] = {}
    for at in range(start, start + n * _CHILD_RECORD, _CHILD_RECORD):
        record = raw[at : at + _CHILD_RECORD]
        children[record[:8]] = (record[8:24], Fingerprint.from_bytes(record[24:]))
    heads: dict[bytes, Fingerprint] = {}
    for at in range(start + n * _CHILD_RECORD, len(raw) - 8, _HEAD_RECORD):
        record = raw[at : at + _HEAD_RECORD]
        heads[record[:8]] = Fingerprint.from_bytes(record[8:])
    return children, heads


def _check_names(what: str, sealed: set[bytes], found: Mapping[str, object]) -> None:
    hashes = {_hash(name): name for name in found}
    for key, name in hashes.items():
        if key not in sealed:
            raise IntegrityError(
                f"{name}: the adapter was saved without this {what}; its configuration and its weights file do not "
                "belong together, or the base model has other modules than the one it was made for."
            )
    if sealed - set(hashes):
        raise IntegrityError(
            f"{len(sealed - set(hashes))} of the {len(sealed)} {what}s that were saved are not in this model; the "
            "base model is another one, or `target_modules` differs. Present, for example: "
            f"{next(iter(found), 'none')}."
        )


def verify_seal(seal: Tensor, children: Mapping[str, Sealed], heads: Mapping[str, Tensor]) -> None:
    """Check that everything is what was saved and that the base is the one it was made for.

    Args:
        seal: as made by `make_seal`.
        children: every covered base tensor of the model, with what the file holds for it.
        heads: every `modules_to_save` tensor, as the file holds it.

    Raises:
        FormatError: the seal itself is malformed.
        IntegrityError: a tensor was changed since, is missing, or is one too many.
        BaseMismatchError: a base tensor differs from the one that the adapter was made for.
    """
    sealed, sealed_heads = _read(seal)
    _check_names("base tensor", set(sealed), children)
    _check_names("`modules_to_save` tensor", set(sealed_heads), heads)
    for name, entry in children.items():
        if _digest(name, entry) != sealed[_hash(name)][0]:
            raise IntegrityError(
                f"{name}: the stored child differs from what was saved; the file is damaged, fetch it again."
            )
    unverified = []
    for name, tensor in heads.items():
        same = matches(sealed_heads[_hash(name)], _head_fingerprint(tensor))
        if same is False:
            raise IntegrityError(
                f"{name}: the stored tensor differs from what was saved; the file is damaged, fetch it again."
            )
        if same is None:
            unverified.append(name)
    for name, entry in children.items():
        same = matches(sealed[_hash(name)][1], entry.fingerprint())
        if same is False:
            raise BaseMismatchError(
                f"{name}: the base weights differ from those that the adapter was made for; load it onto the base "
                "model (and revision) named in its adapter_config.json."
            )
        if same is None:
            unverified.append(name)
    if unverified:
        logger.warning(
            "%s and %d more tensors could not be verified: the adapter was made on a bfloat16 base and this one is "
            "float16, or the other way round. Load the base in the precision in which it was published to have it "
            "checked.",
            unverified[0],
            len(unverified) - 1,
        )
