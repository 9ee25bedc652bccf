"""Floor 3: the method as PEFT sees it."""

from .base_check import verify_base
from .callback import ChildTuningCallback
from .config import ChildTuningConfig
from .diagnosis import SelectionDiagnosis, diagnose_selection, selection_report
from .head import fit_head
from .inspection import get_child_network, get_deltas
from .layer import ChildTuningLayer
from .learning_rate import suggest_learning_rate
from .memory import MemoryEstimate, estimate_memory
from .model import ChildTuningModel
from .registration import register
from .selection import select_child_network
from .stability import SelectionStability, selection_stability

__all__ = [
    "ChildTuningCallback",
    "ChildTuningConfig",
    "ChildTuningLayer",
    "ChildTuningModel",
    "MemoryEstimate",
    "SelectionDiagnosis",
    "SelectionStability",
    "diagnose_selection",
    "estimate_memory",
    "fit_head",
    "get_child_network",
    "get_deltas",
    "select_child_network",
    "selection_report",
    "selection_stability",
    "suggest_learning_rate",
    "verify_base",
]

register(ChildTuningConfig, ChildTuningModel)
