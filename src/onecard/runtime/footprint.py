"""The memory that a model takes while it runs on this processor, from the code that lays it out.

    weights      every part of the kernel layout, as it would be written (weights.py, layout.cpp)
    embedding    the stored table; rows are read where they lie, all of them once when it is opened
    kv cache     pages for all positions of all sequences at once (forward.cpp)
    work space   activations of a step's rows, logits, what every thread has to itself (forward.cpp)
    program      what this process holds already: the interpreter and its libraries

Only headers are read, so it is instant for a model of any size, and for formats that it is not in yet: one
for all linears of blocks, or each linear's own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from onecard.checkpoint.source import Source
from onecard.core.device import resident
from onecard.core.errors import BadRequest
from onecard.runtime.cpu import MOST, PAGE, CpuSettings, Described
from onecard.runtime.weights import Formats, planned_weights

USUAL = CpuSettings()


@dataclass(frozen=True)
class Footprint:
    """Bytes of everything, by part: ("attention", n), ... in the order of the top of this file."""

    weights: tuple[tuple[str, int], ...]
    kv_bytes: int
    work_bytes: int
    program_bytes: int
    positions: int  # that there are pages for, of all sequences

    def parts(self) -> tuple[tuple[str, int], ...]:
        return (*self.weights, ("kv cache", self.kv_bytes), ("work space", self.work_bytes),
                ("program", self.program_bytes))  # fmt: skip

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights)

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts())


def footprint(
    source: Source, context: int, batch: int = 1, settings: CpuSettings = USUAL,
    formats: Formats | None = None, program: int | None = None,
) -> Footprint:  # fmt: skip
    """For `batch` sequences of `context` positions each; with linears in other `formats` (weights.py).

    `program`: bytes of a process that runs nothing else; None: what this one holds. Raises BadRequest
    where the engine cannot run the model.
    """
    if context < 1 or batch < 1:
        raise BadRequest(
            f"a context of {context} for {batch} sequences was asked for", do="both are 1 or more"
        )
    pages = batch * -(-context // PAGE)
    if pages * PAGE > MOST["context"]:
        raise BadRequest(
            f"{batch} sequences of {context} positions were asked for",
            do=f"{MOST['context']} positions in all are possible",
        )
    weights = planned_weights(source, settings.head, formats)
    work, kv = Described(source, replace(settings, context=pages * PAGE), weights).need()
    sizes: Counter[str] = Counter()
    for path, size in weights.sizes().items():
        sizes[part_of(path)] += size
    return Footprint(
        tuple(sizes.most_common()), kv, work, resident() if program is None else program,
        pages * PAGE,
    )  # fmt: skip


def part_of(path: str) -> str:
    """The part of a model that a module belongs to, by its path."""
    words = path.split(".")
    if "norm" in path:
        return "norms"
    if path.startswith("stem.") or words[1] == "project":
        return "embedding"
    if path.startswith("tail."):
        return "head"
    if words[2] == "attention":
        return "attention"
    return "experts" if words[3].startswith(("expert", "shared")) else "feed-forward"
