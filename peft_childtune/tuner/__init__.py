"""Floor 3: the method as PEFT sees it."""

from .base_check import verify_base
from .callback import ChildTuningCallback
from .config import ChildTuningConfig
from .inspection import get_child_network, get_deltas, selection_report
from .layer import ChildTuningLayer
from .memory import MemoryEstimate, estimate_memory
from .model import ChildTuningModel
from .registration import register
from .selection import select_child_network

__all__ = [
    "ChildTuningCallback",
    "ChildTuningConfig",
    "ChildTuningLayer",
    "ChildTuningModel",
    "MemoryEstimate",
    "estimate_memory",
    "get_child_network",
    "get_deltas",
    "select_child_network",
    "selection_report",
    "verify_base",
]

register(ChildTuningConfig, ChildTuningModel)
