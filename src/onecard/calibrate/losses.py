"""What training lowers, as pure functions of what two networks say: logits, hidden states, attention.

B windows, T positions, V words, C channels, H heads, D channels of a head, N samples. With logits z of
the student and v of the teacher, p(T) = softmax(z / T), q(T) = softmax(v / T):

    next token      -log p[next]
    soft targets    T^2 KL(q(T) || p(T)), reversed T^2 KL(p(T) || q(T))        Hinton, arXiv 1503.02531
    hidden states   ||P h - g||^2 / ||g||^2, P a projection where the widths differ        arXiv 1412.6550
    attention       KL(A_teacher || A_student) over the positions seen        MiniLM, arXiv 2002.10957
    relations       KL of softmax(X X^T / sqrt(D)), X the queries, keys, values cut into as many heads
                    on both sides, so that head counts may differ        MiniLMv2, arXiv 2012.15828
    distances       Huber(d_student, d_teacher), d the distances between samples over their mean, and the
                    same of the cosines of the angles of all triples        RKD, arXiv 1904.05068

T^2 makes up for the 1 / T^2 by which the gradient of soft targets shrinks: for T to infinity the gradient
of T^2 KL to z_i is (z_i - mean z - v_i + mean v) / V. Forward KL covers all that the teacher says,
reverse KL keeps to what it says most. All are means over positions, in float32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from onecard.core.errors import BadRequest

Direction = Literal["forward", "reverse"]


def check_loss(*weights: float, temperature: float) -> None:
    """BadRequest where weights of a loss or its temperature leave what float32 adds up."""
    for weight in weights:
        if not 0 <= weight <= 1e6:
            raise BadRequest(f"a weight of {weight:g} in the loss", do="a number from 0 to 1000000")
    if not 1e-3 <= temperature <= 1e3:
        raise BadRequest(f"a temperature of {temperature:g}", do="a number from 0.001 to 1000")


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean nats per predicted token: logits [B, T, V] of ids [B, T]."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def soft_targets(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, direction: Direction = "forward"
) -> Tensor:
    """T^2 KL between the softened words of teacher and student [..., V]."""
    p = torch.log_softmax(student.float() / temperature, -1)
    q = torch.log_softmax(teacher.float() / temperature, -1)
    if direction == "reverse":
        p, q = q, p
    return temperature**2 * _kl(q, p)


def _kl(q: Tensor, p: Tensor) -> Tensor:
    """Mean over positions of KL(q || p), both logarithms [..., n]; what cannot be seen is -inf in both."""
    terms = torch.where(q.isneginf(), 0.0, q.exp() * (q - p.masked_fill(q.isneginf(), 0.0)))
    return terms.sum(-1).mean()


def hidden_states(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error relative to the teacher's size: [..., C]."""
    teacher = teacher.float()
    return (student.float() - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)


def attention_maps(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor,
    scales: tuple[float, float],
) -> Tensor:  # fmt: skip
    """KL of the attention of (queries [B, H, T, D], keys [B, G, T, D]); as many heads on both sides."""
    sides = zip((student, teacher), scales, strict=True)
    p, q = (_attention(queries, keys, mask, scale) for (queries, keys), scale in sides)
    return _kl(q, p)


def _attention(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    return torch.log_softmax(scores.masked_fill(~mask, float("-inf")), -1)


def relations(student: Tensor, teacher: Tensor, heads: int, mask: Tensor) -> Tensor:
    """KL of the scaled products of vectors with each other: [B, T, C], C divided into `heads`."""
    cut = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (student, teacher))
    p, q = (_attention(x, x, mask, 1 / math.sqrt(x.shape[-1])) for x in cut)  # [B, heads, T, T]
    return _kl(q, p)


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the distances between samples [N, C], each over their mean."""
    p, q = (_over_mean(torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist"))
            for x in (student, teacher))  # fmt: skip
    return F.smooth_l1_loss(p, q)


def _over_mean(d: Tensor) -> Tensor:
    return d / d[d > 0].mean().clamp(min=1e-12)


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles between all triples of samples [N, C]."""
    cosines = []
    for x in (student.float(), teacher.float()):
        between = x[None] - x[:, None]  # [N, N, C]
        unit = F.normalize(between, dim=-1, eps=1e-6)
        cosines.append(unit @ unit.transpose(-1, -2))  # [N, N, N]
    return F.smooth_l1_loss(cosines[0], cosines[1])
