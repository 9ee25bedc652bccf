"""What the command shows: tables that stay readable when piped, one-line errors, progress on stderr."""

from __future__ import annotations

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from ..errors import ChildTuningError

__all__ = ["bar_over", "fail", "note", "printable", "reporting", "show_facts", "show_json", "show_table"]

P = ParamSpec("P")


def printable(text: object) -> str:
    r"""Return text in one line that cannot steer a terminal: names come from files.

    Example:
        >>> printable("layer.0\x1b[31m")
        "'layer.0\\x1b[31m'"
    """
    line = " ".join(str(text).split("\n"))
    return line if line.isprintable() else ascii(line)


def note(text: str) -> None:
    """Print a line to stderr."""
    print(f"childtune: {printable(text)}", file=sys.stderr)


def fail(text: str, *, code: int) -> typer.Exit:
    """Print a line to stderr and return the exit that goes with it."""
    note(text)
    return typer.Exit(code)


def reporting(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end in one line and an exit code where it ends in an error that is no bug.

    2 where something could not be read or written, 1 for everything that this library refuses.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        handler = _Notes()
        logger = logging.getLogger("peft_childtune")
        logger.addHandler(handler)
        try:
            with _quiet():
                command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of a pipe has enough, which typer ends quietly
        except OSError as error:
            told = f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
            raise fail(told, code=2) from error
        except ChildTuningError as error:
            raise fail(str(error), code=1) from error
        finally:
            logger.removeHandler(handler)

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars and warnings of transformers, PEFT and torch out of the way; errors still come."""
    from transformers.utils import logging as theirs

    verbosity, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|huggingface_hub)(\.|$)")
        try:
            yield
        finally:
            theirs.set_verbosity(verbosity)
            if bars:
                theirs.enable_progress_bar()  # type: ignore[no-untyped-call]


class _Notes(logging.Handler):
    """Warnings of the library, as lines on stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def bar_over(what: str, unit: str = "tensor") -> Callable[[Collection[str]], Iterable[str]]:
    """Return what shows progress over names on stderr, where that is a terminal."""
    return lambda names: tqdm(names, desc=what, unit=unit, disable=None, leave=False, file=sys.stderr)


def _console() -> Console:
    # piped, a line of the table is a line of text, however long; a terminal has its own width
    return Console() if sys.stdout.isatty() else Console(width=1000, color_system=None, legacy_windows=False)


def show_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair a line, aligned."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {printable(value)}")


def show_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[str]) -> None:
    """Print a table; columns are aligned right but for those in `left`."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(
            column, justify="left" if column in left else "right", overflow="fold", no_wrap=not sys.stdout.isatty()
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = _console()
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def show_json(content: dict[str, Any]) -> None:
    """Print JSON."""
    print(json.dumps(content, indent=2))
