"""Where a command's result goes: a JSON file, or standard output with the view moved aside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

import msgspec

from p2pfl_torrent.core.errors import P2PFLError

STDOUT = "-"


class OutputError(P2PFLError):
    """A result cannot be written; the text names the file."""


def write_json(target: str | None, result: Any) -> None:
    """Write a result to a file or, for ``-``, to standard output; nothing without a target.

    Raises:
        OutputError: the file cannot be written.
    """
    if target is None:
        return
    text = msgspec.json.format(msgspec.json.encode(result)).decode() + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}.") from error


def check_writable(target: str | None) -> None:
    """Find out before an hour of work that its result could not be written.

    Raises:
        OutputError: the file's directory is missing.
    """
    if target not in (None, STDOUT) and not Path(target).absolute().parent.is_dir():
        raise OutputError(f"{target} cannot be written: its directory does not exist.")


def view_stream(target: str | None) -> TextIO:
    """Where to show progress: not among a result on standard output."""
    return sys.stderr if target == STDOUT else sys.stdout
