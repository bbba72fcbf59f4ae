"""Killed at any moment, the same command goes on and gives the same bytes; nothing is half-written."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from onecard.calibrate.data import Calibration
from onecard.checkpoint import save
from onecard.checkpoint.journal import Journal, partial_of
from onecard.checkpoint.shards import sha256_of
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import Report
from onecard.passes import GPTQ, RoundToNearest
from onecard.passes.base import Recipe
from onecard.passes.job import Settings, compress, is_finished, prepare
from onecard.passes.layers import DropLayers

RECIPE = Recipe("g", (GPTQ(4, 64),))


class Killed(Exception):
    pass


def settings(text_file: Path) -> Settings:
    return Settings(Calibration(4, 32), text_file)


def result(out: Path) -> dict[str, str]:
    """The hash of every file that has to be the same."""
    files = [p for p in out.iterdir() if p.name not in ("report.json", "report.html")]
    return {p.name: sha256_of(p) for p in files}


@pytest.fixture(scope="module")
def undisturbed(
    tiny: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(prepare(tiny, out, RECIPE, settings(text_file)))
    return result(out)


@pytest.mark.parametrize("single_file", [save.SINGLE_FILE, 0], ids=["joined", "shards"])
def test_stopped_at_every_write(
    tiny: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_file: int
) -> None:
    """The process dies at its n-th file operation, for every n; a second run completes the job, and
    makes nothing again that was noted before, not even where the first died in its last steps."""
    rename, note, results = os.replace, Journal.note, list[dict[str, str]]()
    monkeypatch.setattr(save, "SINGLE_FILE", single_file)
    noted: list[str] = []

    def noting(journal: Journal, part: str, *more: object) -> None:
        assert part not in noted
        noted.append(part)
        note(journal, part, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Journal, "note", noting)
    for stop in range(1, 40):
        out, count = tmp_path / f"out{stop}", 0
        noted.clear()

        def dying(source: object, target: object, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count == stop:
                raise Killed
            rename(source, target)  # type: ignore[call-overload]

        monkeypatch.setattr(os, "replace", dying)
        with contextlib.suppress(Killed):
            compress(prepare(tiny, out, RECIPE, settings(text_file)))
        monkeypatch.setattr(os, "replace", rename)
        died = count == stop
        assert died is not out.exists()
        if died:
            compress(prepare(tiny, out, RECIPE, settings(text_file)))
        assert not partial_of(out).exists()
        results.append(result(out))
        shutil.rmtree(out)
        if not died:
            break
    assert len(results) > 10 and all(found == results[-1] for found in results)
    assert ("model.safetensors" in results[0]) is bool(single_file)


def test_kill_9(tiny: Path, text_file: Path, tmp_path: Path, undisturbed: dict) -> None:
    """A real process, killed hard again and again at growing delays, until it gets through."""
    out, kills = tmp_path / "out", 0
    words = [str(tiny), str(out), "--recipe", str(tmp_path / "r.yaml"), "--data", str(text_file)]
    command = [
        sys.executable,
        "-m",
        "onecard",
        "compress",
        *words,
        "--samples",
        "4",
        "--length",
        "32",
    ]
    (tmp_path / "r.yaml").write_text("name: g\npasses: [{gptq: {bits: 4, group: 64}}]\n")
    while not out.exists():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        partial = partial_of(out) / "journal.jsonl"
        lines, deadline = kills + 2, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if partial.is_file() and len(partial.read_bytes().splitlines()) >= lines:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.wait(60)
    assert kills >= 2
    assert result(out) == undisturbed


def test_torn_journal_line_is_ignored(tiny: Path, text_file: Path, tmp_path: Path, undisturbed: dict,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out"
    _stop_after_blocks(tiny, text_file, out, monkeypatch)
    with (partial_of(out) / "journal.jsonl").open("a") as file:
        file.write('{"part": "block-000')
    compress(prepare(tiny, out, RECIPE, settings(text_file)))
    assert result(out) == undisturbed


def test_damaged_part_is_made_again(tiny: Path, text_file: Path, tmp_path: Path, undisturbed: dict,
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out"
    _stop_after_blocks(tiny, text_file, out, monkeypatch)
    part = partial_of(out) / "stem.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    compress(prepare(tiny, out, RECIPE, settings(text_file)))
    assert result(out) == undisturbed


@pytest.mark.parametrize("junk", [b"\xff\xfe", b"[" * 100_000 + b"\n", b'{"a": 1}\n', b"5\n"],
                         ids=["bytes", "deep", "keys", "number"])  # fmt: skip
def test_what_is_no_journal_is_ignored(
    tiny: Path, text_file: Path, tmp_path: Path, undisturbed: dict, junk: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for number, whole in enumerate((False, True)):
        out = tmp_path / str(number) / "out"
        _stop_after_blocks(tiny, text_file, out, monkeypatch)
        journal = partial_of(out) / "journal.jsonl"
        journal.write_bytes((b"" if whole else journal.read_bytes()) + junk)
        compress(prepare(tiny, out, RECIPE, settings(text_file)))
        assert result(out) == undisturbed


def test_the_damaged_part_is_named(tiny: Path, text_file: Path, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out"
    _stop_after_blocks(tiny, text_file, out, monkeypatch)
    (partial_of(out) / "block-00001.safetensors").write_bytes(b"junk")
    with pytest.raises(FailedWork, match=r"block-00001\.safetensors is damaged or gone"):
        compress(prepare(tiny, out, RECIPE, settings(text_file)))


def test_a_file_where_the_work_goes(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    partial_of(out).write_text("mine")
    with pytest.raises(BadRequest, match=r"partial is a file"):
        compress(prepare(tiny, out, RECIPE, settings(text_file)))
    assert partial_of(out).read_text() == "mine"


def test_another_job_is_not_mixed_in(tiny: Path, text_file: Path, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "out"
    _stop_after_blocks(tiny, text_file, out, monkeypatch)
    other = Recipe("other", (RoundToNearest(4),))
    with pytest.raises(BadRequest, match="differs in"):
        compress(prepare(tiny, out, other, Settings()))
    compress(prepare(tiny, out, other, Settings(force=True)))
    assert (out / "config.json").is_file()


def test_what_is_added_while_it_works_stays(
    tiny: Path, text_file: Path, tmp_path: Path, undisturbed: dict
) -> None:
    """The result waits beside it, and the same command puts it there once the file is moved away."""
    out = tmp_path / "out"
    compress(prepare(tiny, out, RECIPE, settings(text_file)))
    job = prepare(tiny, out, RECIPE, replace(settings(text_file), force=True))

    def add(folder: Path, report: Report) -> Report:
        (out / "notes.txt").write_text("precious")
        return report

    with pytest.raises(FailedWork, match=r"now holds notes\.txt"):
        compress(job, finish=add)
    assert (out / "notes.txt").read_text() == "precious"
    (out / "notes.txt").unlink()
    compress(job)
    assert result(out) == undisturbed and not partial_of(out).exists()


@pytest.mark.parametrize(
    "recipe", [RECIPE, Recipe("l", (DropLayers(layers=(1,), most=None),))], ids=lambda r: r.name
)
def test_what_is_finished_is_known(
    tiny: Path, text_file: Path, tmp_path: Path, recipe: Recipe
) -> None:
    """Whatever its settings are: the manifest has lists where they have tuples."""
    out, how = tmp_path / "out", settings(text_file)
    compress(prepare(tiny, out, recipe, how))
    assert is_finished(tiny, out, recipe, how)
    assert not is_finished(tiny, out, Recipe("o", (GPTQ(3, 64),)), how)


def test_full_disk_keeps_what_is_done(tiny: Path, text_file: Path, tmp_path: Path, undisturbed: dict,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """No space left while a block is written: an error, the journal intact, and then it goes on."""
    from onecard.checkpoint import shards

    out, real, calls = tmp_path / "out", shards.write_chunks, 0

    def full(path, chunks):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(28, "No space left on device", str(path))
        return real(path, chunks)

    monkeypatch.setattr(shards, "write_chunks", full)
    with pytest.raises(OSError):
        compress(prepare(tiny, out, RECIPE, settings(text_file)))
    monkeypatch.setattr(shards, "write_chunks", real)
    assert not out.exists()
    compress(prepare(tiny, out, RECIPE, settings(text_file)))
    assert result(out) == undisturbed


def test_two_processes_do_not_share_a_job(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    from onecard.checkpoint.journal import Journal

    out = tmp_path / "out"
    prepared = prepare(tiny, out, RECIPE, settings(text_file))
    journal = Journal(out, prepared.key())
    with pytest.raises(BadRequest, match="another process"):
        compress(prepared)
    assert journal.folder.is_dir()


def _stop_after_blocks(
    tiny: Path, text_file: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the job until two blocks are journaled."""
    from onecard.passes.stream import StreamedBlocks

    real = StreamedBlocks.done

    def done(self, index, block, rows, hidden):  # type: ignore[no-untyped-def]
        real(self, index, block, rows, hidden)
        if index == 1:
            raise Killed

    monkeypatch.setattr(StreamedBlocks, "done", done)
    with pytest.raises(Killed):
        compress(prepare(tiny, out, RECIPE, settings(text_file)))
    monkeypatch.setattr(StreamedBlocks, "done", real)
