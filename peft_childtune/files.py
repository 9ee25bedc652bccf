"""Safetensors files on disk: written whole or not at all, read with every length checked."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import FormatError

__all__ = ["load_tensors", "save_tensors", "settle", "sweep", "sync", "umask", "write_durably"]

_WINDOWS = os.name == "nt"
_UMASK = threading.Lock()  # two threads that read it at once would keep what one of them has set
_PREFIX = ".childtune-"
_TEMPORARY = re.compile(rf"{re.escape(_PREFIX)}\w+|\.tmp\w{{6}}")  # the latter: safetensors, through Rust's `tempfile`


def umask() -> int:
    """Return the process's umask; it can be read only by setting it, so other threads get the strictest meanwhile."""
    with _UMASK:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk; a folder only where the system can do that."""
    if _WINDOWS and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # network and FUSE file systems
            raise
    finally:
        os.close(handle)


def write_durably(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: an old one at `path` stays as it is until the new one is on the disk.

    It is written beside `path`, flushed and renamed, with the permissions that the umask asks for.
    """
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=_PREFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~umask())
            if _WINDOWS:  # where an open file cannot be renamed, and nothing is swept
                file.close()
            os.replace(name, target)  # while it is open: until then another process might sweep it away
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync(target.parent)


def settle(path: str | os.PathLike[str]) -> None:
    """Flush a file and its name to the disk, with the permissions that the umask asks for.

    safetensors' own `save_file`, which PEFT calls, renames like `write_durably`, but does neither of these.
    """
    os.chmod(path, 0o666 & ~umask())
    sync(Path(path))
    sync(Path(path).parent)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove what killed writers left in a folder: temporary files of ours and safetensors' that nobody is writing.

    Where this cannot be told (leases are Linux's), nothing is removed.
    """
    for path in Path(folder).iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file() and not _may_be_written(path):
            path.unlink(missing_ok=True)


def _may_be_written(path: Path) -> bool:
    try:
        import fcntl

        with open(path, "rb") as file:
            # granted only where nobody has it open for writing; a write lease would be broken by whoever opens the
            # file, another sweeper say, and the signal that tells us so, SIGIO, would end this process
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (ImportError, AttributeError, OSError):
        return True
    return False


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Save tensors as a safetensors file, as `write_durably` does."""
    write_durably(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata=dict(metadata)))


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
    except (SafetensorError, RuntimeError) as error:  # the latter: exchanged by a shorter one while it is read
        raise FormatError(f"{path}: is not a sound safetensors file ({error}); fetch or save it again.") from error
