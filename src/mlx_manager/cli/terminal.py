"""What every command says in the same way: sentences, tables, sizes, exit codes.

Names of folders and texts of models come from elsewhere: none of it may steer the terminal.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

FAILED: Final = 1
USAGE: Final = 2
NO_SERVER: Final = 3
INTERRUPTED: Final = 130

UNTIL_CUT = 200
"""Columns where nobody can be asked how many there are: a table that is piped should not be folded."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Without the characters that move cursors and open escape sequences; line ends and tabs stay."""
    return _CONTROL.sub("", text)


def screen() -> Console:
    return Console(width=None if sys.stdout.isatty() else UNTIL_CUT, highlight=False)


def errors() -> Console:
    return Console(stderr=True, highlight=False)


def say(sentence: str) -> None:
    screen().print(Text(printable(sentence)), soft_wrap=True)


def warn(sentence: str) -> None:
    errors().print(Text(printable(sentence), "yellow"), soft_wrap=True)


def fail(sentence: str, code: int = FAILED) -> NoReturn:
    """Ends the command with a sentence that says what is wrong and, where we know it, what to do."""
    errors().print(Text(printable(sentence), "red"), soft_wrap=True)
    raise typer.Exit(code)


def leave(code: int = 0) -> NoReturn:
    """Ends a process in which MLX ran on a thread of its own, without taking the interpreter apart.

    Before Python 3.13 a joined thread may still be in its destructors. MLX's take the GIL, and if the interpreter is already being
    finalised then, the process aborts: one time in ten, after all its work is done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def print_table(rows: Iterable[Sequence[str | Text]], *, columns: Sequence[str] = (), numbers: Sequence[str] = ()) -> None:
    """`numbers` names the columns that are aligned as such; without columns there is no header."""
    rows = list(rows)
    grid = Table(box=None, pad_edge=False, header_style="dim", show_header=bool(columns))
    for name in columns or [""] * len(rows[0]):
        grid.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row))
    screen().print(grid)


def label(field: str) -> str:
    """`max_tokens` as a person reads it."""
    return field.replace("_", " ").capitalize()


def ability(told: Mapping[str, Any]) -> str:
    """Whether a model can do something, and how that is known."""
    return f"{'yes' if told['supported'] else 'no'} ({told['status']})"


def size(num_bytes: int) -> str:
    """In units of 1000, as the Hub counts: `3.9 MB`."""
    return _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"), " ")


def count(number: int) -> str:
    """`1.2B`, as parameters are counted."""
    return _scaled(number, ("", "K", "M", "B", "T"), "")


def tokens(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _scaled(number: float, units: tuple[str, ...], gap: str) -> str:
    if number < 1000:
        return f"{number:.0f}{gap}{units[0]}"
    for unit in units[1:]:
        number /= 1000
        if number < 999.5 or unit == units[-1]:
            return f"{number:.{0 if number >= 99.5 else 1}f}{gap}{unit}"
    raise AssertionError("there is a last unit")
