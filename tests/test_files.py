"""Saving is whole or not at all; loading refuses what is not sound."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_childtune import FormatError, files
from peft_childtune.files import load_tensors, save_tensors, settle

_OLD, _NEW = {"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0, 3.0])}


def test_tensors_and_metadata_come_back_bit_for_bit(tmp_path):
    tensors = {
        "float": torch.tensor([-0.0, float("inf"), 1e-42]),
        "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 3),
    }
    save_tensors(tensors, tmp_path / "f.safetensors", {"format": "x", "note": "y"})
    found, metadata = load_tensors(tmp_path / "f.safetensors")
    assert metadata == {"format": "x", "note": "y"}
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_other_readers_of_the_format_can_read_the_file(tmp_path):
    save_tensors(_NEW, tmp_path / "f", {})
    assert torch.equal(load_file(tmp_path / "f")["a"], _NEW["a"])


def test_strided_and_trainable_tensors_are_saved_by_value(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).t().requires_grad_()
    save_tensors({"t": tensor}, tmp_path / "f", {})
    assert load_tensors(tmp_path / "f")[0]["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_file_has_the_permissions_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors(_NEW, tmp_path / "f", {})
        assert os.umask(umask) == umask  # and the umask is left alone
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "fdopen"])
@pytest.mark.parametrize("error", [OSError(28, "no space left"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_the_old_file_stays_whole_when_saving_fails(tmp_path, monkeypatch, call, error):
    path = tmp_path / "f.safetensors"
    save_tensors(_OLD, path, {})

    def fail(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(type(error)):
            save_tensors(_NEW, path, {})
    assert torch.equal(load_tensors(path)[0]["a"], _OLD["a"])
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_the_bytes_are_on_the_disk_before_the_old_file_is_replaced(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"fsync {os.fstat(fd).st_size > 0}"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    save_tensors(_NEW, tmp_path / "f", {})
    assert calls[:2] == ["fsync True", "replace"]
    assert len(calls) == 3  # the folder, too, so that the new name survives a power cut


def test_the_umask_is_never_widened_for_other_threads(tmp_path, monkeypatch):
    asked, umask = [], os.umask
    before = umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: (asked.append(mask), umask(mask))[1])
    try:
        save_tensors(_NEW, tmp_path / "f", {})
    finally:
        umask(before)
    assert asked
    assert all(mask & 0o027 == 0o027 for mask in asked)


def test_a_file_system_that_cannot_flush_folders_is_saved_to(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    save_tensors(_NEW, tmp_path / "f", {})
    assert torch.equal(load_tensors(tmp_path / "f")[0]["a"], _NEW["a"])


def test_windows_opens_no_folders_flushes_only_what_can_be_written_and_renames_no_open_file(tmp_path, monkeypatch):
    opened, replace, descriptors = os.open, os.replace, {}

    def open_(path, flags, *args, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "permission denied")
        handle = opened(path, flags, *args, **options)
        descriptors[handle] = flags
        return handle

    def fsync(handle):
        if descriptors[handle] & (os.O_RDWR | os.O_WRONLY) == 0:
            raise OSError(errno.EBADF, "bad file descriptor")

    def replace_(source, target):
        if any(os.path.realpath(f"/proc/self/fd/{name}") == source for name in os.listdir("/proc/self/fd")):
            raise PermissionError(errno.EACCES, "in use")
        replace(source, target)

    monkeypatch.setattr(files, "_WINDOWS", True)
    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace_)
    save_tensors(_NEW, tmp_path / "f", {})
    settle(tmp_path / "f")
    assert torch.equal(load_tensors(tmp_path / "f")[0]["a"], _NEW["a"])


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        save_tensors(_NEW, tmp_path / "absent" / "f", {})


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "absent")


def _sound(path: Path) -> bytes:
    save_tensors(_NEW, path, {})
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:7],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"not a safetensors file at all",
        lambda raw: struct.pack("<Q", 1 << 60) + raw[8:],
        lambda raw: raw[:8] + b"[" + raw[9:],
        lambda raw: raw.replace(b'"F32"', b'"F99"'),
    ],
    ids=["empty", "no header", "short", "long", "text", "huge header", "no object", "unknown dtype"],
)
def test_damage_is_a_format_error_that_names_the_file(tmp_path, damage):
    path = tmp_path / "f"
    raw = _sound(path)
    path.write_bytes(damage(raw))
    with pytest.raises(FormatError, match=str(path)):
        load_tensors(path)
