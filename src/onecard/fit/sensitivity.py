"""What each candidate of each place does to the model's answers: one walk, block after block, streamed.

At a site the walk has all statistics of its inputs. Every candidate is made there, as it will be made in
the end (GPTQ, k-means; at quick effort rounding), and its error e at the site is taken: the share of the
power of the outputs that it takes away, tr(D H D^T) / tr(W H W^T), mean over the site's linears. Then a few
of them, the anchors, go on: after the block has been run with an anchor's weights, what comes out is a
stream of its own, which all later blocks, untouched, carry along beside the original. At the end every
stream passes the head, and

    harm(s, anchor) = mean over tokens of KL(p || p')

is measured where it counts. The other candidates lie between the anchors: log harm is taken to be linear in
log e, with slope 1 (both are squares of a disturbance) beyond the outermost ones.

At quick effort there is one stream per block, or per two of a large model, all sites disturbed by one anchor,
and its harm is dealt out by what each site alone does to the block's output, on the first tokens of the same
samples. (A stream per block is a quarter of the work of the streams of its sites; per-site directions below
the block are what is lost.)

The tables are a stream that is disturbed before the first block, each cache one whose keys and values are
rounded in every block, and each block left out another.

A block is in memory once, so memory is that of the walk and of the streams, whatever the model's size. What
was found lies in a journal by the content of model, text and effort: killed, the walk goes on behind the
last block; asked again, for other budgets too, it is not walked at all.

Dong et al., HAWQ, arXiv 1905.03696 (sensitivity before allocation).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onecard import __version__
from onecard.calibrate.data import digest
from onecard.calibrate.stats import HESSIAN, NORM
from onecard.calibrate.walk import Progress, Reached, batches, peak_bytes, walk, weight_count
from onecard.checkpoint.journal import Busy, Journal, partial_of
from onecard.checkpoint.load import as_array
from onecard.checkpoint.load import block as read_block
from onecard.checkpoint.load import stem as read_stem
from onecard.checkpoint.load import tail as read_tail
from onecard.checkpoint.save import source_hashes
from onecard.checkpoint.shards import fresh, pread, read_header
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Format, Integers, Weight, parse_format
from onecard.core.report import Row, write_text
from onecard.core.spec import LayerSpec, Spec, linear_shapes, sites
from onecard.fit.candidates import CACHES, TABLES, Trial, possible, size_of
from onecard.fit.planner import GONE
from onecard.kernels import convert
from onecard.kernels.reference import DTYPES, from_dense
from onecard.nn.layers import Matrix
from onecard.nn.transformer import Block, Cache, Context, Tail, positions_of
from onecard.passes.planned import carry_out

LEAST, WORST, ROWS = 1e-12, 700.0, 512
WAIT = 1.0
"""Seconds between two looks whether another process is done."""
BEGUN = 64
"""Tokens at the beginning of each sample that tell what a site does to the block's output."""
VERSION = 3


@dataclass(frozen=True)
class Sensitivity:
    """place -> candidate -> nats per token. Places: `blocks.3.attention.in`, `tables`, `cache`,
    `blocks.3` (its one candidate is `gone`). `errors`: what was seen at the sites themselves."""

    harms: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    measured: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"harms": self.harms, "errors": self.errors, "measured": self.measured})


def look(
    source: Source, ids: Tensor, trial: Trial, home: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Sensitivity:  # fmt: skip
    """The harms of every place of a model, `ids` [samples, length]; from `home` where they are known."""
    key = key_of(source, ids, trial)
    path = path_of(key, home)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        found = recalled(path, source, trial)
        if found is not None:
            shutil.rmtree(
                partial_of(path.with_suffix("")), ignore_errors=True
            )  # killed just behind it
            return found
        try:
            journal = Journal(path.with_suffix(""), key, force=True)
            break
        except Busy:  # another fit of the same model: what it finds is what is wanted here
            progress(0, 1, "waiting for another process that measures this model")
            time.sleep(WAIT)
    with journal:
        watch = Watch(source, ids, trial, journal)
        hidden = watch.resume()
        walk(watch, (watch,), hidden, watch.done_before(), progress=progress)
        found = watch.result()
        write_text(path, found.to_json())
        journal.discard()
    return found


def known(source: Source, ids: Tensor, trial: Trial, home: Path | None = None) -> bool:
    """Whether `look` would find its answer on the disk."""
    return recalled(path_of(key_of(source, ids, trial), home), source, trial) is not None


def look_bytes(source: Source, ids: Tensor, trial: Trial) -> int:
    """Memory that `look` takes at most, the process itself not counted: what passes from block to block and
    every stream, and beside them the walk through a block with its anchors, or two heads and logits."""
    spec = source.spec
    tried = max(1, trial.tried // ids.shape[1]) * ids.shape[1]
    streams = 1 + len(CACHES) + len(table_formats(source, trial.tables))
    streams += spec.num_layers * trial.left_out
    if trial.together:
        streams += -(-spec.num_layers // trial.together)
    else:
        streams += len(trial.anchors) * sum(len(sites(layer)) for layer in spec.layers)
    needs = frozenset({HESSIAN if trial.rounding == "gptq" else NORM})
    walking = peak_bytes(spec, ids, needs, 4, False, lambda rows, columns: 16 * rows * columns)
    block = max(weight_count(spec, layer) for layer in spec.layers)
    head = spec.vocab_size * (3 * spec.embed_size + 8 * ids.shape[1])
    held = spec.hidden * (streams * tried + 2 * ids.numel())
    return 4 * held + max(walking + 4 * block * len(trial.anchors), 4 * head)


def path_of(key: Mapping[str, Any], home: Path | None) -> Path:
    """The file of an answer."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return ((home or default_home()) / name).with_suffix(".json")


def recalled(path: Path, source: Source, trial: Trial) -> Sensitivity | None:
    """What was found before; None where nothing was, or where the file does not hold a harm, a number from 0
    on, for every place."""
    try:
        found = Sensitivity(**json.loads(path.read_bytes()))
        places = [f"blocks.{i}.{name}" for i, layer in enumerate(source.spec.layers)
                  for name in shapes_of(source.spec, layer)]  # fmt: skip
        needed = [(where, source.dtype) for where in places] + [("cache", "fp16")]
        needed += [("tables", format.name) for format in table_formats(source, trial.tables)]
        needed += [(f"blocks.{i}", GONE) for i in range(source.spec.num_layers) if trial.left_out]
        whole = all(name in found.harms[where] for where, name in needed) and all(
            0 <= harm < math.inf for own in found.harms.values() for harm in own.values()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if whole else None


def key_of(source: Source, ids: Tensor, trial: Trial) -> dict[str, Any]:
    """What decides the answer: the bytes of the model, the text, what is tried."""
    return {
        "onecard": __version__, "version": VERSION, "source": source_hashes(source),
        "calibration": digest(ids), "trial": asdict(trial), "threads": torch.get_num_threads(),
    }  # fmt: skip


def default_home() -> Path:
    """Where sensitivities are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "onecard" / "sensitivity"
    except RuntimeError as error:  # a user without a home
        raise BadRequest(
            "there is no folder to keep sensitivities in", do="set XDG_CACHE_HOME"
        ) from error


def shapes_of(spec: Spec, layer: LayerSpec) -> dict[str, list[tuple[int, int]]]:
    """site -> shapes of its linears."""
    shapes = linear_shapes(spec, layer)
    return {site.name: [shapes[name] for name in site.linears] for site in sites(layer)}


class Watch:
    """The walk's pass and its source of blocks in one: it sees sites, and carries the streams."""

    def __init__(self, source: Source, ids: Tensor, trial: Trial, journal: Journal) -> None:
        self.source, self.spec, self.stored, self.trial = source, source.spec, source.dtype, trial
        self.ids, self.journal = ids, journal
        self.needs = frozenset({HESSIAN if trial.rounding == "gptq" else NORM})
        rows = max(1, trial.tried // ids.shape[1])
        self.tried = ids[:rows]
        self.streams: dict[str, Tensor] = {}
        self.original = torch.empty(0)
        self.swaps: dict[str, dict[str, dict[str, Tensor]]] = {}
        self.notes: list[list[Any]] = []

    # Where blocks come from and go to

    def load(self, index: int) -> Block:
        self.swaps, self.notes = {}, []
        return read_block(self.source, index, torch.float32)

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None:
        """All streams go through the block, and those that begin here begin."""
        with torch.no_grad():
            self.carry(block)
        self.original = self.tried_part(hidden)
        state = {f"hidden.{i:05d}": as_array(h) for i, h in enumerate(hidden)}
        state["original"] = as_array(self.original)
        state |= {f"stream.{name}": as_array(h) for name, h in self.streams.items()}
        self.journal.add(
            f"block-{index:05d}", {"none": as_array(torch.zeros(1))}, self.notes, state
        )

    def begin(self) -> list[Tensor]:
        """The inputs of the first block; the streams that are disturbed before it."""
        stem = read_stem(self.source, torch.float32)
        with torch.no_grad():
            hidden = [stem(b, positions_of(b, None, 0)) for b in batches(self.ids)]
            self.original = stem(self.tried, positions_of(self.tried, None, 0))
            for format in table_formats(self.source, self.trial.tables):
                with swapped(stem.embedding, rounded(stem.embedding.matrix(), format, self.stored)):
                    self.streams[f"tables {format.name}"] = stem(
                        self.tried, positions_of(self.tried, None, 0)
                    )
            for held in CACHES[1:]:
                self.streams[f"cache {held}"] = self.original
        return hidden

    def done_before(self) -> int:
        """How many blocks are done already."""
        return sum(f"block-{i:05d}" in self.journal for i in range(self.spec.num_layers))

    def resume(self) -> list[Tensor]:
        """The inputs of the next block; where what was left of a former walk is damaged, of the first."""
        try:
            path = self.journal.state()
        except FailedWork:
            self.journal.restart()
            path = None
        if path is None:
            return self.begin()
        entries = read_header(path)
        found = {
            name: torch.frombuffer(
                pread(e.path, e.begin, fresh(e.nbytes)), dtype=DTYPES[e.dtype]
            ).view(e.shape)
            for name, e in sorted(entries.items())
        }
        self.original = found.pop("original")
        self.streams = {
            n.removeprefix("stream."): h for n, h in found.items() if n.startswith("stream.")
        }
        return [h for name, h in found.items() if name.startswith("hidden.")]

    def tried_part(self, hidden: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(hidden))[: len(self.tried)]

    # What happens at a site, and behind a block

    def site(self, site: Reached) -> Iterator[Row]:
        """Every candidate is made and its error noted; anchors are kept till the block ends."""
        where = f"{site.block}.{site.name}"
        held = {name: linear.held() for name, linear in site.linears.items()}
        shapes = [linear.shape for linear in site.linears.values()]
        weights = sum(rows * columns for rows, columns in shapes)
        formats = possible(self.trial.formats, shapes, self.stored)
        formats.pop(self.stored)
        bits = {n: 8 * size_of(f, shapes, self.stored) / weights for n, f in formats.items()}
        anchors = set(anchors_of(bits, self.trial.anchors))
        plain = self.trial.rounding == "nearest"
        for name, format in formats.items():
            apart = rounding_error(site, format, held, self.stored) if plain else None
            if apart is None or name in anchors:
                for linear, was in zip(site.linears.values(), held.values(), strict=True):
                    linear.replace(was)
                error = made(site, format, held, self.trial)
            self.notes.append([where, name, error if apart is None else apart])
            if name in anchors:
                self.swaps.setdefault(where, {})[name] = {
                    path: linear.matrix() for path, linear in site.linears.items()
                }
        for linear, was in zip(site.linears.values(), held.values(), strict=True):
            linear.replace(was)
        yield from ()

    def finish(self, whole: Any) -> Iterator[Row]:
        return iter(())

    def carry(self, block: Block) -> None:
        """Every stream through a block, and new ones for its anchors and for leaving it out."""
        index, mine = f"blocks.{block.index}", self.stream_of(block.index)
        for name, h in self.streams.items():
            if name != mine:
                self.streams[name] = block(h, self.context(h, name))
        if self.trial.left_out:
            self.streams[f"{index} {GONE}"] = self.original.clone()
        if not self.trial.together:
            for where, anchors in self.swaps.items():
                for name, matrices in anchors.items():
                    with exchanged(block, matrices):
                        after = block(self.original, self.context(self.original))
                    self.streams[f"{where} {name}"] = after
            return
        few = self.original[:, :BEGUN]
        plain, alone = block(few, self.context(few)), dict[str, float]()
        ones = {where: next(iter(found.items())) for where, found in self.swaps.items()}
        for where, (_, matrices) in ones.items():
            with exchanged(block, matrices):
                after = block(few, self.context(few))
            alone[where] = float((after - plain).square().sum(dtype=torch.float64))
        h = self.streams.get(mine, self.original)
        with exchanged(block, {p: m for _, own in ones.values() for p, m in own.items()}):
            self.streams[mine] = block(h, self.context(h))
        for where, (name, _) in ones.items():
            self.notes.append([where, f"alone {name}", alone[where]])

    def stream_of(self, index: int) -> str:
        """The stream in which all sites of a block are disturbed, where there is one."""
        width = self.trial.together
        return f"blocks.{index - index % width} anchor" if width else ""

    def context(self, h: Tensor, name: str = "") -> Context:
        """Of a forward of `h` [R, T, hidden]; with rounded keys and values where a stream is a cache's."""
        positions = torch.arange(h.shape[1]).expand(h.shape[:2])
        cache = None
        if name.startswith("cache "):
            cache = Cache(self.spec, h.shape[0], h.shape[1], torch.float32, held=name.split()[1])
        return Context(self.spec, positions, None, cache)

    # What comes of it

    def result(self) -> Sensitivity:
        """The harms of all places, from what reached the end."""
        ends = self.ends()
        errors: dict[str, dict[str, float]] = {}
        alone: dict[str, tuple[str, float]] = {}
        totals: dict[str, float] = {}
        for i in range(self.spec.num_layers):
            for where, name, value in self.journal.rows(f"block-{i:05d}"):
                if name.startswith("alone "):
                    alone[where] = name.removeprefix("alone "), value
                    totals[self.stream_of(i)] = totals.get(self.stream_of(i), 0.0) + value
                else:
                    errors.setdefault(where, {})[name] = value
        harms: dict[str, dict[str, float]] = {}
        measured: dict[str, list[str]] = {}
        for where, found in errors.items():
            points = {n: ends[f"{where} {n}"] for n in found if f"{where} {n}" in ends}
            if where in alone:
                name, value = alone[where]
                stream = self.stream_of(int(where.split(".")[1]))
                points = {name: value / (totals[stream] or 1.0) * ends[stream]}
            harms[where] = between(found, points) | {self.stored: 0.0}
            measured[where] = list(points)
        for name, harm in ends.items():
            place, _, candidate = name.rpartition(" ")
            if place in ("tables", "cache") or candidate == GONE:
                harms.setdefault(place, {})[candidate] = harm
        if "tables" in harms:
            harms["tables"][self.stored] = 0.0
        harms.setdefault("cache", {})["fp16"] = 0.0
        return Sensitivity(harms, errors, measured)

    @torch.no_grad()
    def ends(self) -> dict[str, float]:
        """stream -> KL of its answers, nats per token; one head beside the original's is in memory."""
        tail = read_tail(self.source, torch.float32)
        plain = [name for name in self.streams if not name.startswith("tables ")]
        found = self.answered(tail, plain)
        for format in table_formats(self.source, self.trial.tables):
            head = rounded(tail.head.matrix(), format, self.stored)
            found |= self.answered(tail, [f"tables {format.name}"], head)
        return found

    def answered(
        self, tail: Tail, names: Sequence[str], head: Tensor | None = None
    ) -> dict[str, float]:
        """The KL of streams, what they say spoken by another head where one is given."""
        found, count = dict.fromkeys(names, 0.0), self.original.shape[0]
        for row in range(count):
            logp = torch.log_softmax(tail(self.original[row : row + 1]).float(), -1)
            p = logp.exp()
            with swapped(tail.head, head):
                for name in names:
                    h = self.streams[name][row : row + 1]
                    found[name] += apart(p, logp, torch.log_softmax(tail(h).float(), -1)) / count
        return found


def apart(p: Tensor, logp: Tensor, now: Tensor) -> float:
    """KL(p || exp(now)) per token; WORST where what is said now is no numbers. FailedWork where p is none."""
    value = float((p * (logp - now)).sum(-1).mean())
    if math.isfinite(value):
        return max(0.0, value)
    if not math.isfinite(float(p.sum())):
        raise FailedWork("the model gives logits that are not numbers", do="check its weights")
    return WORST


@torch.no_grad()
def left_out(source: Source, ids: Tensor, tried: int, gone: Collection[str]) -> float:
    """KL of the answers to the first `tried` of ids [samples, length], nats per token, were these blocks left
    out together and all else untouched. One block is in memory at once."""
    ids = ids[: max(1, tried // ids.shape[1])]
    stem, tail = read_stem(source, torch.float32), read_tail(source, torch.float32)
    whole = less = stem(ids, positions_of(ids, None, 0))
    context = Context(source.spec, torch.arange(ids.shape[1]).expand(ids.shape))
    for index in range(source.spec.num_layers):
        block = read_block(source, index, torch.float32)
        whole = block(whole, context)
        if f"blocks.{index}" not in gone:
            less = block(less, context)
    total = 0.0
    for row in range(len(ids)):
        logp, now = (
            torch.log_softmax(tail(h[row : row + 1]).float(), -1) for h in (whole, less)
        )  # fmt: skip
        total += apart(logp.exp(), logp, now) / len(ids)
    return total


# Making candidates --------------------------------------------------------------------------------


def made(site: Reached, format: Format, held: Mapping[str, Weight], trial: Trial) -> float:
    """Bring a site into a format; the mean share of its linears' output power that is lost."""
    rows = list(carry_out(site, format, trial.rounding))
    seen = [float(r.value) for r in rows if r.what == "relative_output_error"]  # type: ignore[arg-type]
    if len(seen) == len(site.linears):
        return sum(seen) / len(seen)
    weights, shares = diagonal(site), []
    for name, linear in site.linears.items():
        w = held[name].parts["weight"].float()
        shares.append(lost(linear.matrix(), w, weights) / max(power(site, name, w), 1e-30))
    return sum(shares) / len(shares)


def rounding_error(
    site: Reached, format: Format, held: Mapping[str, Weight], stored: str
) -> float | None:
    """What `made` finds of integers by rounding, from about ROWS rows of each linear, evenly spread, as rows
    do not know of each other. None of other formats."""
    if not isinstance(format, Integers):
        return None
    weights, shares = diagonal(site), []
    for weight in held.values():
        w = weight.parts["weight"]
        w = w[:: max(1, w.shape[0] // ROWS)].float()
        whole = float((w.square() @ weights).sum(dtype=torch.float64))
        shares.append(lost(rounded(w, format, stored), w, weights) / max(whole, 1e-30))
    return sum(shares) / len(shares)


def lost(now: Tensor, w: Tensor, weights: Tensor) -> float:
    """The power of the outputs that `now` takes from w [out, in], with the power of each input [in]."""
    return float((now.sub_(w).square_() @ weights).sum(dtype=torch.float64))


def power(site: Reached, name: str, w: Tensor) -> float:
    """The power of a linear's outputs, were its inputs independent; taken once and kept with the site."""
    if name not in site.kept:
        found = (w.square() @ diagonal(site)).sum(dtype=torch.float64)
        site.kept[name] = found
    return float(site.kept[name])


def diagonal(site: Reached) -> Tensor:
    """The mean square of every input [in]: of errors that do not know of each other only these count."""
    stats = site.stats
    return stats.hessian.diagonal() if HESSIAN in stats.needs else stats.norm.square()


def rounded(w: Tensor, format: Format, stored: str) -> Tensor:
    """A table [vocabulary, width] rounded to the nearest grid points."""
    assert isinstance(format, Integers)
    return convert.to_dense(convert.round_to_nearest(w.contiguous(), format.scaled(stored)))


def table_formats(source: Source, names: Sequence[str] = TABLES) -> list[Format]:
    """Those that the embedding and the head may get: symmetric integers whose groups divide their rows."""
    width = source.spec.embed_size
    shape = (source.spec.vocab_size, width)
    found = possible(names, [shape], source.dtype)
    found.pop(source.dtype)
    return [parse_format(name) for name in found]


def anchors_of(bits: Mapping[str, float], wanted: Sequence[float]) -> list[str]:
    """For every wanted number of bits the candidate nearest to it."""
    return [min(bits, key=lambda name: (abs(bits[name] - b), name)) for b in wanted] if bits else []


def between(errors: Mapping[str, float], points: Mapping[str, float]) -> dict[str, float]:
    """name -> harm of all candidates, from the harm of some: log harm over log error."""
    known = sorted(
        (math.log(max(errors[n], LEAST)), math.log(max(h, LEAST))) for n, h in points.items()
    )
    harms = {}
    for name, error in errors.items():
        if name in points:
            harms[name] = points[name]
            continue
        x = math.log(max(error, LEAST))
        below = [p for p in known if p[0] <= x]
        above = [p for p in known if p[0] > x]
        if below and above:
            (x0, y0), (x1, y1) = below[-1], above[0]
            y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        else:
            x0, y0 = below[-1] if below else above[0]
            y = y0 + (x - x0)
        harms[name] = math.exp(y)
    return harms


@contextmanager
def swapped(matrix: Matrix, other: Tensor | None) -> Iterator[None]:
    """A dense matrix is another one for a while; None: it is itself."""
    held = matrix.held()
    if other is not None:
        matrix.replace(from_dense(other.to(held.parts["weight"].dtype)))
    try:
        yield
    finally:
        matrix.replace(held)


@contextmanager
def exchanged(block: Block, matrices: Mapping[str, Tensor]) -> Iterator[None]:
    """Linears of a block have other matrices for a while."""
    with ExitStack() as stack:
        for path, other in matrices.items():
            stack.enter_context(swapped(block.linear(path), other))
        yield
