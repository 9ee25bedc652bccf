r"""The seal of an adapter: digests of what a weights file holds and fingerprints of the base it was made for.

The seal is one uint8 tensor, stored in the file only. Layout, little-endian, 56 + 57 n + 41 m bytes:

    8   magic "CTSEAL\0" and the format's major version
    2   the format's minor version
    2   zero
    4   required features, one bit each
    4   n, the number of covered base tensors
    4   m, the number of `modules_to_save` tensors
    16  digest of the configuration's own fields
    8   zero
    n x 57   hash of the name (8), digest of code and values (16), fingerprint of the base tensor (33)
    m x 41   hash of the name (8), fingerprint of the tensor (33)
    8   xxh3-64 of everything before it

Records are sorted by the hash of their name. Readers refuse another major version and required features that they do
not know. They accept a newer minor version, which may give a meaning to bytes that are zero here, but changes no
length.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from .codec import decode_child
from .errors import FormatError, IntegrityError
from .weights import FINGERPRINT_BYTES, Fingerprint, digest, fingerprint

__all__ = [
    "Seal",
    "Sealed",
    "child_digest",
    "head_fingerprint",
    "make_seal",
    "name_hash",
    "read_seal",
    "seal_bytes",
    "sealed_file_tensor",
]

_MAJOR = 1
_FEATURES = 0  # required ones that this release knows: none yet
_HEADER = struct.Struct("<7sBHHIII16s8s")
_CHILD_RECORD = struct.Struct(f"<8s16s{FINGERPRINT_BYTES}s")
_HEAD_RECORD = struct.Struct(f"<8s{FINGERPRINT_BYTES}s")
_MAGIC = b"CTSEAL\0"


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


def sealed_file_tensor(
    name: str, code: Tensor | None, values: Tensor | None, *, base: Callable[[], Tensor], whole: bool = False
) -> Sealed:
    """Return what the seal vouches for, of a base tensor for which a file holds this code and these values.

    Args:
        name: the base model's own name of the tensor.
        code: uint8, the coded child; None where nothing was kept.
        values: `(nnz,)`, the delta; None where nothing was kept.
        base: called for the base tensor, nothing merged into it, once the file has proved sound.
        whole: hash all of the base tensor.
    """
    empty = torch.zeros(0)
    code = empty.to(torch.uint8) if code is None else code.detach().cpu()
    values = empty if values is None else values.detach().cpu()

    def compute() -> Fingerprint:
        tensor = base()
        indices = torch.zeros(0, dtype=torch.int64)
        if code.numel():
            try:
                child = decode_child(code, shape=tuple(tensor.shape), nnz=values.numel())
            except FormatError as error:
                raise type(error)(f"{name}: {error}") from error
            if child.nnz != values.numel():
                raise IntegrityError(
                    f"{name}: {values.numel()} values for {child.nnz} kept entries; fetch the file again."
                )
            indices = child.indices()
        return fingerprint(tensor, indices, whole=whole)

    return Sealed(code, values, compute)


def name_hash(name: str) -> bytes:
    """Return the 8 bytes under which a seal holds a tensor."""
    return xxhash.xxh3_64_digest(name.encode())


def child_digest(name: str, entry: Sealed) -> bytes:
    """Return the 16 bytes that depend on a base tensor's name, and on the code and the delta stored for it."""
    # float32 holds every value of the narrower dtypes exactly, so a loader that widens does not break the digest
    return digest(name, entry.code, entry.values.to(torch.float32))


def head_fingerprint(tensor: Tensor) -> Fingerprint:
    """Return the fingerprint of all of a `modules_to_save` tensor."""
    if not tensor.is_floating_point():  # a counter, say: its bits are the same in every precision
        bits = int.from_bytes(digest("", tensor)[:8], "little")
        return Fingerprint(0, (bits, bits, bits), bits)
    return fingerprint(tensor, torch.arange(tensor.numel(), device=tensor.device))


@dataclass(frozen=True)
class Seal:
    """The content of a seal.

    Attributes:
        config: digest of the configuration's own fields.
        children: by the hash of the base tensor's name, the digest of its child and the base tensor's fingerprint.
        heads: fingerprints of `modules_to_save` tensors, likewise.
    """

    config: bytes
    children: dict[bytes, tuple[bytes, Fingerprint]]
    heads: dict[bytes, Fingerprint]


def seal_bytes(children: int, heads: int) -> int:
    """Return the length of the seal of so many covered tensors and `modules_to_save` tensors."""
    return _HEADER.size + children * _CHILD_RECORD.size + heads * _HEAD_RECORD.size + 8


def make_seal(children: Mapping[str, Sealed], heads: Mapping[str, Tensor], *, config: bytes) -> Tensor:
    """Return the seal, uint8 `(seal_bytes(...),)`, of what is about to be saved.

    Args:
        children: every covered base tensor, by the base model's own name of it.
        heads: every `modules_to_save` tensor, by the base model's own name of it.
        config: 16 bytes, the digest of the configuration's own fields.
    """
    out = bytearray(_HEADER.pack(_MAGIC, _MAJOR, 0, 0, 0, len(children), len(heads), config, bytes(8)))
    for name in sorted(children, key=name_hash):
        entry = children[name]
        out += _CHILD_RECORD.pack(name_hash(name), child_digest(name, entry), entry.fingerprint().to_bytes())
    for name in sorted(heads, key=name_hash):
        out += _HEAD_RECORD.pack(name_hash(name), head_fingerprint(heads[name]).to_bytes())
    out += xxhash.xxh3_64_digest(bytes(out))
    return torch.frombuffer(out, dtype=torch.uint8).clone()


def read_seal(seal: Tensor) -> Seal:
    """Return what a seal says.

    Args:
        seal: uint8, `(bytes,)`.

    Raises:
        FormatError: it is none, or one of a newer format.
        IntegrityError: it was changed since.
    """
    raw = seal.detach().cpu().contiguous().numpy().tobytes() if seal.dtype is torch.uint8 else b""
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise FormatError("child_tuning_seal: is not a seal; the file is damaged: fetch it again.")
    _, major, _, _, features, n, m, config, _ = _HEADER.unpack_from(raw)
    if major == _MAJOR and len(raw) != seal_bytes(n, m):
        raise FormatError(
            f"child_tuning_seal: {len(raw)} bytes, but {n} children and {m} heads need {seal_bytes(n, m)}; "
            "the file is damaged, fetch it again."
        )
    if xxhash.xxh3_64_digest(raw[:-8]) != raw[-8:]:
        raise IntegrityError("child_tuning_seal: differs from what was saved; the file is damaged, fetch it again.")
    if major != _MAJOR:
        raise FormatError(
            f"child_tuning_seal: has format version {major}, and this release reads version {_MAJOR}; update "
            "peft_childtune."
        )
    if unknown := features & ~_FEATURES:
        raise FormatError(
            f"child_tuning_seal: needs features (bits {unknown:#x}) that this release does not know; update "
            "peft_childtune."
        )
    at = _HEADER.size + n * _CHILD_RECORD.size
    children = {
        key: (digest, Fingerprint.from_bytes(base))
        for key, digest, base in _CHILD_RECORD.iter_unpack(raw[_HEADER.size : at])
    }
    heads = {key: Fingerprint.from_bytes(base) for key, base in _HEAD_RECORD.iter_unpack(raw[at:-8])}
    return Seal(config, children, heads)
