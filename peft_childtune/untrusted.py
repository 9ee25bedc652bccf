"""Files from strangers: their folder and their header are looked at before anything is loaded from them."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import FormatError, IntegrityError, UnsupportedError

__all__ = [
    "MAX_SCANNED",
    "PEFT_PREFIX",
    "TensorEntry",
    "check_sizes",
    "read_header",
    "refuse_pickle",
    "shown",
]

# JSON takes up to 24 times its length as Python objects: 8 MiB of it stay below 200 MB, and longer headers come with
# the tensors that need them (a table of 100,000 tensors has 17 MB)
MAX_FREE_HEADER_BYTES, MAX_HEADER_SHARE = 8 << 20, 1 / 32
MAX_SCANNED = 1 << 27  # units that are drawn or decompressed for a file alone: some 3 s on one core
PEFT_PREFIX = "base_model.model."  # what PEFT puts before the base model's own names
MAX_NAME = 1024  # characters; names of modules have some 100
MAX_SIZE = (1 << 63) - 1  # of one dimension: torch's sizes are int64, and zeros can make any product small

_NO_TABLE = (AttributeError, KeyError, TypeError)

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80


def shown(value: object) -> str:
    """Return a short, printable form of something from a file, for error messages.

    Example:
        >>> shown("a" * 1000)
        "'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    return _shortened.repr(value)


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """All its entries."""
        return math.prod(self.shape)


def refuse_pickle(path: str | os.PathLike[str]) -> None:
    """Raise if a file of weights is no safetensors file by its name: what else there is are pickles.

    Raises:
        UnsupportedError: it is not.
    """
    if Path(path).suffix != ".safetensors":
        raise UnsupportedError(
            f"{path}: is no safetensors file; a pickle can run any program when it is opened, so adapters of this "
            "method are not loaded from one. Save the adapter again with safetensors (`safe_serialization=True`, the "
            "default)."
        )


def check_sizes(
    folder: str | os.PathLike[str], child: Mapping[str, Sequence[int]], header: Mapping[str, TensorEntry]
) -> None:
    """Raise if a configuration lists more kept entries or coded bytes than are in the weights file beside it.

    Loaders make room by that list before they open the file.

    Raises:
        IntegrityError: it does.
    """
    for at, kind in enumerate(("values", "code")):
        stored: dict[str, int] = {}
        for key, entry in header.items():
            path, _, parameter = key.rpartition(f".child_tuning_{kind}.")
            stored[f"{path.removeprefix(PEFT_PREFIX)}.{parameter}"] = entry.numel if path else 0
        listed = {name: sizes[at] for name, sizes in child.items()}
        if sum(listed.values()) <= sum(stored.values()):
            continue
        name = next((name for name, count in listed.items() if count > stored.get(name, 0)), str(folder))
        found = f"there are {stored[name]}" if stored.get(name) else f"its child_tuning_{kind} is missing"
        raise IntegrityError(
            f"{shown(name)}: adapter_config.json lists {listed.get(name, sum(listed.values()))} entries of "
            f"child_tuning_{kind}, but {found} in {folder}; save or fetch the adapter again."
        )


def read_header(path: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Return the table of a safetensors file.

    On top of what safetensors itself refuses: two entries of one name (parsers differ in which of them they take),
    names that cannot be printed, sizes that no tensor has, and headers out of all proportion to the file.

    Raises:
        FormatError: the file is not sound.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_FREE_HEADER_BYTES + size * MAX_HEADER_SHARE:
                raise FormatError(
                    f"{path}: declares a header of {length} bytes in a file of {size}; its limit is "
                    f"{MAX_FREE_HEADER_BYTES + int(size * MAX_HEADER_SHARE)}. Fetch or save the file again."
                )
            with safe_open(str(path), framework="pt"):  # offsets, lengths, overlaps, types: all of it is checked here
                pass
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
        return {name: _entry(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    except (FormatError, FileNotFoundError):
        raise
    # the last four: a file that is exchanged while it is read, since safetensors opens it by its name, and twice
    except (SafetensorError, ValueError, RecursionError, OSError, RuntimeError, *_NO_TABLE) as error:
        raise FormatError(f"{path}: is not a sound safetensors file ({error}); fetch or save it again.") from error


class _DuplicateError(ValueError):
    """A JSON object with two entries of one name."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(one for one, other in zip(names, names[1:], strict=False) if one == other)
        raise _DuplicateError(f"the header has two entries named {shown(twice)}")
    return found


def _entry(path: str | os.PathLike[str], name: str, entry: dict[str, Any]) -> TensorEntry:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise FormatError(
            f"{path}: holds a tensor named {shown(name)}; a name is printable and has 1 to {MAX_NAME} characters. "
            "The file is damaged: fetch or save it again."
        )
    if any(size > MAX_SIZE for size in entry["shape"]):
        raise FormatError(f"{path}: {name} has the shape {shown(entry['shape'])}, above the limit {MAX_SIZE}.")
    return TensorEntry(entry["dtype"], tuple(entry["shape"]))
