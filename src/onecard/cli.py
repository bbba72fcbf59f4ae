"""The entry point: words in, an exit code out. The verbs are in `verbs`.

Exit code 0: done; 1: work failed, what was finished is kept; 2: the request cannot be carried out and
nothing was touched; 130: interrupted. `--debug` shows the traceback. Nothing heavy is imported before
Ctrl-C is looked after.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING

from onecard.terminal import INTERRUPTED, leave_on_interrupt, open_streams, say

if TYPE_CHECKING:
    from cyclopts import CycloptsError

    from onecard.core.errors import Problem

CAPPED = {"compress", "distill"}
"""Verbs with --memory."""


def main(arguments: list[str] | None = None) -> None:
    """Carry out a command line. Turns problems into short messages and exit codes."""
    if arguments is not None:
        sys.exit(run(arguments))
    leave_on_interrupt()
    open_streams()
    code = run(sys.argv[1:])
    leave_on_interrupt(code)  # what is left is putting away
    sys.exit(code)


def run(words: list[str]) -> int:
    """The exit code of a command line, problems told on standard error."""
    # Threads that wait for each other by spinning stand still together on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]

    from cyclopts import CycloptsError, UnusedCliTokensError

    from onecard.core.errors import BadRequest, Problem
    from onecard.verbs import app

    try:
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
        return 0
    except UnusedCliTokensError as error:
        unused = " ".join(map(repr, error.unused_tokens or ()))
        advice = f"put a text of several words in quotes; {_help(error)}"
        return _fail(BadRequest(f"nothing takes {unused}", do=advice), debug)
    except CycloptsError as error:
        return _fail(BadRequest(str(error), do=_help(error)), debug)
    except Problem as problem:
        return _fail(problem, debug)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "rich", "yaml"):
            raise
        return _fail(BadRequest(f"this needs {error.name}, which is not installed",
                                do="pip install 'onecard[compress]'"), debug)  # fmt: skip
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept, the same command goes on")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:  # so rich ends where nobody reads on
        return 0
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space; the same command goes on" if full else ""
        what = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        return _fail(Problem(what, do=advice), debug)
    except RecursionError as error:
        return _fail(BadRequest("the input is nested too deeply", seen=str(error)), debug)
    except MemoryError:
        caps = "; a --memory cap helps" if set(words[:1]) & CAPPED else ""
        return _fail(
            Problem("the machine ran out of memory", do=f"end other programs{caps}"), debug
        )
    except Exception as error:
        return _fail(Problem(f"onecard failed: {type(error).__name__}: {str(error)[:200]}",
                             do="this is a bug; --debug shows where"), debug)  # fmt: skip


def _help(error: CycloptsError) -> str:
    """Where to read what the words of a command line may be."""
    verb = " ".join(error.command_chain or ())
    return f"onecard {verb + ' ' if verb else ''}--help lists what there is"


def _fail(problem: Problem, debug: bool) -> int:
    """Tell a problem; its exit code."""
    if debug:
        import traceback

        traceback.print_exc()
    say("error: " + "\n  ".join(filter(None, (problem.what, problem.seen, problem.do))))
    return problem.exit_code
