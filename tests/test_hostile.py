"""Nonsense in a model folder: whatever its files say, a short error and exit code 2, no traceback."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call

from onecard.checkpoint.packed import Schemes
from onecard.core.errors import BadRequest
from onecard.core.format import Integers
from onecard.core.scheme import Scheme
from onecard.inspect import inspect_model, part_of
from onecard.kernels.reference import rope_frequencies
from onecard.nn.families import spec_of
from onecard.nn.transformer import Transformer

NAN, INF = float("nan"), float("inf")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 500000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16, "original_max_position_embeddings": 64}  # fmt: skip
LINEAR, DYNAMIC = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}
GEMMA = {"architectures": ["Gemma2ForCausalLM"]}
MIXTURE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "moe_intermediate_size": 8,
           "num_experts_per_tok": 2}  # fmt: skip
WINDOW = {"architectures": ["MistralForCausalLM"]}


def rope(start: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {**start, **more}}


EDITS: list[dict[str, Any]] = [
    *({"layer_types": value} for value in (5, "full", {}, True, [[]] * 3, ["full_attention"])),
    *({"rope_parameters": value} for value in (-1, True, "llama3", [1], {"rope_type": [1]})),
    *({"hidden_act": value} for value in ([], {}, 5, "nonsense")),
    *(rope({}, partial_rotary_factor=value) for value in (NAN, 1e9, -0.5, 0, 0.01, 0.35, "1")),
    *(rope({}, rope_theta=value) for value in (-1, 0, 1, NAN, INF, "1e4", [1e4], True)),
    *(rope(LLAMA3, original_max_position_embeddings=value) for value in ("abc", [1], INF, -1, 1.5)),
    *(rope({"rope_type": kind}) for kind in ("linear", "dynamic", "yarn", "longrope", "llama3")),
    *(
        rope(start, factor=value)
        for start in (LINEAR, DYNAMIC, LLAMA3, YARN)
        for value in ("8", 0, -1, NAN, INF, 1e300, [8.0], {"a": 1})
    ),
    *(rope(LLAMA3, low_freq_factor=value) for value in (None, 4.0, 9, NAN, "1", [1])),
    *(rope(LLAMA3, high_freq_factor=value) for value in (None, 0.5, NAN, "1", {})),
    *(
        rope(YARN, **{name: value})
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        for value in (NAN, INF, -1, "32", [1], 1e300)
    ),
    rope(YARN, truncate="yes"),
    *(
        rope(LONG, **{name: value})
        for name in ("short_factor", "long_factor")
        for value in (None, 5, [], [1.0] * 15, ["1"] * 16, [NAN] * 16, [0] * 16, [[1]] * 16, {})
    ),
    rope(LONG, original_max_position_embeddings=1),
    *({"rms_norm_eps": value} for value in (NAN, INF, -1e-6, "1e-6", True)),
    *({"num_attention_heads": value} for value in (0, -1, 2.0, NAN, "4", [], 10**30)),
    *({"architectures": value} for value in ([[1]], [5], ["x" * 100_000])),
    *({**GEMMA, "query_pre_attn_scalar": value} for value in (0, -1, NAN, "256")),
    *({**GEMMA, "attn_logit_softcapping": value} for value in (0, NAN, -1, [])),
    *({**GEMMA, "final_logit_softcapping": value} for value in (0, NAN, INF)),
    *({**WINDOW, "sliding_window": value} for value in (0, -1, NAN, "4", [4])),
    *({**MIXTURE, "mlp_only_layers": value} for value in (-1, True, "0", {})),
]


def edit(folder: Path, change: dict[str, Any], name: str = "config.json") -> None:
    path = folder / name
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **change}))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command line says as it refuses."""
    assert call(*words) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert 1 <= len(said.strip().splitlines()) <= 3
    assert len(said) < 1500
    return said


@pytest.mark.parametrize("change", EDITS, ids=lambda change: repr(change)[:70])
def test_nonsense_config_is_refused(change, model, capsys) -> None:
    edit(model, change)
    refused(capsys, "inspect", model)
    refused(capsys, "run", model, "hi", "--max-tokens", "1")


@pytest.mark.parametrize(
    "start", [LINEAR, DYNAMIC, LLAMA3, YARN, LONG], ids=lambda r: r["rope_type"]
)
def test_sound_ropes_run(start, model) -> None:
    """The edits above are refused for what they change, not for what they start from."""
    edit(model, rope(start, finetuned=True, attention_factor=None))
    assert call("run", model, "hi", "--max-tokens", "1") == 0


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [[[1]], "2", {"a": 1}, 1.5, [None, "x"]], ids=repr)
def test_nonsense_stop_tokens(file, value, model, capsys) -> None:
    edit(model, {"eos_token": None}, "tokenizer_config.json")
    edit(model, {"eos_token_id": value}, file)
    assert "eos_token_id" in refused(capsys, "run", model, "hi", "--max-tokens", "1")


@pytest.mark.parametrize("value", [5, [{"name": [1]}], [[]], {"default": 1}, [{"name": "default"}]])
def test_nonsense_chat_template_is_none(value, model) -> None:
    edit(model, {"chat_template": value, "bos_token": [1], "unk_token": "\ud800"},
         "tokenizer_config.json")  # fmt: skip
    assert call("run", model, "hi", "--max-tokens", "1") == 0


@pytest.mark.parametrize(
    "config",
    [
        5, [], "x",
        *({"config_groups": value} for value in ([1], 5, {"a": 1}, {"a": [1]})),
        *({"config_groups": {"a": {"weights": value}}} for value in (5, [1], "int", {})),
        *({"config_groups": {"a": {"targets": value, "weights": {
            "num_bits": 4, "strategy": "group", "group_size": 32}}}} for value in (5, "Linear", [1])),
        *({"config_groups": {"a": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True, **more}}}}
          for more in ({"num_bits": "4"}, {"num_bits": 99}, {"group_size": [1]}, {"strategy": []},
                       {"symmetric": "no"}, {"type": {}}, {"group_size": NAN})),
    ],
    ids=repr,
)  # fmt: skip
def test_nonsense_schemes(config) -> None:
    if isinstance(config, dict):
        config = {"quant_method": "compressed-tensors", **config}
    with pytest.raises(BadRequest):
        Schemes(config)


def test_patterns_of_schemes_are_found_in_order_and_at_once() -> None:
    weights = {"num_bits": 4, "strategy": "channel"}
    targets = [r"re:model\.layers.*q_proj$", "re:" + ".*a" * 40 + "b"]
    schemes = Schemes({"quant_method": "compressed-tensors",
                       "config_groups": {"g": {"targets": targets, "weights": weights}}})  # fmt: skip
    assert schemes.find("model.layers.0.attn.q_proj") == Scheme(Integers(4, None))
    for name in ("model.layers.0.attn.k_proj", "a.model.layers.q_proj", "a" * 2000):
        assert schemes.find(name) is None


INDEXES = {
    "deep": ("[" * 100_000, "cannot be read"),
    "empty": ('{"weight_map": {}}', "names no shard"),
    "absent": ("{}", "cannot be read"),
    "list": ("[]", "cannot be read"),
    "numbers": ('{"weight_map": {"a": 1}}', "cannot be read"),
    "lists": ('{"weight_map": {"a": ["x"]}}', "cannot be read"),
    "mixed": ('{"weight_map": {"a": "x", "b": null}}', "cannot be read"),
    "nul": ('{"weight_map": {"a": "x\\u0000"}}', "outside"),
    "nothing": ('{"weight_map": {"a": ""}}', "outside"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_nonsense_index(name, model, capsys) -> None:
    (model / "model.safetensors").unlink()
    text, words = INDEXES[name]
    (model / "model.safetensors.index.json").write_text(text)
    assert words in refused(capsys, "inspect", model)
    assert words in refused(capsys, "run", model, "hi", "--max-tokens", "1")


def rewrite(folder: Path, change: Callable[[str], str]) -> None:
    """Change the text of the safetensors header and keep its data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_name_twice_in_a_header(model, capsys) -> None:
    row = '{"model.norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},'
    rewrite(model, lambda text: row + text[1:])
    assert "twice" in refused(capsys, "inspect", model)


def test_a_dtype_that_is_not_read(model, capsys) -> None:
    rewrite(model, lambda text: text.replace("BF16", "F8_E5M2", 1))
    said = refused(capsys, "inspect", model)
    assert "dtype F8_E5M2 is not read yet" in said and "again" not in said


def test_no_tensors(model, capsys) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    refused(capsys, "inspect", model)
    refused(capsys, "run", model, "hi", "--max-tokens", "1")


def test_inspect_counts_whole_files_and_notes_a_long_context(tiny) -> None:
    found = inspect_model(str(tiny), context=257)
    size = (tiny / "model.safetensors").stat().st_size
    assert found.value("file_bytes") == size
    assert sum(row.value for row in found.rows if row.what == "part_bytes") == size
    assert any("256" in text for title, text in found.notes if title == "context")
    assert len(inspect_model(str(tiny), context=256).notes) == len(found.notes) - 1
    assert inspect_model(str(tiny)) == inspect_model(str(tiny), context=256)


def test_models_are_called_what_they_are(tiny, capsys, monkeypatch) -> None:
    assert call("inspect", "demo") == 0
    said = capsys.readouterr().out
    assert said.startswith("demo") and "7.3 million" in said and "bits per weight" in said
    monkeypatch.chdir(tiny)
    assert inspect_model(".").title == tiny.name
    assert "no folder ''" in refused(capsys, "inspect", "")


def test_parts_of_awkward_names() -> None:
    assert part_of("embed_out.weight") == "head"
    assert part_of("model.decoder.layers.0.self_attn_layer_norm.weight") == "norms"
    assert part_of("model.layers.0.self_attn.q_norm.weight") == "norms"
    assert part_of("model.layers.0.self_attn.q_proj.weight") == "attention"


# Random nonsense ----------------------------------------------------------------------------------

NONSENSE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-30, 1e30, 1e300, 10**30, NAN, INF, -INF, "",
    "abc", "nan", [], [1], [[1]], [None], ["full_attention"], {}, {"a": 1}, {"rope_type": "yarn"},
)  # fmt: skip
BASE = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-6, "sliding_window": 4,
        "tie_word_embeddings": True, "layer_types": None, "use_sliding_window": True,
        "max_window_layers": 1, "attention_bias": False, "rope_theta": 1e4}  # fmt: skip
STARTS: tuple[dict[str, Any], ...] = (
    {"architectures": ["LlamaForCausalLM"], **rope(LLAMA3)},
    {"architectures": ["LlamaForCausalLM"], **rope(YARN)},
    {"architectures": ["Phi3ForCausalLM"],
     **rope(LONG, short_factor=[1.0] * 4, long_factor=[2.0] * 4)},
    {"architectures": ["MistralForCausalLM"], **rope(DYNAMIC)},
    {"architectures": ["Qwen2ForCausalLM"], **rope(LINEAR)},
    {"architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 16, "hidden_activation": None,
     "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    {"architectures": ["Gemma3ForCausalLM"], "rope_local_base_freq": 1e4, "rope_scaling": LINEAR,
     "sliding_window_pattern": 2, "rope_parameters": {"full_attention": LINEAR}},
    {"architectures": ["Qwen2MoeForCausalLM"], "num_experts": 3, "num_experts_per_tok": 2,
     "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1,
     "mlp_only_layers": [0], "norm_topk_prob": True},
    {"architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2},
    {"architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 9,
     "n_positions": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"},
    {"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.5, "rotary_emb_base": 1e4,
     "use_parallel_residual": True, "layer_norm_eps": 1e-5},
    {"architectures": ["OPTForCausalLM"], "ffn_dim": 9, "word_embed_proj_dim": 16,
     "activation_function": "relu", "do_layer_norm_before": True},
)  # fmt: skip


def attempt(config: dict[str, Any]) -> bool:
    """Read a config as far as the network's shapes and its ropes; False where it is refused."""
    try:
        spec = spec_of(config)
    except BadRequest:
        return False
    with torch.device("meta"):
        Transformer(spec)
    for layer in spec.layers:
        turned = layer.attention.rope
        hash(turned)
        if turned is None:
            continue
        for length in (1, 65, 4096):
            inverse, scale = rope_frequencies(turned, length, spec.max_context)
            assert inverse.shape == (turned.dims // 2,)
            assert bool(inverse.isfinite().all()) and 0 < scale < 1e9, (config, inverse, scale)
    return True


@pytest.mark.parametrize("start", STARTS, ids=lambda start: start["architectures"][0])
def test_random_nonsense_is_refused_or_works(start) -> None:
    assert attempt({**BASE, **start})
    random_one = random.Random(start["architectures"][0])
    results = []
    for _ in range(30):
        config = json.loads(json.dumps({**BASE, **start}))
        for _ in range(random_one.choice((1, 1, 2))):
            nested = [value for value in config.values() if isinstance(value, dict) and value]
            place = random_one.choice([config, *nested])
            place[random_one.choice(sorted(place))] = random_one.choice(NONSENSE)
        results.append(attempt(config))
    assert not all(results)
