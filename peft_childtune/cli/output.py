"""Folders that appear whole or not at all, and safetensors files rewritten tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..files import sync, umask

__all__ = ["new_folder", "refuse_existing", "rewrite_shard"]

_CHUNK = 1 << 24  # bytes copied at a time
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


def refuse_existing(target: Path) -> None:
    """Raise unless nothing, or an empty folder, is at `target`.

    Raises:
        FileExistsError: something is.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target}: exists and is not an empty folder; choose another one, or remove it first.")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target`, and rename it to `target` if all goes well; else remove it.

    Raises:
        FileExistsError: `target` exists and is not an empty folder.
    """
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    try:
        yield folder
        for path in folder.iterdir():
            sync(path)
        sync(folder)
        folder.chmod(0o777 & ~umask())
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync(target.parent)


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file that was opened soundly before, and where its data begin."""
    size = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(size)), 8 + size


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def rewrite_shard(
    source: Path,
    target: Path,
    *,
    rename: Callable[[str], str],
    edit: Mapping[str, Callable[[Tensor], None]],
    replace: Mapping[str, Tensor],
    add: Mapping[str, Tensor],
) -> int:
    """Write a safetensors file like another one, with some tensors edited; no more than one of them is in memory.

    Args:
        source: a sound safetensors file.
        target: written.
        rename: of each tensor of `source`, its name in `target`.
        edit: by the name in `source`; changes the tensor in place.
        replace: by the name in `source`: tensors that stand in for it.
        add: by the name in `target`: further tensors.

    Returns:
        The bytes of all tensors.
    """
    with source.open("rb") as old, target.open("wb") as new:
        header, start = _header(old)
        metadata = header.pop("__metadata__", {"format": "pt"})
        entries: list[tuple[str, str, list[int], int, str | Tensor]] = []
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if key in replace:
                entries.append(_entry(rename(key), replace[key]))
            else:
                begin, end = entry["data_offsets"]
                entries.append((rename(key), entry["dtype"], entry["shape"], end - begin, key))
        entries += [_entry(name, tensor) for name, tensor in add.items()]
        entries.sort(key=lambda entry: -_width(entry[1]))  # the widest first, as safetensors does: all stay aligned
        layout, at = {"__metadata__": metadata}, 0
        for name, dtype, shape, size, _ in entries:
            layout[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(layout, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        new.write(len(text).to_bytes(8, "little") + text)
        for _, dtype, shape, size, content in entries:
            if isinstance(content, Tensor):
                new.write(_raw(content))
                continue
            old.seek(start + header[content]["data_offsets"][0])
            if content in edit:
                tensor = torch.frombuffer(bytearray(old.read(size)), dtype=_TORCH[dtype]).view(shape)
                edit[content](tensor)
                new.write(_raw(tensor))
                continue
            while size:
                new.write(old.read(min(size, _CHUNK)))
                size -= min(size, _CHUNK)
    return at


def _entry(name: str, tensor: Tensor) -> tuple[str, str, list[int], int, str | Tensor]:
    return name, _DTYPES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size(), tensor


def _width(dtype: str) -> int:
    return _TORCH[dtype].itemsize if dtype in _TORCH else 1
