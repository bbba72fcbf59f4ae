"""What each option of each place costs: bytes in the files, bytes in memory, seconds of a step.

    size      exactly what the format stores (core/format.py), scales in the model's dtype
    memory    the kernel layout, as the engine would lay it out (runtime/weights.py); on another device than
              this processor the stored bytes
    seconds   of a step, from kernels measured on this machine (onecard.cost); where they are not known and no
              speed is asked for, or for another device, bytes over the bandwidth (roofline.py)

A block that is left out takes with it all of its linears, its norms, its share of keys and values in whatever
they are held, and the steps around its products; lines of a file's header are counted as if it were there.

`Fixed` is what no choice changes: norms, biases, the embedding's rows, work space, the program itself. The
program is that of `onecard run`, seen in a process of its own, as the one that plans holds far more.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from onecard import cost
from onecard.checkpoint.source import Source
from onecard.core.device import Device, resident
from onecard.core.format import Dense, Format, Integers, parse_format
from onecard.core.spec import linear_shapes, sites
from onecard.fit.candidates import CACHES, possible, size_of
from onecard.fit.goal import Goal
from onecard.fit.planner import GONE, Group, Option
from onecard.kernels import cpu, layout
from onecard.roofline import DECODE, device_of, needed
from onecard.runtime.cpu import CpuSettings, usual_cache
from onecard.runtime.footprint import Footprint, footprint
from onecard.runtime.pages import position_bytes
from onecard.runtime.weights import HEAD_BLOCK, planned_weights

ENTRY = 140
"""Bytes of a tensor's line in a file's header, at most."""
SPARE = 1 << 19
"""Bytes by which one start of a program takes more than another."""
USED = 2048
"""Tokens of context where none are asked for."""


@dataclass(frozen=True)
class Fixed:
    """What every plan costs beside its options: bytes of the files, bytes in memory, seconds of a step."""

    size: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Costs:
    """Sizes and speeds of a model's candidates on one device, in one use."""

    source: Source
    goal: Goal

    @property
    def context(self) -> int:
        return self.goal.context or min(USED, self.source.spec.max_context)

    @cached_property
    def device(self) -> Device:
        return device_of(self.goal.device)

    @property
    def here(self) -> bool:
        return self.goal.device == "auto" and cpu.available()

    def options(
        self, formats: Sequence[str], harms: Mapping[str, Mapping[str, float]] | None = None,
        tables: Sequence[str] = (),
    ) -> dict[str, list[Option]]:  # fmt: skip
        """place -> its options; without `harms`, of which only the costs are to be known, they are 0."""
        spec, stored = self.source.spec, self.source.dtype
        found: dict[str, list[Option]] = {}
        for index, layer in enumerate(spec.layers):
            shapes = linear_shapes(spec, layer)
            for site in sites(layer):
                where = f"blocks.{index}.{site.name}"
                own = {f"blocks.{index}.{name}": shapes[name] for name in site.linears}
                names = possible(formats, list(own.values()), stored)
                if harms is not None:
                    names = {n: f for n, f in names.items() if n in harms[where]}
                found[where] = [
                    self.option(name, format, own, 0.0 if harms is None else harms[where][name])
                    for name, format in names.items()
                ]
        if tables:
            known = harms["tables"] if harms is not None else dict.fromkeys([*tables, stored], 0.0)
            found["tables"] = [
                self.table(name, known[name]) for name in (*tables, stored) if name in known
            ]
        known = harms["cache"] if harms is not None else dict.fromkeys(CACHES, 0.0)
        found["cache"] = [self.cache(name, known[name]) for name in CACHES if name in known]
        return found

    def option(
        self, name: str, format: Format, own: Mapping[str, tuple[int, int]], harm: float
    ) -> Option:
        """A site in a format; linears lie in memory as the engine lays them out."""
        size = size_of(format, list(own.values()), self.source.dtype)
        if not self.here:
            return Option(name, harm, size, size, size * self.per_byte * self.met(own))
        memory = sum(self.laid_out(name)[path] for path in own)
        if self.machine is None:
            return Option(name, harm, size, memory, memory * self.per_byte * self.met(own))
        shares = [self.machine.of_matrix(shape, format, self.met(own)) for shape in own.values()]
        return Option(name, harm, size, memory, sum(share.decode for share in shares))

    def met(self, own: Mapping[str, tuple[int, int]]) -> float:
        """The share of a site's bytes that a step reads: of experts those that are chosen."""
        experts = next(
            (e for row in self.source.spec.layers if (e := row.feed_forward.experts)), None
        )
        return experts.top / experts.count if experts and ".expert" in next(iter(own)) else 1.0

    @cached_property
    def machine(self) -> cost.Costs | None:
        """Measured kernels of this machine, where a speed is asked for or they are known already."""
        if not self.here or not (self.goal.speed or cost.known()):
            return None
        return self.running(usual_cache())

    def running(self, cache: str) -> cost.Costs:
        """Costs with keys and values in `cache`; made once."""
        if cache not in self._running:
            self._running[cache] = self._runs(cache)
        return self._running[cache]

    @cached_property
    def _running(self) -> dict[str, cost.Costs]:
        return {}

    def _runs(self, cache: str) -> cost.Costs:
        size = sum(self.laid_out("int4-g128").values())
        return cost.Costs(
            self.source, self.context, self.goal.batch, CpuSettings(cache=cache), size
        )

    def laid_out(self, name: str) -> dict[str, int]:
        """path -> bytes of every linear of the blocks, were all in one format."""
        return _laid_out(self.source, None if name == self.source.dtype else name)

    @cached_property
    def per_byte(self) -> float:
        """Seconds that reading a byte takes."""
        bandwidth = self.device.bandwidth()
        return 1 / (DECODE * bandwidth) if bandwidth else 0.0

    def table(self, name: str, harm: float) -> Option:
        """The embedding and the head, which the engine has in int8 where it is dense; an embedding that is
        packed it expands again, so that bytes in memory are those of the head, beside the usual ones."""
        spec, stored = self.source.spec, self.source.dtype
        shape, format = (spec.vocab_size, spec.embed_size), parse_format(name)
        size = size_of(format, [shape], stored) * (1 if spec.tied else 2)
        if not self.here:
            return Option(name, harm, size, size, size * self.per_byte)
        usual = layout.rounded(shape, HEAD_BLOCK)
        made = layout.integers(shape, format) if isinstance(format, Integers) else usual
        more = layout.size(made) - layout.size(usual)
        return Option(name, harm, size, more, more * self.per_byte)

    def cache(self, name: str, harm: float) -> Option:
        """Keys and values of all positions; a step reads them all. Seconds beside those of the usual one."""
        usual, size = usual_cache(), self.kept(name)
        if not self.here or self.machine is None:
            return Option(name, harm, 0, size, size * self.per_byte)
        held, slower = usual if name == "fp16" else name, 0.0
        if held != usual:
            slower = self.running(held).rest().decode - self.machine.rest().decode
        return Option(name, harm, 0, size, slower)

    def kept(self, cache: str, blocks: Sequence[int] | None = None) -> int:
        """Bytes of keys and values, of all blocks or of these."""
        held = usual_cache() if self.here and cache == "fp16" else cache
        shares = [
            position_bytes(row.attention.num_kv_heads, row.attention.head_dim, held)
            for row in self.source.spec.layers
        ]
        total = self.context * self.goal.batch * sum(shares)
        if self.here:
            total = _footprint(self.source, self.context, self.goal.batch, held).kv_bytes
        return total if blocks is None else sum(total * shares[i] // sum(shares) for i in blocks)

    def groups(
        self, places: Mapping[str, Sequence[Option]], harms: Mapping[str, Mapping[str, float]] | None,
    ) -> list[Group]:  # fmt: skip
        """The blocks that can be left out; with `harms` those of which it was measured."""
        names, found = list(places), []
        for index in range(self.source.spec.num_layers):
            block = f"blocks.{index}"
            if harms is not None and block not in harms:
                continue
            members = tuple(i for i, w in enumerate(names) if w.startswith(f"{block}."))
            saves = tuple(self.saved(index, option.format) for option in places["cache"])
            found.append(Group(block, members, harms[block][GONE] if harms else 0.0, saves))
        return found if len(found) > 1 else []

    def saved(self, index: int, cache: str) -> Option:
        """What goes with a block beside its linears, where keys and values are held in `cache`."""
        source, layer = self.source, self.source.spec.layers[index]
        own = [place.stored.name for place in source.places(index)]
        tensors = {n for n in source.checkpoint.entries if n.rpartition(".")[0] in own}
        linears = sum(
            Dense(source.dtype).bytes(linear_shapes(source.spec, layer)[name])
            for site in sites(layer) for name in site.linears
        )  # fmt: skip
        size = max(0, sum(source.checkpoint.entries[n].nbytes for n in tensors) - linears)
        kv = self.kept(cache, [index])
        if not self.here:
            return Option(GONE, 0.0, size, kv + size, kv * self.per_byte)
        held = usual_cache() if cache == "fp16" else cache
        seconds = (
            kv * self.per_byte if self.machine is None else self.running(held).block(layer).decode
        )
        return Option(GONE, 0.0, size, kv + _beside(source)[index], seconds)

    @cached_property
    def linears(self) -> int:
        """Bytes of the linears of all blocks, as they are stored."""
        spec, dense = self.source.spec, Dense(self.source.dtype)
        return sum(
            dense.bytes(linear_shapes(spec, layer)[name])
            for layer in spec.layers for site in sites(layer) for name in site.linears
        )  # fmt: skip

    def fixed(self, tables: bool = True) -> Fixed:
        """What the options leave out; the tables too, where they are no choice."""
        source, spec = self.source, self.source.spec
        table = self.table(source.dtype, 0.0)
        files = sum(path.stat().st_size for path in source.checkpoint.files)
        count = sum(len(site.linears) for layer in spec.layers for site in sites(layer))
        size = files - self.linears + 4 * ENTRY * count - (table.size if tables else 0)
        memory = self.fixed_memory(tables)
        if not self.here:
            return Fixed(size, memory, 0.0 if tables else table.seconds)
        head = dict(_footprint(source, self.context, self.goal.batch, usual_cache()).weights)
        seconds = head.get("head", 0) * self.per_byte
        return Fixed(size, memory, seconds if self.machine is None else self.machine.rest().decode)

    def fixed_memory(self, tables: bool = True) -> int:
        """Bytes in memory that the options leave out."""
        source, context, batch = self.source, self.context, self.goal.batch
        if not self.here:
            own = self.table(source.dtype, 0.0).memory if tables else 0
            return max(0, needed(source, None, context, batch).fixed - self.linears - own)
        found = _footprint(source, context, batch, usual_cache())
        blocks = sum(self.laid_out(source.dtype).values())
        return found.weight_bytes - blocks + _work(source, context, batch) + program_bytes()


@lru_cache(maxsize=128)
def _laid_out(source: Source, name: str | None) -> dict[str, int]:
    weights = planned_weights(source, "int8", parse_format(name) if name else None)
    return {path: size for path, size in weights.linears().items() if path.startswith("blocks.")}


@lru_cache(maxsize=8)
def _beside(source: Source) -> list[int]:
    """Bytes in memory of every block's norms and biases."""
    weights = planned_weights(source, "int8")
    linears, found = weights.linears(), [0] * source.spec.num_layers
    packed = {
        f"blocks.{index}.{name}"
        for index, layer in enumerate(source.spec.layers) for site in sites(layer) for name in site.linears
    }  # fmt: skip
    for path, size in weights.sizes().items():
        if path.startswith("blocks.") and not (path in linears and path in packed):
            found[int(path.split(".")[1])] += size
    return found


@lru_cache(maxsize=32)
def _footprint(source: Source, context: int, batch: int, cache: str) -> Footprint:
    return footprint(source, context, batch, CpuSettings(cache=cache))


def _work(source: Source, context: int, batch: int) -> int:
    """Work space, of whatever formats the linears are in."""
    formats = (None, parse_format("int4-g32"), parse_format("int3-g64"))
    return max(footprint(source, context, batch, formats=format).work_bytes for format in formats)


PROGRAM = """
import onecard.runtime.cpu, onecard.runtime.scheduler, onecard.running, onecard.checkpoint.source
import onecard.checkpoint.tokenizer, onecard.runtime.engine, onecard.kernels.cpu as cpu, sys
from onecard.core.device import resident
cpu.available()
onecard.checkpoint.source.Source(sys.argv[1]).tokenizer()
print(resident())
"""


@lru_cache(maxsize=4)
def program_bytes(model: str = "demo") -> int:
    """What a process that is about to run a model holds already, at most."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, model], capture_output=True, text=True, check=False
    )
    seen = (
        int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else resident()
    )
    return seen + SPARE
