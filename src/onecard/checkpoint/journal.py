"""The journal of a long job: every finished part is a file plus one line that names its hash.

A job writes into `.OUT.partial` beside OUT. A part (the stem, a block, the tail) is a safetensors file
written by rename, then a line {"part", "sha256", "rows"} is appended to `journal.jsonl`. Killed at any
moment, the job goes on behind the last line whose file has the named hash; anything after it is
thrown away. The first line is the job's key: what it reads and does. Another job's leftovers are never
mixed in. When all parts are there the model folder is put together in `result` (parts of a large model
move there, and back where the job is killed before its end) and renamed to OUT.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from onecard.checkpoint.shards import Array, Checkpoint, read_json, sha256_of, write_file
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.settings import format_size

Key = Mapping[str, Any]
LONGEST_NAME = 200
BESIDE = frozenset({"manifest.json", "report.json", "report.html", "fit.json", ".onecard"})
"""What a result's folder holds of its own that its manifest does not name."""


class Busy(BadRequest):
    """Another process holds the working folder."""


class Journal:
    """The working folder of one job; at most one process holds it, until it is left as a context."""

    def __init__(self, out: Path, key: Key, force: bool = False) -> None:
        self.out, self.folder = out, partial_of(out)
        self.result = self.folder / "result"
        self.key = json.loads(json.dumps(key, sort_keys=True))
        self.lines: list[dict[str, Any]] = []
        self.damaged: Path | None = None
        self.fresh = not self.folder.exists()
        if not self.fresh and not self.folder.is_dir():
            raise BadRequest(
                f"{self.folder} is a file", seen="unfinished work is kept in a folder of that name",
                do="move it away, or give another output",
            )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise Busy(f"another process is working on {out}") from error
        try:
            self._recover(force)
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *failure: object) -> None:
        self._lock.close()

    def _recover(self, force: bool) -> None:
        """Keep the lines whose parts are whole; start anew where the job is another one."""
        path = self.folder / "journal.jsonl"
        lines = _whole_lines(path)
        same = bool(lines) and lines[0] == {"key": self.key}
        if lines and lines[0] != {"key": self.key}:
            if not force:
                differing = sorted(
                    k for k in {*self.key, *lines[0].get("key", {})}
                    if self.key.get(k) != lines[0].get("key", {}).get(k)
                )  # fmt: skip
                raise BadRequest(
                    f"{self.folder} holds unfinished work of another job",
                    seen="it differs in: " + ", ".join(differing),
                    do="--force throws it away; or finish it with the settings it was begun with",
                )
            lines = []
        for number, line in enumerate(lines[1:], 1):
            file = self.file(line["part"])
            moved = self.result / shard_name(number, len(lines) - 1)
            if moved.is_file():
                os.replace(moved, file)
            if not file.is_file() or sha256_of(file) != line["sha256"]:
                self.damaged = file
                break
            self.lines.append(line)
        kept = {f"{line['part']}.safetensors" for line in self.lines} | {"lock"}
        kept |= {f"{line['state']}.safetensors" for line in self.lines[-1:] if line.get("state")}
        for file in self.folder.iterdir():
            if file.name not in kept and not (same and is_stage(file)):
                remove(file)
        text = "".join(json.dumps(line) + "\n" for line in ({"key": self.key}, *self.lines))
        temporary = self.folder / "journal.part"
        temporary.write_text(text)
        os.replace(temporary, path)

    def file(self, part: str) -> Path:
        """Where a part is written."""
        return self.folder / f"{part}.safetensors"

    def __contains__(self, part: str) -> bool:
        return any(line["part"] == part for line in self.lines)

    def hashes(self) -> dict[Path, str]:
        """file of a part -> its sha256."""
        return {self.file(line["part"]): line["sha256"] for line in self.lines}

    def rows(self, part: str) -> list[list[Any]]:
        """The rows that were noted with a finished part."""
        return next(line["rows"] for line in self.lines if line["part"] == part)

    def add(
        self,
        part: str,
        arrays: Mapping[str, Array],
        rows: list[list[Any]],
        state: Mapping[str, Array] | None = None,
    ) -> None:
        """Write a part, and the state that the next one starts from, then say so in one line."""
        kept = None
        if state is not None:
            name = f"state-{part}"
            kept = (name, write_file(self.folder / f"{name}.safetensors", state))
        self.note(part, self.write(part, arrays), rows, kept)

    def write(self, part: str, arrays: Mapping[str, Array]) -> str:
        """The file of a part; returns its sha256. It counts once it is noted. For any thread."""
        return write_file(self.file(part), arrays)

    def note(
        self, part: str, sha256: str, rows: list[list[Any]], state: tuple[str, str] | None = None
    ) -> None:
        """Enter a written part; `state` is the name and sha256 of what the next one starts from."""
        name, digest = state or (None, None)
        line = {"part": part, "rows": rows, "state": name, "state_sha256": digest, "sha256": sha256}
        with (self.folder / "journal.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        old = self.lines[-1].get("state") if self.lines else None
        self.lines.append(line)
        if old:
            (self.folder / f"{old}.safetensors").unlink(missing_ok=True)

    def state(self) -> Path | None:
        """The file of the state behind the last part; FailedWork where it was damaged."""
        line = self.lines[-1] if self.lines else {}
        if not line.get("state"):
            return None
        file = self.folder / f"{line['state']}.safetensors"
        if not file.is_file() or sha256_of(file) != line["state_sha256"]:
            culprit = file if file.is_file() else self.damaged or file  # the last state is kept
            raise FailedWork(
                f"{culprit} is damaged or gone, so the work cannot go on from there",
                do="start anew: --force",
            )
        return file

    def restart(self) -> None:
        """Forget all parts: they are made anew."""
        for line in self.lines:
            self.file(line["part"]).unlink(missing_ok=True)
        self.lines = []
        (self.folder / "journal.jsonl").write_text(json.dumps({"key": self.key}) + "\n")

    def discard(self) -> None:
        """Leave no working folder behind: the job is done, or was found to be impossible."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, replace: bool) -> None:
        """The complete `result` gets its final name, in one step; then the journal goes."""
        old = self.out.with_name(f".{self.out.name}.replaced")
        check_still(self.out, self.result, replace)
        if self.out.is_dir() and any(self.out.iterdir()):
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
        os.replace(self.result, self.out)
        shutil.rmtree(old, ignore_errors=True)
        self.discard()


def shard_name(number: int, count: int) -> str:
    """The final name of one of `count` files, from 1 on."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def is_stage(file: Path) -> bool:
    """What belongs to a stage of the job: its result, its own working folder, its notes."""
    return file.name.startswith(("stage-", ".stage-"))


def remove(path: Path) -> None:
    """A file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def partial_of(out: Path) -> Path:
    """The working folder beside OUT."""
    return out.parent / f".{out.name}.partial"


def check_target(out: Path, source: Path, force: bool, own: Collection[str] = ()) -> None:
    """OUT can be written: apart from the source, not a file, empty, or a result to be replaced in which
    nothing else lies. `own` names results that belong to it."""
    out, source = out.resolve(), source.resolve()
    if out == source or source in out.parents:
        raise BadRequest(f"the output {out} lies in the source", do="give another folder")
    kept = {"the source": source, "the folder you are in": Path.cwd(), "your home": Path.home()}
    for what, folder in kept.items():
        if out == folder.resolve() or out in folder.resolve().parents:
            raise BadRequest(f"the output {out} would replace {what}", do="give another folder")
    if str(out).encode("utf-8", "replace").decode("utf-8") != str(out):
        raise BadRequest(f"the path {out} is not UTF-8", do="give another folder")
    if os.path.ismount(out) or str(out) in mount_points():
        raise BadRequest(f"{out} is where a disk is mounted", do="give a folder in it")
    if len(out.name.encode()) > LONGEST_NAME:
        raise BadRequest(f"the name {out.name[:40]}... is too long for a folder",
                         do=f"at most {LONGEST_NAME} bytes")  # fmt: skip
    if out.exists() and not out.is_dir():
        raise BadRequest(f"{out} is a file", do="give a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise BadRequest(
            f"{out} is not empty", do="give a new folder, or --force to replace a former result"
        )
    if out.is_dir() and any(out.iterdir()) and not is_result(out):
        raise BadRequest(
            f"{out} is not empty and no result of onecard", do="--force replaces only results"
        )
    if out.is_dir() and (other := stranger(out, own)):
        raise BadRequest(
            f"{out} holds {other.relative_to(out)}, which is not the result's own",
            do="move it away: --force would delete it",
        )
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise BadRequest(f"{parent} cannot be written to", do="give a folder that can")


def is_result(folder: Path) -> bool:
    """A folder that onecard wrote: it has a manifest, or the report of a demo."""
    if (folder / "manifest.json").is_file():
        return "onecard" in read_json(folder / "manifest.json")
    return (folder / "report.json").is_file() and "rows" in read_json(folder / "report.json")


def stranger(folder: Path, own: Collection[str] = ()) -> Path | None:
    """Something in a result's folder that is not the result's own, None where nothing is.

    Its own is what its manifest names, what is written beside that, and the results that `own` names
    with their working folders.
    """
    path = folder / "manifest.json"
    manifest = read_json(path) if path.is_file() else {}
    named = [manifest.get(key) for key in ("files", "carried")]
    files = {name for names in named if isinstance(names, dict | list) for name in names}
    parts = {partial_of(folder / name).name for name in own}
    for path in sorted(folder.iterdir()):
        if path.name in own and path.is_dir() and not path.is_symlink():
            found = stranger(path) if is_result(path) else next(path.iterdir(), None)
            if found is not None:
                return found
        elif path.name not in BESIDE | parts and (path.name not in files or path.is_dir()):
            return path
    return None


def check_still(out: Path, result: Path, force: bool) -> None:
    """OUT can be written even now that `result` is complete. FailedWork where it was filled meanwhile."""
    filled = out.is_dir() and any(out.iterdir())
    if filled and not force:
        raise FailedWork(f"{out} is no longer empty", do=f"the result is in {result}")
    if filled and (other := stranger(out)):
        raise FailedWork(f"{out} now holds {other.name}, which is not the former result's own",
                         do=f"move it away; the result is in {result}")  # fmt: skip


def mount_points(table: Path = Path("/proc/self/mountinfo")) -> set[str]:
    """Where something is mounted, a folder bound from the same disk too, which os.path.ismount overlooks."""
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return set()
    fields = (line.split(" ") for line in lines)
    return {
        re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), f[4]) for f in fields if len(f) > 4
    }


def check_space(out: Path, needed: int) -> None:
    """There is room for `needed` more bytes where OUT goes."""
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    done = (
        sum(f.stat().st_size for f in partial_of(out).rglob("*")) if partial_of(out).is_dir() else 0
    )
    free = shutil.disk_usage(parent).free + done
    if needed > free:
        raise BadRequest(
            f"{out} needs {format_size(needed)}", f"{format_size(free)} are free on its disk",
            "free some space or give a folder on another disk",
        )  # fmt: skip


def fingerprint(checkpoint: Checkpoint) -> str:
    """What identifies a source cheaply: its headers, and each file's size and time."""
    digest = hashlib.sha256()
    for path in checkpoint.files:
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    for name, entry in sorted(checkpoint.entries.items()):
        digest.update(f"{name} {entry.dtype} {entry.shape} {entry.begin}\n".encode())
    return digest.hexdigest()


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that is torn or no line of a journal."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_bytes().splitlines(keepends=True):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            wanted = {"part", "rows", "sha256"} if lines else {"key"}
            if not text.endswith(b"\n") or not isinstance(line, dict) or not wanted <= line.keys():
                break
            lines.append(line)
    return lines
