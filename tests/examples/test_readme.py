"""The README's code runs as written, on a tiny encoder and made-up sentences in place of the pinned ones."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from pathlib import Path
from typing import Any, get_args

import assets
import numpy as np
import pytest

from peft_childtune.scores.registry import _BUILT_IN
from peft_childtune.tuner.config import Granularity, Mode, SaveDtype, Scope

# Trainer's own dataloaders, on a machine without an accelerator
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")

README = (Path(__file__).parents[2] / "README.md").read_text()


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def printed(encoder: Path, table_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = list(csv.reader(table_file.read_text().splitlines()))[1:]
    texts, labels = [text for text, _ in rows], np.array([label == "pos" for _, label in rows], int)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(assets, "encoder_dir", lambda: encoder)
        patch.setattr(assets, "vader", lambda _: (texts, labels))
        patch.chdir(tmp_path_factory.mktemp("readme"))
        namespace = {"__name__": "__main__"}
        for block in code_blocks():
            exec(compile(block, "README.md", "exec"), namespace)
    return out.getvalue()


def test_every_code_block_of_the_readme_runs(printed: str) -> None:
    assert "ChildNetwork(" in printed


def test_the_loaded_model_of_the_readme_predicts_the_same(printed: str) -> None:
    assert "identical predictions: True" in printed


def test_the_foreign_base_of_the_readme_is_refused(printed: str) -> None:
    assert "the base weights differ" in printed


def test_the_readme_names_the_test_command_that_ci_runs() -> None:
    ci = (Path(__file__).parents[2] / ".ci" / "run").read_text()
    assert "python -m pytest -n 2" in README and "python -m pytest -n 2" in ci


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("mode", get_args(Mode)),
        ("score", tuple(_BUILT_IN)),
        ("scope", get_args(Scope)),
        ("granularity", get_args(Granularity)),
        ("save_dtype", get_args(SaveDtype)),
    ],
)
def test_the_readme_lists_every_choice_of_an_option(option: str, choices: Any) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| `{option}` |"))
    assert all(f"`{choice}`" in row or f'`"{choice}"`' in row for choice in choices)
