"""Files from strangers: what takes long is left to runs that ask for it (`-m long`)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "long: takes minutes; skipped unless asked for by `-m long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked `long` unless the marker was asked for."""
    if "long" in config.getoption("-m"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with `-m long`"))


@pytest.fixture(scope="session")
def in_a_process() -> Callable[..., str]:
    """Return a function that runs a module in a process of its own and returns what it prints; a signal fails."""

    def run(module: str, *arguments: object, timeout: float = 600) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode >= 0, f"{module} {arguments}: ended by signal {-done.returncode}\n{done.stderr}"
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
