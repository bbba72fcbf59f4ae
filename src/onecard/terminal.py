"""What a person sees of a verb at work, and Ctrl-C.

Lines and progress go to standard error. Before work begins a Ctrl-C ends the process at once: an
exception raised in the middle of an import is swallowed or shown by whatever is being imported. Only
while a `Progress` is open is it a KeyboardInterrupt, for there is something to put in order; and while a
chat answers it ends the answer, between two tokens, and not the talk. This file is imported before
Ctrl-C is looked after, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from io import TextIOWrapper
from typing import Any

INTERRUPTED = 130
"""The exit code that a shell gives for it: 128 + SIGINT."""

QUIET = 10.0
"""Seconds between lines of progress where there is no terminal."""


def say(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr)


def open_streams() -> None:
    """Standard streams that are closed lead nowhere; no file that is opened later takes their place."""
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a character is no failure
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


class Leave:
    """Answers a signal by ending the process at once, without a word."""

    def __init__(self, code: int) -> None:
        self.code = code

    def __call__(self, *ignored: object) -> None:
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\n")
        os._exit(self.code)


def leave_on_interrupt(code: int = INTERRUPTED) -> None:
    """From now on Ctrl-C ends the process, unless whoever started it wants Ctrl-C to do nothing."""
    now = signal.getsignal(signal.SIGINT)
    if now is signal.default_int_handler or isinstance(now, Leave):
        signal.signal(signal.SIGINT, Leave(code))


def raise_on_interrupt() -> None:
    """From now on Ctrl-C is a KeyboardInterrupt where it ended the process before."""
    if isinstance(signal.getsignal(signal.SIGINT), Leave):
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Stop:
    """While it is open the first Ctrl-C only sets `asked`; the second ends the process."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Stop:
        now = signal.getsignal(signal.SIGINT)
        self.leave = now if isinstance(now, Leave) else None
        if self.leave:
            signal.signal(signal.SIGINT, self)
        return self

    def __call__(self, *ignored: object) -> None:
        if self.asked and self.leave:
            self.leave()
        self.asked = True

    def __exit__(self, *failure: object) -> None:
        if self.leave:
            signal.signal(signal.SIGINT, self.leave)


class Progress:
    """A progress bar with time left on standard error; a few plain lines where that is no terminal."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.began = self.last = time.monotonic()
        self.first = self.done = self.total = 0
        self.bar: Any = None

    def __enter__(self) -> Progress:
        raise_on_interrupt()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"),
                TimeRemainingColumn(), console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=None)
        return self

    def __call__(self, done: int, total: int, what: str) -> None:
        """The time left is told from where this count began: it may go on from a former run, and when a
        count ends another may begin."""
        now = time.monotonic()
        if done < self.done or total != self.total:
            self.began, self.first = now, done
            if self.bar is not None:
                self.bar.reset(self.task, total=total)
        self.done, self.total = done, total
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=f"{self.what}: {what}")
        elif now - self.last > QUIET and self.first < done < total:
            self.last = now
            left = (now - self.began) / (done - self.first) * (total - done)
            say(f"{self.what}: {what}, {done} of {total}, about {left:.0f} s left")

    def __exit__(self, *failure: object) -> None:
        if self.bar is not None:
            self.bar.stop()
