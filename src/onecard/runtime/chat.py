"""Messages to a prompt: the model's own chat template, or a plain format where it has none.

The plain format, whose reply ends where the next `User:` would begin:

    You are helpful.

    User: Hello
    Assistant: Hi.
    User: And now?
    Assistant:

Templates are strangers' programs: template.py runs them in a child process; `Renderer` here is the
parent's side, which kills the child when its time is over. All that goes wrong with a template is a
BadRequest. As in the transformers library, a special token's name inside a message becomes that
token: who serves strangers must keep such names out of their messages.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.runtime import template as child
from onecard.runtime.engine import Piece, Runner, generate
from onecard.runtime.sample import GREEDY, MOST_STOPS, Sampling

Message = Mapping[str, Any]
PLAIN_STOPS = ("\nUser:",)
PLAIN_NAMES = {"user": "User", "assistant": "Assistant"}
START_SECONDS = 60

WHAT = {
    "refused": "the model's chat template refuses these messages",
    "unsafe": "the model's chat template does what no template may",
    "syntax": "the model's chat template cannot be read",
    "large": "the model's chat template grows without bound",
    "failed": "the model's chat template fails on these messages",
}


class Renderer:
    """The parent's side of the rendering process; one per program is enough, calls take turns."""

    def __init__(self, seconds: float = child.SECONDS) -> None:
        self.seconds = seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        if len(template) > child.LARGEST_TEMPLATE:
            raise BadRequest(
                f"the model's chat template has {len(template)} characters",
                do=f"at most {child.LARGEST_TEMPLATE} are taken",
            )
        try:
            line = json.dumps({"template": template, "variables": dict(variables)})
        except (TypeError, ValueError, RecursionError) as error:
            raise BadRequest("the messages are not plain data", seen=str(error)[:200]) from error
        if len(line) > child.LARGEST_INPUT:
            raise BadRequest(
                f"the messages have {len(line)} characters", do=f"at most {child.LARGEST_INPUT}"
            )
        with self.lock:
            return self._ask(line)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _ask(self, line: str) -> str:
        if self.process is None or self.process.poll() is not None:
            self.close()
            self.process = _start()
        reply, late = _exchange(self.process, line + "\n", self.seconds)
        if late or not reply.endswith("\n"):
            self.close()
        if not reply.endswith("\n"):
            ended = f"it took more than {self.seconds} s" if late else "its process ended"
            raise BadRequest(WHAT["large"], seen=ended, do="use another template")
        answer = json.loads(reply)
        if "error" in answer:
            raise BadRequest(WHAT.get(answer["error"], WHAT["failed"]), seen=answer["seen"])
        return str(answer["text"])


def _start() -> subprocess.Popen[str]:
    code = (f"import sys; sys.path[:] = {sys.path!r}; import runpy; "
            f"runpy.run_path({str(Path(child.__file__))!r}, run_name='__main__')")  # fmt: skip
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, encoding="utf-8",
        )  # fmt: skip
    except OSError as error:
        raise FailedWork("the template renderer cannot be started", seen=str(error)) from error
    ready, _ = _exchange(process, "", START_SECONDS)
    if ready != "ready\n":
        process.kill()
        process.communicate()
        raise FailedWork("the template renderer did not start", do="is jinja2 installed?")
    return process


def _exchange(process: subprocess.Popen[str], line: str, seconds: float) -> tuple[str, bool]:
    """(the answering line or what there is of it, whether the process was killed for its time)."""
    assert process.stdin is not None and process.stdout is not None
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        return process.stdout.readline(), late.is_set()
    except OSError:
        return "", late.is_set()
    finally:
        timer.cancel()


RENDERER = Renderer()
atexit.register(RENDERER.close)


def render_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True,
    **more: Any,
) -> str:  # fmt: skip
    """The text of a conversation; `more` reaches the template as variables (`tools`, say)."""
    plain = [_checked(message) for message in messages]
    if not plain:
        raise BadRequest("the conversation is empty", do="give at least one message")
    if tokenizer.chat_template is None:
        return _plain(plain, add_generation_prompt)
    special = {key: value for key, value in tokenizer.special.items() if value}
    own = {"messages": plain, "add_generation_prompt": add_generation_prompt}
    nothing = {"tools": None, "documents": None}
    return RENDERER.render(tokenizer.chat_template, {**nothing, **special, **more, **own})


def chat_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True,
    **more: Any,
) -> list[int]:  # fmt: skip
    """The prompt's ids. A template writes its own begin token; the plain format gets it added."""
    text = render_chat(tokenizer, messages, add_generation_prompt, **more)
    return tokenizer.encode(text, special=tokenizer.chat_template is None)


def chat_sampling(tokenizer: Tokenizer, sampling: Sampling) -> Sampling:
    """The settings with the stop strings that the plain format needs."""
    if tokenizer.chat_template is not None:
        return sampling
    missing = tuple(s for s in PLAIN_STOPS if s not in sampling.stop)
    if len(sampling.stop) + len(missing) > MOST_STOPS:
        raise BadRequest(
            f"{len(sampling.stop)} stop strings were asked for",
            do=f"a model without a chat template leaves room for {MOST_STOPS - len(PLAIN_STOPS)}",
        )
    return replace(sampling, stop=sampling.stop + missing)


class Conversation:
    """A history of messages that `ask` prolongs by a question and its reply."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(
        self, executor: Runner, text: str, sampling: Sampling = GREEDY, **more: Any
    ) -> Generator[Piece, None, None]:
        """Pieces of the reply. Raises BadRequest at once, with the history as it was.

        Question and reply join the history when the pieces end or their reader stops: then with
        the part that was read. Work that fails leaves the history as it was.
        """
        question = {"role": "user", "content": text}
        ids = chat_ids(self.tokenizer, [*self.messages, question], **more)
        settings = chat_sampling(self.tokenizer, sampling)
        return self._reply(question, generate(executor, self.tokenizer, ids, settings))

    def _reply(
        self, question: Message, pieces: Generator[Piece, None, None]
    ) -> Generator[Piece, None, None]:
        reply = ""
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    reply += piece.text
                    yield piece
        except GeneratorExit:
            self._keep(question, reply)
            raise
        self._keep(question, reply)

    def _keep(self, question: Message, reply: str) -> None:
        if self.tokenizer.chat_template is None:
            reply = reply.strip()
        self.messages += [question, {"role": "assistant", "content": reply}]


def _checked(message: Message) -> dict[str, Any]:
    """A message with a role and text; parts of text are joined, other parts refused."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadRequest(f"a message is {str(message)[:80]}", do='{"role": ..., "content": ...}')
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise BadRequest("a message has parts that are not text", do="this model reads text")
        content = "".join(str(text) for text in texts)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise BadRequest(f"a message's content is {str(content)[:80]}", do="text is needed")
    return {**message, "content": content}


def _plain(messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    lines = []
    for message in messages:
        name = PLAIN_NAMES.get(message["role"])
        if name is None and message["role"] not in ("system", "developer"):
            raise BadRequest(
                f"a message has the role {message['role'][:40]!r}",
                do="without a chat template: system, user, assistant",
            )
        lines.append(f"{name}: {message['content']}" if name else f"{message['content']}\n")
    return "\n".join([*lines, "Assistant:"] if add_generation_prompt else lines)
