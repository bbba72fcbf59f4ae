"""Integer formats: packing against compressed-tensors, exact bytes, and folders that transformers loads."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_llama
from hypothesis import given
from hypothesis import strategies as st

from onecard.checkpoint.load import Source, load_model
from onecard.core.errors import BadRequest
from onecard.core.format import DTYPE_BYTES, Dense, Integers, parse_format, words
from onecard.kernels import reference
from onecard.passes import recipe_of
from onecard.passes.job import Settings, compress, prepare

SHAPES = ((1, 32), (3, 64), (17, 96), (64, 160), (5, 128))


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 9),
    count=st.integers(1, 140),
    seed=st.integers(0, 99),
)
def test_pack_round_trips(bits: int, rows: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    low, high = Integers(bits).levels
    q = torch.randint(low, high + 1, (rows, count), generator=generator)
    packed = reference.pack(q, bits)
    assert packed.shape == (rows, words(count, bits)) and packed.dtype == torch.int32
    assert torch.equal(reference.unpack(packed, bits, count).long(), q)


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_is_compressed_tensors(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    low, high = Integers(bits).levels
    for rows, count in SHAPES:
        q = torch.randint(low, high + 1, (rows, count), dtype=torch.int8)
        assert torch.equal(reference.pack(q, bits), pack_to_int32(q, bits)), (bits, rows, count)


def test_grid_is_compressed_tensors() -> None:
    """Scales and codes of symmetric and asymmetric groups equal the library's own."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    torch.manual_seed(0)
    for bits in (3, 4, 8):
        for symmetric in (True, False):
            format = Integers(bits, 32, not symmetric, "fp32")
            w = torch.randn(24, 96) + 0.3
            blocks = reference.grouped(w, format)
            scale, zero = reference.grid(blocks, format)
            args = QuantizationArgs(
                num_bits=bits, symmetric=symmetric, strategy="group", group_size=32
            )
            theirs = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
            assert torch.allclose(scale, theirs[0], rtol=1e-6)
            if not symmetric:
                assert (zero - theirs[1].float()).abs().max() <= 1
            mine = reference.encode(blocks, scale[..., None], zero[..., None], format).flatten(1)
            codes = quantize(w, theirs[0], None if symmetric else zero.to(torch.int8), args)
            assert (mine - codes.float()).abs().float().mean() < 1e-3


@pytest.mark.parametrize("name", ["bf16", "int4-g128", "int8-row", "int3-g32-zp", "int5-g64"])
def test_bytes_are_exact(name: str) -> None:
    format = parse_format(name)
    assert format.name == name
    shape = (48, 256)
    w = torch.randn(shape)
    held = (
        reference.from_dense(w.bfloat16())
        if format.dense
        else reference.round_to_nearest(w, format)
    )
    assert format.bytes(shape) == sum(p.numel() * p.element_size() for p in held.parts.values())
    stated = format.parts(shape)
    for part, tensor in held.parts.items():
        assert stated[part] == (reference.NAMES[tensor.dtype], tuple(tensor.shape))
        assert math.prod(tensor.shape) * DTYPE_BYTES[stated[part][0]] == tensor.nbytes


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rounding_error_is_within_half_a_step(bits: int, zero_point: bool) -> None:
    format = Integers(bits, 32, zero_point, "fp32")
    w = torch.randn(8, 96)
    scale, _ = reference.grid(reference.grouped(w, format), format)
    off = (reference.to_dense(reference.round_to_nearest(w, format)) - w).abs()
    reach = scale * (1.0 if zero_point else 1.0 + 1e-5)
    inner = reference.grouped(off, format) <= reach[..., None] * (1.01 if zero_point else 0.51)
    top = reference.grouped(w, format) > (format.levels[1]) * scale[..., None]
    assert bool((inner | top).all())


def test_zero_groups_stay_zero() -> None:
    w = torch.zeros(4, 64)
    for zero_point in (False, True):
        assert not reference.to_dense(
            reference.round_to_nearest(w, Integers(4, 32, zero_point))
        ).any()


@pytest.mark.parametrize("bits, group", [(1, 128), (9, 128), (4, 48), (4, 0)])
def test_impossible_formats_are_refused(bits: int, group: int) -> None:
    with pytest.raises(BadRequest):
        Integers(bits, group)


def test_unknown_names_are_refused() -> None:
    for name in ("int4", "int4-g", "fp8", "int44-row"):
        with pytest.raises(BadRequest):
            parse_format(name)
    with pytest.raises(BadRequest):
        Dense("int8")


def test_groups_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(BadRequest, match="32"):
        Integers(4, group=128).groups((4, 96))


CASES = [
    {"rtn": {"bits": 4}}, {"rtn": {"bits": 8}}, {"rtn": {"bits": 8, "group": None}},
    {"gptq": {"bits": 4, "group": 64}},
    {"gptq": {"bits": 3}},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=json.dumps)
def test_transformers_loads_our_folder(tmp_path: Path, text_file: Path, case: dict) -> None:
    """transformers with compressed-tensors gives our logits, in float32 for bf16 scales too."""
    from onecard.calibrate.data import Calibration

    folder = make_llama(tmp_path / "model")
    recipe = recipe_of({"passes": [case]}, "case")
    settings = Settings(Calibration(4, 64), text_file, "fp32")
    out = tmp_path / "out"
    compress(prepare(folder, out, recipe, settings))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = load_model(out, "fp32", tokenizer=False).network
    ids = torch.randint(0, 300, (2, 21))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    assert Source(out).compressed


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_zero_points_are_compressed_tensors(bits: int) -> None:
    """The library's own decompression of what we store gives our matrix. (transformers 5.23 with
    compressed-tensors 0.20 makes zero points unpacked when it builds a model, and so refuses folders
    with packed ones, its own as well; vLLM reads them packed.)"""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    w = torch.randn(40, 96) + 0.2
    held = reference.round_to_nearest(w, Integers(bits, 32, True, "fp32"))
    args = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.decompress(dict(held.parts), scheme)["weight"]
    assert torch.equal(theirs.float(), reference.to_dense(held))


@pytest.mark.parametrize("architecture, more", [
    ("Phi3ForCausalLM", {"num_key_value_heads": 4}),
    ("GPTNeoXForCausalLM", {}),
    ("GPT2LMHeadModel", {"n_embd": 128, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2,
                            "num_key_value_heads": 4}),
    ("OPTForCausalLM", {"ffn_dim": 256, "word_embed_proj_dim": 128}),
])  # fmt: skip
@pytest.mark.parametrize("zero_point", [False, True])
def test_fused_and_transposed_families_round_trip(
    tmp_path: Path, architecture: str, more: dict, zero_point: bool
) -> None:
    """Packed parts of fused matrices are joined on disk and cut again when read: nothing is lost."""
    cls = getattr(transformers, architecture)
    base = {"vocab_size": 90, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
    cls(cls.config_class(**{**base, **more})).save_pretrained(tmp_path / "model")
    recipe = recipe_of(
        {"passes": [{"rtn": {"bits": 5, "group": 32, "zero_point": zero_point}}]}, "r"
    )
    compress(prepare(tmp_path / "model", tmp_path / "out", recipe, Settings()))
    before = load_model(tmp_path / "model", "fp32", tokenizer=False)
    after = dict(load_model(tmp_path / "out", "fp32", tokenizer=False).linears())
    format = Integers(5, 32, zero_point, "fp32")
    for name, linear in before.linears():
        wanted = reference.to_dense(reference.round_to_nearest(linear.matrix(), format))
        assert torch.equal(after[name].matrix(), wanted), name
