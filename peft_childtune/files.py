"""Safetensors files on disk: written whole or not at all, read with every length checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import FormatError

__all__ = ["load_tensors", "save_tensors"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Save tensors as a safetensors file; an old file at `path` stays whole until the new one is complete.

    The file is written beside `path`, flushed to the disk and renamed, with the permissions that the umask asks for
    (safetensors' own `save_file` renames too, but does not flush, and leaves mode 0600).
    """
    target = Path(path)
    data = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=dict(metadata))
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        FileNotFoundError: nothing is there.
        FormatError: it is no sound safetensors file.
    """
    if os.path.isdir(path):
        raise FormatError(
            f"{path}: is a folder, no file; an adapter's folder is loaded with `PeftModel.from_pretrained`."
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except SafetensorError as error:
        raise FormatError(f"{path}: is not a sound safetensors file ({error}); fetch or save it again.") from error
