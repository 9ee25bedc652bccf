"""The configuration's file: written whole or not at all, and never read beside weights that do not belong to it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ..errors import UnsupportedError
from ..files import settle, sweep, write_durably
from ..untrusted import check_sizes, read_header, refuse_pickle

__all__ = ["check_beside", "save_config"]


def check_beside(folder: str | os.PathLike[str], child: Mapping[str, Sequence[int]] | None, *, pickled: bool) -> None:
    """Check the weights in a configuration's folder as far as that goes without reading tensors.

    Args:
        folder: with the configuration; nothing is checked if it holds no weights.
        child: the configuration's table of sizes.
        pickled: whether the configuration says that the weights were saved as a pickle.

    Raises:
        FormatError: the file is not sound.
        IntegrityError: it is smaller than the table says.
        UnsupportedError: the weights are a pickle, and were not saved as one.
    """
    weights, pickle = Path(folder, SAFETENSORS_WEIGHTS_NAME), Path(folder, WEIGHTS_NAME)
    if weights.exists():
        header = read_header(weights)
        if child is not None:
            check_sizes(folder, child, header)
    elif pickle.exists() and not pickled:
        refuse_pickle(pickle)


def save_config(folder: str | os.PathLike[str], fields: Mapping[str, Any], *, alone: bool) -> None:
    """Save a configuration's fields, flush the weights that PEFT has just written beside it, and sweep the folder.

    PEFT asks nothing before it writes a pickle (`safe_serialization=False`). If the folder holds safetensors from an
    older save, which loaders would take, that pickle is removed again.

    Args:
        folder: where to.
        fields: of the configuration.
        alone: whether no weights have been saved just before, so that those in the folder are somebody's.

    Raises:
        UnsupportedError: it does.
    """
    weights, pickle = Path(folder, SAFETENSORS_WEIGHTS_NAME), Path(folder, WEIGHTS_NAME)
    pickled = pickle.exists()
    if pickled and weights.exists():
        if not alone and pickle.stat().st_mtime_ns > weights.stat().st_mtime_ns:
            pickle.unlink()
            raise UnsupportedError(
                f"{folder}: holds {SAFETENSORS_WEIGHTS_NAME} of an older save, which loaders would take; remove it, "
                "or save with safe_serialization=True, the default."
            )
        pickled = False
    Path(folder).mkdir(parents=True, exist_ok=True)
    saved = json.dumps({**fields, "pickled": pickled}, indent=2, sort_keys=True)
    write_durably(Path(folder, CONFIG_NAME), saved.encode())
    if weights.exists():  # afterwards: until the two fit each other, nothing loads
        settle(weights)
    sweep(folder)
