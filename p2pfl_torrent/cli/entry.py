"""Parses the command line, runs a command, and turns what went wrong into one sentence."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from p2pfl_torrent.cli.arguments import parse
from p2pfl_torrent.cli.parent import end_with_parent
from p2pfl_torrent.core.errors import P2PFLError

SUCCESS, FAILURE, INTERRUPTED = 0, 1, 130


def _command(name: str) -> Callable[[Namespace], int]:
    """The function of a command; its module, and what that needs, is imported only now."""
    if name == "bootstrap":
        from p2pfl_torrent.cli.bootstrap import run
    elif name == "join":
        from p2pfl_torrent.cli.join import run
    else:
        from p2pfl_torrent.cli.demo import run
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``p2pfl-torrent`` with these arguments (by default the process's own).

    Returns:
        0 for success, 1 for a failure told in one sentence on stderr, 2 for arguments that cannot
        be understood, 130 after Ctrl-C or SIGTERM.
    """
    try:
        arguments = parse(argv)
    except SystemExit as told:  # argparse has printed help or its error already
        return told.code if isinstance(told.code, int) else FAILURE
    try:
        with _interruptible(last=argv is None):
            end_with_parent()
            return _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(arguments: Namespace) -> int:
    try:
        return _command(arguments.command)(arguments)
    except BrokenPipeError:
        # Whoever read our output is gone; nothing is left to tell, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except P2PFLError as error:
        if arguments.debug:
            traceback.print_exc()
        _tell(str(error))
        return FAILURE
    except Exception as error:  # noqa: BLE001 - the last line: a bug is told without a traceback
        if arguments.debug:
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        _tell(f"This is a bug ({what}); run it again with --debug and report what it prints.")
        return FAILURE


def _tell(sentence: str) -> None:
    # Other peers' words may be in it: what is no character must not reach a terminal.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(sentence.split()))
    print(f"p2pfl-torrent: {text}", file=sys.stderr)


@contextmanager
def _interruptible(*, last: bool) -> Iterator[None]:
    """Ctrl-C and SIGTERM both end a command cleanly, by KeyboardInterrupt.

    Args:
        last: nothing but the interpreter's own end comes after it, which a signal could only
            garble: none is heard then.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGTERM, _interrupt)
    if before[0] is signal.SIG_IGN:  # so a shell without job control starts what it puts behind
        signal.signal(signal.SIGINT, signal.default_int_handler)
    after = (signal.SIG_IGN, signal.SIG_IGN) if last else before
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, after[0])
        signal.signal(signal.SIGTERM, after[1])


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Not raised here: trio takes SIGINT over while it runs, to interrupt only where that is safe.
    signal.raise_signal(signal.SIGINT)
