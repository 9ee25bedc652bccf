"""Single entries of a weight, read and written in the order in which they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import extension, is_plain

__all__ = ["put_entries_", "take_entries"]

_SIZES = (2, 4, 8)  # bytes of an entry that the extension moves


def take_entries(tensor: Tensor, indices: Tensor) -> Tensor:
    """Return the entries of a tensor at some positions, without gradients.

    Args:
        tensor: any shape and layout.
        indices: int64 or int32, `(nnz,)`, flat row-major positions.

    Returns:
        `(nnz,)`, on the device of the tensor.

    Raises:
        IndexError: a position lies outside.

    Example:
        >>> take_entries(torch.tensor([[5.0, 6.0], [7.0, 8.0]]), torch.tensor([0, 3]))
        tensor([5., 8.])
    """
    entries = torch.empty(indices.numel(), dtype=tensor.dtype, device=tensor.device)
    if _move(tensor, indices, entries, writes=False):
        return entries
    return tensor.detach()[_place(tensor, indices)]


def put_entries_(tensor: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Write entries into a tensor in place, unseen by autograd; if a position lies outside, none is written.

    Args:
        tensor: any shape and layout.
        indices: int64 or int32, `(nnz,)`, flat row-major positions, none of them twice.
        entries: `(nnz,)`, of the dtype and on the device of the tensor.

    Raises:
        IndexError: a position lies outside.

    Example:
        >>> tensor = torch.zeros(2, 2)
        >>> put_entries_(tensor, torch.tensor([0, 3]), torch.tensor([1.0, 2.0]))
        >>> tensor
        tensor([[1., 0.],
                [0., 2.]])
    """
    if not _move(tensor, indices, entries, writes=True):
        tensor.data.index_put_(_place(tensor, indices), entries)


def _place(tensor: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    """Return the index of flat positions in a tensor, which a convolution's in channels_last needs."""
    return torch.unravel_index(indices.to(tensor.device, torch.int64), tensor.shape)


def _move(tensor: Tensor, indices: Tensor, entries: Tensor, *, writes: bool) -> bool:
    """Return whether the extension has moved the entries; it moves none if a position lies outside."""
    library = extension()
    size = tensor.element_size()
    if (
        library is None
        or size not in _SIZES
        or tensor.dtype != entries.dtype
        or indices.dtype not in (torch.int32, torch.int64)
        or indices.shape != entries.shape
        or not is_plain(tensor, indices, entries)
    ):
        return False
    failed = library.move_entries(
        tensor.data_ptr(),
        tensor.numel(),
        indices.data_ptr(),
        indices.dtype == torch.int64,
        indices.numel(),
        entries.data_ptr(),
        size,
        writes,
        torch.get_num_threads(),
    )
    return not failed
