"""Losses against their closed forms: limits of the temperature, identities, invariances."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from onecard.calibrate import losses
from onecard.calibrate.forward import forward
from onecard.checkpoint.load import load_model
from onecard.kernels.reference import causal_mask


def gradient(z: torch.Tensor, v: torch.Tensor, temperature: float, direction: str) -> torch.Tensor:
    z = z.clone().requires_grad_()
    losses.soft_targets(z, v, temperature, direction).backward()  # type: ignore[arg-type]
    assert z.grad is not None
    return z.grad


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_gradient_of_soft_targets(temperature: float) -> None:
    """T^2 times (p - q) / T, by Hinton's equation 2."""
    torch.manual_seed(0)
    z, v = torch.randn(1, 9), torch.randn(1, 9)
    expected = temperature * (
        torch.softmax(z / temperature, -1) - torch.softmax(v / temperature, -1)
    )
    torch.testing.assert_close(gradient(z, v, temperature, "forward"), expected)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_hot_targets_are_logit_regression(direction: str) -> None:
    """For T to infinity the gradient is that of half the squared distance of centred logits over V."""
    torch.manual_seed(0)
    z, v = torch.randn(1, 10), torch.randn(1, 10)
    limit = ((z - z.mean()) - (v - v.mean())) / 10
    errors = [float((gradient(z, v, t, direction) - limit).norm()) for t in (1.0, 5.0, 20.0, 200.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 2e-3 * float(limit.norm()) * 10
    unscaled = gradient(z, v, 200.0, direction) / 200.0**2
    assert float(unscaled.norm()) < 1e-3 * float(limit.norm())  # what the T^2 is for


def test_kl_identities() -> None:
    torch.manual_seed(0)
    z, v = torch.randn(2, 3, 7), 3 * torch.randn(2, 3, 7)
    for direction in ("forward", "reverse"):
        assert abs(float(losses.soft_targets(z, z + 5.0, 2.0, direction))) < 1e-6  # type: ignore[arg-type]
    assert float(losses.soft_targets(z, v, 2.0, "reverse")) == pytest.approx(
        float(losses.soft_targets(v, z, 2.0, "forward")))  # fmt: skip
    assert float(losses.soft_targets(z, v)) == pytest.approx(float(F.kl_div(
        torch.log_softmax(z, -1).flatten(0, 1), torch.softmax(v, -1).flatten(0, 1),
        reduction="batchmean")))  # fmt: skip


def test_forward_covers_and_reverse_seeks() -> None:
    """Of two bumps, one gaussian fitted by forward KL lies between, by reverse KL on one of them."""
    x = torch.linspace(-6, 6, 121)
    teacher = torch.logaddexp(-((x + 3) ** 2) / 0.5, -((x - 3) ** 2) / 0.5 + 0.3)[None]

    def fit(direction: str) -> tuple[float, float]:
        centre, spread = (torch.tensor(x, requires_grad=True) for x in (2.0, 0.5))
        optimizer = torch.optim.Adam([centre, spread], 0.05)
        for _ in range(400):
            optimizer.zero_grad()
            student = -((x - centre) ** 2) / (2 * spread.exp() ** 2)
            losses.soft_targets(student[None], teacher, 1.0, direction).backward()  # type: ignore[arg-type]
            optimizer.step()
        return centre.item(), spread.exp().item()

    (middle, wide), (mode, narrow) = fit("forward"), fit("reverse")
    assert abs(middle) < 1 and wide > 2
    assert abs(mode - 3) < 0.3 and narrow < 1


def test_next_token_counts_what_follows() -> None:
    ids = torch.tensor([[1, 2, 0]])
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = logits[0, 1, 0] = 50.0
    assert float(losses.next_token(logits, ids)) < 1e-6
    even = losses.next_token(torch.zeros(1, 3, 4), ids)
    assert float(even) == pytest.approx(math.log(4))


def test_hidden_states_are_relative() -> None:
    x = torch.randn(2, 5, 8)
    assert float(losses.hidden_states(x, x)) == 0
    assert float(losses.hidden_states(torch.zeros_like(x), 100 * x)) == pytest.approx(1.0)


def test_attention_and_relations_of_the_same_are_zero() -> None:
    torch.manual_seed(0)
    q, k, mask = (
        torch.randn(2, 4, 6, 8),
        torch.randn(2, 2, 6, 8),
        causal_mask(6, 6, 3, torch.device("cpu")),
    )
    assert abs(float(losses.attention_maps((q, k), (q, k), mask, (0.3, 0.3)))) < 1e-6
    other = losses.attention_maps((q, k + torch.randn_like(k)), (q, k), mask, (0.3, 0.3))
    assert float(other) > 0.01
    x, y = torch.randn(2, 6, 32), torch.randn(2, 6, 16)
    assert abs(float(losses.relations(x, x, 4, mask))) < 1e-6
    assert float(losses.relations(y, x, 4, mask)) > 0.01  # widths may differ


def test_relations_ignore_rotations_of_a_head() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(2, 6, 8), causal_mask(6, 6, None, torch.device("cpu"))
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    assert abs(float(losses.relations(x @ turn, x, 1, mask))) < 1e-6


def test_relational_losses_see_shapes_not_places() -> None:
    """Distances ignore moves, rotations and size; angles too; both see a change of shape."""
    torch.manual_seed(0)
    x = torch.randn(12, 6)
    turned = 3 * x @ torch.linalg.qr(torch.randn(6, 6)).Q + 5
    for loss in (losses.distances, losses.angles):
        assert float(loss(turned, x)) < 1e-8
        assert float(loss(x * torch.tensor([5.0, 1, 1, 1, 1, 1]), x)) > 1e-3
    assert float(losses.angles(torch.randn(12, 3), x)) > 1e-3  # widths may differ


def test_checkpointing_changes_no_bit(tiny: Path) -> None:
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for checkpointing in (False, True):
        network = load_model(tiny, "fp32").network.requires_grad_(True)
        seen = forward(network, ids, checkpointing, hidden=(0, 2), attention=(1,))
        (losses.next_token(seen.logits, ids) + seen.hidden[0].square().mean()
         + seen.attention[1][0].square().mean()).backward()  # fmt: skip
        found.append({name: p.grad for name, p in network.named_parameters()})
        assert torch.equal(seen.logits, network(ids))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_attention_that_was_kept_is_the_blocks_own(tiny: Path) -> None:
    from onecard.kernels.reference import attend

    network = load_model(tiny, "fp32").network
    ids = torch.arange(20)[None]
    with torch.no_grad():
        q, k, v = forward(network, ids, attention=(0,)).attention[0]
        h, context = network.start(ids)
        stages = network.blocks[0].stages(h, context)  # type: ignore[operator]
        next(stages)
        _, y = next(stages)
    a = network.spec.layers[0].attention
    torch.testing.assert_close(attend(q, k, v, None, a.scale, None).transpose(1, 2).flatten(2), y)
