"""Rounding learned by the sign of its gradient: each block is brought nearest to what the original gives.

For every weight a shift v and for every group a stretch m are learned, all linears of a block at once,

    q = clamp(round(w / s + v) + z),   s = s_0 (1 + m),   loss = |block_Q(x) - target|^2

x are the block's inputs as the compressed blocks before have left them, the target is the output of the
uncompressed model on its own inputs: so a block makes good for what came before it, too. The gradient of
round is taken as 1; every parameter moves by an amount that falls from `rate` / `steps` to 0, in the
direction of its gradient's sign: over all steps by at most half the rate.

The start is round to nearest (v = 0, the paper's) or GPTQ's codes: v is then the least shift that gives
them. Where all steps have not lowered the loss over all inputs, the start stays; without steps it does too.

Memory: the block's weights six times in float32, and what one batch's forward pass keeps for its gradient.
Time: `steps` forward and backward passes of a block over about 2048 tokens.

Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, arXiv 2309.05516.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.calibrate.grids import straight
from onecard.calibrate.stats import ORIGINAL
from onecard.calibrate.walk import Reached, Whole
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Integers, Weight
from onecard.core.report import Row
from onecard.core.spec import Spec
from onecard.kernels import convert, reference
from onecard.nn.layers import Linear
from onecard.nn.transformer import Block
from onecard.passes.base import BlockPass
from onecard.passes.gptq import GPTQ, is_pruned
from onecard.passes.quantize import AUTO, RoundToNearest, require_finite_scale


@dataclass(frozen=True)
class AutoRound(BlockPass):
    """Settings: the grid, the number of steps, and what they start from."""

    bits: int = 4
    group: int | Literal["auto"] | None = AUTO
    zero_point: bool = False
    steps: int = 200
    rate: float = 1.0
    start: Literal["gptq", "rtn"] = "gptq"
    correct: float = 1.0
    sweeps: int = 1

    key = "autoround"
    title = "sign-gradient rounding"
    paper = "Cheng et al., Optimize Weight Rounding via Signed Gradient Descent, arXiv 2309.05516"

    def __post_init__(self) -> None:
        self.first  # noqa: B018  checks the grid
        if not 0 <= self.steps <= 100_000:
            raise BadRequest(f"autoround.steps is {self.steps}", do="0 to 100000; 200 is usual")
        if not 0 < self.rate <= 100:
            raise BadRequest(
                f"autoround.rate is {self.rate}", do="1 for a start at rtn, less at gptq"
            )

    @property
    def first(self) -> GPTQ | RoundToNearest:
        """What it starts from."""
        if self.start == "rtn":
            return RoundToNearest(self.bits, self.group, self.zero_point)
        return GPTQ(
            self.bits, self.group, self.zero_point, correct=self.correct, sweeps=self.sweeps
        )

    @property
    def needs(self) -> frozenset[str]:
        return self.first.needs | {ORIGINAL}

    def format_of(self, columns: int) -> Integers:
        return self.first.format_of(columns)

    def check(self, spec: Spec) -> None:
        self.first.check(spec)

    def site_bytes(self, rows: int, columns: int) -> int:
        return self.first.site_bytes(rows, columns)

    def site(self, site: Reached) -> Iterator[Row]:
        if isinstance(self.first, GPTQ):
            aims, solution, format = self.first.solved(site)
            site.kept.update(aims)
            yield from self.first.hold(site, solution, format)
        else:
            site.kept.update({name: linear.matrix() for name, linear in site.linears.items()})
            yield from self.first.site(site)

    def finish(self, whole: Whole) -> Iterator[Row]:
        before, after = learn(whole, self.steps, self.rate)
        yield Row(f"blocks.{whole.block.index}", "relative_block_error", after, before=before)


class Learned(nn.Module):
    """A linear whose rounding is learned: w [out, in] aims, `held` the codes that it starts from."""

    def __init__(self, linear: Linear, w: Tensor) -> None:
        super().__init__()
        held = linear.held()
        assert isinstance(held.format, Integers)
        self.format, self.bias, self.read = held.format, linear.bias, linear.read
        codes, scale, zero = reference.codes(held)
        self.w = reference.grouped(w, self.format)  # [out, groups, size]
        self.first, self.zero = scale[..., None], zero[..., None]
        q = reference.grouped(codes.float(), self.format)
        self.shift = nn.Parameter(_shift(self.w / self.first, q, self.zero, self.format))
        self.stretch = nn.Parameter(torch.zeros_like(self.first))
        self.keep = self.w != 0 if is_pruned(self.w) else None

    def scale(self) -> Tensor:
        """[out, groups, 1], as it will be stored."""
        s = self.first * (1 + self.stretch)
        return straight(s.to(reference.DTYPES[self.format.scale]).float(), s)

    def codes(self, scale: Tensor) -> Tensor:
        low, high = self.format.levels
        shift = self.shift if self.keep is None else self.shift * self.keep
        t = self.w / scale + shift + self.zero
        return straight(torch.round(t), t).clamp(low, high)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        w = ((self.codes(scale) - self.zero) * scale).flatten(1)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.read(x), w.to(x.dtype), bias)

    @torch.no_grad()
    def stored(self) -> Weight:
        scale = self.scale()
        q = self.codes(scale).flatten(1)
        return convert.hold(q, scale[..., 0], self.zero[..., 0], self.format)


def _shift(t: Tensor, q: Tensor, zero: Tensor, format: Integers) -> Tensor:
    """The least v with clamp(round(t + v) + zero) = q; a hair inside, so that no tie decides."""
    low, high = format.levels
    n = q - zero
    least = torch.where(q > low, n - 0.499, -torch.inf)
    most = torch.where(q < high, n + 0.499, torch.inf)
    there = (torch.round(t) + zero).clamp(low, high) == q
    return torch.where(there, 0.0, t.clamp(least, most) - t)


def learn(whole: Whole, steps: int, rate: float) -> tuple[float, float]:
    """Learn the rounding of a block's linears in place; its relative error before and after."""
    block = whole.block
    linears = {name: block.linear(name) for name in whole.kept}
    start = {name: linear.held() for name, linear in linears.items()}
    power = sum(float(_change(t, h)) for t, h in zip(whole.targets, whole.hidden, strict=True))
    before = _error(block, whole)
    learned = {name: Learned(linear, whole.kept[name]) for name, linear in linears.items()}
    _exchange(block, learned)
    try:
        with torch.enable_grad():
            moved = [p for each in learned.values() for p in (each.shift, each.stretch)]
            descend(block, whole, moved, steps, rate)
    finally:
        _exchange(block, linears)
    for name, linear in linears.items():
        linear.replace(learned[name].stored())
        where = f"blocks.{block.index}.{name}"
        require_finite_scale(linear.held().parts["weight_scale"], learned[name].format, where)
    after = _error(block, whole)
    if not after < before:
        for name, linear in linears.items():
            linear.replace(start[name])
        after = before
    return before / max(power, 1e-30), after / max(power, 1e-30)


def descend(
    block: Block, whole: Whole, parameters: Sequence[nn.Parameter], steps: int, rate: float
) -> None:
    """`steps` of sign descent, a batch each, in an order drawn with a fixed seed."""
    draw = torch.Generator().manual_seed(block.index)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(whole.hidden), generator=draw).tolist()
        i = order.pop()
        out = block(whole.hidden[i], whole.contexts[i])
        loss = F.mse_loss(out.float(), whole.targets[i].float())
        if not bool(torch.isfinite(loss)):
            raise FailedWork(
                f"block {block.index}: the loss is {float(loss)}", do="check the weights"
            )
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        reach = rate * (1 - step / steps) / steps
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(torch.sign(gradient), alpha=reach)


def _exchange(block: Block, modules: dict[str, Learned] | dict[str, Linear]) -> None:
    """Put modules in the places of linears, or those back."""
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, module)


def _error(block: Block, whole: Whole) -> float:
    runs = zip(whole.hidden, whole.contexts, whole.targets, strict=True)
    return sum(float(_change(block(h, c), t)) for h, c, t in runs)


def _change(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().sum()
