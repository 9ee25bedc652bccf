"""A save that fails or is killed leaves the old adapter, or the new one, or two files that refuse each other."""

from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel

from peft_childtune import IntegrityError, UnsupportedError
from peft_childtune.files import settle, sweep, write_durably

from .killed_saves import PAIRS, base, saved

_WEIGHTS = "adapter_model.safetensors"


def _in(folder):
    return saved(PeftModel.from_pretrained(base(), folder))


def _outcome(folder, models):
    try:
        found = _in(folder)
    except IntegrityError:
        return "refused"
    return next(i for i, model in enumerate(models) if saved(model) == found)


def _temporary(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


class _Failing:
    """Stands in for a function: the n-th call raises, the others go through."""

    def __init__(self, real: Callable[..., object], n: int) -> None:
        self.real, self.left = real, n

    def __call__(self, *args: object, **kwargs: object) -> object:
        self.left -= 1
        if self.left == 0:
            raise OSError(28, "No space left on device")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("call", ["fsync", "replace", "chmod", "fdopen"])
def test_whichever_step_fails_the_folder_holds_the_old_or_the_new_adapter_or_is_refused(
    call, pair, tmp_path, monkeypatch
):
    models = PAIRS[pair]()
    failed, n = 0, 0
    while failed == n:  # until a save needs no n-th call
        n += 1
        models[0].save_pretrained(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, _Failing(getattr(os, call), n))
            try:
                models[1].save_pretrained(tmp_path)
            except OSError:
                failed += 1
        assert _outcome(tmp_path, models) in ({0, 1} if pair == "same child" else {1, "refused"})
        assert not _temporary(tmp_path)
    assert failed >= 1
    assert _outcome(tmp_path, models) == 1  # the last one came through


@pytest.mark.parametrize("pair", PAIRS)
def test_a_disk_that_is_full_at_any_byte_costs_the_new_adapter_and_never_the_old_one(pair, tmp_path):
    models = PAIRS[pair]()
    models[0].save_pretrained(tmp_path)
    old = {name: (tmp_path / name).read_bytes() for name in (_WEIGHTS, "adapter_config.json")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 1, 100, 5_000, 20_000):  # bytes that a file may have: the weights do not fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(Exception, match="File too large"):
                models[1].save_pretrained(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert {name: (tmp_path / name).read_bytes() for name in old} == old
        assert not _temporary(tmp_path)
    assert _in(tmp_path) == saved(models[0])


def test_the_new_configuration_of_another_child_is_refused_beside_the_old_weights(tmp_path):
    old, new = (model for model in PAIRS["other child"]())
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    (tmp_path / "old" / "adapter_config.json").write_bytes((tmp_path / "new" / "adapter_config.json").read_bytes())
    with pytest.raises(IntegrityError, match="do not belong together|different numbers of kept entries"):
        _in(tmp_path / "old")


def test_a_configuration_with_the_same_sizes_and_another_score_is_refused(tmp_path):
    model = PAIRS["same child"]()[0]
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"score": "magnitude"', '"score": "random"'))
    with pytest.raises(IntegrityError, match=r"adapter_config\.json: its fields are not those"):
        _in(tmp_path)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_both_files_have_the_permissions_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        PAIRS["same child"]()[0].save_pretrained(tmp_path)
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (_WEIGHTS, "adapter_config.json")}
    assert modes == {_WEIGHTS: mode, "adapter_config.json": mode}


def test_weights_and_configuration_and_folder_are_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed, real = set(), os.fsync

    def fsync(handle):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    PAIRS["same child"]()[0].save_pretrained(tmp_path)
    assert {tmp_path, tmp_path / _WEIGHTS} <= flushed
    assert any(path.name.startswith(".childtune-") for path in flushed)  # the configuration, before it was renamed


def test_a_save_removes_what_killed_ones_have_left_and_nothing_else(tmp_path):
    stale = [".tmpAbC123", ".childtune-abc_def1"]
    others = [".tmp", ".tmpAbC1234", "notes.tmp", ".tmpAbC124"]
    for name in [*stale, *others]:
        (tmp_path / name).write_text("left")
    with open(tmp_path / ".tmpAbC124", "a"):  # of a writer that lives
        PAIRS["same child"]()[0].save_pretrained(tmp_path)
        found = {path.name for path in tmp_path.iterdir()}
        assert found == {"README.md", _WEIGHTS, "adapter_config.json", *others}
    sweep(tmp_path)
    assert not (tmp_path / ".tmpAbC124").exists()


def test_a_reader_that_comes_while_a_file_is_swept_does_not_end_the_process(tmp_path):
    program = textwrap.dedent(
        """
        import fcntl, os, sys
        from peft_childtune.files import sweep

        folder, ask = sys.argv[1], fcntl.fcntl

        def ask_and_meet_a_reader(file, *args):
            ask(file, *args)
            if os.fork() == 0:
                os.open(file.name, os.O_RDONLY | os.O_NONBLOCK)
                os._exit(0)
            os.wait()

        fcntl.fcntl = ask_and_meet_a_reader
        sweep(folder)
        """
    )
    (tmp_path / ".childtune-stale").write_bytes(b"cut off")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.returncode, list(tmp_path.iterdir())) == (0, []), done.stderr


def test_a_file_that_is_about_to_be_renamed_is_not_swept_away(tmp_path, monkeypatch):
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (sweep(tmp_path), replace(a, b)))
    write_durably(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_where_leases_do_not_exist_nothing_is_swept(tmp_path, monkeypatch):
    (tmp_path / ".tmpAbC123").write_text("left")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    sweep(tmp_path)
    assert (tmp_path / ".tmpAbC123").exists()


def test_a_pickle_beside_an_older_safetensors_file_is_refused_for_loaders_would_take_that(tmp_path):
    models = PAIRS["same child"]()
    models[0].save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"holds adapter_model\.safetensors of an older save.*remove it"):
        models[1].save_pretrained(tmp_path, safe_serialization=False)


def test_a_configuration_that_is_saved_alone_removes_no_weights(tmp_path):
    model = PAIRS["same child"]()[0]
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"somebody's, and newer")
    model.peft_config["default"].save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.bin").read_bytes() == b"somebody's, and newer"


def test_a_safetensors_file_beside_an_older_pickle_is_what_is_loaded(tmp_path):
    models = PAIRS["same child"]()
    models[0].save_pretrained(tmp_path, safe_serialization=False)
    models[1].save_pretrained(tmp_path)
    assert _in(tmp_path) == saved(models[1])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["pickled"] is False


def test_what_is_written_durably_is_there_and_settling_a_missing_file_says_so(tmp_path):
    write_durably(tmp_path / "f", b"bytes")
    assert (tmp_path / "f").read_bytes() == b"bytes"
    with pytest.raises(FileNotFoundError):
        settle(tmp_path / "absent")


@pytest.mark.parametrize("kills", [pytest.param(100, marks=pytest.mark.long), 5])
def test_a_killed_save_leaves_the_old_or_the_new_adapter_or_two_files_that_refuse_each_other(kills, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.trust.killed_saves", str(tmp_path), str(kills), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    table = json.loads(run.stdout)
    assert set(table["same child"]["outcomes"]) <= {"number 0", "number 1"}
    assert set(table["other child"]["outcomes"]) <= {"number 0", "number 1", "refused"}
    for pair in table.values():
        assert sum(pair["outcomes"].values()) == kills
        assert pair["files"] == ["README.md", "adapter_config.json", _WEIGHTS]
