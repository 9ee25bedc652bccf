"""The step counter of a resampled child: the last 8 bytes of its code, saved, resumed and moved with it."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..errors import FormatError
from .header import MAGIC, RESAMPLED

STEP_BYTES = 8  # little-endian int64


def step_view(code: Tensor) -> Tensor:
    """Return the step as an int64 tensor of shape `(1,)`, without a sync.

    It shares memory with `code` where the step is aligned in its storage, as in any code that `encode_child` or a copy
    made; else it is computed.

    Args:
        code: of a resampled child, uint8, 1-D, on any device.

    Raises:
        FormatError: not a uint8 vector of at least 8 bytes.
    """
    if code.dtype != torch.uint8 or code.ndim != 1 or code.numel() < STEP_BYTES:
        raise FormatError(f"code: {code.dtype} of shape {tuple(code.shape)}; a step is in the last 8 bytes of a code.")
    tail = code.detach()[-STEP_BYTES:]
    if _is_viewable(tail):
        return tail.view(torch.int64)
    return (tail.to(torch.int64) << _shifts(tail.device)).sum(0, keepdim=True)


def read_step(code: Tensor) -> int:
    """Return the step counter.

    Raises:
        FormatError: not the code of a resampled child, or a negative step.

    Example:
        >>> from peft_childtune.codec import encode_child
        >>> from peft_childtune.sparse import ResampledUnits, TensorChild, UnitGrid
        >>> code = encode_child(TensorChild(UnitGrid((2, 4)), ResampledUnits(seed=0, stream=0, density=0.3)))
        >>> write_step_(code, 41)
        >>> advance_step_(code)
        >>> read_step(code)
        42
    """
    _refuse_other_codings(code)
    step = int(step_view(code))
    if step < 0:
        raise FormatError(f"step: {step}, below its limit 0; the code is damaged.")
    return step


def write_step_(code: Tensor, step: int) -> None:
    """Set the step counter in place.

    Raises:
        FormatError: not the code of a resampled child, or a step outside of [0, 2^63).
    """
    _refuse_other_codings(code)
    if not 0 <= step < 1 << 63:
        raise FormatError(f"step: {step} is out of range; use 0 <= step < 2^63.")
    _store_(code, torch.tensor([step], device=code.device))


def advance_step_(code: Tensor, by: Tensor | int = 1) -> None:
    """Add to the step counter in place, without a sync.

    Args:
        code: of a resampled child, on any device.
        by: an integer, or a tensor of one element on the same device: 0 where the optimizer skipped its step.
    """
    step = step_view(code)
    if isinstance(by, Tensor):
        by = by.detach().reshape(1).to(device=code.device, dtype=torch.int64)
    _store_(code, step + by)


def _store_(code: Tensor, step: Tensor) -> None:
    tail = code.detach()[-STEP_BYTES:]
    if _is_viewable(tail):
        tail.view(torch.int64).copy_(step)
    else:
        tail.copy_(((step >> _shifts(tail.device)) & 0xFF).to(torch.uint8))


def _is_viewable(tail: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a traced program cannot ask where a tensor begins
        return False
    return tail.stride(0) == 1 and tail.storage_offset() % STEP_BYTES == 0 and sys.byteorder == "little"


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(0, 8 * STEP_BYTES, 8, device=device)


def is_resampled(code: Tensor) -> bool:
    """Return whether a code is that of a resampled child, the only kind that has a step."""
    start = bytes(code[:4].tolist()) if code.dtype == torch.uint8 and code.ndim == 1 else b""
    return start[:2] == MAGIC and start[3:] == bytes([RESAMPLED])


def _refuse_other_codings(code: Tensor) -> None:
    if not is_resampled(code):
        raise FormatError("code: not of a resampled child; only such a code has a step.")
