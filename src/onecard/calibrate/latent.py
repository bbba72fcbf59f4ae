"""Training what is stored: a latent float32 weight, and a grid that makes of it what multiplies.

    forward    y = x grid(W)^T + b         W, or W + s B A where a low-rank change is trained instead

A grid (calibrate/grids.py) also says how its result is stored, so a model keeps its masks and formats while
it learns. Norms, biases, embeddings and routers train as they are. `Trainee` puts latent linears in the
place of a model's linears and, at the end, stored weights back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onecard.calibrate.grids import Grid, grid_of
from onecard.nn.layers import Linear
from onecard.nn.model import Model


class LatentLinear(nn.Module):
    """A linear whose matrix is grid(latent). With `rank`, the latent is fixed but for s B A.

    A [rank, in] is random, B [out, rank] zero at first (Hu et al., LoRA, arXiv 2106.09685), s = alpha /
    rank with alpha = 2 rank. The change is added before the grid, so zeros and integers are respected
    and merging it changes no bit of the output.
    """

    base: Tensor

    def __init__(self, linear: Linear, grid: Grid, rank: int, seed: int) -> None:
        super().__init__()
        self.shape, self.grid, self.bias = linear.shape, grid, linear.bias
        self.read = linear.read  # it learns what to do about rounded inputs, too
        self.rank = rank if grid.latent else 0
        w = linear.matrix().clone() if grid.latent else torch.empty(0)
        if not grid.latent:
            self.register_buffer("base", w)
        elif rank:
            generator = torch.Generator().manual_seed(seed)
            bound = 1 / math.sqrt(w.shape[1])
            a = torch.empty(rank, w.shape[1]).uniform_(-bound, bound, generator=generator)
            self.register_buffer("base", w)
            self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(w.shape[0], rank))
        else:
            self.latent = nn.Parameter(w)

    def matrix(self) -> Tensor:
        """The latent matrix [out, in]; nothing where the grid has its own."""
        if self.rank:
            return self.base + 2.0 * self.b @ self.a
        return self.latent if self.grid.latent else self.base

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            w = self.grid(self.matrix())
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self.read(x), w.to(x.dtype), bias)


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
        self.embedding, self.compute = (
            model.network.stem.embedding,
            model.network.stem.embedding.dtype,
        )
        self.embedding.compute = torch.float32
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
            if linear.grid.latent and not linear.rank:
                linear.grid.settle(linear.latent.data)

    @torch.no_grad()
    def finish(self) -> None:
        """Stored weights take the place of the latent ones; everything has the dtype it had."""
        for name, linear in self.places.items():
            made = self.linears[name]
            linear.replace(made.grid.store(made.matrix()))
            self._put(name, linear)
        self.embedding.compute = self.compute
        for p, dtype in self.dtypes.items():
            p.data = p.data.to(dtype)
            p.requires_grad_(False)


@contextmanager
def trainable(
    model: Model,
    grid: Callable[[str, Linear], Grid] = lambda name, linear: grid_of(linear.held()),
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
