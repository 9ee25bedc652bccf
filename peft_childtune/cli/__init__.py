"""The `childtune` command: what is in an adapter, whether it is sound, and to and from full checkpoints.

It needs the extra `cli` (typer and rich); without it, it says so.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command; exit with 0 (well), 1 (damaged, or not possible) or 2 (could not be tried)."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f'childtune: {missing} is not installed; run: pip install "peft_childtune[cli]"', file=sys.stderr)
        raise SystemExit(2) from None
    app(prog_name="childtune")
