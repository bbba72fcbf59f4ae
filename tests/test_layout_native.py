"""The kernel layout: written by the library, read back in plain NumPy, equal to the reference."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from onecard.core.errors import BadRequest
from onecard.core.format import Format, Integers
from onecard.kernels import cpu, layout, reference, structs
from onecard.kernels.structs import Matrix

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")

GUARD = 64
SHAPES = ((1, 1), (16, 32), (5, 40), (17, 128), (33, 96), (48, 160), (70, 384), (100, 300))


def array(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's numbers; bf16 as uint16."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def filled(matrix: Matrix, fill) -> np.ndarray:
    """The layout that `fill(out)` writes, with guards around it."""
    size = layout.size(matrix)
    memory = np.full(size + 2 * GUARD + 64, 0xA5, np.uint8)
    start = GUARD + -(memory.ctypes.data + GUARD) % 64
    out = memory[start : start + size]
    fill(out)
    assert (memory[:start] == 0xA5).all() and (memory[start + size :] == 0xA5).all()
    return out


def laid(weight, threads: int = 2) -> tuple[Matrix, np.ndarray]:
    """A packed Weight in the kernel layout."""
    matrix = layout.integers(weight.shape, weight.format)
    zero = None
    if weight.format.zero_point:
        _, _, zero = reference.codes(weight)
        zero = zero.to(torch.int8).contiguous().numpy()
    packed, scale = (array(weight.parts[name]) for name in ("weight_packed", "weight_scale"))
    return matrix, filled(
        matrix,
        lambda out: layout.fill_integers(matrix, packed, scale, zero, weight.format, out, threads),
    )


def formats(columns: int) -> list[Format]:
    groups = [None, *(g for g in (32, 64, 128) if columns % g == 0)]
    kinds = itertools.product(range(2, 9), groups, (False, True))
    return [Integers(bits, group, zero) for bits, group, zero in kinds]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16"])
def test_integers_come_back(shape: tuple[int, int], scale: str) -> None:
    torch.manual_seed(sum(shape))
    w = torch.randn(shape)
    for kind in formats(shape[1]):
        format = Integers(kind.bits, kind.group, kind.zero_point, scale)
        weight = reference.round_to_nearest(w, format)
        matrix, data = laid(weight)
        found = layout.parts(matrix, data)
        rows, columns = shape
        expected = reference.to_dense(weight).numpy()
        np.testing.assert_array_equal(found.values(rows, columns), expected, err_msg=format.name)
        assert (found.u[:rows, columns:] == found.zero[:rows, columns:]).all(), format.name
        assert not found.scale[rows:].any() and not found.u[rows:].any()
        block = matrix.block
        assert block == format.group or (block >= min(columns, 128) and format.group is None)


def test_every_code_and_zero_of_every_width() -> None:
    """The ends of the grid, where a sign or a carry would show."""
    for bits in range(2, 9):
        format = Integers(bits, 128, zero_point=True, scale="fp32")
        low, high = format.levels
        q = torch.arange(256 * 48).view(48, 256) % 2**bits + low
        zero = torch.arange(96).view(48, 2) % 2**bits + low
        weight = reference.hold(q, torch.ones(48, 2), zero, format)
        matrix, data = laid(weight, 1)
        found = layout.parts(matrix, data)
        np.testing.assert_array_equal(
            found.values(48, 256), reference.to_dense(weight).numpy(), err_msg=str(bits)
        )
        assert found.u.max() <= 2**matrix.bits - 1 and low + high == -1


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("held", ["fp32", "fp16", "bf16"])
def test_dense_comes_back(dtype: str, held: str) -> None:
    for rows, columns in SHAPES:
        torch.manual_seed(rows)
        w = (torch.randn(rows, columns) * 100).to(reference.DTYPES[dtype])
        matrix = layout.dense((rows, columns), held)
        data = filled(matrix, lambda out: layout.fill_dense(matrix, array(w), out, 2))  # noqa: B023
        found = layout.parts(matrix, data)
        expected = w.to(reference.DTYPES[held]).float().numpy()
        np.testing.assert_array_equal(found.values(rows, columns), expected)
        assert not found.scale[rows:].any()


def test_small_and_odd_halves_come_back() -> None:
    """All finite fp16 patterns, subnormal ones and both zeros included."""
    patterns = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    w = patterns[np.isfinite(patterns)].reshape(-1, 64)
    matrix = layout.dense(w.shape, "fp32")
    data = filled(matrix, lambda out: layout.fill_dense(matrix, w, out, 2))
    np.testing.assert_array_equal(
        layout.parts(matrix, data).values(*w.shape).view(np.uint32),
        w.astype(np.float32).view(np.uint32),
    )
    assert not layout.exactly_bf16(w)
    assert layout.exactly_bf16(w[np.arange(0, len(w), 16)] * 0 + np.float16(1.5))


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_rounding_is_the_reference(block: int, dtype: str) -> None:
    """Whole blocks as core/format's int8; a short last block as a group of its own."""
    for (rows, columns), scale in itertools.product(SHAPES, ("fp32", "fp16", "bf16")):
        torch.manual_seed(columns)
        w = torch.randn(rows, columns).to(reference.DTYPES[dtype])
        w[0] = 0
        matrix = layout.rounded((rows, columns), block, scale)
        data = filled(matrix, lambda out: layout.fill_dense(matrix, array(w), out, 2))  # noqa: B023
        pieces = [
            reference.to_dense(reference.round_to_nearest(piece, Integers(8, None, scale=scale)))
            for piece in w.split(block, 1)
        ]
        found = layout.parts(matrix, data)
        np.testing.assert_array_equal(found.values(rows, columns), torch.cat(pieces, 1).numpy())
        assert (found.u[:rows, columns:] == 128).all() and not found.scale[rows:].any()


def test_rows_laid_out_in_pieces_are_the_whole() -> None:
    w = torch.randn(50, 96)
    whole = layout.dense((50, 96), "bf16")
    data = filled(whole, lambda out: layout.fill_dense(whole, array(w), out, 1))
    pieces = []
    for begin in range(0, 50, 16):
        piece = w[begin : begin + 16]
        matrix = layout.dense((len(piece), 96), "bf16")
        pieces.append(filled(matrix, lambda out: layout.fill_dense(matrix, array(piece), out, 1)))  # noqa: B023
    np.testing.assert_array_equal(data, np.concatenate(pieces))


def test_the_same_for_any_number_of_threads() -> None:
    weight = reference.round_to_nearest(torch.randn(3000, 96), Integers(3, 32, True))
    first = laid(weight, 1)[1]
    for threads in (2, 3, 16):
        np.testing.assert_array_equal(laid(weight, threads)[1], first)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_what_is_not_finite_is_counted(bad: float, dtype: str) -> None:
    w = torch.randn(20, 64)
    w[3, 5] = w[19, 63] = bad
    dense = array(w.to(reference.DTYPES[dtype]))
    for matrix in (layout.dense((20, 64), "fp32"), layout.rounded((20, 64), 32)):
        with pytest.raises(BadRequest, match="2 weights that are NaN or infinite"):
            filled(matrix, lambda out: layout.fill_dense(matrix, dense, out, 1))  # noqa: B023
    weight = reference.round_to_nearest(torch.randn(20, 64), Integers(4, 32, scale=dtype))
    weight.parts["weight_scale"][7, 1] = bad
    with pytest.raises(BadRequest, match="1 scales that are NaN or infinite"):
        laid(weight)


def test_bytes_are_exact_and_nonsense_is_refused() -> None:
    assert layout.size(layout.dense((17, 3), "bf16")) == 2 * 128
    assert layout.size(layout.dense((16, 3), "fp32")) == 192
    four = layout.integers((32, 256), Integers(4, 128, True))
    assert layout.size(four) == 2 * (64 + 64 + 256 * 8)
    three = layout.integers((1, 32), Integers(3, 32))
    assert layout.size(three) == 64 + 192
    most = 1 << 30
    assert layout.size(layout.dense((most, most), "fp32")) == 1 << 62
    good = {"rows": 32, "columns": 64, "bits": 4, "block": 32, "dtype": 2, "zero_point": 0}
    bytes_of = cpu.library().oc_layout_bytes
    assert bytes_of(ctypes.byref(Matrix(**good))) > 0
    assert bytes_of(None) == -1
    nonsense = {
        "rows": (0, -1, most + 1, 2**63 - 1), "columns": (0, -5, most + 1, -(2**63)),
        "bits": (0, 1, 5, 6, 7, 9, -4, 2**31 - 1), "block": (0, 16, 48, 256, -32),
        "dtype": (3, -1, 99), "zero_point": (2, -1),
    }  # fmt: skip
    for name, values in nonsense.items():
        for value in values:
            assert bytes_of(ctypes.byref(Matrix(**{**good, name: value}))) == -1, (name, value)
            with pytest.raises(BadRequest, match="no kernel layout"):
                layout.size(Matrix(**{**good, name: value}))
    assert bytes_of(ctypes.byref(Matrix(**{**good, "bits": 0, "block": 0, "zero_point": 1}))) == -1


def test_calls_that_do_not_fit_are_refused() -> None:
    native = cpu.library()
    packed, scale = np.zeros((32, 8), np.int32), np.ones((32, 2), np.float32)
    zero, out = np.zeros((32, 2), np.int8), np.zeros(1 << 16, np.uint8)
    matrix = layout.integers((32, 64), Integers(4, 32, scale="fp32"))

    def integer(m=matrix, p=packed, bits=4, s=scale, z=None, group=32, threads=1, o=out) -> int:
        places = (None if x is None else x.ctypes.data for x in (p, s, z, o))
        p, s, z, o = places
        return native.oc_layout_integers(ctypes.byref(m), p, bits, s, z, group, threads, o)

    assert integer() == 0
    assert integer(m=layout.integers((32, 64), Integers(4, 32, True, "fp32")), z=zero) == 0
    for wrong in (
        {"p": None}, {"s": None}, {"o": None}, {"bits": 5}, {"bits": 0}, {"bits": 99}, {"z": zero},
        {"group": 0}, {"group": -32}, {"group": 48}, {"group": 128}, {"threads": 0},
        {"threads": 9999}, {"m": layout.dense((32, 64), "fp32")}, {"m": Matrix()},
        {"m": layout.integers((32, 64), Integers(4, 64, scale="fp32"))},
        {"m": layout.integers((32, 72), Integers(4, 32, scale="fp32"))},
    ):  # fmt: skip
        assert integer(**wrong) == -1, wrong
    dense = np.ones((32, 64), np.float32)
    for function, good in (
        (native.oc_layout_dense, layout.dense((32, 64), "fp32")),
        (native.oc_layout_quantize, layout.rounded((32, 64), 32)),
    ):
        at, to = dense.ctypes.data, out.ctypes.data
        assert function(ctypes.byref(good), at, 0, 1, to) == 0
        assert function(ctypes.byref(good), None, 0, 1, to) == -1
        assert function(ctypes.byref(good), at, 3, 1, to) == -1
        assert function(ctypes.byref(good), at, 0, 0, to) == -1
        assert function(ctypes.byref(good), at, 0, 1, None) == -1
        other = matrix if good.bits == 0 else layout.dense((32, 64), "fp32")
        assert function(ctypes.byref(other), at, 0, 1, to) == -1
    with pytest.raises(ValueError, match="aligned"):
        layout.fill_dense(layout.dense((32, 64), "fp32"), dense, out[1 : 1 + 8192], 1)
    with pytest.raises(ValueError, match="contiguous"):
        layout.fill_dense(layout.dense((32, 64), "fp32"), dense, out[:64], 1)


# Checksum -----------------------------------------------------------------------------------------


def plain_checksum(data: bytes) -> int:
    """The formula of csrc/onecard.h."""
    mask, chunk = 2**64 - 1, 1 << 20

    def step(h: int, w: int) -> int:
        h ^= w
        return ((h << 29 | h >> 35) & mask) * 0x9E3779B97F4A7C15 & mask

    total = len(data)
    for c in range(-(-len(data) // chunk)):
        piece = data[c * chunk : (c + 1) * chunk]
        piece += b"\0" * (-len(piece) % 64)
        words = np.frombuffer(piece, "<u8").tolist()
        found = c
        for lane in range(8):
            h = 8 * c + lane + 1
            for w in words[lane::8]:
                h = step(h, w)
            found = step(found, h)
        total = step(total, found)
    return total


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 4096, (1 << 20) + 3, (3 << 20) - 1])
def test_checksum_is_its_formula(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    expected = plain_checksum(data.tobytes())
    for threads in (1, 2, 5):
        assert layout.checksum(data, threads) == expected


def test_checksum_sees_flips_swaps_and_lengths() -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (2 << 20) + 100, np.uint8)
    first = layout.checksum(data, 2)
    seen = {first}

    def note(changed: np.ndarray) -> None:
        found = layout.checksum(changed, 2)
        assert found not in seen
        seen.add(found)

    for bit in range(64):
        changed = data.copy()
        changed[bit // 8 + 8 * rng.integers(0, 1000)] ^= 1 << bit % 8
        note(changed)
    for a, b, length in (
        (0, 8, 8),
        (0, 64, 64),
        (0, 1 << 20, 1 << 20),
        (100, 200, 1),
        (7, 4096, 8),
    ):
        changed = data.copy()
        changed[a : a + length], changed[b : b + length] = (
            data[b : b + length], data[a : a + length],
        )  # fmt: skip
        note(changed)
    changed = data.copy()
    changed[7] ^= 0x80
    changed[7 + 128] ^= 0x80
    note(changed)
    note(data[:-1])
    note(np.append(data, np.uint8(0)))
    for zeros in (0, 1, 64, 128, 1 << 20, 2 << 20):
        note(np.zeros(zeros, np.uint8))
    note_of = cpu.library().oc_checksum
    found = ctypes.c_uint64()
    assert note_of(None, 1, 1, ctypes.byref(found)) == -1
    assert note_of(data.ctypes.data, -1, 1, ctypes.byref(found)) == -1
    assert note_of(data.ctypes.data, 1, 0, ctypes.byref(found)) == -1
    assert note_of(data.ctypes.data, 1, 1, None) == -1


# The structs --------------------------------------------------------------------------------------


def test_structs_are_those_of_the_header(tmp_path: Path) -> None:
    """Size of each struct and place of each field, as a compiler sees them."""
    source = Path(__file__).parents[1] / "src" / "onecard" / "kernels" / "csrc"
    names = {
        "oc_matrix": structs.Matrix, "oc_norm": structs.Norm, "oc_mlp": structs.Mlp,
        "oc_layer": structs.Layer, "oc_rope": structs.Rope, "oc_model": structs.Model,
    }  # fmt: skip
    header = (source / "onecard.h").read_text()
    declared = set(re.findall(r"^\} (oc_\w+);", header, re.M))
    assert names.keys() <= declared
    lines = []
    for name, struct in names.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in struct._fields_:
            lines.append(f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));')
    program = '#include <stddef.h>\n#include <stdio.h>\n#include "onecard.h"\nint main(void) {\n'
    (tmp_path / "a.c").write_text(program + "\n".join(lines) + "\nreturn 0; }\n")
    try:
        subprocess.run(
            ["cc", f"-I{source}", str(tmp_path / "a.c"), "-o", str(tmp_path / "a")], check=True
        )
    except FileNotFoundError:
        pytest.skip("there is no C compiler")
    told = subprocess.run([str(tmp_path / "a")], check=True, capture_output=True, text=True).stdout
    for line in told.splitlines():
        name, _, field = line.split()[0].partition(".")
        struct = names[name]
        mine = getattr(struct, field).offset if field else ctypes.sizeof(struct)
        assert mine == int(line.split()[1]), line
