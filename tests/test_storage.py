"""Formats as a family: names, exact bytes, what is held is read back, folders load and run."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import call, make_llama
from torch import Tensor

from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.packed import Schemes
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.format import (
    DTYPE_BYTES,
    TABLES,
    Codebook,
    Dense,
    Float8,
    Format,
    Hashed,
    Integers,
    Levels,
    LowRank,
    Sparse,
    Weight,
    parse_format,
)
from onecard.kernels import convert, cpu, expand, reference, storage
from onecard.passes import recipe_of
from onecard.passes.job import Settings, compress, prepare

ROUNDED = (
    "bf16", "fp32", "int4-g32", "int5-row-zp", "nf4-g32", "fp4-g64", "mxfp4", "nvfp4", "ternary-row",
    "ternary-g32", "binary-row", "fp8-row", "fp8-tensor", "fp8-block", "hashed8",
    "sparse0.5(bf16)", "sparse2:4(fp32)", "sparse0.5(int4-g32)", "sparse2:4(int8-row)",
    "sparse4:8(int3-g64)",
)  # fmt: skip
NAMES = (*ROUNDED, "codebook3", "codebook1-row", "codebook8x4", "lowrank8(bf16)",
         "lowrank8(int8-row)+int4-g32", "lowrank4(bf16)+sparse0.5(int4-g32)")  # fmt: skip
SHAPE = (17, 192)


def weights(seed: int = 0, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pruned(w: Tensor, format: Sparse) -> Tensor:
    """w with the zeros that a sparse format asks for."""
    if format.pattern:
        kept, of = map(int, format.pattern.split(":"))
        runs = w.unflatten(1, (-1, of))
        low = runs.abs().argsort(-1)[..., : of - kept]
        return runs.scatter(-1, low, 0.0).flatten(1)
    w = w.clone()
    w.view(-1)[w.abs().flatten().argsort()[: math.floor(format.share * w.numel())]] = 0
    return w


def held(w: Tensor, format: Format) -> Weight:
    """w in any format, one way or another."""
    rows, columns = w.shape
    match format:
        case Codebook(bits, vector, per_row):
            table = weights(1, (rows if per_row else 1, 2**bits * vector)).unflatten(
                1, (-1, vector)
            )
            codes = torch.arange(rows * columns // vector).view(rows, -1) * 7 % 2**bits
            return storage.hold_codebook(codes, table, format)
        case LowRank():
            u, s, v = torch.linalg.svd(w, full_matrices=False)
            left, right = u[:, : format.rank] * s[: format.rank], v[: format.rank]
            pieces = format.pieces((rows, columns))
            a, b = held(left, pieces["left_"][0]), held(right, pieces["right_"][0])
            rest = held(w - left @ right, format.rest) if format.rest else None
            return storage.hold_lowrank(a, b, rest)
        case Sparse():
            return storage.held_in(pruned(w, format), format)
    return storage.held_in(w, format)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_exact_bytes(name: str) -> None:
    format = parse_format(name)
    assert format.name == name and parse_format(format.name) == format
    weight = held(weights(), format)
    assert weight.format == format
    for part, (dtype, sizes) in format.parts(SHAPE).items():
        array = storage.as_numpy(weight.parts[part])
        assert array.shape == sizes and array.itemsize == DTYPE_BYTES[dtype], part
    assert set(format.parts(SHAPE)) == set(weight.parts)
    assert format.bytes(SHAPE) == sum(storage.as_numpy(p).nbytes for p in weight.parts.values())


@pytest.mark.parametrize("name", [
    "fp8", "int9-row", "int4-g48", "nf5-g64", "mxfp4-g32", "codebook9", "codebook3x3", "sparse1(bf16)",
    "sparse4:2(bf16)", "sparse0.5(nf4-g64)", "sparse0.5(int4-g32-zp)", "sparse0.5.5(bf16)",
    "lowrank0(bf16)", "lowrank4(lowrank2(bf16))", "hashed1", "sparse.(bf16)", "sparse0.5(" * 50, "",
])  # fmt: skip
def test_what_is_no_format(name: str) -> None:
    with pytest.raises(BadRequest):
        parse_format(name)


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int2-g32-zp", "int4-g32-zp", "int8-g32-zp", "int3-g32-zp"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_zero_points_in_a_single_word(name: str, rows: int) -> None:
    """Of few rows, the words that hold the zero points are one per group; as they are read from a file."""
    made = held(weights(0, (rows, 160)), parse_format(name))
    read = {n: torch.from_numpy(storage.as_numpy(t).copy()) for n, t in made.parts.items()}
    weight = replace(made, parts=read | {"weight_scale": made.parts["weight_scale"]})
    parts = {part: storage.as_numpy(tensor) for part, tensor in weight.parts.items()}
    wanted = torch.from_numpy(expand.expand(parts, weight.shape, weight.format))
    for found in (convert.to_dense(weight), reference.to_dense(weight)):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", [n for n in ROUNDED if n not in ("hashed8",)])
def test_what_is_held_is_nearest(name: str) -> None:
    """No held number is further from its weight than another number of its grid would be."""
    format, w = parse_format(name), weights()
    if isinstance(format, Sparse):
        w = pruned(w, format)
    back = storage.to_dense(held(weights(), format))
    off = (back - w).abs()
    inner = format.inner if isinstance(format, Sparse) else format
    most = w.abs().amax(1, keepdim=True)
    if isinstance(inner, Integers):
        assert (off <= most / (2 ** (inner.bits - 1) - 0.5) * 0.52 + most * 2.0**-8).all()
    elif isinstance(inner, Float8):
        assert (off <= w.abs() / 16 + float(w.abs().max()) * 2.0**-10).all()
    elif isinstance(inner, Levels) and inner.table not in ("ternary", "binary"):
        levels = sorted(TABLES[inner.table].levels)
        widest = max(b - a for a, b in itertools.pairwise(levels)) / TABLES[inner.table].top
        if inner.table == "mxfp4":  # the power of two leaves up to a third of the range outside
            assert (off <= most / 3).all()
        else:
            assert (off <= most * widest * 0.54).all()
    elif inner.dense:
        assert torch.equal(back, w.to(storage.DTYPES[inner.dense]).float())
    if isinstance(format, Sparse):
        assert torch.equal(back == 0, w == 0) or inner.name.startswith("int")
        assert (back[w == 0] == 0).all()


def test_levels_against_their_definitions() -> None:
    """NF4: levels times the largest magnitude; ternary and binary: sign times the mean magnitude."""
    w = weights()
    nf4 = torch.tensor(TABLES["nf4"].levels)
    scale = w.abs().amax(1, keepdim=True)
    nearest = nf4[(w[..., None] / scale[..., None] - nf4).abs().argmin(-1)] * scale
    got = storage.to_dense(storage.round_to_levels(w, Levels("nf4", None, "fp32")))
    torch.testing.assert_close(got, nearest)
    mean = w.abs().mean(1, keepdim=True)
    got = storage.to_dense(storage.round_to_levels(w, Levels("ternary", None, "fp32")))
    torch.testing.assert_close(got, (w / mean).round().clamp(-1, 1) * mean)
    got = storage.to_dense(storage.round_to_levels(w, Levels("binary", None, "fp32")))
    torch.testing.assert_close(got, torch.where(w > 0, mean, -mean))


@pytest.mark.parametrize(
    "name, most", [("nf4-g64", 0.0104), ("fp4-g64", 0.0150), ("int4-g64", 0.0150)]
)
def test_errors_on_normal_data(name: str, most: float) -> None:
    """Mean squared error on N(0, 1) in blocks of 64 with exact scales: NF4 below the others."""
    w = weights(3, (256, 4096))
    back = storage.to_dense(storage.held_in(w, parse_format(name).scaled("fp32")))
    assert float((w - back).square().mean()) < most


def test_fp8_is_what_torch_says() -> None:
    """Every byte, and rounding, as torch's float8_e4m3fn."""
    every = torch.arange(256, dtype=torch.uint8)
    theirs = every.view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(expand.E4M3, theirs)


def test_sparse_with_other_zeros() -> None:
    """Any share, zeros in any place, whole rows, none at all, nothing else: what is not zero is kept."""
    for share in (0.0, 0.1, 0.33333, 0.98, 1.0):
        w = weights(5) * (torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) >= share)
        w[3] = 0
        assert torch.equal(storage.to_dense(storage.hold_sparse(w, torch.float32)), w)
    with pytest.raises(FailedWork, match="run of 4"):
        storage.hold_sparse(weights(), torch.float32, "2:4")
    few = pruned(weights(), Sparse(Dense("fp32"), pattern="2:4"))
    few[:, ::3] = 0
    assert torch.equal(storage.to_dense(storage.hold_sparse(few, torch.float32, "2:4")), few)


def test_a_mask_that_lies_is_found() -> None:
    weight = held(weights(), parse_format("sparse0.5(int4-g32)"))
    parts = {name: storage.as_numpy(part).copy() for name, part in weight.parts.items()}
    parts["weight_mask"][0, 0] ^= 1
    with pytest.raises(BadRequest, match="mask"):
        expand.expand(parts, SHAPE, weight.format)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["fp8-row", "nf4-g64", "int4-g32", "codebook4-row"])
def test_damaged_scales_give_infinities_and_no_warnings(name: str) -> None:
    weight = held(weights() * 100, parse_format(name).scaled("fp32"))
    parts = {key: storage.as_numpy(part).copy() for key, part in weight.parts.items()}
    part = "weight_table" if name.startswith("code") else "weight_scale"
    parts[part] = np.full_like(parts[part], np.inf)
    assert not np.isfinite(expand.expand(parts, SHAPE, weight.format)).all()


def test_a_group_that_cannot_be_changed() -> None:
    with pytest.raises(BadRequest, match="sizes that do: 32"):
        parse_format("nf4-g64").bytes((3, 96))
    with pytest.raises(BadRequest, match="mxfp4 has no other size"):
        parse_format("mxfp4").bytes((3, 172))


def test_hashing_is_even_and_the_best_there_is() -> None:
    """Buckets and signs are evenly taken; no other shared numbers come closer."""
    bucket, sign = expand.hashed((256, 512), 1000)
    counts = np.bincount(bucket.reshape(-1), minlength=1000)
    assert counts.min() > 80 and counts.max() < 190 and abs(sign.mean()) < 0.01
    w = weights(2, (64, 64))
    weight = storage.round_to_hashed(w, Hashed(4, "fp32"))
    off = float((storage.to_dense(weight) - w).square().sum())
    for seed in range(5):
        shared = weight.parts["weight_shared"] + 0.01 * torch.randn(
            1024, generator=torch.Generator().manual_seed(seed)
        )
        other = storage.hold_hashed(shared, (64, 64), Hashed(4, "fp32"))
        assert float((storage.to_dense(other) - w).square().sum()) > off


def test_infinite_weights_are_refused() -> None:
    w = weights()
    w[2, 3] = float("inf")
    for name in ("nf4-g64", "fp8-row"):
        with pytest.raises(FailedWork, match="NaN or infinite"):
            storage.held_in(w, parse_format(name))


# Folders ------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": None,
    "phi3": ("Phi3ForCausalLM", {"num_key_value_heads": 4}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "neox": ("GPTNeoXForCausalLM", {}),
}


def family(name: str, folder: Path) -> Path:
    if FAMILIES[name] is None:
        return make_llama(folder)
    architecture, more = FAMILIES[name]
    cls = getattr(transformers, architecture)
    base = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    cls(cls.config_class(**{**base, **more})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", FAMILIES)
def test_mixed_folders_load_and_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every linear in another format, saved, loaded, and the same matrices; the engine runs them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    model = load_model(family(kind, tmp_path / "model"), tokenizer=False)
    names = [n for n in NAMES if n not in ("bf16", "fp32", "sparse2:4(fp32)")]
    for i, (_, linear) in enumerate(model.linears()):
        if i % (len(names) + 1) < len(names):
            dtype = linear.weight.dtype
            format = parse_format(names[i % (len(names) + 1)]).for_row(linear.shape[1])
            linear.replace(held(linear.matrix(), storage.rescaled(format, dtype)))
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out", tokenizer=False)
    before, after = dict(model.linears()), dict(again.linears())
    for name, linear in before.items():
        assert linear.format == after[name].format, name
        assert torch.equal(linear.matrix(), after[name].matrix()), name
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(model.network(ids), again.network(ids))
    if cpu.available():
        from test_engine_families import fed_logits

        from onecard.runtime.cpu import CpuSettings, CpuStepper

        stepper = CpuStepper(
            Source(tmp_path / "out"), CpuSettings(threads=1, rows=16, head="stored")
        )
        got = torch.from_numpy(fed_logits(stepper, ids[0].tolist(), (10,)))
        with torch.no_grad():
            wanted = load_model(tmp_path / "out", "fp32", tokenizer=False).network(ids)[0]
        spread = wanted.std()
        assert (got - wanted).abs().max() < 0.2 * spread


@pytest.mark.parametrize("table", ["nf4", "mxfp4", "nvfp4", "ternary", "fp8-row", "fp8-block"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_streamed_and_in_memory_are_the_same(kind: str, table: str, tmp_path: Path) -> None:
    from onecard.passes.walked import apply

    folder = family(kind, tmp_path / "model")
    recipe = recipe_of({"passes": [{"levels": {"table": table}}]}, "r")
    compress(prepare(folder, tmp_path / "streamed", recipe, Settings()))
    model = load_model(folder, tokenizer=False)
    apply(model, recipe, None)
    save_model(model, tmp_path / "saved")
    for one, two in zip(
        load_model(tmp_path / "streamed", tokenizer=False).linears(),
        load_model(tmp_path / "saved", tokenizer=False).linears(),
        strict=True,
    ):
        assert one[1].format == two[1].format and torch.equal(one[1].matrix(), two[1].matrix())
    assert (tmp_path / "streamed" / "config.json").read_text() == (
        tmp_path / "saved" / "config.json"
    ).read_text()


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_transformers_loads_fp8(tmp_path: Path, per: str) -> None:
    folder = make_llama(tmp_path / "model")
    recipe = recipe_of({"passes": [{"levels": {"table": f"fp8-{per}"}}]}, "r")
    compress(prepare(folder, tmp_path / "out", recipe, Settings()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    ours = load_model(tmp_path / "out", "fp32", tokenizer=False).network
    ids = torch.randint(0, 300, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4


def test_our_own_schemes_are_checked(tmp_path: Path) -> None:
    """Unknown formats, other dtypes and shapes than the format says: named before anything is read."""
    for config in ({"formats": {"nf9": []}}, {"formats": {"nf4-g64": "all"}}, {"formats": 3},
                   {"formats": {}, "scale": "int8"}, {"formats": {}, "split": 1}):  # fmt: skip
        with pytest.raises(BadRequest):
            Schemes({"quant_method": "onecard", **config})
    folder = make_llama(tmp_path / "model")
    recipe = recipe_of({"passes": ["levels"]}, "r")
    compress(prepare(folder, tmp_path / "out", recipe, Settings()))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    formats = config["quantization_config"]["formats"]
    for wrong in ("nf4-g32", "int8-row", "fp8-row", "ternary-row"):
        config["quantization_config"]["formats"] = {wrong: next(iter(formats.values()))}
        path.write_text(json.dumps(config))
        with pytest.raises(BadRequest, match=r"weight|lacks"):
            Source(tmp_path / "out")


def test_from_the_command_line(model: Path, tmp_path: Path) -> None:
    assert call("compress", model, tmp_path / "out", "--recipe", "rtn-nf4") == 0
    assert call("run", tmp_path / "out", "The", "--max-tokens", "3") == 0
    assert call("inspect", tmp_path / "out") == 0
