"""What the engine takes and does with what a fit made, and with the original beside it.

Speed and memory are measured by `onecard bench` in a process of its own, so that what the fit itself held
does not count.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from onecard.checkpoint.source import Source
from onecard.core.errors import FailedWork
from onecard.core.report import Report
from onecard.cost import SPREAD
from onecard.fit.gates import held_out_pieces, runner_of
from onecard.fit.job import Job
from onecard.fit.result import Sample
from onecard.kernels import cpu
from onecard.prove import sample
from onecard.runtime.cpu import CpuSettings

SPEED_UNCERTAIN = 0.35
"""The share by which a speed that the maker's bandwidth says may be off."""
PROMPTED, DECODED, SAMPLES = 256, 64, 3
FILLED = 8192
"""Positions of all sequences that are filled, at most, before what is written is timed."""


@dataclass(frozen=True)
class Seen:
    """What the engine took and did: bytes, tokens per second of all prompts, and of one sequence while it
    writes; and what it wrote. `wrong`: why there are no figures where there should be some."""

    memory: float | None = None
    prompt: float | None = None
    decode: float | None = None
    before_prompt: float | None = None
    before_decode: float | None = None
    samples: tuple[Sample, ...] = field(default_factory=tuple)
    wrong: str = ""
    foreign: float = 0.0  # share of the machine that other programs took meanwhile


@dataclass(frozen=True)
class Load:
    """What the engine is measured with: ids of a prompt; ids that each of `batch` sequences writes behind so
    many others; positions there is to be memory for and that are not written."""

    prompt: int
    decode: int
    behind: int
    unwritten: int
    turns: int

    @staticmethod
    def of(context: int, batch: int) -> Load:
        """The whole context of all sequences, as far as it can be filled in a reasonable time."""
        decode = max(1, min(DECODED, context // 2))
        behind = max(1, min(context, FILLED // batch) - decode)
        left = max(0, batch * (context - behind - decode))
        turns = 3 if batch * behind <= FILLED // 4 else 1
        return Load(min(PROMPTED, context), decode, behind, left, turns)


def measured(job: Job, folder: Path, runs: CpuSettings) -> Seen:
    """Run what was made; nothing where the native engine is missing or another device is meant."""
    if not cpu.available() or job.goal.device != "auto":
        return Seen(samples=samples_of(job, folder))
    load, batch = Load.of(job.costs.context, job.goal.batch), job.goal.batch
    try:
        made = benched(load, batch, folder, runs)
        before = benched(load, batch, job.source.folder, CpuSettings())
    except FailedWork as error:
        return Seen(samples=samples_of(job, folder), wrong=str(error).replace("\n", ": "))
    counted = job.costs.kept(runs.cache or "fp16") * load.unwritten // (job.costs.context * batch)
    return Seen(
        made["peak_memory_bytes"] + counted, made["prompt_tokens_per_second"],
        made["decode_tokens_per_second"] / batch, before["prompt_tokens_per_second"],
        before["decode_tokens_per_second"] / batch, samples_of(job, folder),
        foreign=made.get("foreign_share", 0.0),
    )  # fmt: skip


def benched(load: Load, batch: int, folder: Path, runs: CpuSettings) -> dict[str, float]:
    """what -> value, of `onecard bench` in a process of its own. Raises FailedWork where it fails."""
    words = [sys.executable, "-m", "onecard", "bench", str(folder), "--prompt", str(load.prompt),
             "--decode", str(load.decode), "--behind", str(load.behind), "--batch", str(batch),
             "--repeat", str(load.turns), "--json", *flags(runs)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise FailedWork("it could not be run", said[0] if said else f"exit code {done.returncode}")
    report = Report.from_json(done.stdout)
    found: dict[str, float] = {}
    for row in report.rows:
        if isinstance(row.value, (int, float)):
            found.setdefault(row.what, float(row.value))
    return found


def is_fast(job: Job, folder: Path, runs: CpuSettings) -> bool:
    """Whether what was made keeps --speed when it is run so; measured, where there is one."""
    if job.goal.speed is None:
        return True
    batch = job.goal.batch
    try:
        made = benched(Load.of(job.costs.context, batch), batch, folder, runs)
    except FailedWork:
        return False
    return made["decode_tokens_per_second"] / batch >= slowest(job)


def slowest(job: Job) -> float:
    """Tokens per second that still keep --speed, which is promised within what is uncertain of it."""
    return (job.goal.speed or 0.0) * (1 - (speed_of(job)[1] or 0.0))


def speed_of(job: Job) -> tuple[str, float | None]:
    """Where a predicted speed comes from, and the share by which it may be off; None: it is a bound."""
    if job.costs.machine is not None:
        return "modelled from kernels measured here", SPREAD
    if job.costs.here:
        return "at most, from bytes of a step over the speed of reading memory", None
    return "modelled from bytes of a step over the maker's bandwidth", SPEED_UNCERTAIN


def flags(runs: CpuSettings) -> list[str]:
    """What says so on a command line."""
    cache = [] if runs.cache is None else ["--cache", runs.cache]
    return cache + (["--exact", ",".join(runs.exact)] if runs.exact else [])


def samples_of(job: Job, folder: Path) -> tuple[Sample, ...]:
    """How both go on behind a few beginnings of held-out text, greedily."""
    source = job.source
    tokenizer, room = source.tokenizer(), min(source.spec.max_context, 128)
    pieces = held_out_pieces(source, job.request.held_out, 1 << 12)[:SAMPLES]
    prompts = [tokenizer.decode(list(piece.ids[: min(12, room // 4)])).strip() for piece in pieces]
    said: list[list[str]] = []
    for each in (source, Source(folder)):
        runner = runner_of(each, room)
        said.append([sample(runner, tokenizer, prompt or "The").text for prompt in prompts])
    return tuple(Sample(p, a, b) for p, a, b in zip(prompts, *said, strict=True))
