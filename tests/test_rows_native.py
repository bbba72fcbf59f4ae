"""What is done to one row at a time, in every instruction-set class: exact, in bounds, NaN kept.

An error is judged by what plain float32 torch commits: at most twice that, against float64.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from onecard.core.scheme import Inputs
from onecard.core.spec import Norm
from onecard.kernels import cpu, reference, structs

CLASSES = cpu.isas() if cpu.available() else ()
pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")

SIZES = (*range(1, 131), 576, 2048, 5632)
KINDS = ("silu", "relu", "gelu", "gelu_tanh")
NAN, INF = float("nan"), float("inf")
EDGE, OFFSET = 77, 3  # what lies around a row, and where in a cache line it begins

pointer, c_int, c_int64, c_float = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class Rope(ctypes.Structure):
    _fields_ = (("inverse", pointer), ("half", ctypes.c_int32), ("scale", c_float))


class NormRow(ctypes.Structure):
    _fields_ = (("weight", pointer), ("bias", pointer), ("kind", ctypes.c_int32), ("eps", c_float))


def kernel(*arguments: object, result: object = None) -> object:
    return ctypes.CFUNCTYPE(result, *arguments)  # type: ignore[arg-type]


class Rounding(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("scale", c_float))


class Rows(ctypes.Structure):
    """csrc/engine.h, once more."""

    _fields_ = (
        ("gather", kernel(pointer, c_int, c_int64, c_int64, c_float, pointer)),
        ("norm", kernel(ctypes.POINTER(NormRow), pointer, c_int64, pointer)),
        ("quantize", kernel(pointer, c_int64, ctypes.POINTER(Rounding), pointer, c_int64)),
        ("activate", kernel(c_int, pointer, pointer, c_int64, pointer)),
        ("angles", kernel(ctypes.POINTER(Rope), c_int64, pointer, pointer)),
        ("rotate", kernel(pointer, c_int, c_int, c_int, pointer, pointer)),
        ("add", kernel(pointer, c_float, c_int64, pointer)),
        ("soft_cap", kernel(pointer, c_int64, c_float)),
        ("softmax", kernel(pointer, c_int64)),
        ("peaks", kernel(pointer, c_int64, pointer, result=ctypes.c_bool)),
        ("exp_sum", kernel(pointer, c_int64, c_float, result=c_float)),
        ("chances", kernel(pointer, c_int64, c_float, ctypes.c_double, pointer)),
    )  # fmt: skip


@pytest.fixture(params=CLASSES)
def rows(request: pytest.FixtureRequest) -> Iterator[Rows]:
    cpu.force_isa(request.param)
    yield Rows.from_address(cpu.library().oc_rows())
    cpu.force_isa(None)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(x: Tensor) -> Tensor:
    """A copy of x that begins off any alignment, between numbers that must stay."""
    room = torch.full((x.numel() + 2 * OFFSET,), EDGE, dtype=x.dtype)
    inner = room[OFFSET:-OFFSET].view(x.shape)
    inner.copy_(x)
    inner.room = room  # type: ignore[attr-defined]
    return inner


def row_of(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return apart(torch.zeros(size, dtype=dtype))


def intact(*rows: Tensor) -> bool:
    edges = [row.room[part] for row in rows for part in (slice(OFFSET), slice(-OFFSET, None))]  # type: ignore[attr-defined]
    return all(bool((edge == EDGE).all()) for edge in edges)


def check(mine: Tensor, plain: Tensor, exact: Tensor, units: int = 1) -> None:
    """Twice the worst error of plain code in this row, and units in the last place for its luck."""
    error, theirs = (mine.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    assert error <= 2 * theirs + units * exact.abs().max() * 2**-23, (error, theirs)


def same(mine: Tensor, theirs: Tensor) -> bool:
    return torch.equal(mine.contiguous().view(torch.int32), theirs.contiguous().view(torch.int32))


# Embeddings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_gather(rows: Rows, dtype: str) -> None:
    kind = reference.DTYPES[dtype]
    for size in (1, 7, 64, 576):
        table = (random(3, size) * 100).to(kind)
        table.view(-1)[: min(3, size)] = torch.tensor([INF, -INF, NAN])[:size].to(kind)
        table[2, 0] = 6e-8
        for id, scale in itertools.product(range(3), (1.0, 24.0)):
            out = row_of(size)
            rows.gather(table.data_ptr(), cpu.CODES[dtype], id, size, scale, out.data_ptr())
            torch.testing.assert_close(
                out, table[id].float() * scale, rtol=0, atol=0, equal_nan=True
            )
            assert intact(out)


# Norms --------------------------------------------------------------------------------------------


def normed(rows: Rows, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    y, x = row_of(len(x)), apart(x)
    norm = NormRow(
        weight.data_ptr(), bias.data_ptr() if bias is not None else None, kind == "layer", 1e-5
    )
    rows.norm(norm, x.data_ptr(), len(x), y.data_ptr())
    rows.norm(norm, x.data_ptr(), len(x), x.data_ptr())
    assert same(x, y) and intact(x, y)
    return y


def exact_norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    y = x.double() - (x.double().mean() if kind == "layer" else 0)
    y = y / (y.square().mean() + float(np.float32(1e-5))).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(rows: Rows, kind: str) -> None:
    for size, biased in itertools.product(SIZES, (False, True)):
        x = random(size, seed=size) * 3 + 1
        weight = random(size, seed=1)
        bias = random(size, seed=2) if biased else None
        plain = reference.norm(x, weight, bias, Norm(kind=kind, eps=1e-5))
        mine = normed(rows, x, weight, bias, kind)
        check(mine, plain, exact_norm(x, weight, bias, kind))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_norm_keeps_what_is_no_number(rows: Rows, bad: float) -> None:
    for size, at in ((1, 0), (16, 15), (40, 3), (40, 39)):
        x, one = random(size), torch.ones(size)
        x[at] = bad
        assert normed(rows, x, one, None, "rms")[at].isnan()
        assert normed(rows, x, one, None, "layer").isnan().all()


# Rounding -----------------------------------------------------------------------------------------


def quantized(
    rows: Rows, x: Tensor, block: int, kind: int = structs.BY_BLOCK, given: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, scale and sum of a row that lies among fifteen others, which must stay as they are."""
    blocks, row = -(-len(x) // block), 5
    chunks = -(-blocks * block // 64)
    q = torch.full((chunks, 16, 64), 77, dtype=torch.int8)
    scale, total = torch.zeros(16, blocks), torch.zeros(16, blocks, dtype=torch.int32)
    to = structs.Quantized(
        q.data_ptr(), scale.data_ptr(), total.data_ptr(), chunks * 1024, blocks, block
    )
    how = Rounding(kind, given)
    rows.quantize(x.data_ptr(), len(x), ctypes.byref(how), ctypes.byref(to), row)
    others = torch.cat((q[:, :row], q[:, row + 1 :]), 1)
    assert (others == 77).all()
    return q[:, row].flatten()[: blocks * block].view(blocks, block), scale[row], total[row]


@pytest.mark.parametrize("block", [32, 64, 128])
def test_quantize(rows: Rows, block: int) -> None:
    for size in SIZES:
        x = random(size, seed=size) * 10.0 ** (size % 7 - 3)
        q, scale, total = quantized(rows, x, block)
        padded = torch.nn.functional.pad(x, (0, -size % block)).view(-1, block)
        most = padded.abs().amax(1)
        assert same(scale, most / 127)
        assert torch.equal(q.float(), torch.round(padded * (127 / most)[:, None]))
        assert torch.equal(total, q.to(torch.int32).sum(1).to(torch.int32))
        assert int(q.abs().max()) == 127


@pytest.mark.parametrize("block", [32, 64, 128])
def test_quantize_as_a_folder_says(rows: Rows, block: int) -> None:
    """One scale for the row, its own or a given one: the numbers of the reference, bit for bit."""
    for size in SIZES:
        x = random(size, seed=size) * 10.0 ** (size % 7 - 3)
        x[size // 2] = 0.0
        given = torch.tensor([float(x.abs().max()) / 100 or 1.0])  # the largest do not fit
        for kind, scale in ((structs.BY_ROW, None), (structs.BY_SCALE, given)):
            q, step, total = quantized(rows, x, block, kind, 0.0 if scale is None else given.item())
            inputs = Inputs("int8", scale is not None)
            assert torch.equal(
                (q.float() * step[:, None]).flatten()[:size],
                reference.round_inputs(x, inputs, scale),
            )
            assert len(set(step.tolist())) == 1 and not q.flatten()[size:].any()
            assert torch.equal(total, q.to(torch.int32).sum(1).to(torch.int32))


def test_quantize_ties_go_to_even(rows: Rows) -> None:
    q, scale, _ = quantized(rows, torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]), 32)
    assert q[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -126, 0]
    assert scale.item() == 1


def test_quantize_at_the_edges(rows: Rows) -> None:
    for size in (0.0, 1e-45, 1e-38):
        q, scale, total = quantized(rows, torch.full((32,), size), 32)
        assert not q.any() and not scale.any() and not total.any()
    for size in (1e-36, 3.4e38):
        q, scale, _ = quantized(rows, torch.full((40,), -size), 32)
        assert (q.flatten()[:40] == -127).all() and not q[1, 8:].any()
        assert scale.tolist() == pytest.approx([size / 127] * 2)


@pytest.mark.parametrize("bad", [NAN, -NAN, INF, -INF])
def test_quantize_marks_blocks_that_are_not_finite(rows: Rows, bad: float) -> None:
    x = random(100)
    x[5] = x[99] = bad
    _, scale, _ = quantized(rows, x, 32)
    finite = scale.isfinite().tolist()
    assert finite == [False, True, True, False]
    assert bool(scale[0].isnan()) == math.isnan(bad)
    assert not quantized(rows, x, 32, structs.BY_ROW)[1].isfinite().any()
    _, scale, _ = quantized(rows, x, 32, structs.BY_SCALE, 0.5)
    assert scale.isfinite().tolist() == finite


# Activations --------------------------------------------------------------------------------------

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * torch.erfc(-x / 2**0.5),
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


def activated(rows: Rows, kind: str, gate: Tensor, up: Tensor | None = None) -> Tensor:
    y, gate = row_of(len(gate)), apart(gate)
    other = up.data_ptr() if up is not None else None
    rows.activate(KINDS.index(kind), gate.data_ptr(), other, len(gate), y.data_ptr())
    rows.activate(KINDS.index(kind), gate.data_ptr(), other, len(gate), gate.data_ptr())
    assert same(gate, y) and intact(gate, y)
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_activate(rows: Rows, kind: str) -> None:
    plain = reference.ACTIVATIONS[kind]
    for size in SIZES:
        gate, up = random(size, seed=size) * 3, random(size, seed=1)
        exact = EXACT[kind](gate.double())
        check(activated(rows, kind, gate), plain(gate), exact)
        check(activated(rows, kind, gate, up), plain(gate) * up, exact * up.double())


@pytest.mark.parametrize("kind", KINDS)
def test_activate_everywhere(rows: Rows, kind: str) -> None:
    """Every size of number: an absolute error of 3e-7, or of one and a half units in the last place."""
    x = torch.cat((torch.linspace(-20, 20, 200001), torch.logspace(-40, 38, 4001)))
    x = torch.cat((x, -x))
    exact = EXACT[kind](x.double())
    error = (activated(rows, kind, x).double() - exact).abs()
    assert (error <= torch.maximum(torch.tensor(3e-7), exact.abs() * 2**-23 * 1.5)).all()
    assert (error[exact.abs() < 0.1] <= 6e-8).all()


@pytest.mark.parametrize("kind", KINDS)
def test_activate_keeps_what_is_no_number(rows: Rows, kind: str) -> None:
    for size in (5, 16, 37):
        x = torch.zeros(size)
        x[0], x[-1], x[2] = NAN, INF, -INF
        y = activated(rows, kind, x)
        assert y[0].isnan() and y[-1] == INF and (y[1] if size > 5 else y[3]) == 0
        assert y[2] == 0 if kind == "relu" else y[2].isnan()
        one = activated(rows, kind, torch.ones(size), x)
        assert one[0].isnan() and one[-1] == INF and one[2] == -INF


# Positions ----------------------------------------------------------------------------------------


def test_angles(rows: Rows) -> None:
    for half, position in itertools.product(
        (1, 3, 16, 32, 48, 64), (0, 1, 77, 4095, 131071, 10**6)
    ):
        inverse = 1.0 / 10000 ** (torch.arange(half) / half)
        cos, sin = row_of(half), row_of(half)
        rope = Rope(inverse.data_ptr(), half, 1.25)
        rows.angles(rope, position, cos.data_ptr(), sin.data_ptr())
        angle = torch.tensor(float(position)) * inverse
        check(cos, angle.cos() * 1.25, angle.double().cos() * 1.25)
        check(sin, angle.sin() * 1.25, angle.double().sin() * 1.25)
        assert intact(cos, sin)


def test_angles_of_every_quarter(rows: Rows) -> None:
    inverse = torch.linspace(-40, 40, 10001)
    cos, sin = row_of(10001), row_of(10001)
    rows.angles(Rope(inverse.data_ptr(), 10001, 1.0), 1, cos.data_ptr(), sin.data_ptr())
    assert (cos.double() - inverse.double().cos()).abs().max() <= 6e-8
    assert (sin.double() - inverse.double().sin()).abs().max() <= 6e-8


def test_rotate(rows: Rows) -> None:
    for (dim, half), heads in itertools.product(
        ((2, 1), (64, 32), (80, 40), (96, 16), (30, 7)), (1, 3)
    ):
        x, angle = random(heads, dim), random(half, seed=1) * 9
        cos, sin = angle.cos(), angle.sin()
        turned = apart(x)
        rows.rotate(turned.data_ptr(), heads, dim, half, cos.data_ptr(), sin.data_ptr())
        arguments = x[None, :, None], cos[None, None, None], sin[None, None, None]
        plain = reference.rotate(*arguments)[0, :, 0]
        exact = reference.rotate(*(a.double() for a in arguments))[0, :, 0]
        check(turned, plain, exact)
        assert torch.equal(turned[:, 2 * half :], x[:, 2 * half :]) and intact(turned)
        x[-1, 0] = NAN
        turned = apart(x)
        rows.rotate(turned.data_ptr(), heads, dim, half, cos.data_ptr(), sin.data_ptr())
        assert turned[-1, 0].isnan() and turned[-1, half].isnan() and turned.isnan().sum() == 2


# Sums, caps, chances ------------------------------------------------------------------------------


def test_add(rows: Rows) -> None:
    for size, factor in itertools.product(SIZES, (1.0, -0.37)):
        x, y = random(size, seed=size), random(size, seed=1)
        mine = apart(y)
        rows.add(x.data_ptr(), factor, size, mine.data_ptr())
        exact = y.double() + x.double() * float(np.float32(factor))
        check(mine, y + x * factor, exact)
        assert intact(mine)


def test_soft_cap(rows: Rows) -> None:
    for size, cap in itertools.product(SIZES, (1.0, 30.0)):
        x = random(size, seed=size) * cap
        mine = apart(x)
        rows.soft_cap(mine.data_ptr(), size, cap)
        check(mine, cap * torch.tanh(x / cap), cap * torch.tanh(x.double() / cap))
        assert intact(mine)
    x = torch.cat((torch.linspace(-12, 12, 100001), torch.logspace(-40, 38, 4001)))
    mine = x.clone()
    rows.soft_cap(mine.data_ptr(), len(x), 1.0)
    off = (mine.double() - x.double().tanh()).abs()
    assert (off <= x.double().tanh().abs() * 2**-23 * 1.5 + 1e-45).all()
    odd = torch.tensor([NAN, INF, -INF, -0.0, 1.0])
    rows.soft_cap(odd.data_ptr(), 5, 30.0)
    assert odd[0].isnan() and odd[1:4].tolist() == [30, -30, 0] and odd[3].signbit()


def test_softmax(rows: Rows) -> None:
    for size in SIZES:
        x = random(size, seed=size) * 5
        x[::7] = -INF if size > 1 else 0
        mine = apart(x)
        rows.softmax(mine.data_ptr(), size)
        check(mine, x.softmax(0), x.double().softmax(0), units=2)  # a power, and a division
        assert intact(mine)
    for odd in ([NAN, 1.0, 2.0], [INF, 1.0], [-INF, -INF], [1.0] * 20 + [NAN]):
        x = torch.tensor(odd)
        rows.softmax(x.data_ptr(), len(x))
        assert x.isnan().all()
    x = torch.tensor([3e38, -3e38, 3e38])
    rows.softmax(x.data_ptr(), 3)
    assert x.tolist() == [0.5, 0, 0.5]


def test_peaks(rows: Rows) -> None:
    for size in (*SIZES, 32000):
        x, blocks = random(size, seed=size), -(-size // 128)
        for bad in (None, -INF, INF, NAN, -NAN):
            if bad is not None:
                x[size * 2 // 3] = bad
            peak, row = row_of(blocks), apart(x)
            numbers = bad is None or not math.isnan(bad)
            assert rows.peaks(row.data_ptr(), size, peak.data_ptr()) == numbers
            whole = torch.nn.functional.pad(
                x.nan_to_num(-INF, INF, -INF), (0, -size % 128), value=-INF
            )
            assert torch.equal(peak, whole.view(-1, 128).amax(1)) and intact(peak)


def test_exp_sum(rows: Rows) -> None:
    for size in range(1, 129):
        x = apart(random(size, seed=size) * 4)
        mine = rows.exp_sum(x.data_ptr(), size, float(x.max()))
        assert mine == pytest.approx(float((x.double() - x.max()).exp().sum()), rel=3e-7)


def test_chances(rows: Rows) -> None:
    for size, t in itertools.product((1, 2, 3, 5, 9, 100, 2047), (0.1, 0.7, 1.0, 100.0, 1e-300)):
        x = random(size, seed=size) * 30
        x[size // 2] = -INF if size > 1 else 0
        x, mine = apart(x), row_of(size, torch.float64)
        rows.chances(x.data_ptr(), size, float(x.max()), t, mine.data_ptr())
        with np.errstate(all="ignore"):
            exact = np.exp((x.numpy().astype(np.float64) - float(x.max())) / t)
        assert np.all(np.abs(mine.numpy() - exact) <= 4e-16 * exact + 5e-324) and intact(mine)


# A row alone --------------------------------------------------------------------------------------


def test_a_row_has_the_same_bits_wherever_it_lies(rows: Rows) -> None:
    for size in (1, 17, 100, 576):
        x, weight = random(size, seed=5), random(size, seed=6)
        seen = []
        for offset in range(5):
            room = random(size + 40, seed=offset)
            y = torch.empty(size + 40)
            room[offset : offset + size] = x
            norm = NormRow(weight.data_ptr(), None, 1, 1e-5)
            rows.norm(norm, room[offset:].data_ptr(), size, y[offset:].data_ptr())
            rows.activate(
                2, y[offset:].data_ptr(), room[offset:].data_ptr(), size, y[offset:].data_ptr()
            )
            rows.softmax(y[offset:].data_ptr(), size)
            seen.append(y[offset : offset + size].clone())
        assert all(same(one, seen[0]) for one in seen)
