"""Slow proofs (make proofs): many hard kills of real work, on the shipped model."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onecard.checkpoint.journal import partial_of
from onecard.checkpoint.shards import sha256_of

pytestmark = pytest.mark.slow


def hashes(out: Path) -> dict[str, str]:
    return {p.name: sha256_of(p) for p in out.iterdir() if not p.name.startswith("report.")}


@pytest.mark.parametrize("recipe", ["gptq-int4", "gptq-int3", "magnitude-20-gptq-int4", "rtn-int4"])
def test_killed_at_random_moments(tmp_path: Path, recipe: str) -> None:
    """kill -9 after a random time, again and again, until it gets through: the same bytes."""
    command = [sys.executable, "-m", "onecard", "compress", "demo", "OUT", "--recipe", recipe,
               "--samples", "32"]  # fmt: skip

    def run(out: Path) -> subprocess.Popen:
        words = [str(out) if word == "OUT" else word for word in command]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert run(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - began
    draw, kills, out = random.Random(recipe), 0, tmp_path / "out"
    for _ in range(60):
        process = run(out)
        try:
            process.wait(draw.uniform(0.3, 1.0) * seconds if kills < 15 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if out.exists():
            break
    assert kills >= 1 and hashes(out) == hashes(tmp_path / "whole")
    assert not partial_of(out).exists()
