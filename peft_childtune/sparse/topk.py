"""Exact top-k over many tensors, streamed: a radix histogram over float bits, no sort and no concatenation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError, ScoreError

_CPU_CHUNK, _DEVICE_CHUNK = 1 << 18, 1 << 24  # scores at a time: within the cache, and few launches
_DIGIT = 16  # bits per histogram
_FEW = 1 << 20  # scores of one digit that are simply sorted


def select_topk(scores: Mapping[str, Tensor], k: int) -> dict[str, Tensor]:
    """Return the positions of the `k` largest scores of all tensors together.

    Equal scores are taken from the first tensor and its lowest position first, so that every device gives the same
    answer. Narrower dtypes are compared as fp32; if any tensor is fp64, all are compared as fp64. `-0.0` equals `0.0`.

    Args:
        scores: any shapes, floating point; NaN is refused, infinities are not.
        k: how many to keep, between 0 and the number of all scores.

    Returns:
        For every name int64 `(n,)`, strictly increasing row-major positions, on the tensor's device.

    Raises:
        BudgetError: `k` is out of range.
        ScoreError: a score is NaN, or a tensor is not floating point.

    Example:
        >>> select_topk({"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[5.0, 2.0]])}, k=2)
        {'a': tensor([1]), 'b': tensor([0])}
    """
    total = sum(tensor.numel() for tensor in scores.values())
    if not 0 <= k <= total:
        raise BudgetError(f"scores: k={k} of {total} entries; use 0 <= k <= {total}.")
    flat = {name: _flat(name, tensor) for name, tensor in scores.items()}
    wide = any(tensor.dtype == torch.float64 for tensor in flat.values())
    dtype = torch.float64 if wide else torch.float32
    if k == total:
        for name, tensor in flat.items():
            for _, chunk in _chunks(tensor, dtype):
                _refuse_nan(name, chunk)
        return {name: torch.arange(tensor.numel(), device=tensor.device) for name, tensor in flat.items()}
    low, shift, left = _find_bucket(flat, k, dtype)
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64, device=tensor.device) for name, tensor in flat.items()}
    return _collect(flat, low=low, high=low + (1 << shift), left=left, dtype=dtype)


def _find_bucket(flat: dict[str, Tensor], k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return `(low, shift, left)`: keys of at least `low + 2^shift` are in, and `left` of those from `low` on."""
    bits = 64 if dtype == torch.float64 else 32
    shift, prefix, left = bits, 0, k
    while shift > 0:
        shift -= _DIGIT
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for name, tensor in flat.items():
            for _, chunk in _chunks(tensor, dtype):
                digits = _order_keys(chunk)
                if shift + _DIGIT == bits:
                    _refuse_nan(name, chunk)
                else:
                    digits = digits[(digits >> (shift + _DIGIT)) == prefix]
                digits = digits.bitwise_right_shift_(shift)
                # the first digit carries the sign
                digits = digits.add_(1 << 15) if shift + _DIGIT == bits else digits.bitwise_and_((1 << _DIGIT) - 1)
                histogram += torch.bincount(digits, minlength=1 << _DIGIT).cpu()
        if k == 0:
            return 0, 0, 0
        reached = histogram.flip(0).cumsum(0)
        from_top = int(torch.searchsorted(reached, left))
        digit = (1 << _DIGIT) - 1 - from_top
        population = int(histogram[digit])
        left -= int(reached[from_top]) - population
        prefix = digit - (1 << 15) if shift + _DIGIT == bits else (prefix << _DIGIT) | digit
        if population <= max(k, _FEW):
            break
    return prefix << shift, shift, left


def _collect(flat: dict[str, Tensor], *, low: int, high: int, left: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the positions with keys of at least `high`, and the best `left` of those in `[low, high)`."""
    floor = _key_to_float(low, dtype)
    all_equal = high - low == 1
    positions, certain, border_keys = {}, {}, []
    open_places = left
    for name, tensor in flat.items():
        found, sure = [], []
        for start, chunk in _chunks(tensor, dtype):
            at = _at_least(chunk, floor)
            keys = _order_keys(chunk[at])
            above = keys >= high if high < 1 << (63 if dtype == torch.float64 else 31) else torch.zeros_like(at).bool()
            if all_equal:  # the first ones win: the others need not be remembered
                keep = above | ((~above).cumsum(0) <= open_places)
                at, keys, above = at[keep], keys[keep], above[keep]
                open_places -= int((~above).sum())
            found.append(at + start)
            sure.append(above)
            border_keys.append(keys[~above].cpu())
        empty = torch.empty(0, dtype=torch.int64, device=tensor.device)
        positions[name] = torch.cat(found) if found else empty
        certain[name] = torch.cat(sure) if sure else empty.bool()
    border = torch.cat(border_keys)
    chosen = torch.zeros(border.numel(), dtype=torch.bool)
    chosen[torch.sort(border, descending=True, stable=True).indices[:left]] = True
    done = 0
    for name, above in certain.items():
        undecided = (~above).nonzero().flatten()
        above[undecided] = chosen[done : done + undecided.numel()].to(above.device)
        done += undecided.numel()
        positions[name] = positions[name][above]
    return positions


def _flat(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ScoreError(f"{name}: scores have dtype {tensor.dtype}; give a floating point dtype.")
    return tensor.detach().reshape(-1)


def _chunks(tensor: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    size = _CPU_CHUNK if tensor.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, tensor.numel(), size):
        yield start, tensor[start : start + size].to(dtype)


def _refuse_nan(name: str, chunk: Tensor) -> None:
    if bool(chunk.max().isnan()):  # max hands a NaN on, at a fraction of the cost of isnan over all
        raise ScoreError(f"{name}: a score is NaN; check the loss and the data for overflow before selecting.")


def _order_keys(values: Tensor) -> Tensor:
    """Return integers in the order of the floats: their bits, with those of negative ones turned round."""
    integer, top = (torch.int64, 63) if values.dtype == torch.float64 else (torch.int32, 31)
    bits = (values + 0.0).view(integer)  # + 0.0 makes -0.0 a 0.0
    return bits.bitwise_xor_((bits >> top).bitwise_and_((1 << top) - 1))


def _key_to_float(key: int, dtype: torch.dtype) -> float:
    integer, top = (torch.int64, 63) if dtype == torch.float64 else (torch.int32, 31)
    bits = key if key >= 0 else key ^ ((1 << top) - 1)
    value = float(torch.tensor(bits, dtype=integer).view(dtype))
    return -float("inf") if value != value else value  # below -inf there are only NaN patterns, already refused


def _at_least(chunk: Tensor, floor: float) -> Tensor:
    if chunk.device.type == "cpu":  # numpy compares five times faster than torch 2.13 on the CPU
        return torch.from_numpy(np.flatnonzero(chunk.numpy() >= chunk.new_tensor(floor).numpy()))
    return (chunk >= floor).nonzero().flatten()
