"""Rows times a matrix of the kernel layout, through oc_multiply, in every instruction-set class.

Each class is held to three things: near float64 as plain float32 code is, or nearer; a row has the same
bits in any company and with any number of threads; and the same bits in all classes that have a fused
multiply-add. Of the integer product the bits are known altogether: `recipe` computes them in NumPy.
"""

from __future__ import annotations

import ctypes
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_layout_native import array, filled, laid

from onecard.core.format import Integers
from onecard.kernels import cpu, layout, reference
from onecard.kernels.structs import Matrix

CLASSES = cpu.isas() if cpu.available() else ()
pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")

FUSED = tuple(isa for isa in CLASSES if isa != "plain")
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64)
BLOCKS = (32, 64, 128)
SCALES = ("fp32", "fp16", "bf16")
SHAPES = ((1, 1), (5, 33), (16, 128), (17, 96), (31, 129), (33, 200), (48, 512), (49, 520), (100, 260),
          (20, 1100), (64, 64), (97, 31))  # fmt: skip
KINDS = list(itertools.product(BLOCKS, (False, True), SCALES))
BAD_ARGUMENT = -1


@pytest.fixture(params=CLASSES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)


@dataclass
class Case:
    """A matrix in the kernel layout, and what is in it: w = (u - zero) * scale."""

    matrix: Matrix
    data: np.ndarray
    codes: np.ndarray  # u - zero, [rows, padded columns]; a dense matrix has its weights
    scale: np.ndarray  # [rows, blocks]
    x: np.ndarray  # [64, columns]

    def multiply(self, x: np.ndarray, threads: int = 1, repeats: int = 1) -> np.ndarray:
        rows, columns = self.matrix.rows, self.matrix.columns
        assert x.shape[1] == columns and x.flags.c_contiguous
        y = np.full((len(x) + 2, rows), 7.0, np.float32)
        self.matrix.data = self.data.ctypes.data
        seconds = ctypes.c_double()
        code = cpu.library().oc_multiply(
            ctypes.byref(self.matrix), x.ctypes.data, len(x), threads, repeats, y[1].ctypes.data,
            ctypes.byref(seconds),
        )  # fmt: skip
        assert code == 0 and seconds.value > 0
        assert (y[0] == 7).all() and (y[-1] == 7).all()
        return y[1:-1]

    @property
    def weights(self) -> np.ndarray:
        """float64 [rows, columns]"""
        block = self.matrix.block or 1
        scale = np.repeat(self.scale.astype(np.float64), block, 1) if self.matrix.bits else 1.0
        return (self.codes * scale)[:, : self.matrix.columns]


def generator(*about: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(about).encode()))


def inputs(rng: np.random.Generator, columns: int) -> np.ndarray:
    """64 rows; numbers of many sizes, some blocks of zeros."""
    x = rng.standard_normal((64, columns)) * np.exp(rng.standard_normal((64, columns)))
    x[7, : columns // 2] = 0
    x[11] = 0
    x[13] *= 1e20
    x[14] *= 1e-20
    return x.astype(np.float32)


def integer_case(
    shape: tuple[int, int], bits: int, block: int, zero_point: bool, scale: str, exact: bool = False
) -> Case:
    """Random codes, zeros and scales, the ends of their ranges among them."""
    rows, columns = shape
    rng = generator(shape, bits, block, zero_point, scale)
    padded = -(-columns // block) * block
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    q = rng.integers(low, high + 1, (rows, padded))
    q[0], q[-1] = low, high
    zero = np.zeros((rows, padded // block), np.int64)
    if zero_point:
        zero = rng.integers(low, high + 1, zero.shape)
        zero[0], zero[-1] = high, low
    q[:, columns:] = np.repeat(zero, block, 1)[:, columns:]
    of = torch.tensor(np.exp(rng.standard_normal(zero.shape)) * 0.01).float()
    weight = reference.hold(
        torch.tensor(q), of, torch.tensor(zero), Integers(bits, block, zero_point, scale)
    )
    matrix, data = laid(weight)
    matrix.columns, matrix.exact = columns, int(exact)
    stored = weight.parts["weight_scale"].float().numpy()
    return Case(matrix, data, q - np.repeat(zero, block, 1), stored, inputs(rng, columns))


def dense_case(shape: tuple[int, int], dtype: str) -> Case:
    rng = generator(shape, dtype)
    w = torch.tensor(rng.standard_normal(shape)).to(reference.DTYPES[dtype])
    matrix = layout.dense(shape, dtype)
    data = filled(matrix, lambda out: layout.fill_dense(matrix, array(w), out, 1))
    return Case(matrix, data, w.float().numpy(), np.ones((shape[0], 1)), inputs(rng, shape[1]))


def rounded(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [rows, padded columns] and scales [rows, blocks] of inputs, as the engine rounds them."""
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)
    top = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(top > 0, np.rint(blocks * (np.float32(127) / top)), 0)
    return codes.reshape(len(x), -1).astype(np.int64), (top / np.float32(127))[..., 0]


def recipe(case: Case, fused: bool) -> np.ndarray:
    """The integer product as onecard.h and matmul.cpp tell it."""
    block = case.matrix.block
    codes, scale = rounded(case.x, block)
    y = np.zeros((len(case.x), case.matrix.rows), np.float32)
    for b in range(scale.shape[1]):
        at = slice(b * block, (b + 1) * block)
        dots = (codes[:, at] @ case.codes[:, at].T).astype(np.float32)
        factor = case.scale[:, b].astype(np.float32) * scale[:, b, None]
        if fused:
            y = (dots.astype(np.float64) * factor + y).astype(np.float32)
        else:
            y = dots * factor + y
    return y


def plain(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """A loop in float32, column after column."""
    y = np.zeros((len(x), len(w)), np.float32)
    x, w = x.astype(np.float32), w.astype(np.float32)
    for k in range(x.shape[1]):
        y += x[:, k, None] * w[:, k]
    return y


def check_error(mine: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """At most twice the worst error of plain code, and half an ulp for its luck; each relative to the sum
    of magnitudes, so that no cancellation is judged."""
    x = x.astype(np.float64)
    exact, size = x @ w.T, np.maximum(np.abs(x) @ np.abs(w).T, 1e-300)
    error, theirs = (float((np.abs(y - exact) / size).max()) for y in (mine, plain(x, w)))
    assert error <= 2 * theirs + 2**-24, (error, theirs)


def check_company(case: Case, whole: np.ndarray) -> None:
    """Any number of rows gives each row the bits of `whole`."""
    for count in ROWS:
        for first in {0, 64 - count}:
            found = case.multiply(case.x[first : first + count])
            np.testing.assert_array_equal(bits_of(found), bits_of(whole[first : first + count]))


def bits_of(y: np.ndarray) -> np.ndarray:
    return y.view(np.uint32)


# Integers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers(isa: str, bits: int) -> None:
    """Every block, zero point and scale, over shapes in turn."""
    for i, (block, zero_point, scale) in enumerate(KINDS):
        shape = SHAPES[(i + 5 * bits) % len(SHAPES)]
        case = integer_case(shape, bits, block, zero_point, scale)
        whole = case.multiply(case.x)
        wanted = recipe(case, isa != "plain")
        same = bits_of(whole) == bits_of(wanted)  # NumPy rounds twice where a fused one rounds once
        assert same.all() if isa == "plain" else same.mean() > 0.999, (shape, block, scale)
        codes, scales = rounded(case.x, block)
        x = (codes * np.repeat(scales.astype(np.float64), block, 1))[:, : shape[1]]
        check_error(whole, x, case.weights)
        check_company(case, whole)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shapes(isa: str, bits: int) -> None:
    """Every shape, over kinds in turn."""
    for i, shape in enumerate(SHAPES):
        case = integer_case(shape, bits, *KINDS[(7 * i + bits) % len(KINDS)])
        whole = case.multiply(case.x)
        same = bits_of(whole) == bits_of(recipe(case, isa != "plain"))
        assert same.mean() > 0.999, shape
        for count in (1, 3, 9, 33):
            np.testing.assert_array_equal(case.multiply(case.x[:count]), whole[:count])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_exact(isa: str, bits: int) -> None:
    """Inputs that stay float32."""
    for i, (block, zero_point, scale) in enumerate(KINDS):
        shape = SHAPES[(i + 3 * bits) % len(SHAPES)]
        case = integer_case(shape, bits, block, zero_point, scale, exact=True)
        whole = case.multiply(case.x)
        check_error(whole, case.x, case.weights)
        check_company(case, whole)


@pytest.mark.parametrize("dtype", SCALES)
def test_dense(isa: str, dtype: str) -> None:
    for shape in SHAPES:
        case = dense_case(shape, dtype)
        whole = case.multiply(case.x)
        check_error(whole, case.x, case.weights)
        check_company(case, whole)


def every_kind(big: bool = False) -> Iterator[Case]:
    """One of each: bits, zero point, exact, dense."""
    shape = (250, 700) if big else (49, 330)
    for i, (bits, zero, exact) in enumerate(
        itertools.product((2, 3, 4, 8), (False, True), (False, True))
    ):
        yield integer_case(shape, bits, BLOCKS[i % 3], zero, SCALES[i % 2], exact)
    for dtype in SCALES:
        yield dense_case(shape, dtype)


def test_threads(isa: str) -> None:
    """They take tiles as they come, and change nothing."""
    for case in every_kind(big=True):
        for count in (1, 8, 9, 40):
            alone = case.multiply(case.x[:count])
            for threads in (2, 3, 7):
                found = case.multiply(case.x[:count], threads, repeats=2)
                np.testing.assert_array_equal(bits_of(found), bits_of(alone))


@pytest.mark.skipif(len(FUSED) < 2, reason="one class alone")
def test_fused_classes_agree() -> None:
    for case in every_kind():
        found = {}
        for isa in FUSED:
            cpu.force_isa(isa)
            try:
                found[isa] = [bits_of(case.multiply(case.x[:count])) for count in (1, 7, 64)]
            finally:
                cpu.force_isa(None)
        first = found[FUSED[0]]
        for isa, products in found.items():
            for mine, theirs in zip(products, first, strict=True):
                np.testing.assert_array_equal(mine, theirs, isa)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_poison_stays_in_its_row(isa: str, value: float) -> None:
    """Where it is among columns or rows, and however many rows there are."""
    for case in every_kind():
        columns = case.matrix.columns
        for count, row, column in (
            (1, 0, 0),
            (4, 2, 77),
            (8, 7, columns - 1),
            (13, 9, 200),
            (64, 40, 5),
        ):
            clean = case.multiply(case.x[:count])
            x = case.x[:count].copy()
            x[row, column] = value
            found = case.multiply(x)
            assert not np.isfinite(found[row]).any()
            others = np.arange(count) != row
            np.testing.assert_array_equal(bits_of(found[others]), bits_of(clean[others]))


def test_bias(isa: str) -> None:
    bias = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    for case in every_kind():
        for count in (1, 20):
            plain = case.multiply(case.x[:count])
            case.matrix.bias = bias.ctypes.data
            np.testing.assert_array_equal(
                case.multiply(case.x[:count]), plain + bias[: case.matrix.rows]
            )
            case.matrix.bias = None


def test_the_largest_sums(isa: str) -> None:
    """Codes and inputs at their ends, all of one sign: what would saturate or overflow."""
    for bits, block, sign in itertools.product((2, 3, 4, 8), BLOCKS, (1, -1)):
        for zero_point in (False, True):
            case = integer_case((20, 256), bits, block, zero_point, "fp32")
            case.x[:] = sign * 3.0
            found, wanted = case.multiply(case.x), recipe(case, isa != "plain")
            assert (bits_of(found) == bits_of(wanted)).mean() > 0.99
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_nonsense_is_refused() -> None:
    case = integer_case((16, 64), 4, 32, False, "fp32")
    x, y = np.zeros((4, 64), np.float32), np.zeros((4, 16), np.float32)
    case.matrix.data = case.data.ctypes.data

    def multiply(rows=4, threads=1, repeats=1, x=x.ctypes.data, y=y.ctypes.data, **changed) -> int:
        matrix = Matrix.from_buffer_copy(case.matrix)
        for name, value in changed.items():
            setattr(matrix, name, value)
        return cpu.library().oc_multiply(ctypes.byref(matrix), x, rows, threads, repeats, y, None)

    assert multiply() == 0
    for wrong in (
        {"rows": 0}, {"rows": -1}, {"rows": 1 << 62}, {"threads": 0}, {"threads": -5},
        {"threads": 1 << 30}, {"repeats": 0}, {"x": None}, {"y": None}, {"data": None}, {"bits": 5},
        {"bits": -4}, {"bits": 1 << 30}, {"block": 0}, {"block": 16}, {"block": 1 << 30}, {"dtype": 3},
        {"dtype": -1}, {"columns": 0}, {"columns": -64}, {"columns": 1 << 40},
        {"zero_point": 7}, {"zero_point": -1},
    ):  # fmt: skip
        assert multiply(**wrong) == BAD_ARGUMENT, wrong
    assert cpu.library().oc_multiply(None, x.ctypes.data, 4, 1, 1, y.ctypes.data, None) == -1
