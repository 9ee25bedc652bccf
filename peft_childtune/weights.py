"""Deltas written into base weights and taken out again, and fingerprints that tell one base from another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import c_bool
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from .errors import DeltaError, UnsupportedError
from .kernels import merge_entries_, put_entries_
from .sparse import compose_entries

__all__ = [
    "FINGERPRINT_BYTES",
    "Fingerprint",
    "Replaced",
    "check_finite",
    "digest",
    "fingerprint",
    "matches",
    "merge_",
    "restore_",
    "sampled_digest",
]

SAMPLES = 1024  # untouched positions per tensor that a fingerprint looks at, evenly spaced
FINGERPRINT_BYTES = 33  # one dtype code, then four hashes of 8 bytes
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@dataclass(slots=True, eq=False)
class Replaced:
    """What a merge has replaced in one weight.

    Attributes:
        indices: `(nnz,)`, flat row-major positions; None for every position.
        entries: `(nnz,)`, or of the weight's shape, where every position is written.
        is_written: whether the merge took place; before that, there is nothing in `entries`.
    """

    indices: Tensor | None
    entries: Tensor
    is_written: c_bool


def merge_(
    weight: Tensor, indices: Tensor | None, values: Tensor, *, record: Callable[[Replaced], object] | None = None
) -> Replaced:
    """Write round(float(W) + delta) into `weight` in place and return the entries it replaced.

    Only the child's positions are written, and autograd sees nothing of it.

    Args:
        weight: any shape and layout.
        indices: `(nnz,)`, flat row-major positions; None for every position.
        values: `(nnz,)`, the delta.
        record: called with what will be returned before anything is written, so that even a write that is broken off
            can be undone.

    Raises:
        UnsupportedError: the weight is on the meta device.
    """
    weight = _present(weight)
    values = values.data.to(weight.device)
    entries = weight.clone() if indices is None else weight.new_empty(indices.numel())
    replaced = Replaced(indices, entries, c_bool(indices is None))
    if record is not None:
        record(replaced)
    if indices is None:
        weight.copy_(compose_entries(weight.reshape(-1), values).view(weight.shape))
    else:
        merge_entries_(weight, indices, values, replaced=entries, is_written=replaced.is_written)
    return replaced


def restore_(weight: Tensor, replaced: Replaced) -> None:
    """Write the entries that `merge_` replaced back into `weight` in place: bit for bit, or cast as the weight was."""
    weight = _present(weight)
    if not replaced.is_written.value:
        return
    if replaced.indices is None:
        weight.copy_(replaced.entries)
    else:
        put_entries_(weight, replaced.indices, replaced.entries.to(weight))


def _present(weight: Tensor) -> Tensor:
    if weight.device.type == "meta":  # torch would drop what is written
        raise UnsupportedError(
            f"a weight of shape {tuple(weight.shape)} is on the meta device, as accelerate leaves weights that it has "
            "offloaded, so nothing can be merged into it; bring it in first."
        )
    if is_sharded(weight):
        raise UnsupportedError(
            f"a weight of shape {tuple(weight.shape)} is divided among processes, so nothing can be merged into it; "
            "save the adapter, and merge it into a base that one process has loaded."
        )
    return weight.data


def check_finite(name: str, values: Tensor) -> None:
    """Raise if a delta has an entry that is no number.

    Raises:
        DeltaError: it has.

    Example:
        >>> check_finite("fc.weight", torch.tensor([-0.0, 1e-45]))
    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        at = int((~finite).nonzero()[0])
        raise DeltaError(
            f"{name}: {int((~finite).sum())} of its {values.numel()} deltas are not finite, the first one "
            f"{values[at].item()} at place {at}; such an adapter is neither saved nor loaded. Where training has "
            "diverged, go on from an earlier checkpoint with a lower learning rate; where save_dtype='float16' is too "
            "narrow (65504), use 'bfloat16' or None."
        )


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only its part of a tensor (`DTensor`, as FSDP2 leaves parameters)."""
    return type(tensor).__name__ == "DTensor"  # of parameters, too; not by the class, whose import takes half a second


def _raw(tensor: Tensor) -> memoryview:
    array = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # numpy's stubs know no buffers in this Python


def digest(name: str, *tensors: Tensor) -> bytes:
    """Return a 16-byte hash of a name and of the bits of some tensors, in order.

    Example:
        >>> digest("weight", torch.zeros(1)) == digest("weight", -torch.zeros(1))
        False
    """
    state = xxhash.xxh3_128(name.encode())
    for tensor in tensors:
        state.update(tensor.numel().to_bytes(8, "little"))
        state.update(_raw(tensor))
    return state.digest()


def sampled_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return 32 hexadecimal digits that depend on names, sizes and an even sample of the entries of some tensors.

    Example:
        >>> sampled_digest({"w": torch.ones(3)}) == sampled_digest({"w": torch.ones(3) + 1e-6})
        False
    """
    state = xxhash.xxh3_128()
    for name, tensor in tensors.items():
        if tensor.is_meta:
            state.update(name.encode())
            continue
        state.update(digest(f"{name} {tuple(tensor.shape)}", _sample(tensor.detach().reshape(-1))))
    return state.hexdigest()


def _sample(flat: Tensor) -> Tensor:
    return flat[:: max(1, -(-flat.numel() // SAMPLES))]


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of the sampled entries of one base tensor, in its own dtype and as rounded to the other two.

    Attributes:
        dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64: the dtype the base had.
        hashes: of the entries as float32 (exact for the three 2- and 4-byte dtypes), bfloat16 and float16.
        whole: hash of all entries, in their own dtype; 0 where it was not asked for.
    """

    dtype: int
    hashes: tuple[int, int, int]
    whole: int = 0

    def to_bytes(self) -> bytes:
        """Return the `FINGERPRINT_BYTES` bytes in which a file holds it."""
        return bytes([self.dtype]) + b"".join(h.to_bytes(8, "little") for h in (*self.hashes, self.whole))

    @classmethod
    def from_bytes(cls, raw: bytes) -> Fingerprint:
        """Return the fingerprint of exactly `FINGERPRINT_BYTES` bytes."""
        first, second, third, whole = (int.from_bytes(raw[i : i + 8], "little") for i in (1, 9, 17, 25))
        return cls(raw[0], (first, second, third), whole)


@torch.no_grad()
def fingerprint(base: Tensor, indices: Tensor, *, whole: bool = False) -> Fingerprint:
    """Return the fingerprint of a base tensor: all its entries at `indices`, and an even sample of the others.

    Args:
        base: floating point, any shape, nothing merged into it.
        indices: int64, `(nnz,)`, the child's flat positions.
        whole: also hash all of it, which reads it once.

    Example:
        >>> base = torch.linspace(0, 1, 8)
        >>> fingerprint(base, torch.tensor([1])) == fingerprint(base * 1.01, torch.tensor([1]))
        False
    """
    flat = base.detach().reshape(-1)
    entries = torch.cat([flat[indices.to(flat.device)], _sample(flat)]).cpu()
    wide = torch.promote_types(entries.dtype, torch.float32)
    hashes = [xxhash.xxh3_64_intdigest(_raw(entries.to(dtype))) for dtype in (wide, torch.bfloat16, torch.float16)]
    everything = xxhash.xxh3_64_intdigest(_raw(flat)) if whole else 0
    return Fingerprint(_CODES[base.dtype], (hashes[0], hashes[1], hashes[2]), everything)


def matches(saved: Fingerprint, found: Fingerprint) -> bool | None:
    """Return whether two fingerprints can come from one base; None where their dtypes allow no statement.

    Equal dtypes are compared bit for bit. Otherwise both are compared as rounded to the narrower dtype; between
    bfloat16 and float16 neither is a rounding of the other, and nothing can be said.
    """
    if saved.dtype == found.dtype:
        return saved.hashes[0] == found.hashes[0]
    narrow = {saved.dtype, found.dtype} - {0, 3}
    if len(narrow) == 2:
        return None
    if not narrow:  # float32 and float64: as bfloat16, which both can be rounded to
        return saved.hashes[1] == found.hashes[1]
    rounding = narrow.pop()
    return saved.hashes[rounding] == found.hashes[rounding]
