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
    ("passes", "evaluate", "export", "serve"), ("search", "inspect", "harness", "prove"),
    ("bench", "render", "demo", "terminal"), ("verbs",), ("cli",), ("__main__",),
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


def test_torch_free_verbs() -> None:
    """`inspect`, `info`, `recipes --help` and the reading side work where torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import onecard.checkpoint.shards, onecard.checkpoint.tokenizer, onecard.runtime.sample\n"
        "import onecard.kernels.cpu, onecard.inspect, onecard.render, onecard.nn.families\n"
        "import onecard.runtime.scheduler, onecard.runtime.chat, onecard.runtime.fake\n"
        "import onecard.runtime.cpu\n"
        "from onecard.cli import main\n"
        "main(['inspect', sys.argv[1]])\n"
    )
    data = PACKAGE / "shipped" / "model"
    done = subprocess.run(
        [sys.executable, "-c", code, str(data)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
