"""What a stage leaves, before it is there: every tensor by name, dtype and shape, and so its bytes.

Sizes follow from the Spec that the passes foretell, from the layout of the source (its names, what is
fused, what lies transposed), and from the scheme of every linear, carried from stage to stage: what a pass
packs, and what it finds packed and keeps. Headers are counted. Exact but for what weights and measurements
decide: how many weights rounding sets to zero where zeros are not stored, and which sites get how many bits
where only their sum is given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onecard.checkpoint.save import SINGLE_FILE
from onecard.checkpoint.shards import header_of
from onecard.checkpoint.source import Place, Source
from onecard.core.format import DTYPE_BYTES, Format, Parts
from onecard.core.scheme import Scheme
from onecard.core.spec import linear_shapes, sites
from onecard.passes.base import ModelPass, Pass, output_scheme


@dataclass(frozen=True)
class Outline:
    """A model: its layout and sizes, the dtype it is stored in, the schemes of those linears of every block
    that are packed, the format of embedding and head where they are, whether what is fused lies in parts.
    """

    source: Source
    stored: str
    schemes: tuple[Mapping[str, Scheme], ...]
    table: Format | None = None
    split: bool = False

    @property
    def file_bytes(self) -> int:
        """Bytes of its weight files, headers counted."""
        parts = [self.part(None, "stem"), *map(self.part, range(self.source.spec.num_layers)),
                 self.part(None, "tail")]  # fmt: skip
        total = sum(map(written_bytes, parts))
        if total > SINGLE_FILE:
            return total
        return written_bytes({name: array for part in parts for name, array in part.items()})

    def part(self, index: int | None, side: str = "") -> Parts:
        """name -> dtype and shape of the tensors of a block, or of the stem or the tail."""
        found: Parts = {}
        for place in self.source.places(index, self.split):
            later = bool(place.stored.of and place.stored.part)
            tied = place.path == "tail.head" and self.source.spec.tied
            if place.path.startswith(side) and not later and not tied:
                scheme = None if index is None else self.schemes[index].get(place.path)
                if self.table and place.path in ("stem.embedding", "tail.head"):
                    scheme = Scheme(self.table)
                found |= self.placed(place, scheme)
        return found

    def placed(self, place: Place, scheme: Scheme | None) -> Parts:
        """The same of one module, the rows of those fused with it among its own."""
        found: Parts = {}
        for tensor, own in place.module.tensors().items():
            name, shape = f"{place.stored.name}.{tensor}", (place.total, *own[1:])
            if tensor == "weight" and scheme is not None:
                parts = scheme.parts((shape[0], shape[1]), self.stored)
                found |= {f"{place.stored.name}.{part}": array for part, array in parts.items()}
                continue
            entry = self.source.checkpoint.entries.get(name)
            turned = tensor == "weight" and place.stored.transposed
            dtype = entry.dtype if entry else self.stored
            found[name] = dtype, tuple(reversed(shape)) if turned else shape
        return found


def written_bytes(arrays: Parts) -> int:
    """Bytes of a safetensors file that holds these."""
    header, _ = header_of(arrays)
    return len(header) + sum(DTYPE_BYTES[dtype] * math.prod(s) for dtype, s in arrays.values())


def outline_of(source: Source) -> Outline:
    """A model as it lies in a folder that is not compressed."""
    return Outline(source, source.dtype, ({},) * source.spec.num_layers, None, source.split)


def behind(before: Outline, passes: Sequence[Pass], split: bool) -> Outline:
    """What a stage of such passes leaves of a model."""
    spec, stored, table = before.source.spec, before.stored, before.table
    for p in passes:
        spec = p.leaves(spec)
    source, made = before.source.shaped(spec), [p.foretold(spec) for p in passes]
    blocks = []
    for index, layer in enumerate(spec.layers):
        block, shapes = dict[str, Scheme](), linear_shapes(spec, layer)
        for name in (name for site in sites(layer) for name in site.linears):
            found = (row[index].get(name) for row in reversed(made))
            format = next((format for format in found if format), None)
            held = before.schemes[index].get(name)
            scheme = output_scheme(passes, shapes[name], stored, format, held)
            if format and isinstance(passes[0], ModelPass):  # stored as it is made
                scheme = Scheme(format.scaled(stored))
            if not scheme.format.dense:
                block[name] = scheme
        blocks.append(block)
    for p in passes:
        table = p.table_for(spec) or table
    return Outline(source, stored, tuple(blocks), table.scaled(stored) if table else None, split)
