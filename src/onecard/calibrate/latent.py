"""Training what is stored: a latent float32 weight, and a grid that makes of it what multiplies.

    forward    y = x grid(W)^T + b         W, or W + s B A where a low-rank change is trained instead
    backward   the gradient of grid(W) is taken for that of W (straight-through, arXiv 1308.3432), cut off
               where a grid ends

A grid also says how its result is stored, so what was trained is exactly what is saved: zeros of a pruned
matrix are multiplied away before and after, integers stay on the scales they came with. Norms, biases,
embeddings and routers train as they are. `Trainee` puts latent linears in the place of a model's linears
and, at the end, stored weights back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.core.format import Integers, Weight
from onecard.kernels import reference
from onecard.nn.layers import Linear
from onecard.nn.model import Model


class Grid(nn.Module):
    """What a latent matrix [out, in] becomes. Its own parameters, if any, are learned with it."""

    def forward(self, w: Tensor) -> Tensor:
        """The matrix that multiplies, float32, with a gradient to w."""
        raise NotImplementedError

    def store(self, w: Tensor) -> Weight:
        """`forward(w)` as it is stored."""
        raise NotImplementedError

    def settle(self, w: Tensor) -> None:
        """Keep w in its range, behind an update."""


class FreeGrid(Grid):
    """Any number where the stored matrix is not zero; stored in the dtype it had."""

    keep: Tensor | None

    def __init__(self, stored: Tensor) -> None:
        super().__init__()
        self.dtype = stored.dtype
        keep = stored != 0
        self.register_buffer("keep", None if bool(keep.all()) else keep)

    def forward(self, w: Tensor) -> Tensor:
        return w if self.keep is None else w * self.keep

    def store(self, w: Tensor) -> Weight:
        return reference.from_dense(self(w).to(self.dtype))


class IntegerGrid(Grid):
    """The integer grid a matrix is stored on: scales and zero points [out, groups] stay.

    Below and above the grid the gradient is zero. `zeros`: weights that are zero stay so.
    """

    keep: Tensor | None
    scale: Tensor
    zero: Tensor

    def __init__(self, held: Weight, zeros: bool = False) -> None:
        super().__init__()
        assert isinstance(held.format, Integers)
        self.format = held.format
        q, scale, zero = reference.codes(held)
        self.register_buffer("scale", scale[..., None])
        self.register_buffer("zero", zero[..., None])
        keep = reference.grouped(q.float(), self.format) != self.zero
        self.register_buffer("keep", keep.flatten(1) if zeros else None)

    def codes(self, w: Tensor) -> Tensor:
        """Integers [out, groups, size], as floats, with the straight-through gradient."""
        low, high = self.format.levels
        t = (reference.grouped(w, self.format) / self.scale + self.zero).clamp(low, high)
        return straight(torch.round(t), t)

    def forward(self, w: Tensor) -> Tensor:
        values = ((self.codes(w) - self.zero) * self.scale).flatten(1)
        return values if self.keep is None else values * self.keep

    def store(self, w: Tensor) -> Weight:
        q = self.codes(w)
        if self.keep is not None:
            kept = reference.grouped(self.keep, self.format)
            q = torch.where(kept, q, self.zero)
        return reference.hold(q.flatten(1), self.scale[..., 0], self.zero[..., 0], self.format)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, through: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight(value: Tensor, through: Tensor) -> Tensor:
    """`value` with the gradient of `through`."""
    return _Straight.apply(value.detach(), through)


def grid_of(linear: Linear, zeros: bool = False) -> Grid:
    """The grid of a linear as it is stored."""
    held = linear.held()
    return FreeGrid(held.parts["weight"]) if linear.format.dense else IntegerGrid(held, zeros)


# Linears and the model around them ----------------------------------------------------------------


class LatentLinear(nn.Module):
    """A linear whose matrix is grid(latent). With `rank`, the latent is fixed but for s B A.

    A [rank, in] is random, B [out, rank] zero at first (Hu et al., LoRA, arXiv 2106.09685), s = alpha /
    rank with alpha = 2 rank. The change is added before the grid, so zeros and integers are respected
    and merging it changes no bit of the output.
    """

    base: Tensor

    def __init__(self, linear: Linear, grid: Grid, rank: int, seed: int) -> None:
        super().__init__()
        self.shape, self.grid, self.rank = linear.shape, grid, rank
        w = linear.matrix().clone()
        self.bias = linear.bias
        if rank:
            generator = torch.Generator().manual_seed(seed)
            bound = 1 / math.sqrt(w.shape[1])
            a = torch.empty(rank, w.shape[1]).uniform_(-bound, bound, generator=generator)
            self.register_buffer("base", w)
            self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(w.shape[0], rank))
        else:
            self.latent = nn.Parameter(w)

    def matrix(self) -> Tensor:
        """The latent matrix [out, in]."""
        return self.base + 2.0 * self.b @ self.a if self.rank else self.latent

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            w = self.grid(self.matrix())
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, w.to(x.dtype), bias)


class Trainee:
    """A model that can be trained: latent linears in it, everything float32.

    `rank`: only low-rank changes of the linears are trained. `within`: only what lies under this path.
    """

    def __init__(
        self,
        model: Model,
        grid: Callable[[str, Linear], Grid],
        rank: int = 0,
        within: str = "",
        seed: int = 0,
    ) -> None:
        self.network = model.network
        self.linears: dict[str, LatentLinear] = {}
        self.places: dict[str, Linear] = {}
        found = [(name, linear) for name, linear in model.linears() if name.startswith(within)]
        inside = {id(p) for _, linear in found for p in linear.parameters(recurse=False)}
        self.dtypes: dict[nn.Parameter, torch.dtype] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        for name, p in self.network.named_parameters():
            if not name.startswith(within) or (id(p) in inside and not name.endswith("bias")):
                continue
            self.dtypes[p] = p.dtype
            p.data = p.data.float()
            if not rank:
                p.requires_grad_(True)
                self.parameters[name] = p
        for number, (name, linear) in enumerate(found):
            made = LatentLinear(linear, grid(name, linear), rank, seed + number)
            self._put(name, made)
            self.linears[name], self.places[name] = made, linear
            self.parameters |= {
                f"{name}.{part}": p for part, p in made.named_parameters() if part != "bias"
            }

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.network.get_submodule(parent), last, module)

    def settle(self) -> None:
        """Behind an update: latents go back into their range."""
        for linear in self.linears.values():
            if not linear.rank:
                linear.grid.settle(linear.latent.data)

    @torch.no_grad()
    def finish(self) -> None:
        """Stored weights take the place of the latent ones; everything has the dtype it had."""
        for name, linear in self.places.items():
            made = self.linears[name]
            linear.replace(made.grid.store(made.matrix()))
            self._put(name, linear)
        for p, dtype in self.dtypes.items():
            p.data = p.data.to(dtype)
            p.requires_grad_(False)


@contextmanager
def trainable(
    model: Model,
    grid: Callable[[str, Linear], Grid] = lambda name, linear: grid_of(linear),
    rank: int = 0,
    within: str = "",
    seed: int = 0,
) -> Iterator[Trainee]:
    """A model made trainable; it holds stored weights again behind the block, also after a failure."""
    trainee = Trainee(model, grid, rank, within, seed)
    try:
        yield trainee
    finally:
        trainee.finish()
