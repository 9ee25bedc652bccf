"""Floor 1: autograd for weights of which only a child is trained."""

from .compose import Edit, compose_parameter
from .compose_cache import ComposeCache
from .conv import child_conv
from .entries import merge_entries_, put_entries_, take_entries
from .extension import load_extension
from .gate import StepGate
from .hull import Hull, hull_of
from .linear import child_linear
from .ops import plain_linear
from .options import KernelOptions, kernel_options, use_kernels

__all__ = [
    "ComposeCache",
    "Edit",
    "Hull",
    "KernelOptions",
    "StepGate",
    "child_conv",
    "child_linear",
    "compose_parameter",
    "hull_of",
    "kernel_options",
    "load_extension",
    "merge_entries_",
    "plain_linear",
    "put_entries_",
    "take_entries",
    "use_kernels",
]
