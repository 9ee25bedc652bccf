"""Files from strangers: processes of their own to open them in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


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
