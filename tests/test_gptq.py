"""GPTQ against its textbook form, and the identities that any implementation must keep."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from onecard.calibrate.stats import ABSMAX, HESSIAN, MEAN, NORM, Statistics
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Format, Integers
from onecard.kernels import reference
from onecard.passes.columns import search_grid
from onecard.passes.gptq import GPTQ, PANEL, Rounding, Solution, factor, output_power, solve

PLAIN = Rounding(order="natural", search=0)


def problem(
    rows: int = 12, columns: int = 64, tokens: int = 300, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * 0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), 2 * x.T @ x / tokens


def textbook(
    w: Tensor, h: Tensor, format: Format, damp: float, static: bool
) -> tuple[Tensor, float]:
    """The paper's algorithm with the inverse Hessian, in float64: codes and the loss."""
    columns = w.shape[1]
    h = h.double() + torch.eye(columns) * damp * h.diagonal().double().mean()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    scale, zero = (t.double() for t in reference.grid(reference.grouped(w, format), format))
    w, q, loss, group = w.double().clone(), torch.zeros_like(w), 0.0, format.group or columns
    for j in range(columns):
        if not static and j % group == 0:
            block = w[:, None, j : j + group].float()
            s, z = reference.grid(block, format)
            scale[:, j // group], zero[:, j // group] = s[:, 0].double(), z[:, 0].double()
        s, z = scale[:, j // group], zero[:, j // group]
        q[:, j] = reference.encode(w[:, j], s.float(), z.float(), format)
        error = (w[:, j] - (q[:, j] - z) * s) / u[j, j]
        loss += float(error.square().sum())
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return q, loss


def value(solution: Solution, format: Format) -> Tensor:
    q = reference.grouped(solution.codes.float(), format)
    return reference.decode(q, solution.scale[..., None], solution.zero[..., None]).flatten(1)


def output_error(w: Tensor, other: Tensor, h: Tensor) -> float:
    return float((((w - other) @ h) * (w - other)).sum())


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("block", [16, 24, 48, 128])
def test_equals_the_textbook(static: bool, zero_point: bool, block: int) -> None:
    w, h = problem(columns=96)
    format = Integers(4, 32, zero_point, "fp32")
    rounding = Rounding(order="natural", search=0, static_groups=static, block=block)
    mine = solve(w, h, format, rounding)
    q, loss = textbook(w, h, format, 0.01, static)
    assert (mine.codes != q).float().mean() < 0.01
    assert float(mine.loss.sum()) == pytest.approx(loss, rel=0.02)


def test_loss_is_the_output_error() -> None:
    """sum of (R_jj (t_j - q_j))^2 = tr(dW H dW^T) with the damped Hessian."""
    w, h = problem()
    format = Integers(3, 32, False, "fp32")
    mine = solve(w, h, format, PLAIN)
    damped = h + torch.eye(64) * 0.01 * h.diagonal().mean()
    assert float(mine.loss.sum()) == pytest.approx(
        output_error(w, value(mine, format), damped), rel=1e-3
    )


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_diagonal_hessian_is_rounding(order: str) -> None:
    w, _ = problem()
    format = Integers(4, 32, False, "fp32")
    h = torch.diag(torch.arange(1.0, 65.0))
    mine = solve(w, h, format, Rounding(order=order, search=0))
    assert torch.equal(
        value(mine, format), reference.to_dense(reference.round_to_nearest(w, format))
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_below_rounding(bits: int) -> None:
    for seed in range(5):
        w, h = problem(seed=seed)
        format = Integers(bits, 32, False, "fp32")
        nearest = reference.to_dense(reference.round_to_nearest(w, format))
        for rounding in (PLAIN, Rounding(search=0), Rounding()):
            mine = value(solve(w, h, format, rounding), format)
            assert output_error(w, mine, h) < output_error(w, nearest, h)


def test_activation_order_is_a_permutation() -> None:
    """Sorting columns by hand and going through them in natural order gives the same weights."""
    w, h = problem()
    format = Integers(4, None, False, "fp32")
    order = torch.argsort(h.diagonal(), descending=True, stable=True)
    mine = value(solve(w, h, format, Rounding(order="activation", search=0)), format)
    sorted_ = value(solve(w[:, order], h[order][:, order], format, PLAIN), format)
    assert torch.allclose(mine[:, order], sorted_, atol=1e-5)


def test_search_never_raises_the_weighted_error() -> None:
    w, h = problem()
    for bits, zero_point in itertools.product((2, 3, 4), (False, True)):
        format = Integers(bits, 32, zero_point, "fp32")
        errors = []
        for steps in (0, 12):
            scale, zero = search_grid(w, h.diagonal(), format, steps)
            blocks = reference.grouped(w, format)
            q = reference.encode(blocks, scale[..., None], zero[..., None], format)
            off = reference.decode(q, scale[..., None], zero[..., None]) - blocks
            errors.append((off.square().flatten(1) * h.diagonal()).sum())
        assert errors[1] <= errors[0]


def test_dead_columns_and_starved_experts_are_rounded() -> None:
    w, h = problem()
    format = Integers(4, 32, False, "fp32")
    h[5, :] = h[:, 5] = 0
    nearest = reference.to_dense(reference.round_to_nearest(w, format))
    assert torch.equal(value(solve(w, h, format, PLAIN), format)[:, 5], nearest[:, 5])
    starved = solve(w, torch.zeros_like(h), format, PLAIN)
    assert torch.equal(value(starved, format), nearest)


def test_pruned_weights_stay_zero_and_are_made_good() -> None:
    w, h = problem()
    mask = torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    format = Integers(4, 32, False, "fp32")
    sparse = w * mask
    mine = value(solve(sparse, h, format, PLAIN), format)
    assert not mine[~mask].any()
    nearest = reference.to_dense(reference.round_to_nearest(sparse, format))
    assert output_error(sparse, mine, h) < output_error(sparse, nearest, h)


@pytest.mark.parametrize("bad", ["negative", "nan", "indefinite"])
def test_impossible_hessians_are_refused(bad: str) -> None:
    h = torch.eye(8)
    if bad == "negative":
        h[0, 0] = -1
    elif bad == "nan":
        h[0, 1] = float("nan")
    else:
        h[0, 1] = h[1, 0] = 5
    with pytest.raises(FailedWork):
        factor(h, 0.01, torch.arange(h.shape[0]))


@pytest.mark.parametrize("columns", [3, PANEL, PANEL + 1, 2 * PANEL + 7])
def test_the_power_of_outputs_is_their_square(columns: int) -> None:
    w, x = torch.randn(5, columns), torch.randn(40, columns)
    power = (w.double() @ x.double().T).square().sum(1)
    torch.testing.assert_close(output_power(w, x.T @ x).double(), power, rtol=0.02, atol=0.0)


def test_factor_is_a_square_root() -> None:
    _, h = problem()
    r, dead = factor(h, 0.05, torch.arange(h.shape[0]))
    damped = h + torch.eye(64) * 0.05 * h.diagonal().mean()
    assert torch.allclose(r @ r.T, damped, rtol=1e-4, atol=1e-3) and not dead.any()
    assert torch.equal(r, r.triu())


def test_float32_is_close_to_float64() -> None:
    w, h = problem(rows=32, columns=256, tokens=2000)
    format = Integers(4, 128, False, "fp32")
    mine = float(solve(w, h, format, PLAIN).loss.sum())
    assert mine == pytest.approx(textbook(w, h, format, 0.01, True)[1], rel=0.02)


@pytest.mark.parametrize("settings", [
    {"damp": -0.1}, {"damp": 2.0}, {"bits": 1}, {"bits": 9}, {"group": 48}, {"block": 0},
    {"search": -1}, {"static_groups": False},
])  # fmt: skip
def test_bad_settings_are_refused(settings: dict) -> None:
    with pytest.raises(BadRequest):
        GPTQ(**settings)


# Statistics ---------------------------------------------------------------------------------------


def test_ones_give_twice_the_ones() -> None:
    """X all ones, 6 x 2 x 2: the running mean of 2 X^T X is 2."""
    stats = Statistics(2, [HESSIAN])
    stats.add(torch.ones(6, 2, 2))
    assert stats.count == 12 and torch.equal(stats.hessian, torch.full((2, 2), 2.0))


def test_batches_merge() -> None:
    x = torch.randn(90, 33)
    needs = [HESSIAN, NORM, ABSMAX, MEAN]
    whole, parts = Statistics(33, needs), Statistics(33, needs)
    whole.add(x)
    for piece in (x[:7].view(1, 7, 33), x[7:40], x[40:40], x[40:]):
        parts.add(piece)
    assert parts.count == whole.count == 90
    assert torch.allclose(parts.hessian, whole.hessian, rtol=1e-5, atol=1e-6)
    assert torch.allclose(whole.hessian, 2 * x.T @ x / 90, rtol=1e-4, atol=1e-5)
    assert torch.allclose(parts.norm, x.norm(dim=0), rtol=1e-5)
    assert torch.equal(parts.absmax, x.abs().amax(0))
    assert torch.allclose(parts.mean, x.mean(0), atol=1e-6)


def test_bfloat16_products_are_exact() -> None:
    x = torch.randn(500, 40).bfloat16()
    stats = Statistics(40, [HESSIAN])
    stats.add(x)
    wanted = 2 * x.double().T @ x.double() / 500
    assert (stats.hessian - wanted).abs().max() < 1e-5


def test_wide_hessians_are_symmetric() -> None:
    x = torch.randn(64, 2304)
    stats = Statistics(2304, [HESSIAN])
    stats.add(x)
    assert torch.equal(stats.hessian, stats.hessian.T)
    assert torch.allclose(stats.hessian, 2 * x.T @ x / 64, atol=1e-4)
