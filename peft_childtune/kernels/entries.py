"""Single entries of a weight, read and written in the order in which they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .extension import is_plain, load_extension

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
    view, index = _indexed(tensor, indices)
    return view[index]


def put_entries_(tensor: Tensor, indices: Tensor, entries: Tensor) -> None:
    """Write entries into a tensor in place, unseen by autograd.

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
        view, index = _indexed(tensor, indices)
        view.index_put_(index, entries)


def _indexed(tensor: Tensor, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a view of a tensor, without gradients, and the index of flat positions in it."""
    positions = indices.to(tensor.device, torch.int64)
    if tensor.is_contiguous():
        return tensor.data.view(-1), (positions,)
    return tensor.data, torch.unravel_index(positions, tensor.shape)  # convolutions in channels_last


def _move(tensor: Tensor, indices: Tensor, entries: Tensor, *, writes: bool) -> bool:
    """Return whether the extension has moved the entries; raise if a position lies outside, with none moved."""
    library = load_extension()
    if library is None or not (is_plain(tensor) and is_plain(indices) and is_plain(entries)):
        return False
    size, is_wide, count = tensor.element_size(), indices.dtype == torch.int64, indices.numel()
    if entries.dtype != tensor.dtype or entries.numel() != count or size not in _SIZES:
        return False
    if not is_wide and indices.dtype != torch.int32:
        return False
    place = tensor.data_ptr(), tensor.numel(), indices.data_ptr(), is_wide, count
    if library.move_entries(*place, entries.data_ptr(), size, writes, torch.get_num_threads()):
        raise IndexError(f"positions span {int(indices.min())} to {int(indices.max())}, outside of {tensor.numel()}")
    return True
