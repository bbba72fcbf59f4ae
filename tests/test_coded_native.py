"""Kernels of weights that are no plain integers, through oc_multiply, in every class: tables and sparse.

Codes, tables and masks are drawn at random, so that what a product should be is known to the bit
(`recipe`); a sparse matrix, or one of the pattern 2:4, has the very bits of the same integers stored with
their zeros. Every format is then laid out from its stored parts, and multiplied with inputs that are not
rounded, against kernels/expand.py in float64.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_layout_native import array, filled
from test_matmul_native import (
    BLOCKS,
    CLASSES,
    SCALES,
    SHAPES,
    Case,
    bits_of,
    check_company,
    check_error,
    generator,
    inputs,
    integer_case,
    isa,
    recipe,
    rounded,
)
from test_storage import NAMES, held, weights

from onecard.core.errors import BadRequest
from onecard.core.format import Integers, LowRank, parse_format
from onecard.kernels import cpu, expand, forms, layout, reference, structs

pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")
TABLES = [(bits, own) for bits in range(1, 7) for own in (False, True) if bits <= 4 or not own]
__all__ = ["isa"]  # a fixture


def table_case(shape: tuple[int, int], bits: int, own: bool, block: int, scale: str) -> Case:
    rows, columns = shape
    rng = generator(shape, bits, own, block, scale)
    group = block if columns % block == 0 else None
    matrix = layout.table(shape, bits, group, scale, own)
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    table = rng.integers(0, 256, (rows if own else 1, 2**bits)).astype(np.uint8)
    groups = columns // group if group else 1
    held = torch.tensor(np.exp(rng.standard_normal((rows, groups))) * 0.01)
    held = held.to(reference.DTYPES[scale])
    data = filled(
        matrix, lambda out: layout.fill_table(matrix, codes, array(held), table, out, threads=2)
    )
    blocks = -(-columns // matrix.block)
    values = np.take_along_axis(np.broadcast_to(table, (rows, 2**bits)), codes.astype(int), 1)
    padded = np.zeros((rows, blocks * matrix.block), np.int64)
    padded[:, :columns] = values.astype(np.int64) - 128
    spread = np.broadcast_to(held.float().numpy(), (rows, groups))
    spread = spread if group else np.repeat(spread, blocks, 1)
    return Case(matrix, data, padded, spread, inputs(rng, columns))


def sparse_cases(
    shape: tuple[int, int], bits: int, block: int, share: float, exact: bool = False,
    pattern: bool = False,
) -> tuple[Case, Case]:  # fmt: skip
    """The same integers stored with and without their zeros."""
    rows, columns = shape
    dense = integer_case(shape, bits, block, False, "bf16", exact)
    rng = generator(shape, bits, block, share)
    padded = dense.codes.shape[1]
    codes = np.where(rng.random((rows, padded)) < share, 0, dense.codes)
    if pattern:  # the two of four that come first in a random order, if they are not zero anyway
        order = rng.random((rows, padded // 4, 4)).argsort(2).reshape(rows, padded)
        codes[order >= 2] = 0
    codes[:, columns:] = 0
    format = Integers(bits, block, scale="bf16")
    weight = reference.hold(torch.tensor(codes), torch.tensor(dense.scale), None, format)
    from test_layout_native import laid

    matrix, data = laid(weight)
    matrix.columns, matrix.exact = columns, int(exact)
    slots = int((codes != 0).sum())
    smaller = layout.pattern(matrix) if pattern else layout.sparse(matrix, slots)
    packed = filled(smaller, lambda out: layout.fill_sparse(smaller, data, out, 2))
    case = Case(matrix, data, codes, dense.scale, dense.x)
    return case, Case(smaller, packed, codes, dense.scale, dense.x)


def check(case: Case, fused: bool) -> None:
    whole, wanted = case.multiply(case.x), recipe(case, fused)
    same = bits_of(whole) == bits_of(wanted)
    assert same.mean() > 0.999 if fused else same.all(), case.matrix.bits
    codes, scales = rounded(case.x, case.matrix.block)
    x = codes * np.repeat(scales.astype(np.float64), case.matrix.block, 1)
    check_error(whole, x[:, : case.matrix.columns], case.weights)
    check_company(case, whole)


@pytest.mark.parametrize(("bits", "own"), TABLES)
def test_tables(isa: str, bits: int, own: bool) -> None:
    for i, shape in enumerate(SHAPES):
        kind = BLOCKS[(i + bits) % 3], SCALES[(i + own) % 3]
        case = table_case(shape, bits, own, *kind)
        check(case, isa != "plain")
        case.matrix.exact = 1
        whole = case.multiply(case.x)
        check_error(whole, case.x, case.weights)
        np.testing.assert_array_equal(bits_of(case.multiply(case.x[5:8])), bits_of(whole[5:8]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("pattern", [False, True])
def test_sparse(isa: str, bits: int, pattern: bool) -> None:
    """The same bits as with the zeros, alone and in company."""
    for i, shape in enumerate(SHAPES):
        share, exact = (0.0, 0.5, 0.7, 0.97, 1.0)[i % 5], i % 4 == 3
        dense, sparse = sparse_cases(shape, bits, BLOCKS[(i + bits) % 3], share, exact, pattern)
        whole = dense.multiply(dense.x)
        np.testing.assert_array_equal(bits_of(sparse.multiply(sparse.x)), bits_of(whole))
        check_company(sparse, whole)
        if (share >= 0.5 or pattern) and shape[1] > 500:
            assert layout.size(sparse.matrix) < layout.size(dense.matrix)


def kinds() -> Iterator[Case]:
    shape = (250, 700)
    for i, (bits, own) in enumerate(TABLES):
        yield table_case(shape, bits, own, BLOCKS[i % 3], "bf16")
    for bits in (4, 8):
        yield sparse_cases(shape, bits, 64, 0.5)[1]
        yield sparse_cases(shape, bits, 128, 0.1, pattern=True)[1]


def test_threads(isa: str) -> None:
    for case in kinds():
        for count in (1, 9, 40):
            alone = case.multiply(case.x[:count])
            for threads in (2, 5):
                found = case.multiply(case.x[:count], threads, repeats=2)
                np.testing.assert_array_equal(bits_of(found), bits_of(alone))


@pytest.mark.skipif(len(CLASSES) < 3, reason="one class alone")
def test_fused_classes_agree() -> None:
    for case in kinds():
        found = {}
        for name in CLASSES[1:]:
            cpu.force_isa(name)
            try:
                found[name] = [bits_of(case.multiply(case.x[:count])) for count in (1, 7, 64)]
            finally:
                cpu.force_isa(None)
        first = found[CLASSES[1]]
        for name, products in found.items():
            for mine, theirs in zip(products, first, strict=True):
                np.testing.assert_array_equal(mine, theirs, name)


# What is stored, laid out ----------------------------------------------------------------------------

# How far the layout may be from the stored numbers, in the largest of a row: what rounding entries of a table
# to 127 steps, or weights to int8 in blocks of 32, leaves. Exact where it is 0.
ROOM = {"ternary": 0, "fp4": 0, "mxfp4": 0, "binary": 0, "sparse2:4(int": 0, "sparse0.5(int": 0,
        "sparse4:8(int": 0}  # fmt: skip


@pytest.mark.parametrize(
    "name", [n for n in (*NAMES, "codebook6", "codebook4-row", "codebook2", "codebook5-row")
             if not n.startswith(("bf16", "fp32", "int", "lowrank"))]
)  # fmt: skip
@pytest.mark.parametrize("rows", [slice(None), np.arange(40, 3, -2)], ids=["all", "some"])
def test_formats(name: str, rows: slice | np.ndarray) -> None:
    shape, format = (45, 448), parse_format(name).scaled("bf16")
    assert not isinstance(format, LowRank)
    w = held(weights(3, shape), format)
    parts = {
        n: array(t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t)
        for n, t in w.parts.items()
    }
    whole = expand.expand(parts, shape, format)
    wanted = whole[rows].astype(np.float64)
    matrix = forms.form(format, wanted.shape, shape)
    data = filled(matrix, lambda out: forms.fill(matrix, parts, rows, shape, format, out, 2))
    matrix.exact = 1
    case = Case(matrix, data, np.zeros(0), np.zeros(0), np.eye(448, dtype=np.float32))
    found = np.concatenate([case.multiply(case.x[i : i + 64]) for i in range(0, 448, 64)]).T
    room = next((r for prefix, r in ROOM.items() if name.startswith(prefix)), 1 / 120)
    most = np.abs(wanted).max(1, keepdims=True) * room
    assert (np.abs(found - wanted) <= most + 1e-7 * np.abs(wanted)).all(), name


def test_nonsense_is_refused() -> None:
    table = layout.table((32, 64), 3, 32, "bf16", own=False)
    sparse = layout.sparse(layout.rounded((32, 64), 32), 100)
    for good, wrongs in (
        (table, ({"bits": 0}, {"bits": 7}, {"bits": 8}, {"zero_point": 1}, {"slots": 3}, {"kind": 5},
                 {"kind": structs.PATTERN}, {"kind": -1}, {"kind": structs.SPARSE}, {"block": 0})),
        (sparse, ({"bits": 2}, {"bits": 3}, {"slots": -1}, {"slots": 1 << 40}, {"zero_point": 1},
                  {"kind": structs.PLAIN}, {"kind": structs.PATTERN})),
        (layout.pattern(layout.rounded((32, 64), 32)),
         ({"bits": 2}, {"bits": 3}, {"slots": 1}, {"zero_point": 1}, {"block": 16})),
    ):  # fmt: skip
        assert layout.size(good) > 0
        for changed in wrongs:
            matrix = structs.Matrix.from_buffer_copy(good)
            for field, value in changed.items():
                setattr(matrix, field, value)
            with pytest.raises(BadRequest):
                layout.size(matrix)
            x = np.zeros(64, np.float32)
            matrix.data = x.ctypes.data
            code = cpu.library().oc_multiply(
                ctypes.byref(matrix), x.ctypes.data, 1, 1, 1, x.ctypes.data, None
            )
            assert code < 0


def test_more_weights_than_slots() -> None:
    dense, sparse = sparse_cases((40, 128), 8, 32, 0.5)
    short = layout.sparse(dense.matrix, sparse.matrix.slots // 2)
    with pytest.raises(BadRequest, match="laid out"):
        filled(short, lambda out: layout.fill_sparse(short, dense.data, out, 1))
    three = layout.pattern(dense.matrix)
    with pytest.raises(BadRequest, match="laid out"):
        filled(three, lambda out: layout.fill_sparse(three, dense.data, out, 1))


@pytest.mark.parametrize("mask", [0b0111, 0b0001], ids=["three of four", "one of four"])
def test_a_mask_that_is_not_the_formats(mask: int) -> None:
    shape, format = (16, 64), parse_format("sparse2:4(int8-g32)").scaled("bf16")
    w = held(weights(3, shape), format)
    parts = {name: array(part) for name, part in w.parts.items()}
    matrix = forms.form(format, shape, shape)
    assert matrix.kind == structs.PATTERN
    places = parts["weight_mask"]
    places[2, 3] = mask * 17
    places[2, 4] = (
        0b1000_1000 if mask == 0b0111 else 0b0011_0011
    )  # as many bits as values, or fewer
    with pytest.raises(BadRequest, match=r"sparse2:4.* keeps"):
        filled(matrix, lambda out: forms.fill(matrix, parts, slice(None), shape, format, out, 1))


@pytest.mark.parametrize(
    "name", ["codebook3", "codebook6", "codebook2-row", "nf4-g64", "sparse2:4(int8-g64)"]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.filterwarnings("error")
def test_no_number_is_found(name: str, dtype: str) -> None:
    """NaN of any bits, as a damaged disk may leave it in a table or among scales, does not become a zero."""
    shape, format = (16, 64), parse_format(name).scaled(dtype)
    parts = {n: array(part) for n, part in held(weights(3, shape), format).parts.items()}
    damaged = parts["weight_table" if "codebook" in name else "weight_scale"].reshape(-1)
    matrix = forms.form(format, shape, shape)
    size = f"i{damaged.itemsize}"
    for bits in (-1, np.iinfo(size).max):
        damaged[3:4].view(size)[:] = bits
        with pytest.raises(BadRequest, match="NaN or infinite"):
            filled(
                matrix, lambda out: forms.fill(matrix, parts, slice(None), shape, format, out, 1)
            )


@pytest.mark.parametrize("name, able", [("codebook6", "looks_far"), ("binary-g64", "masks")])
def test_tables_give_the_same_bits_as_their_integers(
    isa: str, name: str, able: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up in each product or once, while they are laid out."""
    shape, format = (45, 448), parse_format(name).scaled("bf16")
    w = held(weights(3, shape), format)
    parts = {name: array(part) for name, part in w.parts.items()}
    products = []
    for can, kind in ((True, structs.TABLE), (False, structs.PLAIN)):
        monkeypatch.setattr(forms, able, lambda can=can: can)
        matrix = forms.form(format, shape, shape)
        assert matrix.kind == kind
        data = filled(
            matrix,
            lambda out, matrix=matrix: forms.fill(
                matrix, parts, slice(None), shape, format, out, 2
            ),
        )
        case = Case(matrix, data, np.zeros(0), np.zeros(0), inputs(generator(6), 448))
        products.append([bits_of(case.multiply(case.x[:rows])) for rows in (1, 5, 64)])
    for one, other in zip(*products, strict=True):
        np.testing.assert_array_equal(one, other)


def test_zeros_stay_where_expanding_is_slow(isa: str) -> None:
    shape, quick = (64, 256), isa in ("avx512bf16", "amx")
    for name, kind in (
        ("sparse0.5(int4-g64)", structs.SPARSE if quick else structs.PLAIN),
        ("sparse0.5(int8-g64)", structs.SPARSE), ("sparse2:4(int4-g64)", structs.PATTERN),
    ):  # fmt: skip
        assert forms.form(parse_format(name), shape, shape).kind == kind, name
        told = forms.widened(parse_format(name))
        assert ("puts bytes where a mask says" in told) is (not quick and "2:4" not in name), name


@pytest.mark.parametrize("name, said", [
    ("codebook8x4", "not vectors"), ("codebook4x2", "not vectors"), ("codebook5-row", "16 of each row"),
    ("codebook7", ""), ("codebook5", ""), ("codebook4-row", ""), ("hashed8", "all over the memory"),
    ("nvfp4", "32 weights"),
    ("mxfp4", ""), ("nf4-g64", ""), ("ternary-g128", ""), ("int5-g128", "2, 3, 4 or 8"),
    ("int4-g128", ""), ("int8-row", ""), ("fp8-row", ""), ("sparse2:4(int4-g32)", ""),
])  # fmt: skip
def test_what_is_saved_and_is_no_time_is_told(name: str, said: str) -> None:
    told = forms.widened(parse_format(name))
    assert said in told and bool(told) is bool(said)
