"""What must be cut together: a unit (a head, a neuron, a number of the residual stream) and its sides.

A linear has two sides, its outputs (rows of W [out, in]) and its inputs (columns). A unit lives on the
outputs of the modules that make it and on the inputs of those that read it:

    head       rows of q (and of k, v where every head has its own), columns of o
    kv_group   rows of k and v, of the q of all heads that share them, columns of o
    neuron     rows of gate and up, columns of down: one group per expert
    hidden     columns of everything that reads the residual stream, rows of what adds to it, norms,
               the embedding, the head: one group over the whole model

`Group.sides` says so as data; which units go is a pass's business. Cutting is exact: with the columns
that read a unit set to zero the model computes what it computes without the unit. For `hidden` the
same holds when the norms are told: with n of m numbers left the mean square of an RMS norm is m / n
times as large, so its weight is multiplied by sqrt(m / n) (up to eps). Layer norms subtract a mean
over all numbers, which no weight can make good: such families have no group `hidden`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from onecard.core.errors import BadRequest
from onecard.core.spec import FeedForward, LayerSpec, Spec, block_modules, outer_modules
from onecard.nn.layers import Linear
from onecard.nn.transformer import Block, Stem, Tail

Kind = Literal["head", "kv_group", "neuron", "hidden"]
HIDDEN = "hidden"


@dataclass(frozen=True)
class Side:
    """One side of one module: axis 0 its outputs, 1 its inputs; a unit is `size` entries long there."""

    path: str
    axis: int
    size: int = 1


@dataclass(frozen=True)
class Group:
    """`count` units and the sides they live on; `readers` are the sides that read a unit.

    `runs` equal runs of units must lose the same number each: heads that share a key/value head.
    """

    kind: Kind
    name: str
    count: int
    makers: tuple[Side, ...]
    readers: tuple[Side, ...]
    runs: int = 1

    @property
    def sides(self) -> tuple[Side, ...]:
        return self.makers + self.readers


def stacks(feed_forward: FeedForward) -> list[tuple[str, int]]:
    """(path, width) of the feed-forwards of a layer: one, or its experts and the shared one."""
    experts = feed_forward.experts
    if experts is None:
        return [("feed_forward", feed_forward.width)]
    found = [(f"feed_forward.expert{i}", feed_forward.width) for i in range(experts.count)]
    if experts.shared_width:
        found.append(("feed_forward.shared", experts.shared_width))
    return found


def groups(layer: LayerSpec, kind: Kind) -> tuple[Group, ...]:
    """The groups of one kind within a block."""
    a, f = layer.attention, layer.feed_forward
    if kind == "neuron":
        inner = ("gate", "up") if f.gated else ("up",)
        return tuple(
            Group(kind, name, width, tuple(Side(f"{name}.{part}", 0) for part in inner),
                  (Side(f"{name}.down", 1),))
            for name, width in stacks(f)
        )  # fmt: skip
    if kind == "hidden":
        return ()
    shared = a.num_heads // a.num_kv_heads
    keys = (Side("attention.k", 0, a.head_dim), Side("attention.v", 0, a.head_dim))
    if kind == "kv_group":
        wide = shared * a.head_dim
        return (Group(kind, "attention", a.num_kv_heads, (Side("attention.q", 0, wide), *keys),
                      (Side("attention.o", 1, wide),)),)  # fmt: skip
    makers = (Side("attention.q", 0, a.head_dim), *(keys if shared == 1 else ()))
    runs = a.num_kv_heads if shared > 1 else 1
    reader = Side("attention.o", 1, a.head_dim)
    return (Group(kind, "attention", a.num_heads, makers, (reader,), runs),)


READS_HIDDEN = ("q", "k", "v", "gate", "up", "router", "shared_gate", "head")
MAKES_HIDDEN = ("o", "down")


def hidden_sides(modules: Mapping[str, object]) -> Iterator[Side]:
    """The sides of the modules of a block, or of stem and tail, that the residual stream touches."""
    for path in modules:
        name = path.rpartition(".")[2]
        if name in READS_HIDDEN or name == "embedding":
            yield Side(path, 1)
        elif name in MAKES_HIDDEN or path.startswith(("norm_", "tail.norm")):
            yield Side(path, 0)


def require_hidden(spec: Spec) -> None:
    """BadRequest where numbers of the residual stream cannot be taken out exactly."""
    if spec.norm.kind != "rms":
        raise BadRequest(
            f"the width of {spec.family} cannot be cut: its norms subtract the mean of all numbers",
            do="cut heads, neurons or layers",
        )
    if spec.embed_scale != 1.0:
        raise BadRequest(
            f"the width of {spec.family} cannot be cut: its config.json derives the scale of the "
            "embedding from it", do="cut heads, neurons or layers",
        )  # fmt: skip


# Which units stay ---------------------------------------------------------------------------------

Kept = Mapping[str, Tensor]
"""Group name -> the units that stay, in order, of one block; `hidden` for the whole model."""


@dataclass(frozen=True)
class Surgery:
    """A smaller model: its Spec, which old block each block comes from, and what stays of each.

    `kept` has a row per new block; a group that is not named there stays whole. `hidden`: the numbers
    of the residual stream that stay, None for all.
    """

    spec: Spec
    layers: tuple[int, ...]
    kept: tuple[Kept, ...]
    kind: Kind = "neuron"
    hidden: Tensor | None = None


def surgery(
    spec: Spec,
    layers: Sequence[int],
    kept: Sequence[Kept],
    kind: Kind = "neuron",
    hidden: Tensor | None = None,
) -> Surgery:
    """The Surgery that leaves these; `kept` has a row per layer that stays. BadRequest if none does."""
    if not layers:
        raise BadRequest("no layer would be left", do="leave at least one")
    rows = [_layer(spec.layers[old], row, kind) for old, row in zip(layers, kept, strict=True)]
    width = spec.hidden if hidden is None else len(hidden)
    return Surgery(replace(spec, layers=tuple(rows), hidden=width), tuple(layers), tuple(kept),
                   kind, hidden)  # fmt: skip


def _layer(layer: LayerSpec, kept: Kept, kind: Kind) -> LayerSpec:
    """A row of a Spec after its groups were cut."""
    a, f = layer.attention, layer.feed_forward
    counts = {name: len(units) for name, units in kept.items()}
    if "attention" in counts and kind == "kv_group":
        shared = a.num_heads // a.num_kv_heads
        left = counts["attention"]
        a = replace(a, num_heads=left * shared, num_kv_heads=left)
    elif "attention" in counts:
        left = counts["attention"]
        own = a.num_heads == a.num_kv_heads
        if not own and left % a.num_kv_heads:
            raise BadRequest(
                f"{left} heads cannot share {a.num_kv_heads} key/value heads",
                do=f"leave a multiple of {a.num_kv_heads}, or cut whole groups (kv_group)",
            )
        a = replace(a, num_heads=left, num_kv_heads=left if own else a.num_kv_heads)
    widths = {counts[name] for name, _ in stacks(f) if name in counts and "shared" not in name}
    if len(widths) > 1:
        raise BadRequest("experts of one layer would differ in width", do="leave all the same")
    if widths:
        f = replace(f, width=widths.pop())
    if f.experts and "feed_forward.shared" in counts:
        f = replace(f, experts=replace(f.experts, shared_width=counts["feed_forward.shared"]))
    if not a.num_heads or not f.width:
        raise BadRequest("a layer would lose all its heads or neurons", do="drop the layer instead")
    return replace(layer, attention=a, feed_forward=f)


def entries(units: Tensor, size: int) -> Tensor:
    """The entries of an axis that are those of `units`, `size` each."""
    return (units[:, None] * size + torch.arange(size)).flatten()


def cut_block(block: Block, plan: Surgery, index: int) -> Block:
    """Block `index` of the new model, from the old block it comes from."""
    with torch.device("meta"):
        new = Block(plan.spec, index)
    kept = plan.kept[index]
    cuts: dict[str, dict[int, Tensor]] = {}
    for group in groups(block.layer, plan.kind):
        if group.name in kept:
            for side in group.sides:
                cuts.setdefault(side.path, {})[side.axis] = entries(kept[group.name], side.size)
    _hidden_cuts(cuts, block_modules(plan.spec, plan.spec.layers[index]), plan)
    _fill(new, block, cuts, plan)
    return new


def cut_outer(part: Stem | Tail, plan: Surgery) -> Stem | Tail:
    """The stem or tail of the new model."""
    if plan.hidden is None:
        return part
    with torch.device("meta"):
        new = type(part)(plan.spec)
    side = type(part).__name__.lower() + "."
    cuts: dict[str, dict[int, Tensor]] = {}
    _hidden_cuts(cuts, outer_modules(plan.spec), plan)
    _fill(new, part, {k.removeprefix(side): v for k, v in cuts.items() if k.startswith(side)}, plan)
    return new


def _hidden_cuts(
    cuts: dict[str, dict[int, Tensor]], modules: Mapping[str, object], plan: Surgery
) -> None:
    if plan.hidden is not None:
        for side in hidden_sides(modules):
            cuts.setdefault(side.path, {})[side.axis] = plan.hidden


def _fill(
    new: nn.Module, old: nn.Module, cuts: Mapping[str, Mapping[int, Tensor]], plan: Surgery
) -> None:
    """The tensors of `old`, cut, into `new`, which lies on the meta device."""
    for path, module in new.named_modules():
        before = old.get_submodule(path)
        cut = cuts.get(path, {})
        if isinstance(module, Linear) and isinstance(before, Linear) and not before.format.dense:
            if cut:
                raise BadRequest(f"{path} is packed and cannot be cut", do="cut before quantizing")
            module.replace(before.held())
        for name, whole in before.named_parameters(recurse=False):
            axes = cut if name == "weight" else {k: v for k, v in cut.items() if k == 0}
            less = whole.detach()
            for axis, index in axes.items():
                less = less.index_select(axis, index)
            if plan.hidden is not None and cut and less.ndim == 1 and name == "weight":
                share = len(plan.hidden) / whole.shape[0]
                less = _renormed(less, share, plan.spec.norm.offset)
            setattr(module, name, nn.Parameter(less, requires_grad=False))
        if isinstance(module, Linear) and isinstance(before, Linear):
            module.format = before.format


def _renormed(weight: Tensor, share: float, offset: float) -> Tensor:
    """A norm's weight when `share` of its numbers are left: the mean square is over fewer."""
    return ((weight.float() + offset) * share**-0.5 - offset).to(weight.dtype)
