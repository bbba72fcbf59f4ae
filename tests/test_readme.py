"""The README's commands and code run as they stand, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_commands_run(tmp_path: Path) -> None:
    (block,) = fenced("sh")
    lines = [line.split("#")[0].strip() for line in block.splitlines() if line.strip()]
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "onecard"
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (tmp_path / "small" / "report.html").is_file()


def test_python_runs(tmp_path: Path) -> None:
    (block,) = fenced("python")
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True)
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_recipe_is_one() -> None:
    from onecard.passes import recipe_of

    (block,) = fenced("yaml")
    assert len(recipe_of(yaml.safe_load(block), "README").passes) == 2


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", TEXT))))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists(), target


def test_demo_output_is_real() -> None:
    """The pasted table has a line for each variant that the demo makes."""
    from onecard.methods import VARIANTS

    (pasted,) = re.findall(r"<!-- demo -->(.*?)<!-- /demo -->", TEXT, re.DOTALL)
    for recipe in VARIANTS:
        assert recipe.name.split()[0] in pasted
    assert "dense" in pasted and "perplexity" in pasted
