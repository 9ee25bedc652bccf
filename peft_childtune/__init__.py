"""Child-Tuning as a PEFT method: train a child network of a pretrained model, and save only its delta.

Importing this package registers the method with PEFT, so import it before loading an adapter.

    >>> from peft import get_peft_model
    >>> from peft_childtune import ChildTuningConfig, select_child_network

Source: Xu et al. 2021, Raise a Child in Large Language Model (arXiv:2109.05687).
"""

from .errors import (
    BaseMismatchError,
    BudgetError,
    ChildTuningError,
    ConfigError,
    DeltaError,
    FormatError,
    IntegrityError,
    PeftVersionError,
    ScoreError,
    SelectionError,
    TargetError,
    UnsupportedError,
)
from .network import ChildNetwork
from .scores import ScoreInputs, register_score
from .sparse import SparseDelta
from .tuner import (
    ChildTuningCallback,
    ChildTuningConfig,
    ChildTuningModel,
    MemoryEstimate,
    SelectionDiagnosis,
    SelectionStability,
    diagnose_selection,
    estimate_memory,
    fit_head,
    get_child_network,
    get_deltas,
    select_child_network,
    selection_report,
    selection_stability,
    suggest_learning_rate,
    verify_base,
)
from .verification import skip_verification

__all__ = [
    "BaseMismatchError",
    "BudgetError",
    "ChildNetwork",
    "ChildTuningCallback",
    "ChildTuningConfig",
    "ChildTuningError",
    "ChildTuningModel",
    "ConfigError",
    "DeltaError",
    "FormatError",
    "IntegrityError",
    "MemoryEstimate",
    "PeftVersionError",
    "ScoreError",
    "ScoreInputs",
    "SelectionDiagnosis",
    "SelectionError",
    "SelectionStability",
    "SparseDelta",
    "TargetError",
    "UnsupportedError",
    "diagnose_selection",
    "estimate_memory",
    "fit_head",
    "get_child_network",
    "get_deltas",
    "register_score",
    "select_child_network",
    "selection_report",
    "selection_stability",
    "skip_verification",
    "suggest_learning_rate",
    "verify_base",
]
__version__ = "0.1.0"
