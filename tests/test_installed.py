"""What `pip install .` brings: small, without torch, and it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT

MOST = 120 << 20
"""Bytes of everything but pip itself."""


@pytest.mark.slow
def test_a_plain_install_is_small_and_runs(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / "bin"
    packages = next((tmp_path / "venv" / "lib").glob("python3*")) / "site-packages"
    own = {path.name for path in packages.iterdir()}
    subprocess.run([programs / "python", "-m", "pip", "install", "-q", "--no-compile",
                    "--disable-pip-version-check", ROOT], check=True)  # fmt: skip
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "ONECARD_NATIVE")}
    for words in (("run", "demo", "The function", "--max-tokens", "4"), ("inspect", "demo"),
                  ("bench", "demo", "--prompt", "16", "--decode", "4", "--repeat", "1"),
                  ("eval", "demo", "--limit", "1"), ("info",)):  # fmt: skip
        done = subprocess.run([programs / "onecard", *words], env=plain, capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
    chat = subprocess.run([programs / "onecard", "chat", "demo", "--max-tokens", "4"], env=plain,
                          input="Hello\n", capture_output=True, text=True, check=False)  # fmt: skip
    assert chat.returncode == 0 and chat.stdout.strip(), chat.stderr
    assert not (packages / "torch").exists()
    sizes = {
        path.name: sum(f.lstat().st_size for f in (path.rglob("*") if path.is_dir() else [path]))
        for path in packages.iterdir() if path.name not in own
    }  # fmt: skip
    largest = sorted(sizes.items(), key=lambda pair: -pair[1])[:8]
    print(f"{sum(sizes.values()) / 2**20:.0f} MiB", largest, file=sys.stderr)
    assert sum(sizes.values()) < MOST, largest
