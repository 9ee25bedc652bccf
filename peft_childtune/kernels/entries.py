"""Single entries of a weight, read and written in the order in which they lie in memory."""

from __future__ import annotations

from ctypes import byref, c_bool

import torch
from torch import Tensor

from ..sparse import compose_entries
from .extension import is_plain, load_extension

__all__ = ["merge_entries_", "put_entries_", "take_entries"]

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


def merge_entries_(tensor: Tensor, indices: Tensor, values: Tensor, *, replaced: Tensor, is_written: c_bool) -> None:
    """Add a delta to entries of a tensor in place, unseen by autograd, and note what these were.

    Whenever an exception comes, `is_written` tells whether the entries in `replaced` are to be written back.

    Args:
        tensor: any shape and layout.
        indices: int64 or int32, `(nnz,)`, flat row-major positions, none of them twice.
        values: `(nnz,)`, the delta, on the device of the tensor.
        replaced: `(nnz,)`, of the dtype and on the device of the tensor; its content is overwritten by the entries.
        is_written: false; becomes true.

    Raises:
        IndexError: a position lies outside.

    Example:
        >>> tensor, replaced, is_written = torch.ones(3), torch.empty(1), c_bool(False)
        >>> merge_entries_(tensor, torch.tensor([2]), torch.tensor([0.5]), replaced=replaced, is_written=is_written)
        >>> tensor.tolist(), replaced.tolist(), is_written.value
        ([1.0, 1.0, 1.5], [1.0], True)
    """
    library = load_extension() if tensor.dtype == values.dtype == replaced.dtype == torch.float32 else None
    place = None if library is None else _place(tensor, indices, values, replaced)
    if library is not None and place is not None:
        pointers = values.data_ptr(), replaced.data_ptr(), byref(is_written)
        _check(library.merge_entries(*place, *pointers, torch.get_num_threads()), tensor, indices)
        return
    replaced.copy_(take_entries(tensor, indices))
    merged = compose_entries(replaced, values)
    is_written.value = True  # before the write: what is written back too early is what is there
    put_entries_(tensor, indices, merged)


def _indexed(tensor: Tensor, indices: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a view of a tensor, without gradients, and the index of flat positions in it."""
    positions = indices.to(tensor.device, torch.int64)
    if tensor.is_contiguous():
        return tensor.data.view(-1), (positions,)
    return tensor.data, torch.unravel_index(positions, tensor.shape)  # convolutions in channels_last


def _move(tensor: Tensor, indices: Tensor, entries: Tensor, *, writes: bool) -> bool:
    """Return whether the extension has moved the entries; raise if a position lies outside, with none moved."""
    library, size = load_extension(), tensor.element_size()
    if library is None or size not in _SIZES or entries.dtype != tensor.dtype:
        return False
    place = _place(tensor, indices, entries)
    if place is None:
        return False
    failed = library.move_entries(*place, entries.data_ptr(), size, writes, torch.get_num_threads())
    _check(failed, tensor, indices)
    return True


def _place(tensor: Tensor, indices: Tensor, *rows: Tensor) -> tuple[int, int, int, bool, int] | None:
    """Return the arguments that tell C where entries are; None if it cannot read them, or the rows beside them."""
    if not (is_plain(tensor) and is_plain(indices)):
        return None
    is_wide, count = indices.dtype == torch.int64, indices.numel()
    if not is_wide and indices.dtype != torch.int32:
        return None
    for row in rows:
        if row.numel() != count or not is_plain(row):
            return None
    return tensor.data_ptr(), tensor.numel(), indices.data_ptr(), is_wide, count


def _check(failed: int, tensor: Tensor, indices: Tensor) -> None:
    if failed:
        raise IndexError(f"positions span {int(indices.min())} to {int(indices.max())}, outside of {tensor.numel()}")
