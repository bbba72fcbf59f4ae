"""Imports only go down, also inside functions and under TYPE_CHECKING; core and the reading side of
checkpoint need no torch; nothing anywhere loads pickles or runs code from data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "onecard"
FLOORS = (
    ("core", "__init__"), ("kernels",), ("nn",), ("checkpoint", "parallel"),
    ("calibrate", "runtime", "windows"),
    ("passes", "evaluate", "export", "serve", "cost"), ("roofline",),
    ("search", "inspect", "harness", "prove"), ("fit",),
    ("bench", "render", "demo", "methods", "terminal", "running"), ("fitting",), ("verbs",),
    ("cli",), ("__main__",),
)  # fmt: skip
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every onecard import of a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in names]
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "onecard"]


def room(parts: tuple[str, ...]) -> str:
    """The folder or top-level file that a module lies in."""
    return parts[0] if parts and parts[0] in FLOOR else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    mine = room(path.relative_to(PACKAGE).with_suffix("").parts)
    for line, name in imports(path):
        other = room(tuple(name.split(".")[1:]))
        same = mine == other
        assert same or FLOOR[other] < FLOOR[mine], (
            f"{path}:{line}: {mine} (floor {FLOOR[mine]}) imports {other} (floor {FLOOR[other]})"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_pickle_and_no_code_from_data(path: Path) -> None:
    text = path.read_text()
    for pattern in (r"\bpickle\b(?!d)", r"torch\.load\(", r"allow_pickle=True", r"(?<![.\w])eval\(",
                    r"\bexec\(", r"yaml\.load\((?!.*Plain)", r"trust_remote_code"):  # fmt: skip
        assert not re.search(pattern, text), f"{path} contains {pattern}"


MENDED = [
    path for path in FILES if path.relative_to(PACKAGE).parts[0] in ("core", "calibrate", "passes")
]


@pytest.mark.parametrize("path", MENDED, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_people_can_mend_says_how(path: Path) -> None:
    """A recipe or a setting that is refused: what was asked, what was seen, and what to do."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "BadRequest":
            told = len(node.args) > 2 or any(word.arg == "do" for word in node.keywords)
            assert told, f"{path}:{node.lineno} says nothing of what to do"


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import io
import onecard.checkpoint.shards, onecard.checkpoint.tokenizer, onecard.runtime.sample
import onecard.kernels.cpu, onecard.inspect, onecard.render, onecard.nn.families
import onecard.runtime.scheduler, onecard.runtime.chat, onecard.runtime.fake
from onecard.cli import main
sys.stdin = io.StringIO("The function")
main(sys.argv[1:])
"""


@pytest.mark.parametrize("words, said", [
    (("inspect", "demo"), "LlamaForCausalLM"), (("info",), "native classes"),
    (("run", "demo", "The function", "--max-tokens", "3", "--json"), "decode_tokens_per_second"),
    (("chat", "demo", "--max-tokens", "3", "--json"), "decode_tokens_per_second"),
    (("eval", "demo", "--limit", "1", "--json"), "perplexity"),
    (("bench", "demo", "--prompt", "8", "--decode", "4", "--batch", "1", "--repeat", "1"), "decode"),
    (("run", "demo", "x", "--engine", "reference"), "needs torch"),
    (("recipes",), "gptq-int4"), (("recipes", "magnitude-20-gptq-int4"), "needs torch"),
], ids=lambda words: words[0])  # fmt: skip
def test_torch_free_verbs(words: tuple[str, ...], said: str) -> None:
    """What runs and inspects works where torch cannot be imported; what needs it says so."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == (2 if "needs" in said else 0), done.stderr
    assert said in (done.stderr if "needs" in said else done.stdout)
