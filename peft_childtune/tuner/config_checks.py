"""What the fields of a configuration may hold: it may come from a stranger's file, and loaders size tensors by it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError, FormatError
from ..scores import MAX_NAME
from ..untrusted import shown

__all__ = ["check_types"]

_parser: Any = re._parser  # type: ignore[attr-defined]  # no public one tells how a pattern is built

_FLAGS = ("resample", "init_weights", "inference_mode", "pickled")
_NAMES = ("base_model_name_or_path", "revision", "task_type", "peft_version")
_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters")
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")  # PEFT reads them as such
# names: PEFT compares each with each module, and compiles a pattern from those of the last two
_MAX_NAMES = {"exclude_modules": 10_000, "modules_to_save": 256, "layers_pattern": 256}
_MAX_PATTERN = 4096  # characters
_LENGTH = 32  # ways of a repeat to end; four of them divide a name of 64 letters in some 32**4 ways
_MAX_WAYS = 16 * _LENGTH**4  # of a pattern to match one name: half a second of work
_MAX_SIZE = 1 << 62  # as the code of a child has it
_MAX_DEPTH = 4  # of the record of the selection, which is flat


def check_types(fields: Mapping[str, Any]) -> None:
    """Raise unless each field is of the type that all later code relies on.

    Raises:
        ConfigError: one is not.
        FormatError: a size in `child` is none.
    """
    for name in _FLAGS:
        if not isinstance(fields[name], bool):
            raise _wrong(name, fields[name], "True or False")
    for name in _NAMES:
        if fields[name] is not None and not isinstance(fields[name], str):
            raise _wrong(name, fields[name], "a string or None")
    score = fields["score"]
    if not isinstance(score, str) or not 0 < len(score) <= MAX_NAME or not score.isprintable():
        raise _wrong("score", score, f"the name of a score, of up to {MAX_NAME} printable characters")
    for name in _LISTS:
        # a single string is a pattern, or one name; PEFT would take that of modules_to_save letter by letter
        if isinstance(fields[name], str) and name not in ("modules_to_save", "target_parameters"):
            continue
        if fields[name] is not None and not (
            isinstance(fields[name], list | set | tuple) and all(isinstance(entry, str) for entry in fields[name])
        ):
            raise _wrong(name, fields[name], "a list of names or None")
        if len(fields[name] or ()) > _MAX_NAMES.get(name, _MAX_SIZE):
            raise _wrong(name, fields[name], f"{_MAX_NAMES[name]} names or fewer, or one pattern")
    for name in _PATTERNS:
        for pattern in _patterns(name, fields[name]):
            _check_pattern(name, pattern)
    _check_layers(fields["layers_to_transform"])
    _check_child(fields["child"])
    if not _is_record(fields["selection"], _MAX_DEPTH) or not isinstance(fields["selection"], dict | None):
        raise _wrong("selection", fields["selection"], "a table of strings and numbers, written by the selection")


def _wrong(name: str, value: object, right: str) -> ConfigError:
    return ConfigError(
        f"{name}={shown(value)} is of no use; give {right}. Where it comes from an adapter_config.json, that is "
        "damaged: save or fetch it again."
    )


def _check_layers(layers: object) -> None:
    numbers = layers if isinstance(layers, list | tuple | set) else [] if layers is None else [layers]
    if not all(type(number) is int and 0 <= number < _MAX_SIZE for number in numbers):
        raise _wrong("layers_to_transform", layers, "numbers of blocks, 0 or above, or None")


def _check_child(child: object) -> None:
    if child is None:
        return
    if not isinstance(child, dict) or not all(isinstance(name, str) for name in child):
        raise _wrong("child", child, "the table of sizes that was saved")
    for name, sizes in child.items():
        if not (
            isinstance(sizes, list | tuple)
            and len(sizes) == 2
            and all(type(size) is int and 0 <= size < _MAX_SIZE for size in sizes)
        ):
            raise FormatError(
                f"child: {shown(name)} has the sizes {shown(sizes)}; [kept entries, coded bytes] is expected. The "
                "configuration is damaged: save or fetch the adapter again."
            )


def _is_record(value: object, depth: int) -> bool:
    if isinstance(value, dict | list | tuple):
        inside = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_record(entry, depth - 1) for entry in inside)
    return value is None or isinstance(value, str | int | float)


def _patterns(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif name in ("layers_pattern", "modules_to_save") and value is not None:
        yield from value


def _check_pattern(name: str, pattern: str) -> None:
    """Raise unless a pattern can be matched in seconds: Python's matcher cannot be interrupted.

    What counts is in how many ways it could match the same name, all of which are tried before it is given up:
    repeats multiply them by the length, options by two, and ambiguous parts that are repeated raise them to a power.
    """
    ways = math.inf
    try:
        if len(pattern) <= _MAX_PATTERN:
            re.compile(pattern)
            ways = _ways(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{name}={shown(pattern)}: is no pattern ({error}); list the names of the modules instead, or correct it."
        ) from error
    if ways > _MAX_WAYS:
        raise ConfigError(
            f"{name}={shown(pattern)}: this pattern repeats an ambiguous group, has more than four repeats or many "
            f"options in a row, or is longer than {_MAX_PATTERN} characters, so matching it may take for ever; list "
            "the names of the modules instead."
        )


def _ways(parts: Any) -> float:
    """Return in how many ways a parsed pattern may match one name, at most."""
    total = 1.0
    for kind, content in parts:
        total *= _ways_of(str(kind), content)
    return total


def _ways_of(kind: str, content: Any) -> float:
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, part = content
        ways, (narrow, wide) = _ways(part), part.getwidth()
        if most == 1:
            return ways + 1 if least == 0 else ways
        if ways > 1 or narrow != wide:
            return math.inf
        return 1 if least == most else _LENGTH
    if kind == "SUBPATTERN":
        return _ways(content[-1])
    if kind == "ATOMIC_GROUP":
        return _ways(content)
    if kind in ("ASSERT", "ASSERT_NOT"):
        return _ways(content[1])
    if kind == "BRANCH":
        # alternatives that begin with different letters exclude each other
        starts: dict[Any, float] = {}
        for part in content[1]:
            first = part[0][1] if len(part) and str(part[0][0]) == "LITERAL" else None
            starts[first] = starts.get(first, 0.0) + _ways(part)
        return starts.pop(None, 0.0) + max(starts.values(), default=0.0)
    if kind == "GROUPREF_EXISTS":
        return sum(_ways(part) for part in content[1:] if part)
    return 1
