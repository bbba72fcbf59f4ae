"""Chat templates, rendered in a process of their own.

A template comes with the model: it is a stranger's program. Jinja's immutable sandbox keeps it from
Python's objects, but not from `range` in `range` in `range` or from a string that doubles itself
sixty times, and a thread cannot be stopped. So a small child process renders: its memory is capped
where the system can do that, its output is counted, and it is killed when its time is over. It
starts once (about a tenth of a second), answers in well under a millisecond, and ends when its
parent does. Only JSON goes in and out, so no live object ever meets a template.

The child runs this file by itself; it imports the standard library and jinja2, nothing of onecard.
The environment equals that of the transformers library: trim_blocks, lstrip_blocks, loop controls,
raise_exception, strftime_now, its tojson, and the `generation` tag (which changes no text).
"""

from __future__ import annotations

import datetime
import functools
import json
import signal
import sys
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LARGEST_TEMPLATE = 256 << 10
LARGEST_INPUT = 16 << 20
LARGEST_OUTPUT = 32 << 20
MEMORY = 1 << 30
SECONDS = 5


class RefusedError(TemplateError):
    """The template itself called raise_exception."""


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks a reply; rendering ignores it."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Environment(ImmutableSandboxedEnvironment):
    """The immutable sandbox with what chat templates expect."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
        )  # fmt: skip
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now,
                         "dict": _dict, "namespace": Namespace}  # fmt: skip
        del self.globals["lipsum"]


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name of the template's
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _named(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _named(name)
        super().__setitem__(name, value)


def _named(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {str(name)[:80]!r}")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


def _refuse(message: object) -> None:
    raise RefusedError(str(message)[:1000])


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    return Environment().from_string(template)


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of a template, in this process: without limits on time and memory."""
    pieces, size = [], 0
    for piece in _compiled(template).generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_OUTPUT:
            raise OverflowError(f"it writes more than {LARGEST_OUTPUT} characters")
    return "".join(pieces)


# The child ---------------------------------------------------------------------------------------


def answer(line: str) -> dict[str, str]:
    """One request's answer: {"text"} or {"error": kind, "seen"}."""
    try:
        request = json.loads(line)
        return {"text": render(request["template"], request["variables"])}
    except RefusedError as error:
        return {"error": "refused", "seen": str(error)}
    except SecurityError as error:
        return {"error": "unsafe", "seen": str(error)[:300]}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "seen": f"line {error.lineno}: {error}"[:300]}
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"error": "large", "seen": str(error)[:300] or type(error).__name__}
    except Exception as error:
        return {"error": "failed", "seen": f"{type(error).__name__}: {error}"[:300]}


def limit() -> None:
    """Cap memory, and let an orphan in an endless loop die, where the system can do that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 4 * SECONDS
    for kind, most in (("AS", MEMORY), ("CPU", seconds), ("CORE", 0)):
        number = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(number)[1]
        try:
            soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (soft, hard))
        except (ValueError, OSError):
            continue


def serve() -> None:
    """Answer requests, one JSON line each, until the input ends."""
    limit()
    print("ready", flush=True)
    for line in sys.stdin:
        limit()
        print(json.dumps(answer(line)), flush=True)


if __name__ == "__main__":
    serve()
