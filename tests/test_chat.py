"""Chat templates: equal to transformers' rendering, and harmless when they are poisoned."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.runtime import template as child
from onecard.runtime.chat import (
    PLAIN_STOPS,
    Conversation,
    Renderer,
    chat_ids,
    chat_sampling,
    render_chat,
)
from onecard.runtime.sample import MOST_STOPS, Sampling

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- if loop.index0 == ns.last %}{%- set ns.seen = true %}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- " " + message["content"] + eos_token}}{%- endgeneration %}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not \
supported') }}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% set role = 'model' %}
    {% else %}
        {% set role = message['role'] %}
    {% endif %}
    {{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}
{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}
"""

ODDS = """\
{% macro line(m, name='x') %}{{ name ~ ':' ~ m.content }}{% endmacro %}
{% for m in messages %}
  {% if m.content == 'skip' %}{% continue %}{% endif %}
  {% if m.content == 'stop' %}{% break %}{% endif %}
{{ line(m, name=m.role|upper) }} {{ {'b': 1, 'a': [m.content, none, true]} | tojson }}
{{ m | tojson(indent=2) }} {{ dict(a=1)['a'] }} {{ '%s-%d' % (m.role, 3) }}
{{ pad_token is defined }}
{% endfor %}
{{ messages | map(attribute='role') | unique | join(', ') }}{{ '<&\\'"é中🐉>' | tojson }}
{{ missing }}{{ bos_token }}{{ eos_token }}{{ documents is none }}
"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "odds": ODDS}
U, A, S = "user", "assistant", "system"
TALKS = {
    "one": [(U, "Hello, who are you?")],
    "three": [(U, "  你好 🐉  "), (A, "<think>hm</think>\n\nHi <b>&amp;"), (U, "{{ 7 * 7 }} {% x")],
    "system": [(S, " Be brief.\n"), (U, "a\n\nb"), (A, "c"), (U, "skip"), (A, "stop"), (U, "e")],
    "broken": [(U, "a"), (U, "b")],
}


@pytest.fixture
def hf(stories: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(stories)


@pytest.fixture
def tok(stories: Path) -> Tokenizer:
    return Tokenizer(stories)


def talk(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in TALKS[name]]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("prompted", [True, False])
def test_rendering_equals_transformers(
    hf: Any, tok: Tokenizer, name: str, messages: str, prompted: bool
) -> None:
    tok.chat_template = TEMPLATES[name]
    try:
        expected = hf.apply_chat_template(
            talk(messages), chat_template=TEMPLATES[name], tokenize=False,
            add_generation_prompt=prompted,
        )  # fmt: skip
    except Exception as error:
        with pytest.raises(BadRequest, match="refuses") as seen:
            render_chat(tok, talk(messages), prompted)
        assert str(error) in seen.value.seen
        return
    assert render_chat(tok, talk(messages), prompted) == expected
    ids = hf(expected, add_special_tokens=False)["input_ids"]
    assert chat_ids(tok, talk(messages), prompted) == ids


def test_the_refusals_above_are_seen(tok: Tokenizer) -> None:
    for name, messages in (("mistral", "broken"), ("gemma", "system")):
        tok.chat_template = TEMPLATES[name]
        with pytest.raises(BadRequest, match=r"alternate|System role"):
            render_chat(tok, talk(messages))


def test_more_variables_reach_the_template(hf: Any, tok: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"é": "<1>"}}}]
    tok.chat_template = CHATML
    expected = hf.apply_chat_template(
        talk("one"), tools=tools, chat_template=CHATML, tokenize=False, add_generation_prompt=True
    )
    assert render_chat(tok, talk("one"), tools=tools) == expected


POISON = {
    "classes": "{{ ''.__class__.__mro__ }}",
    "classes by item": "{{ ''['__class__']['__base__'] }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "generator": "{{ (messages|map('upper')).gi_frame }}{{ messages.gi_frame.f_back }}",
    "mutation": "{{ messages.append(1) }}",
    "stored name": "{% set ns = namespace(__class__=1) %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "long range": "{{ range(10**10)|list }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}"
                     "{% endfor %}{% endfor %}",
    "silent loop": "{% set n = namespace(x=0) %}{% for a in range(99999) %}"
                   "{% for b in range(99999) %}{% set n.x = n.x + 1 %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop recursion": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "power": "{{ 10**(10**10) }}",
    "constant": "{{ 'x'|center(10**11) }}",
    "width": "{{ '%1000000000000d' % 1 }}",
    "format width": "{{ '{:>100000000000}'.format(1) }}",
    "doubling": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
                "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "doubled lists": "{% set n = namespace(s=[1, 2]) %}{% for i in range(60) %}"
                     "{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "comparison": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
                  "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
                  "{{ n.a == n.b }}",
    "output": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "operators": "{{ " + "-" * 50000 + "1 }}",
    "chain": "{{ 1" + "+1" * 60000 + " }}",
    "nested blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "nested loops": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "syntax": "{% for %}",
    "unknown": "{{ x|nothing }}",
    "huge": "a" * (child.LARGEST_TEMPLATE + 1),
    "type error": "{{ messages + 1 }}",
    "null": "{{ messages[99].content.upper() }}",
}  # fmt: skip


SILENT = {
    "classes by filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "classes by map": "{{ [''] | map(attribute='__class__') | first }}",
    "function": "{{ raise_exception.__globals__ }}",
    "clock": "{{ strftime_now.__globals__ }}",
    "state": "{{ self._TemplateReference__context }}{{ loop }}{{ caller }}{{ varargs }}",
}
"""What the sandbox hides without a word: it shows as nothing."""


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer(seconds=2)
    yield made
    made.close()


@pytest.mark.parametrize("name", POISON)
def test_poisoned_templates_are_bad_requests_in_time(renderer: Renderer, name: str) -> None:
    begin = time.monotonic()
    with pytest.raises(BadRequest, match="template") as seen:
        renderer.render(POISON[name], {"messages": talk("one")})
    assert time.monotonic() - begin < 20
    assert len(str(seen.value)) < 1500
    assert "root:" not in str(seen.value) and "uid=" not in str(seen.value)
    assert renderer.render("{{ messages[0].role }}", {"messages": talk("one")}) == "user"


@pytest.mark.parametrize("name", SILENT)
def test_hidden_things_show_as_nothing(renderer: Renderer, name: str) -> None:
    assert renderer.render(SILENT[name], {"messages": talk("one")}) == ""


def test_messages_are_data_and_never_templates(renderer: Renderer) -> None:
    messages = [{"role": "user", "content": "{{ ''.__class__ }}{% for"}]
    shown = renderer.render("{{ messages[0].content }}", {"messages": messages})
    assert shown == messages[0]["content"]


def test_only_plain_data_goes_in(renderer: Renderer) -> None:
    with pytest.raises(BadRequest, match="plain data"):
        renderer.render("{{ x }}", {"x": SimpleNamespace(secret=1)})
    with pytest.raises(BadRequest, match="characters"):
        renderer.render("{{ x }}", {"x": "a" * (child.LARGEST_INPUT + 1)})


def test_odd_text_survives_the_way_through(renderer: Renderer) -> None:
    odd = "\x00\r\n\u2028\ud83d 🐉\\\"'\n"
    assert renderer.render("{{ x }}", {"x": odd}) == odd


def test_a_dead_renderer_is_started_again() -> None:
    one = Renderer()
    assert one.render("a{{ x }}", {"x": 1}) == "a1"
    assert one.process is not None
    one.process.kill()
    one.process.wait()
    assert one.render("b{{ x }}", {"x": 2}) == "b2"
    one.close()
    one.close()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_child_ends_with_its_parent() -> None:
    code = ("from onecard.runtime.chat import Renderer; import os; r = Renderer(); "
            "r.render('x', {}); print(r.process.pid, flush=True); os._exit(0)")  # fmt: skip
    done = run_python(code)
    status = Path(f"/proc/{int(done.stdout)}/stat")
    for _ in range(50):
        if not status.exists() or ") Z " in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the rendering process outlived its parent")


def test_no_interpreter_is_failed_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FailedWork, match="renderer"):
        Renderer().render("x", {})


# The plain format, messages, history -------------------------------------------------------------


def test_the_plain_format(tok: Tokenizer) -> None:
    assert render_chat(tok, talk("system")[:4]) == (
        " Be brief.\n\n\nUser: a\n\nb\nAssistant: c\nUser: skip\nAssistant:"
    )
    assert render_chat(tok, talk("one"), False) == "User: Hello, who are you?"
    assert chat_ids(tok, talk("one"))[0] == tok.bos_id
    assert chat_sampling(tok, Sampling(stop=("x",))).stop == ("x", *PLAIN_STOPS)
    with pytest.raises(BadRequest, match="16 stop strings"):
        chat_sampling(tok, Sampling(stop=tuple(map(str, range(MOST_STOPS)))))
    tok.chat_template = CHATML
    assert chat_sampling(tok, Sampling()).stop == ()


def test_parts_of_text_are_joined(tok: Tokenizer) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render_chat(tok, [{"role": "user", "content": parts}], False) == "User: ab"


@pytest.mark.parametrize(
    "messages",
    [[], [{}], ["hi"], [{"role": "user"}], [{"role": 1, "content": "x"}],
     [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": "http://x"}]}],
     [{"role": "tool", "content": "x"}]],
)  # fmt: skip
def test_odd_messages_are_refused(tok: Tokenizer, messages: Any) -> None:
    with pytest.raises(BadRequest):
        render_chat(tok, messages)


class Scripted:
    """An executor that says given ids, whatever it hears."""

    max_context = 4096

    def __init__(self, tokenizer: Tokenizer, ids: list[int], fails_at: int = -1) -> None:
        self.vocab_size = tokenizer.size
        self.ids, self.fails_at, self.heard = ids, fails_at, [0]

    def open(self, capacity: int) -> Scripted:
        self.at = -1
        return self

    def prefill(self, ids: Any) -> Any:
        self.heard = list(ids)
        return self.step(0)

    def step(self, id: int) -> Any:
        self.at += 1
        if self.at == self.fails_at:
            raise FailedWork("the device is gone")
        logits = np.zeros(self.vocab_size, dtype=np.float32)
        logits[self.ids[self.at] if self.at < len(self.ids) else 2] = 1
        return logits

    def close(self) -> None:
        self.at = -1


def said(tok: Tokenizer, text: str) -> list[int]:
    return tok.encode(text)


def test_a_conversation_keeps_its_history(tok: Tokenizer) -> None:
    chat = Conversation(tok, system="Be brief.")
    executor = Scripted(tok, said(tok, "Hello there.\nUser: and"))
    text = "".join(piece.text for piece in chat.ask(executor, "Hi"))
    assert text.strip() == "Hello there."
    list(chat.ask(executor, "And now?"))
    assert [m["role"] for m in chat.messages] == [S, U, A, U, A]
    assert chat.messages[2]["content"] == "Hello there."
    assert tok.decode(executor.heard).endswith(
        "User: Hi\nAssistant: Hello there.\nUser: And now?\nAssistant:"
    )


def test_a_reader_who_stops_keeps_what_was_read(tok: Tokenizer) -> None:
    chat = Conversation(tok)
    executor = Scripted(tok, said(tok, "One day there was a girl"))
    pieces = chat.ask(executor, "Hi")
    assert chat.messages == []
    read = next(pieces).text + next(pieces).text
    pieces.close()  # type: ignore[attr-defined]
    assert chat.messages[1] == {"role": "assistant", "content": read.strip()}


def test_work_that_fails_leaves_the_history(tok: Tokenizer) -> None:
    chat = Conversation(tok)
    with pytest.raises(FailedWork, match="gone"):
        list(chat.ask(Scripted(tok, said(tok, "One day"), fails_at=1), "Hi"))
    assert chat.messages == []
    with pytest.raises(BadRequest, match="context"):
        chat.ask(Scripted(tok, []), "Hi", Sampling(max_tokens=5000))
    assert chat.messages == []


def test_chat_needs_no_torch(stories: Path, tmp_path: Path) -> None:
    shutil.copy(stories / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    code = ("import sys; sys.modules['torch'] = None\n"
            "from pathlib import Path\n"
            "from onecard.checkpoint.tokenizer import Tokenizer\n"
            "from onecard.runtime import engine, sample\n"
            "from onecard.runtime.chat import chat_ids\n"
            f"tok = Tokenizer(Path({str(tmp_path)!r}))\n"
            "print(len(chat_ids(tok, [{'role': 'user', 'content': 'hi'}])))")  # fmt: skip
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_answer_and_twice_the_talk(times: int) -> None:
    code = f"""
import contextlib, os, signal, sys
from onecard import cli
from onecard.runtime.chat import Conversation
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
ask = Conversation.ask
def interrupted(talk, *words, **more):
    with contextlib.closing(ask(talk, *words, **more)) as pieces:
        for place, piece in enumerate(pieces):
            for _ in range({times} if place == 2 and not talk.messages else 0):
                os.kill(os.getpid(), signal.SIGINT)
            print("piece", len(talk.messages), place, file=sys.stderr)
            yield piece
Conversation.ask = interrupted
sys.argv = ["onecard", "chat", "demo", "--max-tokens", "24", "--threads", "1", "--temperature", "0"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], input="Hello\nAnd now\n", text=True,
                          capture_output=True, check=False)  # fmt: skip
    if times == 2:
        assert done.returncode == 130 and "ended by" not in done.stderr, done.stderr
        return
    assert done.returncode == 0 and "ended by" in done.stderr, done.stderr
    assert "piece 0 2" in done.stderr and "piece 0 3" not in done.stderr, done.stderr
    assert "piece 2 0" in done.stderr, done.stderr  # what was read is in the history
