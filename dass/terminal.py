"""What printing may not cost: a terminal that lacks a character, a reader that leaves."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Print line by line, with a ? for what cannot be shown; leave in silence when nobody reads, as in `| head`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's or a test's own is left as it is
            stream.reconfigure(errors="replace", line_buffering=True)  # else a line is lost, and told, at the very end
    try:
        yield
    except BrokenPipeError:
        leave()


def leave() -> NoReturn:
    """Exit as programs do whose output nobody reads any more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):  # else Python complains while it closes them
        os.dup2(nowhere, stream.fileno())
    sys.exit(128 + signal.SIGPIPE)
