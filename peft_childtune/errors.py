"""The errors this library raises: one root, and under it the built-in that each error refines.

ChildTuningError
├── ConfigError           (ValueError)           an option, or two options together, that mean nothing
├── BudgetError           (ValueError)           a density that keeps nothing, or more than there is
├── DeltaError            (ValueError)           positions or values that are no sparse delta
├── ScoreError            (ValueError)           no data, no loss, or a score that is not finite
├── TargetError           (ValueError)           modules that cannot be wrapped, or names that match nothing
├── SelectionError        (RuntimeError)         no child yet, or one that must not be replaced
├── UnsupportedError      (NotImplementedError)  something PEFT offers and this method does not
├── FormatError           (ValueError)           bytes or files that break the format
│    └── IntegrityError                          well-formed, but not what was saved
├── BaseMismatchError     (ValueError)           an adapter made for other base weights
└── PeftVersionError      (ImportError)          a release of PEFT this library was not made for
"""

from __future__ import annotations

__all__ = [
    "BaseMismatchError",
    "BudgetError",
    "ChildTuningError",
    "ConfigError",
    "DeltaError",
    "FormatError",
    "IntegrityError",
    "PeftVersionError",
    "ScoreError",
    "SelectionError",
    "TargetError",
    "UnsupportedError",
]


class ChildTuningError(Exception):
    """Root of every error that this library raises on purpose."""


class ConfigError(ChildTuningError, ValueError):
    """An option, or two options together, that mean nothing."""


class BudgetError(ChildTuningError, ValueError):
    """A density that keeps nothing, or more than there is."""


class DeltaError(ChildTuningError, ValueError):
    """Positions or values that are no sparse delta: out of order, out of range, of different lengths."""


class ScoreError(ChildTuningError, ValueError):
    """Scores that cannot be computed: no data, no loss, or a value that is not finite."""


class TargetError(ChildTuningError, ValueError):
    """Modules that cannot be wrapped, or names that match nothing."""


class SelectionError(ChildTuningError, RuntimeError):
    """A child network that is not there yet, or that must not be replaced."""


class UnsupportedError(ChildTuningError, NotImplementedError):
    """Something that PEFT offers and this method does not."""


class FormatError(ChildTuningError, ValueError):
    """Bytes, a file or a configuration that break the format."""


class IntegrityError(FormatError):
    """A well-formed file that does not hold what was saved."""


class BaseMismatchError(ChildTuningError, ValueError):
    """An adapter that was made for other base weights."""


class PeftVersionError(ChildTuningError, ImportError):
    """A release of PEFT that this library was not made for."""
