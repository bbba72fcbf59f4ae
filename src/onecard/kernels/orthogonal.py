"""Orthogonal matrices that spread one large number over all, for any size. No torch.

A Hadamard matrix H has entries +-1 and H H^T = n I. Of two of them the Kronecker product is one, so from

    Sylvester    2^k, by doubling
    Paley I      q + 1 for a prime q = 3 mod 4:    I + S,  S = [[0, 1], [-1, Q]],  Q_ij = (i - j | q)
    Paley II     2 (q + 1) for a prime q = 1 mod 4: every 0 of the symmetric S = [[0, 1], [1, Q]]
                 becomes [[1, -1], [-1, -1]], every +-1 becomes +-[[1, 1], [1, -1]]

come most sizes that models have (5632 = 44 * 128, 14336 = 28 * 512). Where none of them fits, the odd
part is a random orthogonal matrix (QR of a normal one) times Sylvester's for the rest: still exactly
orthogonal, only not of equal entries. (a | q) is 1 for squares mod q, -1 for the others, 0 for 0.

Paley, On Orthogonal Matrices, J. Math. Phys. 12 (1933).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]


def orthogonal(size: int, seed: int) -> Matrix:
    """float64 [size, size], orthogonal: Hadamard / sqrt(n) where one is known, columns' signs random."""
    draw = np.random.default_rng(seed)
    signs = draw.integers(0, 2, size) * 2.0 - 1.0
    odd = size // (size & -size)
    found = hadamard(size)
    if found is not None:
        return found / math.sqrt(size) * signs
    q, r = np.linalg.qr(draw.standard_normal((odd, odd)))
    q *= np.sign(np.diag(r))
    power = sylvester(size // odd)
    return np.kron(q, power / math.sqrt(size // odd)) * signs


def hadamard(size: int) -> Matrix | None:
    """A Hadamard matrix of a size, +-1 in float64; None where these constructions have none."""
    rest = 1
    while size % rest == 0:
        core = paley(size // rest)
        if core is not None:
            return np.kron(core, sylvester(rest))
        rest *= 2
    return None


def sylvester(size: int) -> Matrix:
    """For a power of two."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h


def paley(size: int) -> Matrix | None:
    """For 1, 2, and sizes of the two constructions; None for others."""
    if size <= 2:
        return sylvester(size)
    q = size - 1
    if q % 4 == 3 and _is_prime(q):
        return np.eye(size) + _conference(q, -1.0)
    q = size // 2 - 1
    if size % 4 == 0 and q % 4 == 1 and _is_prime(q):
        zero, one = np.array([[1.0, -1.0], [-1.0, -1.0]]), np.array([[1.0, 1.0], [1.0, -1.0]])
        return np.kron(np.eye(q + 1), zero) + np.kron(_conference(q, 1.0), one)
    return None


def _conference(q: int, sign: float) -> Matrix:
    """S [q + 1, q + 1]: 0 on the diagonal, +-1 elsewhere, S S^T = q I."""
    kind = -np.ones(q)
    kind[[i * i % q for i in range(1, q)]] = 1.0
    kind[0] = 0.0
    index = np.arange(q)
    s = np.ones((q + 1, q + 1))
    s[1:, 1:] = kind[(index[:, None] - index[None, :]) % q]
    s[1:, 0] = sign
    s[0, 0] = 0.0
    return s


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
