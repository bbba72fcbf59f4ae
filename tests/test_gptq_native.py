"""GPTQ's native inner loops, packing and unpacking against plain torch, in every instruction-set class."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import Format, Integers
from onecard.kernels import convert, cpu, reference
from onecard.passes import columns as plain
from onecard.passes import gptq
from onecard.passes.quantize import round_weight

CLASSES = cpu.isas() if cpu.available() else ()
pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")

TIE = 1e-4  # how far from a half, in steps of the grid, float32 may round the other way


@pytest.fixture(params=CLASSES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(mine: Tensor, theirs: Tensor) -> bool:
    """Equal bit for bit (NaN and the two zeros included)."""
    if mine.dtype.is_floating_point:
        kind = {2: torch.int16, 4: torch.int32}[mine.element_size()]
        mine, theirs = mine.view(kind), theirs.view(kind)
    return mine.dtype == theirs.dtype and torch.equal(mine, theirs)


# Columns ------------------------------------------------------------------------------------------

Block = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]


def block_of(rows: int, block: int, format: Format, masked: bool = False) -> Block:
    """target, carried, r, scale, zero, keep; a grid of its own for every column."""
    target = random(block, rows, seed=rows)
    x = random(4 * block + 4, block, seed=block) + random(4 * block + 4, 1, seed=1)
    h = x.T @ x / len(x)
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    scale, zero = reference.grid(random(block, rows, 32, seed=2), format)
    carried = 0.1 * random(block, rows, seed=3)
    keep = random(block, rows, seed=4) > 0 if masked else None
    if keep is not None:
        target = target * keep
    return target, carried, r, scale, zero, keep


def check_columns(inputs: Block, format: Format) -> None:
    """Each code is the nearest to its aim in float64, up to ties; torch's codes and losses but there."""
    target, carried, r, scale, zero, keep = (None if t is None else t.double() for t in inputs)
    assert target is not None and carried is not None and r is not None and scale is not None
    assert zero is not None
    low, high = format.levels
    errors, codes, loss = convert.round_columns(*inputs, format)
    aim = target + (carried + r.triu(1).T @ errors.double()) / r.diagonal()[:, None]
    exact = (aim / scale + zero).clamp(low, high)
    off = (codes - exact).abs()
    if keep is not None:
        assert (codes == zero)[keep == 0].all()
        off = off[keep == 1]
    assert (off <= 0.5 + TIE).all()
    value = (codes.float() - inputs[4]) * inputs[3]
    assert same(errors, inputs[0] - value)
    wanted = ((aim - value) * r.diagonal()[:, None]).square().sum(0)
    assert torch.allclose(loss.double(), wanted, rtol=1e-4)

    _, theirs, their_loss = plain.round_columns(*inputs, format)
    agree = (codes == theirs).all(0)
    assert int((~agree).sum()) <= 1 + 0.05 * len(agree)
    assert torch.allclose(loss[agree], their_loss[agree], rtol=1e-4)


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 65])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_columns(isa: str, bits: int, rows: int, block: int) -> None:
    for zero_point, masked in itertools.product((False, True), (False, True)):
        format = Integers(bits, group=None, zero_point=zero_point)
        check_columns(block_of(rows, block, format, masked), format)


def test_columns_of_every_class_and_any_threads_are_the_same_bits() -> None:
    format = Integers(3, group=None, zero_point=True)
    inputs = block_of(1025, 128, format, masked=True)
    seen = []
    for name, count in itertools.product(CLASSES, (1, 2, 3)):
        cpu.force_isa(name)
        torch.set_num_threads(count)
        seen.append(convert.round_columns(*inputs, format))
    cpu.force_isa(None)
    for other in seen[1:]:
        assert all(same(a, b) for a, b in zip(seen[0], other, strict=True))


def test_columns_far_outside_the_grid_are_clamped(isa: str) -> None:
    format = Integers(4, group=None, scale="fp32")
    target = torch.tensor([[1e30, -1e30, 7.5, 0.5, -0.5, 2.5, -9.0, 0.0]])
    one, zero = torch.ones_like(target), torch.zeros_like(target)
    errors, codes, loss = convert.round_columns(
        target, zero, torch.ones(1, 1), one, zero, None, format
    )
    assert codes.tolist() == [[7, -8, 7, 0, 0, 2, -8, 0]]
    assert same(errors, target - codes)
    assert loss[2:].tolist() == [0.25, 0.25, 0.25, 0.25, 1, 0]


# Search -------------------------------------------------------------------------------------------


def weighted_error(
    w: Tensor, weights: Tensor, grid: tuple[Tensor, Tensor], format: Format
) -> Tensor:
    """Per group, summed in float64."""
    scale, zero = grid[0][..., None], grid[1][..., None]
    blocks = reference.grouped(w, format)
    off = reference.decode(reference.encode(blocks, scale, zero, format), scale, zero) - blocks
    return (off.double().square() * weights.double().view(scale.shape[1], -1)).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", [False, True])
def test_search(isa: str, bits: int, zero_point: bool) -> None:
    for rows, (columns, group), scale in itertools.product(
        (1, 3, 16, 17, 65), ((256, 128), (96, 32), (192, 64), (77, None), (1, None)),
        ("bf16", "fp16", "fp32"),
    ):  # fmt: skip
        format = Integers(bits, group=group, zero_point=zero_point, scale=scale)
        w, weights = random(rows, columns, seed=rows), random(columns, seed=1).square()
        w[0, : columns // 2] = 0
        theirs, mine = (
            plain.search_grid(w, weights, format, 12),
            convert.search_grid(w, weights, format, 12),
        )
        differ = (mine[0] != theirs[0]) | (mine[1] != theirs[1])
        assert int(differ.sum()) <= 1 + 0.02 * differ.numel()
        error = weighted_error(w, weights, mine, format)
        assert (error <= weighted_error(w, weights, theirs, format) * (1 + 1e-5)).all()


@pytest.mark.parametrize("steps", [0, 1])
def test_search_without_choice_is_the_grid(isa: str, steps: int) -> None:
    """No steps, or no weight on any error: the largest range wins, in the reference's bits."""
    for bits, zero_point, scale in itertools.product(
        range(2, 9), (False, True), ("bf16", "fp16", "fp32")
    ):
        format = Integers(bits, group=32, zero_point=zero_point, scale=scale)
        for size in (1.0, 1e-6, 1e-8, 1e-40, 0.0):
            w = random(9, 64) * size
            mine = convert.search_grid(w, torch.zeros(64), format, steps)
            theirs = reference.grid(reference.grouped(w, format), format)
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


def test_search_of_every_class_and_any_threads_is_the_same_bits() -> None:
    w, weights, format = random(301, 512), random(512, seed=1).square(), Integers(3, group=64)
    seen = []
    for name, count in itertools.product(CLASSES, (1, 2, 3)):
        cpu.force_isa(name)
        torch.set_num_threads(count)
        seen.append(convert.search_grid(w.T.contiguous().T, weights, format, 12))
    cpu.force_isa(None)
    assert all(same(other[0], seen[0][0]) for other in seen)


def test_search_marks_groups_that_are_not_finite(isa: str) -> None:
    w = random(3, 64)
    w[0, 0], w[1, 40], w[2, 63] = float("nan"), float("inf"), float("-inf")
    scale, _ = convert.search_grid(w, torch.ones(64), Integers(4, group=32), 12)
    assert scale.isinf().tolist() == [[True, False], [False, True], [False, True]]


# Both in `solve` ----------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_solve_is_the_same_with_and_without(
    monkeypatch: pytest.MonkeyPatch, static: bool, pruned: bool
) -> None:
    w, x = random(70, 256), random(1000, 256, seed=1) + random(1000, 1, seed=2)
    w = w * (random(70, 256, seed=3) > 0) if pruned else w
    order = "activation" if static else "natural"
    rounding = gptq.Rounding(order=order, static_groups=static, block=32)
    format = Integers(4, 64, zero_point=True)
    mine = gptq.solve(w, x.T @ x, format, rounding)
    monkeypatch.setattr(convert, "native", lambda *_: False)
    theirs = gptq.solve(w, x.T @ x, format, rounding)
    assert (mine.codes != theirs.codes).any(1).float().mean() <= 0.1
    assert float(mine.loss.sum()) == pytest.approx(float(theirs.loss.sum()), rel=1e-3)


# Packing and unpacking ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_hold_and_to_dense(isa: str, bits: int) -> None:
    low, high = Integers(bits, group=None).levels
    shapes = ((256, 64), (333, None), (5, None), (1, None), (64, 32), (1024, 128))
    for (columns, group), zero_point, rows in itertools.product(shapes, (False, True), (1, 17)):
        for scale in ("bf16", "fp16", "fp32"):
            format = Integers(bits, group=group, zero_point=zero_point, scale=scale)
            generator = torch.Generator().manual_seed(columns)
            q = torch.randint(low, high + 1, (rows, columns), generator=generator).to(torch.int8)
            groups = format.groups((rows, columns))
            scales = random(rows, groups).abs() * 10.0 ** torch.arange(-groups, 0)
            scales = scales.to(reference.DTYPES[scale]).float()
            zero = torch.zeros_like(scales)
            if zero_point:
                zero = torch.randint(low, high + 1, (rows, groups), generator=generator).float()
            mine, theirs = (
                convert.hold(q, scales, zero, format),
                reference.hold(q, scales, zero, format),
            )
            assert mine.format == theirs.format and mine.shape == theirs.shape
            assert mine.parts.keys() == theirs.parts.keys()
            assert all(same(mine.parts[name], theirs.parts[name]) for name in theirs.parts)
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                assert same(convert.to_dense(theirs, dtype), reference.to_dense(theirs, dtype))


@pytest.mark.parametrize("scale", [2.0**-24, 3e-7, 6e-5, 1.0, 600.0, 65504.0])
def test_to_dense_at_the_edges_of_fp16(isa: str, scale: float) -> None:
    """Denormal scales and values, and values that overflow."""
    format = Integers(8, group=None, scale="fp16")
    q = torch.arange(-128, 128).to(torch.int8)[None]
    weight = reference.hold(q, torch.tensor([[scale]]), torch.zeros(1, 1), format)
    for dtype in (torch.float16, torch.bfloat16):
        assert same(convert.to_dense(weight, dtype), reference.to_dense(weight, dtype))


def test_strided_codes_are_packed(isa: str) -> None:
    q = torch.randint(-4, 4, (96, 40)).to(torch.int8)
    format, one = Integers(3, group=None), torch.ones(40, 1)
    held = convert.hold(q.T, one, one * 0, format)
    assert same(held.parts["weight_packed"], reference.pack(q.T.contiguous(), 3))


@pytest.mark.parametrize("size", [1e-9, 6e-8, 1e-7, 1e-6, 6e-5, 1e-3])
def test_small_weights_keep_their_denormal_fp16_scales(isa: str, size: float) -> None:
    format = Integers(4, group=32, scale="fp16")
    w = random(4, 64).clamp(-1, 1) * size
    mine, theirs = convert.round_to_nearest(w, format), reference.round_to_nearest(w, format)
    assert all(same(mine.parts[name], theirs.parts[name]) for name in theirs.parts)
    if size >= 1e-6:
        assert (mine.parts["weight_scale"] < 2e-3).all()
        assert ((convert.to_dense(mine) - w).abs().amax() / w.abs().amax()) < 0.2


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(isa: str, bad: float) -> None:
    w = random(4, 64)
    w[1, 5] = w[3, 9] = bad
    for call in (convert.round_to_nearest, round_weight):
        with pytest.raises(FailedWork, match="2 of 256 weights"):
            call(w, Integers(4, group=32))


NONSENSE = {
    "rows": [0, -1, 1 << 40], "columns": [0, -8, 1 << 40], "block": [0, -1, 1 << 20],
    "bits": [1, 9, -4], "group": [0, -32, 3, 12, 64, 128], "scale_dtype": [-1, 3, 7],
    "dense_dtype": [-1, 3, 7], "threads": [0, -1, 5000], "candidates": [0, -1],
}  # fmt: skip
OPTIONAL = ("keep", "zero of to_dense", "zero_point")


@pytest.mark.parametrize("name", ["oc_pack", "oc_to_dense", "oc_round_columns", "oc_search_grid"])
def test_nonsense_is_refused(name: str) -> None:
    buffer = (ctypes.c_char * 4096)()
    sound: dict[str, object] = {
        "oc_pack": {"codes": buffer, "rows": 2, "columns": 96, "bits": 4, "threads": 1, "packed": buffer},
        "oc_to_dense": {
            "packed": buffer, "scale": buffer, "scale_dtype": 2, "zero of to_dense": None, "rows": 2,
            "columns": 96, "bits": 4, "group": 32, "dense_dtype": 0, "threads": 1, "dense": buffer,
        },
        "oc_round_columns": {
            "target": buffer, "carried": buffer, "r": buffer, "scale": buffer, "zero": buffer,
            "keep": None, "block": 4, "rows": 2, "bits": 4, "threads": 1,
            "errors": buffer, "codes": buffer, "loss": buffer,
        },
        "oc_search_grid": {
            "weight": buffer, "importance": buffer, "rows": 2, "columns": 96, "bits": 4, "group": 32,
            "scale_dtype": 2, "shrink": buffer, "candidates": 1, "zero_point": 0, "threads": 1,
            "scale": buffer, "zero": buffer,
        },
    }[name]  # fmt: skip
    function = getattr(cpu.library(), name)
    assert function(*sound.values()) == 0
    for argument in sound:
        for value in NONSENSE.get(argument, [] if argument in OPTIONAL else [None]):
            assert function(*(sound | {argument: value}).values()) == -1, (argument, value)


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(BadRequest, match="oc_pack"):
        cpu.pack(1, 1, 32, 9, 1)
    with pytest.raises(BadRequest, match="do not divide"):
        convert.search_grid(torch.ones(2, 40), torch.ones(40), Integers(4, group=32), 2)
