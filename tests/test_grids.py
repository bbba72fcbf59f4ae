"""Every format learns on its own grid: what multiplies is what is stored, and what may not move does not."""

from __future__ import annotations

import pytest
import torch
from test_storage import NAMES, held, weights

from onecard.calibrate.grids import Grid, SharedGrid, grid_of
from onecard.core.format import Codebook, Dense, Format, Hashed, LowRank, Sparse, parse_format
from onecard.kernels import convert, storage


def learned(name: str) -> tuple[Grid, torch.Tensor, Format]:
    """A grid of a matrix in a format, and its latent after a step."""
    format = parse_format(name)
    weight = held(weights(), format)
    grid, w = grid_of(weight), convert.to_dense(weight).clone()
    assert close(grid(w), convert.to_dense(weight), format)
    w.requires_grad_(grid.latent)
    aim = torch.randn(w.shape, generator=torch.Generator().manual_seed(5))
    trained = [w] if grid.latent else list(grid.parameters())
    optimizer = torch.optim.SGD(trained, 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        ((grid(w) - aim) ** 2).sum().backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
        optimizer.step()
    return grid, w.detach(), format


def close(a: torch.Tensor, b: torch.Tensor, format: Format) -> bool:
    """Equal; sums of a low-rank product may have another order, dense numbers another dtype."""
    inner = format.inner if isinstance(format, Sparse) else format
    off = 1e-2 if isinstance(inner, Dense) else 1e-5 if isinstance(format, LowRank) else 0.0
    return bool(((a - b).abs() <= off * b.abs().max()).all())


@pytest.mark.parametrize("name", NAMES)
def test_what_multiplies_is_what_is_stored(name: str) -> None:
    grid, w, format = learned(name)
    stored = grid.store(w)
    assert stored.format == format
    assert {n: (p.dtype, p.shape) for n, p in stored.parts.items()} == {
        n: (p.dtype, p.shape) for n, p in held(weights(), format).parts.items()
    }
    assert close(grid(w).detach(), convert.to_dense(stored), format)
    before = convert.to_dense(held(weights(), format))
    assert not torch.equal(convert.to_dense(stored), before)


@pytest.mark.parametrize("name", NAMES)
def test_what_may_not_move_does_not(name: str) -> None:
    """Scales, masks, codes of shared numbers: the parts that a grid is made of."""
    grid, w, format = learned(name)
    before, after = held(weights(), format).parts, grid.store(w).parts
    moved = {"weight", "weight_packed", "weight_values", "weight_table", "weight_shared"}
    if isinstance(format, (Codebook, Hashed)):
        moved -= {"weight_packed"}
    for part, stored in after.items():
        plain = part.removeprefix("left_").removeprefix("right_").removeprefix("rest_")
        if plain not in moved:
            assert torch.equal(stored, before[part]), part
        elif not isinstance(format, LowRank):
            assert not torch.equal(storage_view(stored), storage_view(before[part])), part


def storage_view(part: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(storage.as_numpy(part).astype("float64"))


def test_the_gradient_of_a_shared_number_is_the_sum_of_its_weights() -> None:
    """Deep Compression's equation: dL/dC_k = sum of dL/dW_ij over the weights with code k."""
    weight = held(weights(), parse_format("codebook3"))
    grid = grid_of(weight)
    assert isinstance(grid, SharedGrid)
    upstream = torch.randn(weight.shape)
    (grid(torch.empty(0)) * upstream).sum().backward()
    expected = torch.zeros(8).index_add_(0, grid.index.flatten(), upstream.flatten())
    assert grid.shared.grad is not None
    torch.testing.assert_close(grid.shared.grad.flatten(), expected, rtol=1e-4, atol=1e-3)
