"""SDDMM: single entries of the product of two matrices, each a scalar product over the tokens.

For these the tokens have to lie side by side, so both matrices are transposed, a chunk of tokens at a time: the copies
then stay in the cache.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from .extension import is_plain, load_extension
from .hull import Hull, columns_of

__all__ = ["can_sample", "sampled_product"]

CHUNK = 128  # tokens
WIDE = 2048  # rows and columns together; of more, half as many tokens fill the cache of a core
DENSE = 32  # entries to each row or column, from which on the longer chunk is the faster one all the same
PAD = 16  # tokens; chunks are a multiple of it
TILE = 32  # tokens that torch transposes by one product with the identity


def sampled_product(a: Tensor, b: Tensor, *, indices: Tensor, hull: Hull) -> Tensor:
    """Return the entries of `a.T @ b` at a child's positions; see `child_gradient`, which chooses this path.

    Example:
        >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
        >>> sampled_product(a, b, indices=torch.tensor([1, 2]), hull=Hull((2, 2))).tolist()
        [5.0, 6.0]
    """
    rows = hull.size[0]
    row, column = hull.place(indices)
    starts = torch.searchsorted(row, torch.arange(rows + 1, dtype=row.dtype, device=row.device), out_int32=True)
    column = column.to(torch.int32)
    entries = _by_extension(a, b, starts, column, hull)
    return _by_torch(a, b, starts, column, hull) if entries is None else entries


def _by_extension(a: Tensor, b: Tensor, starts: Tensor, column: Tensor, hull: Hull) -> Tensor | None:
    """Return the entries, or None where the extension is not there or cannot read the arguments."""
    library = load_extension()
    if library is None or not a.dtype == b.dtype == torch.float32 or len(a) != len(b):
        return None
    one, other = columns_of(a, hull.rows).contiguous(), columns_of(b, hull.columns).contiguous()
    if not all(map(is_plain, (one, other, starts, column))):
        return None
    factors = one.data_ptr(), one.shape[1], other.data_ptr(), other.shape[1]
    entries = torch.empty(column.numel())
    tokens, lines, threads = a.shape[0], sum(hull.size), torch.get_num_threads()
    chunk = CHUNK // 2 if lines > WIDE and column.numel() < DENSE * lines else CHUNK
    chunk = min(chunk, -(-tokens // (threads * PAD)) * PAD)  # no thread goes without
    place = starts.data_ptr(), column.data_ptr(), entries.data_ptr()
    failed = library.sampled_product(*factors, tokens, *place, max(chunk, PAD), threads)
    return None if failed else entries


def _by_torch(a: Tensor, b: Tensor, starts: Tensor, column: Tensor, hull: Hull) -> Tensor:
    dtype = a.dtype if a.dtype in (torch.float32, torch.float64) else torch.float32
    entries = torch.zeros(column.numel(), dtype=dtype, device=a.device)
    _pass_the_beta_warning()
    product = torch.sparse_csr_tensor(starts, column, entries, size=hull.size, check_invariants=False)
    a, b = columns_of(a, hull.rows), columns_of(b, hull.columns)
    one, other = (torch.empty(0, dtype=dtype, device=a.device) for _ in range(2))
    for start in range(0, a.shape[0], CHUNK):
        chunk = slice(start, start + CHUNK)
        one = _tokens_last(a[chunk].to(dtype), out=one)
        other = _tokens_last(b[chunk].to(dtype), out=other)
        torch.sparse.sampled_addmm(product, one, other.t(), out=product)
    return product.values().to(a.dtype)


def _tokens_last(matrix: Tensor, *, out: Tensor) -> Tensor:
    """Return `(tokens, n)` as a contiguous `(n, tokens)`, in the memory of `out` if that has this shape.

    By products with the identity where it can: torch's own transposition runs in one thread, and no faster in one.
    """
    tokens, width = matrix.shape
    if out.shape != (width, tokens):
        out = matrix.new_empty(width, tokens)
    if matrix.device.type != "cpu" or tokens % TILE:
        return out.copy_(matrix.t())
    tiles = matrix.reshape(-1, TILE, width).transpose(1, 2)
    torch.bmm(
        tiles,
        _identity(matrix.dtype).expand(len(tiles), -1, -1),
        out=out.view(width, len(tiles), TILE).transpose(0, 1),
    )
    return out


@lru_cache(maxsize=2)
def _identity(dtype: torch.dtype) -> Tensor:
    return torch.eye(TILE, dtype=dtype, device="cpu")


@lru_cache(maxsize=1)
def _pass_the_beta_warning() -> None:
    """Let torch give its warning about compressed tensors, which it gives once, where nobody has to read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), dtype=torch.float32)


def can_sample(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether there is an entry-by-entry product for a kind of device: not every build of torch has one."""
    return _torch_can_sample(device_type) or (
        device_type == "cpu" and dtype == torch.float32 and load_extension() is not None
    )


@lru_cache(maxsize=8)
def _torch_can_sample(device_type: str) -> bool:
    one = torch.ones(1, 1, device=device_type)
    _pass_the_beta_warning()
    try:
        place = torch.tensor([0, 1], dtype=torch.int32, device=device_type)
        product = torch.sparse_csr_tensor(place, place[:1], one[0], size=(1, 1), check_invariants=False)
        return bool(torch.sparse.sampled_addmm(product, one, one).values().item() == 2)
    except (NotImplementedError, RuntimeError):
        return False
