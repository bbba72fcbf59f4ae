"""What the verbs share: the app they are added to, types of parameters, and how a report is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from onecard import __version__
from onecard.core.report import Report
from onecard.terminal import say


def shown_default(value: object) -> str | None:
    """A default as the help shows it: not at all where nothing is chosen by it."""
    if value is None or value is False or value == ():
        return None
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


app = App(
    name="onecard",
    help="Make a large model fit and run fast on the one card, or the one CPU, that you have.\n\n"
    "MODEL is a folder, a hub id such as org/name, or `demo` for the shipped model. --json prints one "
    "report; --debug shows the traceback of an error.",
    version=__version__,
    help_format="plaintext",
    default_parameter=Parameter(negative_iterable=(), show_default=shown_default),
    suppress_keyboard_interrupt=False,  # cli.py says what it means
)

Json = Annotated[
    bool, Parameter(name="--json", negative="", help="print one JSON report, nothing else")
]
Flag = Parameter(negative="")
Name = Annotated[str, Parameter(help="a model folder, hub id, or demo")]


def say_what_is_measured() -> None:
    """That kernels of this machine are timed before anything else, where that was not done yet."""
    from onecard import cost
    from onecard.kernels import cpu

    if cpu.available() and not cost.known():
        say("timing this machine's kernels, once; that takes half a minute or so")


@Parameter(name="*")
@dataclass(frozen=True)
class Writing:
    """Whether OUT is written, and what becomes of what lies there already."""

    dry_run: Annotated[
        bool,
        Flag,
        Parameter(help="print the plan (peak memory, disk, time, output size) and stop"),
    ] = False
    resume: Annotated[
        bool,
        Flag,
        Parameter(help="where OUT is finished already by the same command, say so and stop"),
    ] = False
    force: Annotated[
        bool,
        Flag,
        Parameter(help="replace OUT, and throw away unfinished work of another job"),
    ] = False


WRITING = Writing()


def show(found: Report, json: bool) -> None:
    """A report on standard output: JSON, or tables for people."""
    if json:
        print(found.to_json())
        return
    from rich.console import Console

    from onecard.render import terminal

    terminal(found, Console())


def show_finished(out: Path, json: bool) -> None:
    """The report of a result that was there before."""
    say(f"{out} is finished")
    show(Report.from_json((out / "report.json").read_text(encoding="utf-8")), json)
