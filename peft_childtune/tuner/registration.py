"""Registers the method with PEFT from outside: PEFT's own `register_peft_method` refuses names it does not ship."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import peft
from packaging.specifiers import SpecifierSet
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType

from ..errors import PeftVersionError

__all__ = ["PREFIX", "ChildTuningPeftType", "check_peft_version", "register"]

PREFIX = "child_tuning_"  # transformers derives it from the type's value, so it cannot be another one
_SUPPORTED = ("0.21", "0.22")  # from the first release to before the second


class ChildTuningPeftType(str, enum.Enum):  # noqa: UP042  # as PEFT's own `PeftType`
    """The method's entry in PEFT's tables; equal to, and hashed as, the string that the configuration file holds."""

    CHILD_TUNING = "CHILD_TUNING"


def check_peft_version(version: str) -> None:
    """Raise unless this library was made for that release of PEFT.

    Raises:
        PeftVersionError: another release.
    """
    low, high = _SUPPORTED
    # a specifier, unlike a comparison, keeps pre-releases of the upper bound out
    if not SpecifierSet(f">={low},<{high}").contains(version, prereleases=True):
        raise PeftVersionError(
            f"peft {version} is installed, but peft_childtune needs peft >= {low}, < {high}: it relies on "
            "internals that "
            f'change between releases. Run `pip install "peft>={low},<{high}"`.'
        )


def register(config_cls: type, model_cls: type) -> None:
    """Enter the method into PEFT's tables.

    A second call changes nothing, and where PEFT ships the name itself, neither does the first.

    Raises:
        KeyError: another package has taken the name or the prefix.
    """
    name = ChildTuningPeftType.CHILD_TUNING
    if name.value in [member.value for member in PeftType]:
        return
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(name) is config_cls:  # type: ignore[call-overload]
        return
    tables: list[Mapping[Any, Any]] = [
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    ]
    if any(name in table for table in tables) or PREFIX in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise KeyError(
            f"another package has registered {name.value} or the prefix {PREFIX} with PEFT; import only one of them."
        )
    PEFT_TYPE_TO_PREFIX_MAPPING[name] = PREFIX  # type: ignore[index]
    PEFT_TYPE_TO_CONFIG_MAPPING[name] = config_cls  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[name] = model_cls  # type: ignore[index]


check_peft_version(peft.__version__)
