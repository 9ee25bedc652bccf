"""The command as it is called: from a shell, in a pipe, and where its extra is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import peft_childtune
from peft_childtune.cli import main

_ROOT = Path(peft_childtune.__file__).parents[1]


def _run(*arguments, program=("-m", "peft_childtune.cli")):
    return subprocess.run(
        [sys.executable, *program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )


def test_the_module_verifies_from_a_shell(made):
    result = _run("verify", made().adapter, "--base", made().base)
    assert (result.returncode, result.stderr) == (0, "")
    assert (
        result.stdout
        == f"{made().adapter}: sound, 32 tensors of the child and 2 tensors of heads. It fits {made().base}.\n"
    )


def test_an_error_is_one_line_on_stderr_and_no_traceback(tmp_path):
    result = _run("inspect", tmp_path / "nothing")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"childtune: {tmp_path / 'nothing'}: is no folder; name the folder that `save_pretrained` has written.\n"
    )


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from peft_childtune.cli import main; main()"
    result = _run(program=("-c", code))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"childtune: {missing} is not installed; run: pip install")
    assert result.stderr.count("\n") == 1


def test_the_package_declares_the_command_and_its_extra():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"childtune": f"{main.__module__}:{main.__name__}"}
    assert project["optional-dependencies"]["cli"] == ["rich", "typer"]


@pytest.mark.parametrize("command", ["inspect", "verify", "diff", "apply"])
def test_every_command_explains_itself(childtune, command):
    result = childtune(command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) > 8
    assert command in childtune("--help").stdout


def test_no_command_is_wrong_usage(childtune):
    assert childtune().exit_code == 2
    assert childtune("nonsense").exit_code == 2
