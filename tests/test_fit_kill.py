"""A fit that is killed hard at each of its stages goes on from there and gives the same plan and bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from onecard.checkpoint.shards import sha256_of

pytestmark = pytest.mark.slow

STAGES = (
    "cache/onecard/sensitivity/.*.partial/journal.jsonl",  # looking at the blocks
    "cache/onecard/sensitivity/*.json",  # looked
    ".out.fit/plan.json",  # planned
    ".out.fit/texts.json",  # the original has written what it is judged on
    ".out.fit/.attempt-1.partial/journal.jsonl",  # compressing
    ".out.fit/attempt-1/report.json",  # compressed
    ".out.fit/attempt-1.gates.json",  # judged
)


def begun(folder: Path, model: Path, text: Path) -> subprocess.Popen[str]:
    words = ["fit", str(model), str(folder / "out"), "--size", "200KiB", "--quality", "0.2"]
    words += [
        "--calibration",
        str(text),
        "--held-out",
        str(text),
        "--context",
        "64",
        "--effort",
        "quick",
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "onecard", *words], text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> None:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error


def result(out: Path) -> tuple[dict[str, str], list[Any]]:
    """Hashes of the files that have to be the same, and the plan with what was predicted of it."""
    files = {p.name: sha256_of(p) for p in out.iterdir()
             if not p.name.startswith(("report.", "fit.json", ".onecard"))}  # fmt: skip
    said = json.loads((out / "fit.json").read_text())
    return files, [(p["where"], p["format"], p["harm"], p["size"]) for p in said["places"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Path, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    ended(begun(folder, tiny, text_file))
    return folder


def test_killed_at_every_stage(
    tiny: Path, text_file: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """One fit, killed as soon as each stage has left its first trace."""
    shutil.copytree(undisturbed / "cache" / "onecard", tmp_path / "cache" / "onecard",
                    ignore=shutil.ignore_patterns("sensitivity"))  # fmt: skip
    killed = []
    for stage in STAGES:
        process = begun(tmp_path, tiny, text_file)
        while process.poll() is None:
            if any(tmp_path.glob(stage)):
                process.send_signal(signal.SIGKILL)
                killed.append(stage)
                break
            time.sleep(0.001)
        process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert not (tmp_path / "out").exists()
    assert len(killed) >= 4, killed
    if not (tmp_path / "out").exists():
        ended(begun(tmp_path, tiny, text_file))
    assert result(tmp_path / "out") == result(undisturbed / "out")
    assert not (tmp_path / ".out.fit").exists()
    assert sorted(p.name for p in (tmp_path / "cache/onecard/sensitivity").iterdir()) == sorted(
        p.name for p in (undisturbed / "cache/onecard/sensitivity").iterdir()
    )
