"""The walk: one visible loop over the blocks of a model, shared by neighbouring passes.

For each block the generators of all batches run in lock step from site to site. At a site every pass
sees the same statistics of the inputs, computed with everything before it already compressed, and
replaces weights; then the generators go on with what it left. So each block is run once, calibration
follows the compressed model exactly, and only one block's state is alive.

Memory alive at once: one block, its batches' hidden states and whatever a suspended block keeps per
token, one site's statistics and what a pass needs for it (`peak_bytes` adds these up). With
`replay=True` no block stays suspended: each site re-runs the block from its inputs, which keeps only
the hidden states, for about twice the time and the same numbers.

A pass that compares with the uncompressed model (needs `cross` or `original`) has it run alongside: a
copy of the block on hidden states of its own, which the walk keeps behind the others.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from onecard.calibrate import fold
from onecard.calibrate.stats import CROSS, HESSIAN, ORIGINAL, Statistics
from onecard.core.report import Row
from onecard.core.spec import LayerSpec, Spec, linear_shapes, producer, sites
from onecard.kernels.reference import from_dense
from onecard.nn.layers import Linear, Normalize
from onecard.nn.transformer import Block, Context, Sites

TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class Made:
    """What makes a site's inputs: `source` [in] says of which of its channels each is a copy."""

    path: str
    module: Linear | Normalize
    source: Tensor


@dataclass(frozen=True)
class Reached:
    """A site that the walk has reached: the linears that read one input, and its statistics.

    `stored` is the dtype the model is stored in, which may not be the one it is run in. `made` is what
    its inputs come from, where their channels can be scaled; `inputs` are those of suspended blocks.
    What a pass puts into `kept` it finds again when the block is `Whole`.
    """

    block: str
    name: str
    linears: dict[str, Linear]
    stats: Statistics
    stored: str = "fp32"
    made: Made | None = None
    inputs: Sequence[Tensor] = ()
    kept: dict[str, Tensor] = field(default_factory=dict)

    def exact(self, s: Tensor) -> Tensor:
        """The divisors next to s [channels of `made`] that lose nothing."""
        assert self.made is not None
        return fold.exact(self.made.module, s, self.stored)

    def rescale(self, s: Tensor) -> Row:
        """Divide the site's inputs by s (from `exact`) and multiply its linears: the same function.

        The linears are dense float32 afterwards, so that a quantizer that follows loses nothing; the
        walk brings what is still dense after the last pass back to its dtype.
        """
        assert self.made is not None
        fold.divide(self.made.module, s, self.stored)
        into = s[self.made.source]
        for linear in self.linears.values():
            linear.replace(from_dense(linear.matrix() * into))
        self.stats.divide(into)
        for x in self.inputs:
            x.div_(into.to(x.dtype))
        return Row(f"{self.block}.{self.made.path}", "rescaled", float(s.max() / s.min()))


@dataclass(frozen=True)
class Whole:
    """A block whose sites are all done, what it was, its inputs, and what the original made of its own.

    `hidden` are the inputs as the compressed blocks before have left them, `targets` the outputs of the
    uncompressed model, both [B, T, hidden] for each batch.
    """

    block: Block
    original: Block
    hidden: Sequence[Tensor]
    contexts: Sequence[Context]
    targets: Sequence[Tensor]
    kept: dict[str, Tensor]
    stored: str


class SitePass(Protocol):
    """What the walk needs of a pass; `finish` is only called where it needs `original`."""

    @property
    def needs(self) -> frozenset[str]: ...

    def site(self, site: Reached) -> Iterator[Row]: ...

    def finish(self, whole: Whole) -> Iterator[Row]: ...


class Blocks(Protocol):
    """Where blocks come from and where finished ones go."""

    spec: Spec
    stored: str

    def load(self, index: int) -> Block: ...

    def done(self, index: int, block: Block, rows: list[Row], hidden: list[Tensor]) -> None: ...


Progress = Callable[[int, int, str], None]


def batches(ids: Tensor) -> list[Tensor]:
    """Ids [samples, length] in batches of about TOKENS_PER_BATCH tokens."""
    return list(ids.split(max(1, TOKENS_PER_BATCH // ids.shape[1])))


def needs_of(passes: Sequence[SitePass]) -> frozenset[str]:
    return frozenset().union(*(p.needs for p in passes))


def walk(
    blocks: Blocks,
    passes: Sequence[SitePass],
    hidden: list[Tensor],
    first: int = 0,
    replay: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> list[Row]:
    """Apply `passes` to every block from `first` on; `hidden` [B, T, hidden] are its inputs.

    Without a need for statistics `hidden` may be empty, and no block is run. Where a pass compares with
    the original model, `hidden` from a later block on are those of both, as `blocks.done` got them.
    """
    rows: list[Row] = []
    count = blocks.spec.num_layers
    if compares(passes) and first == 0:
        hidden = hidden * 2
    for index in range(first, count):
        progress(index, count, f"block {index}")
        block = blocks.load(index)
        found: list[Row] = []
        with torch.no_grad():
            hidden = compress_block(blocks, block, passes, hidden, found, replay)
        blocks.done(index, block, found, hidden)
        rows += found
    progress(count, count, "done")
    return rows


def compares(passes: Sequence[SitePass]) -> bool:
    """Whether the uncompressed model has to run alongside."""
    return bool(needs_of(passes) & {CROSS, ORIGINAL})


def compress_block(
    blocks: Blocks,
    block: Block,
    passes: Sequence[SitePass],
    hidden: list[Tensor],
    rows: list[Row],
    replay: bool = False,
) -> list[Tensor]:
    """Bring one block through all passes; returns its outputs, the inputs of the next block."""
    needs = needs_of(passes)
    count = len(hidden)
    original, theirs = block, Originals((), ())
    if compares(passes):
        count //= 2
        original = copy.deepcopy(block)
        theirs = Originals.of(
            original, hidden[count:], [_context(blocks.spec, h) for h in hidden[count:]]
        )
    hidden = hidden[:count]
    contexts = [_context(blocks.spec, h) for h in hidden]
    runs: list[Sites] = (
        [] if replay else [block.stages(h, c) for h, c in zip(hidden, contexts, strict=True)]
    )
    kept: dict[str, Tensor] = {}
    for number, site in enumerate(sites(block.layer)):
        linears = {name: block.linear(name) for name in site.linears}
        kinds = {name: linear.held().parts["weight"].dtype
                 for name, linear in linears.items() if linear.format.dense}  # fmt: skip
        stats = Statistics(next(iter(linears.values())).shape[1], needs)
        inputs: list[Tensor] = []
        for i in range(count):
            run = _advanced(block, hidden[i], contexts[i], number) if replay else runs[i]
            name, x = next(run)
            assert name == site.name, f"the block reached {name}, expected {site.name}"
            if needs:
                stats.add(x, theirs.input(i, site.name, x))
            if not replay:
                inputs.append(x)
            if i % 8 == 7 or i == count - 1:
                give_back()
        reached = Reached(f"blocks.{block.index}", site.name, linears, stats, blocks.stored,
                          _made(block, site.name, stats.size), inputs, kept)  # fmt: skip
        for p in passes:
            rows += p.site(reached)
        for name, linear in linears.items():
            if (
                name in kinds
                and linear.format.dense
                and linear.held().parts["weight"].dtype != kinds[name]
            ):
                linear.replace(from_dense(linear.matrix(kinds[name])))
    targets = theirs.finish()
    again = replay
    for p in passes:
        if ORIGINAL in p.needs:
            whole = Whole(block, original, hidden, contexts, targets, kept, blocks.stored)
            rows += p.finish(whole)
            again = True
    if again:
        return [block(h, c) for h, c in zip(hidden, contexts, strict=True)] + targets
    return [_finish(run) for run in runs] + targets


@dataclass(frozen=True)
class Originals:
    """The uncompressed block on its own inputs, suspended at the same site as the compressed one."""

    runs: Sequence[Sites]
    routed: Sequence[str]

    @classmethod
    def of(cls, block: Block, hidden: Sequence[Tensor], contexts: Sequence[Context]) -> Originals:
        experts = [s.name for s in sites(block.layer) if ".expert" in s.name]
        return cls([block.stages(h, c) for h, c in zip(hidden, contexts, strict=True)], experts)

    def input(self, batch: int, site: str, x: Tensor) -> Tensor | None:
        """Its input [..., in]; that of the compressed one where other tokens may have been sent."""
        if not self.runs:
            return None
        name, theirs = next(self.runs[batch])
        assert name == site
        return x if site in self.routed else theirs

    def finish(self) -> list[Tensor]:
        return [_finish(run) for run in self.runs]


def _made(block: Block, site: str, columns: int) -> Made | None:
    """What a site's inputs come from, where their channels can be scaled."""
    found = producer(block.layer, site)
    if found is None:
        return None
    module = block.get_submodule(found.path)
    assert isinstance(module, (Linear, Normalize))
    if not fold.divisible(module):
        return None
    return Made(found.path, module, fold.source_of(found, columns))


def give_back() -> None:
    """Free heap memory goes back to the system at once; glibc would keep hundreds of MiB of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _context(spec: Spec, h: Tensor) -> Context:
    return Context(spec, torch.arange(h.shape[1]).expand(h.shape[:2]))


def _advanced(block: Block, h: Tensor, context: Context, sites_before: int) -> Sites:
    """A fresh run of a block that has passed `sites_before` sites."""
    run = block.stages(h, context)
    for _ in range(sites_before):
        next(run)
    return run


def _finish(run: Sites) -> Tensor:
    try:
        next(run)
    except StopIteration as end:
        return end.value
    raise AssertionError("a block has more sites than its layer says")


# Stating the peak ---------------------------------------------------------------------------------


def weight_count(spec: Spec, layer: LayerSpec) -> int:
    return sum(rows * columns for rows, columns in linear_shapes(spec, layer).values())


def peak_bytes(
    spec: Spec, ids: Tensor | None, needs: frozenset[str], element: int, replay: bool,
    site_bytes: Callable[[int, int], int],
) -> int:  # fmt: skip
    """Bytes alive at the walk's worst moment, the process itself not counted.

    `element` is the bytes of a number in the compute dtype; `site_bytes(rows, columns)` is what the
    passes hold while they work on a site of linears [rows, columns].
    """
    tokens = batch = 0
    if ids is not None and needs:
        tokens, batch = ids.numel(), min(ids.numel(), max(TOKENS_PER_BATCH, ids.shape[1]))
    worst = 0
    for layer in set(spec.layers):
        shapes = linear_shapes(spec, layer)
        block = weight_count(spec, layer) * element * (2 if needs & {CROSS, ORIGINAL} else 1)
        running = batch * 4 * (layer.feed_forward.width + spec.hidden) * 4
        rope = 4 * layer.attention.rope.dims if layer.attention.rope else 0  # cos and sin, float32
        for site in sites(layer):
            rows = sum(shapes[name][0] for name in site.linears)
            columns = shapes[site.linears[0]][1]
            held = _suspended(spec, layer, site.name) if not replay else 2 * spec.hidden
            stats = columns * columns * 4 if HESSIAN in needs else 4 * columns
            if needs & {CROSS, ORIGINAL}:
                held += _suspended(spec, layer, site.name)
                stats += columns * columns * 4 * (CROSS in needs)
            working = max(site_bytes(rows, columns), running)
            worst = max(worst, block + stats + tokens * (held * element + rope) + working)
    return worst


def _suspended(spec: Spec, layer: LayerSpec, site: str) -> int:
    """Numbers per token that a block holds while it is suspended at a site."""
    a, f = layer.attention, layer.feed_forward
    if site == "attention.in":
        return 2 * spec.hidden
    if site == "attention.out":
        return 2 * spec.hidden + 2 * a.head_dim * (a.num_heads + a.num_kv_heads)
    routed, shared = (2, f.experts.shared_width) if f.experts else (0, 0)
    wide = max(f.width, shared) if site.endswith(".out") else 0
    return (4 + routed) * spec.hidden + wide
