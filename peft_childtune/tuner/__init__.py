"""Floor 3: the method as PEFT sees it."""

from .callback import ChildTuningCallback
from .config import ChildTuningConfig
from .layer import ChildTuningLayer
from .model import ChildTuningModel
from .registration import register
from .selection import get_child_network, get_deltas, select_child_network, selection_report

__all__ = [
    "ChildTuningCallback",
    "ChildTuningConfig",
    "ChildTuningLayer",
    "ChildTuningModel",
    "get_child_network",
    "get_deltas",
    "select_child_network",
    "selection_report",
]

register(ChildTuningConfig, ChildTuningModel)
