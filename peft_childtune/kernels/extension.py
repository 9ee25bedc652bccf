"""The loops of `extension.c`, compiled by the machine's own C compiler on first use and kept for later processes.

Without a compiler, or on another system, everything runs on torch's operations: the same results, more slowly.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from .options import kernel_options

__all__ = ["is_plain", "load_extension"]

logger = logging.getLogger(__name__)

SWITCH = "PEFT_CHILDTUNE_EXTENSION"  # environment variable, read once a process
_OFF = ("0", "false", "no", "off")  # its values by which nothing is compiled or loaded
_SOURCE = Path(__file__).with_name("extension.c")
_SECONDS = 120  # a compiler that takes longer is given up
_BASIC = ["-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden"]
# The fastest first. OpenMP's library is left to torch, whose threads then do the work: with a second pool beside
# them, each would wait for the other's.
_VARIANTS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], [])

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FUNCTIONS = {
    "move_entries": [_POINTER, _LONG, _POINTER, _INT, _LONG, _POINTER, _LONG, _INT, _INT],
    "merge_entries": [_POINTER, _LONG, _POINTER, _INT, _LONG, _POINTER, _POINTER, _POINTER, _INT],
    "sampled_product": [_POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _LONG, _INT],
}


def load_extension() -> ctypes.CDLL | None:
    """Return the compiled functions; None if `use_kernels` or the environment says so, or if there is no compiler."""
    return _load() if kernel_options.extension else None


def is_plain(tensor: Tensor) -> bool:
    """Return whether C can read a tensor: on the CPU, contiguous, none of torch's subclasses or lazy negations."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is torch.nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | None:
    if os.environ.get(SWITCH, "").lower() in _OFF or os.name != "posix":
        return None
    compiler = _compiler()
    if not compiler:
        named = os.environ.get("CC")
        missing = (
            f"CC={named} is no command; unset it for cc, gcc or clang" if named else "no cc, gcc or clang is found"
        )
        logger.info("%s: children are handled by torch's operations alone.", missing)
        return None
    folder = _cache_folder()
    kept = [] if folder is None else [folder / f"extension-{_key([*compiler, *flags])}.so" for flags in _VARIANTS]
    reason = ""
    for path in filter(Path.exists, kept):
        try:
            return _opened(path)
        except OSError as error:  # damaged: it is made again
            reason = str(error)
    for place, flags in enumerate(_VARIANTS):
        try:
            return _compiled(compiler, flags, kept[place] if kept else None)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(getattr(error, "stderr", None) or error).strip()
    logger.info("%s cannot compile %s, so torch's operations are used: %s", compiler[0], _SOURCE.name, reason)
    return None


def _compiler() -> list[str]:
    """Return the command that compiles C, empty if there is none."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # no closing quotation
        named = []
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return []


def _compiled(compiler: list[str], flags: list[str], kept: Path | None) -> ctypes.CDLL:
    """Return the library that a compiler makes, and keep it at a path, if there is one.

    Raises:
        OSError: it cannot be run, or what it makes cannot be loaded.
        subprocess.SubprocessError: it failed.
    """
    with tempfile.TemporaryDirectory(dir=None if kept is None else kept.parent, prefix=".build-") as folder:
        objects, made = f"{folder}/extension.o", f"{folder}/extension.so"
        _run([*compiler, *_BASIC, *flags, "-c", str(_SOURCE), "-o", objects])
        _run([*compiler, "-shared", objects, "-o", made])
        library = _opened(Path(made))
        if kept is not None:
            os.replace(made, kept)  # whole or not at all: other processes may be about to load it
    how = " ".join(flags) or "the defaults"  # without -fopenmp it runs on one thread
    where = (
        "for this process only: no folder to keep it in that is this user's alone" if kept is None else f"into {kept}"
    )
    logger.info("compiled %s with %s %s", _SOURCE.name, how, where)
    return library


def _opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _FUNCTIONS.items():
        getattr(library, name).argtypes = arguments
    return library


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=_SECONDS)


def _key(command: list[str]) -> str:
    """Return what tells one compiled library from another: source, compiler, machine."""
    state = xxhash.xxh3_64(_SOURCE.read_bytes())
    program = Path(shutil.which(command[0]) or command[0])
    cpu = Path("/proc/cpuinfo")  # a home folder may be shared by machines of several kinds
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    for part in (*command, *_BASIC, str(program.stat().st_size), platform.platform(), features):
        state.update(part.encode() + b"\0")
    return state.hexdigest()


def _cache_folder() -> Path | None:
    """Return a folder that only this user can write to, or None if there is none."""
    try:
        root = os.environ.get("PEFT_CHILDTUNE_CACHE") or Path.home() / ".cache" / "peft_childtune"
        folder = Path(root) / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if found.st_uid == os.getuid() and not others_write and os.access(folder, os.W_OK) else None
