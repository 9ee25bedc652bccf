"""Child-Tuning as a PEFT method."""

from .errors import ChildTuningError

__all__ = ["ChildTuningError"]
__version__ = "0.1.0"
