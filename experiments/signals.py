"""What a signal to stop does: one line, and an exit that lets everything be cleaned up on its way."""

import contextlib
import os
import signal
import sys
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO = 2.0
"""Seconds in which a signal is the same one once more: `timeout` sends it to the process and to its group."""

_stopped: list[float] = []


def exit_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end this process by `SystemExit`, with exit codes 130, 143 and 129.

    Those that are ignored stay so: under `nohup`, or in the background of a shell.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    if _stopped and time.monotonic() - _stopped[-1] < ECHO:
        return
    _stopped.append(time.monotonic())
    if os.environ.get("RANK", "0") != "0":  # torchrun's: the first process speaks for all
        sys.exit(128 + number)
    line = f"stopped by {signal.Signals(number).name}: the same command goes on with what is not done yet\n"
    with contextlib.suppress(OSError):  # the terminal may be gone; print could be in the middle of a line of its own
        os.write(2, (b"\n" if os.isatty(2) else b"") + line.encode())
    sys.exit(128 + number)
