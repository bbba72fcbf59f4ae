"""Verbs that let a model speak: one reply, or a conversation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from onecard.core.errors import BadRequest
from onecard.core.report import Report, Value, environment
from onecard.running import AS_STORED, USUAL, Compute, Native, Whole, opened
from onecard.terminal import Stop, say
from onecard.verbs.shared import Flag, Json, Name, app, show

if TYPE_CHECKING:
    from onecard.runtime.chat import Conversation
    from onecard.runtime.engine import Piece, Result, Runner
    from onecard.runtime.sample import Sampling


@Parameter(name="*")
@dataclass(frozen=True)
class Choice:
    """How the next token is chosen, beyond its temperature."""

    top_k: Annotated[Whole, Parameter(help="keep the k likeliest tokens (0: all)")] = 0
    top_p: Annotated[float, Parameter(help="keep the likeliest tokens up to this probability")] = (
        0.95
    )
    min_p: Annotated[float, Parameter(help="drop tokens below this share of the likeliest")] = 0.0
    repetition_penalty: Annotated[float, Parameter(help="above 1 makes repeating less likely")] = (
        1.0
    )
    seed: Annotated[Whole | None, Parameter(help="the same seed gives the same text")] = None


LIKELY = Choice()


@app.command
def run(
    model: Name,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    max_tokens: Whole = 128,
    temperature: float = 0.8,
    choice: Choice = LIKELY,
    stop: tuple[str, ...] = (),
    ignore_eos: Annotated[bool, Flag] = False,
    compute: Compute = AS_STORED,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Continue PROMPT. The text goes to standard output, speeds to standard error.

    Parameters
    ----------
    prompt
        the text to continue; - reads it from standard input
    max_tokens
        new tokens at most
    temperature
        0 is greedy
    stop
        end where this text appears (may be given several times)
    ignore_eos
        go on behind the model's end token
    """
    from onecard.runtime.engine import generate, prompt_ids
    from onecard.runtime.sample import Sampling

    sampling = Sampling(max_tokens, temperature, stop=stop, ignore_eos=ignore_eos, **asdict(choice))
    text = sys.stdin.read() if prompt == "-" else prompt
    subject = opened(model, compute, native)
    ids = prompt_ids(subject.tokenizer, text)
    runner = subject.runner(len(ids) + max_tokens)
    result = stream(generate(runner, subject.tokenizer, ids, sampling), quiet=json)
    assert result is not None
    finish(result, subject.facts() | {"model": model}, json)


@app.command
def chat(
    model: Name,
    /,
    *,
    system: str | None = None,
    max_tokens: Whole = 512,
    temperature: float = 0.7,
    choice: Choice = LIKELY,
    compute: Compute = AS_STORED,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Talk with a model, line by line. An empty line or end of input ends it, Ctrl-C an answer.

    Parameters
    ----------
    system
        instructions in front of the conversation
    max_tokens
        new tokens per answer at most
    temperature
        0 is greedy
    """
    from onecard.runtime.chat import Conversation
    from onecard.runtime.sample import Sampling

    sampling = Sampling(max_tokens, temperature, **asdict(choice))
    subject = opened(model, compute, native)
    runner = subject.runner()
    talk = Conversation(subject.tokenizer, system)
    result = None
    sampling = replace(sampling, max_tokens=min(max_tokens, max(1, runner.max_context // 2)))
    while question := _ask():
        with Stop() as stop:
            pieces = _reply(talk, runner, question, sampling)
            result = stream(pieces, quiet=json, stop=stop) or result
    if result is not None:
        finish(result, subject.facts() | {"model": model}, json)
    elif json:
        show(Report((), environment(model=model)), True)


def _reply(
    talk: Conversation, runner: Runner, question: str, sampling: Sampling
) -> Generator[Piece, None, None]:
    """The answer; the oldest turns are left out, and that is said, when the context is full."""
    while True:
        try:
            return talk.ask(runner, question, sampling)
        except BadRequest:
            first = 1 if talk.messages and talk.messages[0]["role"] == "system" else 0
            if len(talk.messages) < first + 2:
                raise
            del talk.messages[first : first + 2]
            say("(the context is full: the oldest question and answer were left out)")


def _ask() -> str:
    """The next line of the user, empty at the end."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()


def stream(
    pieces: Generator[Piece, None, None], quiet: bool, stop: Stop | None = None
) -> Result | None:
    """Print pieces as they come; the whole result, or None where it was stopped."""
    result = None
    with contextlib.closing(pieces):
        for piece in pieces:
            if not quiet:
                sys.stdout.write(piece.text)
                sys.stdout.flush()
            result = piece.result
            if stop and stop.asked:
                break
    if not quiet:
        print(flush=True)
    return result


def finish(result: Result, facts: dict[str, Value], json: bool) -> None:
    """Speeds of the last answer, to standard error or as a report."""
    if json:
        show(Report(result.rows(), environment(**facts), notes=(("text", result.text),)), True)
        return
    rate = result.decode_tokens_per_second
    say(
        f"{result.prompt_tokens} prompt tokens at {result.prompt_tokens_per_second:.0f}/s, "
        f"{result.new_tokens} new"
        + (f" at {rate:.1f}/s" if rate else "")
        + f", first after {result.time_to_first_token * 1000:.0f} ms, ended by {result.finish}"
    )
