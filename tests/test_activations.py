"""Rounded inputs: the grids, the pass, folders that state them, and others' folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import call, make_llama
from safetensors.torch import load_file, save_file
from test_storage import FAMILIES, family
from torch import Tensor

from onecard.calibrate.data import Calibration
from onecard.calibrate.latent import trainable
from onecard.calibrate.stats import ABSMAX, SAMPLE, SAMPLED_TOKENS, Statistics
from onecard.checkpoint.load import load_model
from onecard.checkpoint.packed import Schemes
from onecard.checkpoint.save import save_model
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.core.format import parse_format
from onecard.core.scheme import INPUTS, Scheme, parse_inputs
from onecard.kernels import expand
from onecard.kernels.reference import round_inputs
from onecard.nn.model import Model
from onecard.passes import find_recipe, recipe_of
from onecard.passes.activations import search_scale, static_scale
from onecard.passes.job import Settings, compress, file_bytes, prepare
from onecard.passes.walked import apply

W8 = {"rtn": {"bits": 8, "group": None}}
WEIGHTS = [W8, {"gptq": {"bits": 4, "group": 32}}, {"levels": {"table": "fp8-row"}}]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_ids(rows: int = 2, length: int = 21) -> Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(0))


def logits(model: Model, ids: Tensor, rounded: bool = True) -> Tensor:
    """Of the model, or of the same weights with inputs as they are."""
    kept = [(linear, linear.inputs, linear.input_scale) for _, linear in model.linears()]
    try:
        for linear, inputs, scale in kept:
            linear.round(inputs if rounded else None, scale if rounded else None)
        with torch.no_grad():
            return model.network(ids)
    finally:
        for linear, inputs, scale in kept:
            linear.round(inputs, scale)


# Grids --------------------------------------------------------------------------------------------


def test_a_token_has_its_own_grid() -> None:
    x = draw(3, 4, 64)
    x[0, 0] = 0
    x[1, 2] *= 1000
    for kind, step in (("int8", 1 / 127 / 2), ("fp8", 1 / 16)):
        y = round_inputs(x, parse_inputs(f"{kind}-token"))
        most = x.abs().amax(-1)
        torch.testing.assert_close(y.abs().amax(-1), most, rtol=1e-6, atol=0)
        assert ((y - x).abs().amax(-1) <= step * most * 1.0001).all()
        assert torch.equal(y[1, 2], round_inputs(x[1, 2], parse_inputs(f"{kind}-token")))
        assert not y[0, 0].any()


def test_it_is_compressed_tensors() -> None:
    """Stored scales bit for bit; fp8 per token too. Their int8 per token spans 255 steps, ours 254."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = draw(2, 5, 64)
    for kind, type in (("int8", "int"), ("fp8", "float")):
        args = QuantizationArgs(num_bits=8, type=type, strategy="tensor", symmetric=True)
        scale = static_scale(x.abs().max(), parse_inputs(f"{kind}-static")).reshape(1)
        theirs = fake_quantize(x, scale, torch.zeros(1), args)
        assert torch.equal(round_inputs(x, parse_inputs(f"{kind}-static"), scale), theirs)
    args = QuantizationArgs(
        num_bits=8, type="float", strategy="token", dynamic=True, symmetric=True
    )
    theirs = fake_quantize(x, *compute_dynamic_scales_and_zp(x, args, torch.nn.Module()), args)
    torch.testing.assert_close(round_inputs(x, parse_inputs("fp8-token")), theirs)


def test_nan_is_kept_and_gradients_go_through() -> None:
    for name in INPUTS:
        scale = torch.tensor([0.1]) if name.endswith("static") else None
        x = draw(3, 8)
        x[1, 2] = float("nan")
        y = round_inputs(x, parse_inputs(name), scale)
        assert y[1, 2].isnan() and y[0].isfinite().all() and y[2].isfinite().all()
        x = draw(3, 8).requires_grad_()
        round_inputs(x, parse_inputs(name), scale).sum().backward()
        assert torch.equal(x.grad, torch.ones(3, 8))


def test_search_never_does_worse_on_its_sample() -> None:
    x = draw(300, 32)
    x[0, 0] = 60.0
    rounding = parse_inputs("int8-static")
    widest = static_scale(x.abs().max(), rounding)
    found = search_scale(x, widest, rounding, 20)

    def lost(scale: Tensor) -> Tensor:
        return (round_inputs(x, rounding, scale) - x).square().mean()

    assert found <= widest and lost(found) <= lost(widest)


def test_a_sample_does_not_depend_on_how_batches_are_cut() -> None:
    x = draw(3000, 5)
    whole, pieces = Statistics(5, {SAMPLE, ABSMAX}), Statistics(5, {SAMPLE, ABSMAX})
    whole.add(x)
    for piece in x.split([1, 6, 500, 0, 700, 1793]):
        pieces.add(piece)
    assert torch.equal(whole.sample, pieces.sample)
    assert SAMPLED_TOKENS // 2 <= len(whole.sample) <= SAMPLED_TOKENS
    assert torch.equal(whole.sample, x[::8])
    s = draw(5, seed=1).abs() + 0.5
    whole.divide(s)
    assert torch.equal(whole.sample, x[::8] / s)


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_become_words_and_back(bits: int) -> None:
    q = np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 45))
    packed = expand.pack(q.astype(np.int8), bits)
    assert np.array_equal(expand.unpack(packed, bits, 45).astype(int) - 2 ** (bits - 1), q)


# Folders ------------------------------------------------------------------------------------------


def made(folder: Path, out: Path, passes: list[Any], text: Path) -> Model:
    recipe = recipe_of({"passes": passes}, "r")
    job = prepare(folder, out, recipe, Settings(Calibration(4, 64), text, "fp32"))
    compress(job)
    assert file_bytes(Source(out).checkpoint) == job.plan.output
    return load_model(out, "fp32", tokenizer=False)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("weights", WEIGHTS, ids=json.dumps)
def test_transformers_loads_and_rounds_alike(
    tmp_path: Path, weights: dict[str, Any], inputs: str
) -> None:
    """The same logits for stored scales; per token within what rounding itself changes."""
    model = load_model(make_llama(tmp_path / "model"), tokenizer=False)
    ids = some_ids()
    apply(model, recipe_of({"passes": [weights, {"activations": {"inputs": inputs}}]}, "r"), ids)
    out = save_model(model, tmp_path / "out")
    ours = load_model(out, "fp32", tokenizer=False)
    mine = logits(ours, ids)
    changed = (mine - logits(ours, ids, rounded=False)).abs().max()
    assert changed > 1e-3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        apart = (theirs(ids).logits - mine).abs().max()
    assert apart < (0.5 * changed if inputs.endswith("static") else 2 * changed)


def test_fields_are_those_that_others_read(tmp_path: Path, text_file: Path) -> None:
    folder, layouts = make_llama(tmp_path / "model"), []
    for number, weights in enumerate(WEIGHTS):
        out = tmp_path / str(number)
        made(folder, out, [weights, {"activations": {"inputs": "int8-static"}}], text_file)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        (group,) = config["config_groups"].values()
        layouts.append(config["format"])
        assert group["targets"] == ["Linear"] and group["format"] == config["format"]
        assert group["input_activations"] == {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor",
            "group_size": None, "dynamic": False, "actorder": None,
        }  # fmt: skip
        held = load_file(out / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj"
        assert held[f"{name}.input_scale"].shape == (1,)
        assert (held.get(f"{name}.weight", torch.zeros(0)).dtype == torch.int8) == (number == 0)
    assert layouts == ["int-quantized", "pack-quantized", "float-quantized"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layout_is_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    """Fused and transposed matrices, streamed and in memory, standard layouts and our own."""
    folder, ids = family(kind, tmp_path / "model"), some_ids(4, 64)
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    for number, passes in enumerate((
        [W8, {"activations": {"inputs": "int8-static"}}],
        [{"smooth": {}}, {"rtn": {"bits": 4}}, {"activations": {"inputs": "int8-static", "search": 5}}],
        [{"levels": {"table": "nf4"}}, {"activations": {"inputs": "fp8-token"}}],
        [{"prune": {"share": 0.5}}, W8, {"activations": {}}],
    )):  # fmt: skip
        out, recipe = tmp_path / str(number), recipe_of({"passes": passes}, "r")
        compress(prepare(folder, out, recipe, Settings(data=tmp_path / "ids.json", dtype="fp32")))
        model = load_model(folder, "fp32", tokenizer=False)
        apply(model, recipe, ids)
        again = load_model(out, "fp32", tokenizer=False)
        assert {linear.inputs for _, linear in again.linears()} == {
            recipe.passes[-1].rounding  # type: ignore[attr-defined]
        }
        for (_, one), (_, two) in zip(model.linears(), again.linears(), strict=True):
            assert one.scheme.name == two.scheme.name
        save_model(load_model(out, tokenizer=False), tmp_path / f"{number}-saved")
        saved = tmp_path / f"{number}-saved"
        assert (saved / "config.json").read_text() == (out / "config.json").read_text()
        one, two = (load_file(f / "model.safetensors") for f in (saved, out))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_mixed_folder_says_what_each_module_does(tmp_path: Path) -> None:
    """Integers of 8 and of 4 bits, static and per token, in one folder of compressed-tensors."""
    model = load_model(make_llama(tmp_path / "model"), tokenizer=False)
    ids = some_ids()
    apply(model, recipe_of({"passes": [W8, {"activations": {"inputs": "int8-static"}}]}, "r"), ids)
    other = load_model(tmp_path / "model", tokenizer=False)
    apply(other, recipe_of({"passes": [{"rtn": {"bits": 4}}, "activations"]}, "r"), None)
    for (name, one), (_, two) in zip(model.linears(), other.linears(), strict=True):
        if name.endswith("down"):
            one.replace(two.held())
            one.round(two.inputs)
    out = save_model(model, tmp_path / "out")
    again = load_model(out, "fp32", tokenizer=False)
    assert {linear.scheme.name for _, linear in again.linears()} == {
        "int8-row int8-static", "int4-g128 int8-token"
    }  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        apart = (theirs(ids).logits - logits(again, ids)).abs().max()
    assert apart < 2 * (logits(again, ids) - logits(again, ids, rounded=False)).abs().max()


def test_their_bytes_of_four_bits_are_read(tmp_path: Path) -> None:
    """W4A8 as llm-compressor writes it: int-quantized, a byte for each weight of 4 bits."""
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    model = load_model(make_llama(tmp_path / "model"), tokenizer=False)
    apply(
        model, recipe_of({"passes": [{"rtn": {"bits": 4, "group": 32}}, "activations"]}, "r"), None
    )
    out = save_model(model, tmp_path / "out")
    held = load_file(out / "model.safetensors")
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    for name in [n.removesuffix(".weight_packed") for n in held if n.endswith("weight_packed")]:
        rows, columns = held.pop(f"{name}.weight_shape").tolist()
        scale = held[f"{name}.weight_scale"]
        packed = held.pop(f"{name}.weight_packed").numpy()
        q = torch.from_numpy(expand.unpack(packed, 4, columns).astype(np.float32)) - 8
        w = (q.view(rows, -1, 32) * scale[..., None].float()).flatten(1)
        state = IntQuantizationCompressor.compress(
            {"weight": w, "weight_scale": scale.float()}, scheme
        )
        assert state["weight"].dtype == torch.int8
        held[f"{name}.weight"] = state["weight"]
    save_file(held, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["format"] = "int-quantized"
    (out / "config.json").write_text(json.dumps(config))
    (out / "manifest.json").unlink()
    again = load_model(out, tokenizer=False)
    for (_, one), (_, two) in zip(model.linears(), again.linears(), strict=True):
        assert one.scheme == two.scheme and torch.equal(one.matrix(), two.matrix())


@pytest.mark.parametrize("name", ["w8a8", "w8a8-static", "w4a8", "w8a8-fp8"])
def test_shipped_recipes(tmp_path: Path, text_file: Path, name: str) -> None:
    recipe = find_recipe(name)
    folder, out = make_llama(tmp_path / "model"), tmp_path / "out"
    compress(prepare(folder, out, recipe, Settings(Calibration(4, 64), text_file)))
    source = Source(out)
    assert source.schemes is not None
    assert source.schemes.inputs() == [recipe.passes[-1].inputs]  # type: ignore[attr-defined]
    assert call("inspect", out) == 0


@pytest.mark.parametrize("inputs", ["int8-token", "int8-static"])
def test_training_sees_rounded_inputs(tiny: Path, inputs: str) -> None:
    """What is taught behind the pass learns to live with it, and still rounds afterwards."""
    model, ids = load_model(tiny, "fp32", tokenizer=False), some_ids()
    recipe = recipe_of({"passes": [W8, {"activations": {"inputs": inputs}}]}, "r")
    apply(model, recipe, ids)
    before = logits(model, ids)
    with trainable(model) as trainee:
        torch.testing.assert_close(model.network(ids).detach(), before)
        model.network(ids).square().mean().backward()
        assert all(p.grad is not None for p in trainee.parameters.values())
    assert torch.equal(logits(model, ids), before)


# Refusals -----------------------------------------------------------------------------------------


def test_weights_have_to_be_rounded_first(tiny: Path, tmp_path: Path) -> None:
    for passes in (["activations"], ["activations", W8], [{"prune": {}}, "activations"]):
        recipe = recipe_of({"passes": passes}, "r")
        with pytest.raises(BadRequest, match=r"leaves weights as they are"):
            prepare(tiny, tmp_path / "out", recipe, Settings())
    for settings in ({"search": 5}, {"inputs": "int8-static", "search": 101}, {"inputs": "int4"}):
        with pytest.raises(BadRequest):
            recipe_of({"passes": [W8, {"activations": settings}]}, "r")
    assert not (tmp_path / "out").exists()


def test_configs_are_checked(tmp_path: Path) -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}

    def schemes(**inputs: Any) -> Schemes:
        group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
        return Schemes({"quant_method": "compressed-tensors", "format": "int-quantized",
                        "config_groups": {"group_0": group}})  # fmt: skip

    good = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    assert schemes(**good).find("x") == Scheme(parse_format("int8-row"), parse_inputs("int8-token"))
    assert schemes().find("x") == Scheme(parse_format("int8-row"))
    for wrong in ({"num_bits": 4}, {"strategy": "group"}, {"dynamic": "local"}, {"dynamic": False},
                  {"symmetric": False}, {"type": "bf"}, {"strategy": ["token"]}):  # fmt: skip
        with pytest.raises(BadRequest, match="are not read yet"):
            schemes(**{**good, **wrong})
    for inputs in ({"int8": ["x"]}, {"int8-token": "x"}, 3):
        with pytest.raises(BadRequest):
            Schemes({"quant_method": "onecard", "formats": {"nf4-g64": ["x"]}, "inputs": inputs})


def test_a_stored_scale_is_checked(tmp_path: Path, text_file: Path) -> None:
    folder, out = make_llama(tmp_path / "model"), tmp_path / "out"
    made(folder, out, [W8, {"activations": {"inputs": "int8-static"}}], text_file)
    (out / "manifest.json").unlink()
    held, name = load_file(out / "model.safetensors"), "model.layers.0.self_attn.q_proj.input_scale"
    for bad in (torch.zeros(1), torch.full((1,), float("nan")), torch.ones(2), None):
        broken = {k: v for k, v in held.items() if k != name}
        if bad is not None:
            broken[name] = bad.to(torch.bfloat16)
        save_file(broken, out / "model.safetensors")
        with pytest.raises(BadRequest, match="input_scale"):
            load_model(out, tokenizer=False)
