"""The package's floors: what may import what, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import peft_childtune

_PACKAGE = Path(peft_childtune.__file__).parent
_FILES = sorted(_PACKAGE.rglob("*.py"))
# what each part may import, beside itself and `errors`
_BELOW = {
    "errors": set(),
    "ranks": set(),
    "sparse": set(),
    "codec": {"sparse"},
    "kernels": {"sparse"},
    "scores": {"ranks", "sparse", "codec", "kernels", "untrusted"},
    "untrusted": set(),
    "files": {"sparse", "codec", "kernels"},
    "weights": {"sparse", "codec", "kernels"},
    "network": {"sparse", "codec", "kernels", "scores", "files", "untrusted", "weights"},
    "seal": {"sparse", "codec", "kernels", "scores", "files", "weights"},
    "verification": {"sparse", "codec", "kernels", "scores", "files", "weights", "seal"},
    "artifact": {"sparse", "codec", "kernels", "scores", "files", "weights", "seal", "verification", "untrusted"},
    "tuner": {
        "ranks",
        "sparse",
        "codec",
        "kernels",
        "scores",
        "files",
        "weights",
        "network",
        "seal",
        "verification",
        "untrusted",
    },
}


def _part(path: Path) -> str:
    return path.relative_to(_PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """Yield the absolute dotted name of everything that a file imports, at any depth."""
    package = ["peft_childtune", *path.relative_to(_PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _ids(path: Path) -> str:
    return str(path.relative_to(_PACKAGE))


@pytest.mark.parametrize("path", [p for p in _FILES if _part(p) in _BELOW], ids=_ids)
def test_a_part_imports_only_from_the_floors_below(path):
    parts = {name.split(".")[1] for name in _imports(path) if name.startswith("peft_childtune.")}
    assert parts - {_part(path), "errors"} <= _BELOW[_part(path)]


def test_every_part_below_the_surface_has_a_floor():
    assert {_part(p) for p in _FILES} - {"__init__", "cli", "card", "plots"} == set(_BELOW)


@pytest.mark.parametrize("path", [p for p in _FILES if _part(p) not in ("tuner", "cli", "__init__")], ids=_ids)
def test_nothing_below_the_tuner_imports_the_libraries_it_extends(path):
    roots = {name.split(".")[0] for name in _imports(path)}
    assert not roots & {"peft", "transformers", "accelerate"}


@pytest.mark.parametrize("path", [p for p in _FILES if _part(p) in ("sparse", "codec")], ids=_ids)
def test_the_pure_parts_know_no_modules_and_no_files(path):
    imported = set(_imports(path))
    assert not {
        n for n in imported if f"{n}.".startswith(("torch.nn.", "os.", "pathlib.", "io.", "tempfile.", "shutil."))
    }
    called = {
        node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
    }
    attributes = {
        f"{n.value.id}.{n.attr}"
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    assert not called & {
        "open",
        "read_text",
        "write_text",
        "read_bytes",
        "write_bytes",
        "memmap",
        "fromfile",
        "tofile",
    }
    assert "torch.nn" not in attributes


@pytest.mark.parametrize("path", _FILES, ids=_ids)
def test_no_file_is_longer_than_four_hundred_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def test_there_is_no_grab_bag_of_helpers():
    assert [p.name for p in _FILES if p.stem in ("utils", "helpers", "misc", "common")] == []


@pytest.mark.parametrize("path", _FILES, ids=_ids)
def test_every_file_says_what_it_is_about(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
