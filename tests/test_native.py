"""The native core against plain float32 NumPy: every instruction-set class gives the same bits."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from onecard.core.errors import BadRequest
from onecard.core.format import Dense, Format, Integers
from onecard.kernels import cpu

CLASSES = cpu.isas() if cpu.available() else ()
pytestmark = pytest.mark.skipif(not CLASSES, reason="the native library is not built")

STORED = {"fp32": np.uint32, "fp16": np.uint16, "bf16": np.uint16}
INFINITY = {"fp32": 0x7F800000, "fp16": 0x7C00, "bf16": 0x7F80}
TINY = 2.0**-126  # the smallest normal float32; fp16 has its denormals
GUARD = 64  # bytes after each output that must stay as they were
NO_BYTES = np.zeros(0, np.uint8)


@pytest.fixture(params=CLASSES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(None)


# The reference: patterns (integers) of a dtype in, float32 in between, bytes out ------------------


def read(patterns: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        return (patterns.astype(np.uint32) << 16).view(np.float32)
    return patterns.view(np.float16 if dtype == "fp16" else np.float32).astype(np.float32)


def stored(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf16":
        bits = x.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return x.astype(np.float16 if dtype == "fp16" else np.float32).view(STORED[dtype])


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    bitmap = (codes[..., None] >> np.arange(bits)) & 1
    bitmap = bitmap.reshape(len(codes), -1)
    bitmap = np.pad(bitmap, ((0, 0), (0, -bitmap.shape[1] % 32)))
    return np.packbits(bitmap.astype(np.uint8), axis=1, bitorder="little").view(np.int32)


def expected(patterns: np.ndarray, dtype: str, format: Format) -> tuple[np.ndarray, ...]:
    """(packed words, scale patterns, zero points) by the formulas of onecard.h."""
    rows, columns = patterns.shape
    low, high = (np.float32(level) for level in format.levels)
    w = read(patterns, dtype).reshape(rows, format.groups((rows, columns)), -1)
    with np.errstate(over="ignore"):
        least, most = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
        if format.zero_point:
            scale = (most - least) / np.float32(high - low)
        else:
            scale = np.maximum(-least, most) / np.float32((high - low) / 2)
    assert scale.dtype == np.float32
    scale = stored(scale, format.scale)
    value = read(scale, format.scale)
    scale = np.where(value < TINY, stored(np.ones(1, "f4"), format.scale), scale)
    value = read(scale, format.scale)
    zero = np.zeros_like(value)
    if format.zero_point:
        zero = np.clip(np.rint(low - least / value), low, high)
    q = np.clip(np.rint(w / value[..., None]) + zero[..., None], low, high)
    assert q.dtype == np.float32
    codes = (q - low).astype(np.int64).reshape(rows, columns)
    return packed(codes, format.bits), scale, zero.astype(np.int8)


def native(
    patterns: np.ndarray, dtype: str, format: Format, threads: int = 2
) -> tuple[int, tuple[np.ndarray, ...]]:
    """The same from the library, with guards behind every output."""
    rows, columns = patterns.shape
    groups = format.groups((rows, columns))
    words = -(-columns * format.bits // 32)
    shapes = (
        (np.dtype(np.int32), (rows, words)),
        (np.dtype(STORED[format.scale]), (rows, groups)),
        (np.dtype(np.int8), (rows, groups)),
    )
    sizes = [dtype_.itemsize * shape[0] * shape[1] for dtype_, shape in shapes]
    outputs = [np.full(size + GUARD, 0xA5, np.uint8) for size in sizes]
    patterns = np.ascontiguousarray(patterns)
    found = cpu.round_pack(
        patterns.ctypes.data, dtype, rows, columns, format,
        *(out.ctypes.data for out in outputs), threads=threads,
    )  # fmt: skip
    for out, size in zip(outputs, sizes, strict=True):
        assert (out[size:] == 0xA5).all(), "written past the end"
    if not format.zero_point:
        assert (outputs[2] == 0xA5).all(), "a zero point was written for a symmetric format"
        outputs[2][:] = 0
    arrays = zip(outputs, sizes, shapes, strict=True)
    return found, tuple(out[:n].view(kind).reshape(shape) for out, n, (kind, shape) in arrays)


def check(patterns: np.ndarray, dtype: str, format: Format, threads: int = 2) -> None:
    found, got = native(patterns, dtype, format, threads)
    assert found == 0
    for name, mine, theirs in zip(
        ("words", "scales", "zeros"), got, expected(patterns, dtype, format), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs, err_msg=f"{name} of {dtype} as {format}")


# Weights ----------------------------------------------------------------------------------------


def normal(shape: tuple[int, int], dtype: str, seed: int = 0, size: float = 0.02) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return stored((rng.standard_normal(shape) * size).astype(np.float32), dtype)


def any_finite(shape: tuple[int, int], dtype: str, seed: int = 0) -> np.ndarray:
    """Random bit patterns: huge and tiny, denormal, both zeros."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2 ** (8 * STORED[dtype]().itemsize), shape).astype(STORED[dtype])
    infinity = STORED[dtype](INFINITY[dtype])
    return np.where(patterns & infinity == infinity, patterns & ~infinity, patterns)


# Tests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("zero_point", [False, True])
def test_every_grid(isa: str, bits: int, zero_point: bool) -> None:
    for dtype, scale, group in itertools.product(STORED, STORED, (32, 64, 128, None)):
        format = Integers(bits, group=group, zero_point=zero_point, scale=scale)
        for rows in (1, 3, 17):
            check(normal((rows, 256), dtype, rows), dtype, format)


@pytest.mark.parametrize("columns", [1, 2, 5, 7, 8, 9, 31, 33, 100, 255, 257, 333, 1023])
def test_ragged_rows(isa: str, columns: int) -> None:
    for bits, zero_point, dtype in itertools.product(range(2, 9), (False, True), STORED):
        format = Integers(bits, group=None, zero_point=zero_point)
        check(normal((3, columns), dtype, columns), dtype, format)


@pytest.mark.parametrize("dtype", STORED)
def test_any_finite_number(isa: str, dtype: str) -> None:
    for bits, zero_point, scale in itertools.product((2, 3, 4, 8), (False, True), STORED):
        format = Integers(bits, group=32, zero_point=zero_point, scale=scale)
        check(any_finite((40, 128), dtype, bits), dtype, format)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", [0.0, 1e-45, 3e-39, 1e-8, 2e-4, 5e-4, 6e4, 1e38])
def test_each_magnitude(isa: str, dtype: str, size: float) -> None:
    w = np.clip(normal((4, 64), "fp32").view(np.float32) * 40, -1, 1)
    size = min(size, 6e4) if dtype == "fp16" else size
    patterns = stored((w * np.float32(size)).astype(np.float32), dtype)
    for bits, zero_point, scale in itertools.product((2, 4, 5), (False, True), STORED):
        check(patterns, dtype, Integers(bits, group=32, zero_point=zero_point, scale=scale))


def test_halves_round_to_even(isa: str) -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, :8] = [7.5, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -7.5]
    _, (got, scale, _) = native(w.view(np.uint32), "fp32", Integers(4, group=32, scale="fp32"))
    assert scale.view(np.float32)[0, 0] == 1
    codes = [int(got[0, 0]) >> 4 * i & 15 for i in range(8)]
    assert [code - 8 for code in codes] == [7, 0, 2, 2, 0, -2, -2, -8]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("zero_point", [False, True])
def test_every_quotient_of_short_numbers(isa: str, dtype: str, zero_point: bool) -> None:
    """Where the scale has every significand, so has what is divided by it: down to 2^-6 of the largest."""
    fraction = 7 if dtype == "bf16" else 10
    each = 1 << fraction
    largest = (15 << fraction) + np.arange(0, each, max(1, each // 128), dtype=np.uint16)
    others = ((9 << fraction) + np.arange(6 * each)).astype(np.uint16)
    if dtype == "bf16":
        largest, others = largest + (112 << fraction), others + (112 << fraction)
    groups = len(others) // 96
    patterns = np.empty((len(largest), groups, 128), np.uint16)
    patterns[:, :, :96] = others[: groups * 96].reshape(groups, 96)
    patterns[:, :, 96:] = largest[:, None, None]
    patterns[:, :, 1::2] |= 0x8000
    for bits in (2, 4, 8):
        format = Integers(bits, group=128, zero_point=zero_point, scale=dtype)
        check(patterns.reshape(len(largest), -1), dtype, format)


@pytest.mark.parametrize("zero_point", [False, True])
def test_one_sided_rows(isa: str, zero_point: bool) -> None:
    w = np.abs(normal((2, 128), "fp32").view(np.float32))
    for sign in (np.float32(1), np.float32(-1)):
        check((sign * w).view(np.uint32), "fp32", Integers(4, group=64, zero_point=zero_point))


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_threads_share_rows(isa: str, threads: int) -> None:
    check(normal((67, 4096), "bf16"), "bf16", Integers(4, group=None, zero_point=True), threads)


@pytest.mark.parametrize("dtype", STORED)
def test_what_is_not_finite_is_counted(isa: str, dtype: str) -> None:
    for seed, count in enumerate((1, 5, 77)):
        patterns = normal((9, 256), dtype)
        rng = np.random.default_rng(seed)
        places = rng.choice(patterns.size, count, replace=False)
        bad = INFINITY[dtype] + (np.arange(count) % 3 == 1)  # infinities and NaN
        sign = STORED[dtype](1) << STORED[dtype](8 * patterns.itemsize - 1)
        patterns.reshape(-1)[places] = bad.astype(patterns.dtype) | (sign * (places % 2 == 0))
        found, _ = native(patterns, dtype, Integers(4, group=None, zero_point=True))
        assert found == count


def test_unaligned_weights(isa: str) -> None:
    patterns = normal((2, 64), "fp32")
    memory = np.zeros(patterns.nbytes + 1, np.uint8)
    memory[1:] = patterns.view(np.uint8).reshape(-1)
    words, scale = np.zeros((2, 8), np.int32), np.zeros((2, 2), np.uint16)
    cpu.round_pack(
        memory.ctypes.data + 1, "fp32", 2, 64, Integers(4, group=32),
        words.ctypes.data, scale.ctypes.data,
    )  # fmt: skip
    np.testing.assert_array_equal(words, expected(patterns, "fp32", Integers(4, group=32))[0])


def test_the_torch_reference_gives_the_same_bits(isa: str) -> None:
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("onecard.kernels.reference")
    w = torch.randn(17, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    for bits, zero_point, scale in itertools.product(range(2, 9), (False, True), STORED):
        format = Integers(bits, group=64, zero_point=zero_point, scale=scale)
        parts = reference.round_to_nearest(w, format).parts
        _, (words, scales, _) = native(w.view(torch.uint16).numpy(), "bf16", format)
        np.testing.assert_array_equal(words, parts["weight_packed"].numpy())
        patterns = parts["weight_scale"].view(torch.int32 if scale == "fp32" else torch.int16)
        np.testing.assert_array_equal(scales, patterns.numpy().view(scales.dtype))


NONSENSE = {
    "rows": [0, -1, 1 << 40], "columns": [0, -8, 1 << 40], "bits": [1, 9, -4],
    "group": [0, -32, 3, 12, 64, 128], "weight_dtype": [-1, 3, 7], "scale_dtype": [-1, 3, 7],
    "threads": [0, -1, 5000], "weight": [None], "packed": [None], "scale": [None],
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused(name: str) -> None:
    buffer = (ctypes.c_char * 4096)()
    sound = {
        "weight": buffer, "weight_dtype": 2, "rows": 2, "columns": 96, "bits": 4, "group": 32,
        "scale_dtype": 2, "threads": 1, "packed": buffer, "scale": buffer, "zero": None,
    }  # fmt: skip
    for value in NONSENSE[name]:
        assert cpu.library().oc_round_pack(*(sound | {name: value}).values()) == -1


def test_measurements_are_positive_or_refused(isa: str) -> None:
    native = cpu.library()
    assert native.oc_read_bandwidth(1 << 22, 2, 0.01) > 0
    for dtype in cpu.PEAKS:
        assert native.oc_peak(cpu.CODES[dtype], 2, 0.01) > 0
        assert native.oc_peak_unit(cpu.CODES[dtype])
    assert native.oc_peak(cpu.CODES["fp16"], 1, 0.01) == -1
    assert native.oc_peak_unit(cpu.CODES["fp16"]) is None
    for arguments in (
        (0, 1, 0.1),
        (1000, 2, 0.1),
        (1 << 60, 1, 0.1),
        (4096, 0, 0.1),
        (4096, 1, -1),
    ):
        assert native.oc_read_bandwidth(*arguments) == -1
    assert native.oc_peak(0, 1, float("nan")) == -1


def test_classes_are_named_and_bounded() -> None:
    native = cpu.library()
    assert cpu.isas()[0] == "plain" and cpu.isa() == cpu.isas()[-1]
    assert native.oc_isa_name(-1) is None and native.oc_isa_name(99) is None
    assert native.oc_isa_force(99) == -1 and native.oc_isa_force(-2) == -1
    with pytest.raises(BadRequest, match="does not run"):
        cpu.force_isa("z80")


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(BadRequest):
        cpu.round_pack(1, "int8", 1, 32, Integers(4, group=32), 1, 1)
    with pytest.raises(BadRequest):
        cpu.round_pack(1, "bf16", 1, 32, Dense("bf16"), 1, 1)
    with pytest.raises(BadRequest):
        cpu.round_pack(1, "bf16", 1, 32, Integers(4, group=32, zero_point=True), 1, 1)
    with pytest.raises(BadRequest, match="do not divide"):
        cpu.round_pack(1, "bf16", 1, 40, Integers(4, group=32), 1, 1)


def test_the_loader_checks_the_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = Path(__file__).parents[1] / "src" / "onecard" / "kernels" / "csrc" / "onecard.h"
    assert f"OC_ABI = {cpu.ABI} " in header.read_text()
    for content in (None, b"not a library"):
        path = tmp_path / "_native.so"
        if content:
            path.write_bytes(content)
        monkeypatch.setenv("ONECARD_NATIVE", str(path))
        with pytest.raises(BadRequest, match=r"does not load\n.*\n.*unset"):
            cpu.library.__wrapped__()
    monkeypatch.delenv("ONECARD_NATIVE")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "nothing" / "cpu.py"))
    with pytest.raises(BadRequest, match=r"is missing\n.*\n.*compiler"):
        cpu.library.__wrapped__()


def test_a_library_of_another_version_is_called_that(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cpu.ABI
    monkeypatch.setattr(cpu, "ABI", found + 1)
    with pytest.raises(BadRequest, match=f"another version.*\n.* {found}, .* needs {found + 1}\n"):
        cpu.library.__wrapped__()
