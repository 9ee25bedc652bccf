"""Compiling the extension, keeping it, and doing without it."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys

import pytest
import torch

from peft_childtune.kernels import extension as module
from peft_childtune.kernels import load_extension, take_entries, use_kernels

needs_compiler = pytest.mark.skipif(not module._compiler(), reason="needs a C compiler")


@pytest.fixture
def _fresh(tmp_path, monkeypatch, caplog):
    """Give a cache of its own to what is compiled, and forget it afterwards."""
    monkeypatch.setenv("PEFT_CHILDTUNE_CACHE", str(tmp_path))
    monkeypatch.delenv(module.SWITCH, raising=False)
    caplog.set_level(logging.INFO, logger=module.__name__)
    module._load.cache_clear()
    yield
    module._load.cache_clear()


def _kept(folder):
    return sorted(path.name for path in (folder / "kernels").iterdir())


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_it_is_compiled_once_and_found_by_the_next_process(tmp_path, monkeypatch, caplog):
    assert load_extension() is not None
    (name,) = _kept(tmp_path)
    assert "compiled extension.c with" in caplog.text
    assert f"into {tmp_path / 'kernels' / name}" in caplog.text
    module._load.cache_clear()
    monkeypatch.setattr(module, "_compiled", None)  # whoever compiles again, fails
    assert load_extension() is not None
    assert _kept(tmp_path) == [name]


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc", "cc --no-such-option"])
def test_without_a_compiler_that_works_torch_does_the_work(compiler, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("CC", compiler)
    assert load_extension() is None
    assert "torch's operations" in caplog.text
    assert take_entries(torch.tensor([1.0, 2.0]), torch.tensor([1])).tolist() == [2.0]
    assert not (tmp_path / "kernels").exists() or _kept(tmp_path) == []


@pytest.mark.usefixtures("_fresh")
def test_a_compiler_that_is_named_and_is_not_there_is_named_in_the_log(monkeypatch, caplog):
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert load_extension() is None
    assert "CC=/nowhere/cc is no command; unset it for cc, gcc or clang" in caplog.text


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("value", ["0", "false", "No", "OFF"])
def test_the_environment_can_forbid_it(value, monkeypatch, tmp_path):
    monkeypatch.setenv(module.SWITCH, value)
    assert load_extension() is None
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_block_can_do_without_it():
    with use_kernels(extension=False):
        assert load_extension() is None
        with use_kernels(extension=True):
            assert load_extension() is not None
        assert load_extension() is None


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_a_damaged_library_in_the_cache_is_made_again(tmp_path, caplog):
    load_extension()
    (name,) = _kept(tmp_path)
    kept = tmp_path / "kernels" / name
    size = kept.stat().st_size
    kept.unlink()  # not in place: the one that is loaded is mapped into memory
    kept.write_bytes(b"no library")
    module._load.cache_clear()
    assert load_extension() is not None
    assert kept.stat().st_size == size


@needs_compiler
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("mode", [0o777, 0o770], ids=oct)
def test_a_cache_that_others_can_write_to_is_not_used(mode, tmp_path, caplog):
    folder = tmp_path / "kernels"
    folder.mkdir()
    folder.chmod(mode)
    assert load_extension() is not None
    assert "for this process only" in caplog.text
    assert _kept(tmp_path) == []


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
    (tmp_path / "kernels").write_text("a file")
    assert load_extension() is not None


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_the_cache_belongs_to_the_user_alone(tmp_path):
    load_extension()
    assert stat.S_IMODE((tmp_path / "kernels").stat().st_mode) == 0o700


@needs_compiler
def test_processes_that_compile_at_the_same_time_all_have_it(tmp_path):
    script = "from peft_childtune.kernels import load_extension; assert load_extension() is not None"
    environment = os.environ | {"PEFT_CHILDTUNE_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(_kept(tmp_path)) == 1


@needs_compiler
@pytest.mark.usefixtures("_fresh")
def test_it_brings_no_threads_of_its_own(tmp_path):
    load_extension()
    (name,) = _kept(tmp_path)
    alone = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(tmp_path / 'kernels' / name)!r})"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 0 or "undefined symbol" in alone.stderr  # 0: it was compiled without OpenMP
