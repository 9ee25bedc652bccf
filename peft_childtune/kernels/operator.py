"""Functions that `torch.compile` sees as operators of torch, and not into."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["operator"]

P = ParamSpec("P")
R = TypeVar("R")


def operator(name: str, *, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function an operator wherever a program is traced; elsewhere it stays a plain call, which is faster.

    Args:
        name: of the operator, in this library's namespace.
        fake: returns empty tensors of the shapes and dtypes of the results, for the same arguments.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        traced = torch.library.custom_op(f"peft_childtune::{name}", function, mutates_args=())
        traced.register_fake(fake)

        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return (traced if torch.compiler.is_compiling() else function)(*args, **kwargs)

        return run

    return register
