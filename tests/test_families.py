"""Every family against transformers: random two-layer models of awkward sizes, equal logits.

For each: a padded batch, with and without a cache, and saved by us, loaded by transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.save import save_model
from onecard.core.errors import BadRequest
from onecard.core.spec import Spec, block_modules
from onecard.nn.families import FAMILIES, spec_of
from onecard.nn.graph import Kind, entries, groups, hidden_sides, require_hidden, surgery
from onecard.nn.layers import Normalize
from onecard.nn.model import Model
from onecard.nn.transformer import Cache
from onecard.passes.cut import cut_model

SMALL = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "rope_theta": 10000.0}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 4.0], "original_max_position_embeddings": 8}  # fmt: skip
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 36,
       "decoder_sparse_step": 1}  # fmt: skip

CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied-bias": ("LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True,
                                             "mlp_bias": True, "head_dim": 10}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 3.0,
                                                              "rope_theta": 10000.0}}),
    "llama-dynamic": ("LlamaForCausalLM", {"rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 8}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5}),
    "mistral-full": ("MistralForCausalLM", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4,
                                          "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 14}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 10, "sliding_window": 4,
                                     "query_pre_attn_scalar": 20}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 10, "sliding_window": 4, "num_hidden_layers": 3,
                                     "layer_types": ["sliding_attention", "full_attention",
                                                     "sliding_attention"]}),
    "gemma3-scaled": ("Gemma3ForCausalLM", {
        "head_dim": 10, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3-long": ("Phi3ForCausalLM", {"rope_parameters": LONG,
                                      "original_max_position_embeddings": 8}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_positions": 64}),
    "gpt2-scaled": ("GPT2LMHeadModel", {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_inner": 70,
                                        "n_positions": 64,
                                        "scale_attn_by_inverse_layer_idx": True}),
    "neox": ("GPTNeoXForCausalLM", {"rotary_pct": 0.5, "num_key_value_heads": 6}),
    "neox-serial": ("GPTNeoXForCausalLM", {"use_parallel_residual": False, "rotary_pct": 1.0,
                                           "num_key_value_heads": 6}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 88, "word_embed_proj_dim": 48}),
    "opt-post": ("OPTForCausalLM", {"ffn_dim": 88, "word_embed_proj_dim": 24,
                                    "do_layer_norm_before": False}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 40}),
    "qwen2-moe-mixed": ("Qwen2MoeForCausalLM", {**MOE, "shared_expert_intermediate_size": 40,
                                                "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**MOE, "norm_topk_prob": True, "head_dim": 10}),
}  # fmt: skip


def random_model(case: str, **sizes: int) -> transformers.PreTrainedModel:
    """A random model of transformers; `sizes` win over those of the case."""
    architecture, more = CASES[case]
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**{**SMALL, **more, **sizes})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


@pytest.fixture(params=CASES, scope="module")
def peer(request, tmp_path_factory) -> tuple[transformers.PreTrainedModel, Path]:
    """A random model of transformers, and the folder it saved."""
    model = random_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def batch() -> tuple[Tensor, Tensor]:
    """Ids [3, 11] and which of them are tokens; the second row is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 101, (3, 11), generator=generator)
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, :4] = False
    ids[1, :4] = 0
    return ids, valid


def their_logits(model: transformers.PreTrainedModel, ids: Tensor, valid: Tensor) -> Tensor:
    more = {}
    if model.config.model_type != "opt":
        more["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=valid.long(), **more).logits


def test_logits_with_padding(peer) -> None:
    model, folder = peer
    ids, valid = batch()
    ours = load_model(folder, "fp32", tokenizer=False).network
    with torch.no_grad():
        mine = ours(ids, valid)
    assert (mine - their_logits(model, ids, valid))[valid].abs().max() < 1e-4


def test_logits_with_cache(peer) -> None:
    """A prompt in two chunks, then token by token, equals one forward."""
    model, folder = peer
    ids, valid = batch()
    ours = load_model(folder, "fp32", tokenizer=False)
    cache = Cache(ours.spec, 3, 16, torch.float32)
    pieces = [(0, 5), (5, 8), (8, 9), (9, 10), (10, 11)]
    with torch.no_grad():
        mine = torch.cat([ours.network(ids[:, a:b], valid[:, a:b], cache) for a, b in pieces], 1)
        whole = ours.network(ids, valid)
    growing = any(
        layer.attention.rope is not None and layer.attention.rope.kind in ("dynamic", "longrope")
        for layer in ours.spec.layers
    )
    reference = whole if growing else their_logits(model, ids, valid)
    if growing:  # frequencies follow the length seen so far: only the last position is comparable
        short = mine[:, :5], ours.network(ids[:, :5], valid[:, :5]).detach()
        assert (short[0] - short[1])[valid[:, :5]].abs().max() < 1e-4
    else:
        assert (mine - reference)[valid].abs().max() < 1e-4


def test_saved_loads_in_transformers(peer, tmp_path) -> None:
    model, folder = peer
    ids, valid = batch()
    out = save_model(load_model(folder, "fp32", tokenizer=False), tmp_path / "out")
    again = type(model).from_pretrained(out, dtype=torch.float32).eval()
    difference = their_logits(again, ids, valid) - their_logits(model, ids, valid)
    assert difference[valid].abs().max() < 1e-5


KEPT = {"head": 4, "kv_group": 1, "neuron": 30}


def less(spec: Spec, kind: Kind) -> list[dict[str, Tensor]]:
    """Which units stay in every layer: other ones in each, and fewer in the first than in the last."""
    generator, rows = torch.Generator().manual_seed(2), []
    for index, layer in enumerate(spec.layers):
        row = {}
        for group in groups(layer, kind):
            count = min(KEPT[kind] + (index if kind == "neuron" else 0), group.count - 1)
            if kind == "head" and group.runs > 1:
                shared = group.count // group.runs
                picked = torch.cat([g * shared + torch.randperm(shared, generator=generator)[:2]
                                    for g in range(group.runs)])  # fmt: skip
            else:
                picked = torch.randperm(group.count, generator=generator)[: max(1, count)]
            row[group.name] = picked.sort().values
        rows.append(row)
    return rows


def masked(model: Model, kept: list[dict[str, Tensor]], kind: Kind) -> Model:
    """Nobody reads the units that go: the columns that read them are zero."""
    for block, row in zip(model.blocks(), kept, strict=True):
        for group in groups(block.layer, kind):
            gone = torch.ones(group.count, dtype=torch.bool)
            gone[row[group.name]] = False
            for side in group.readers:
                at = entries(gone.nonzero().flatten(), side.size)
                linear = block.linear(side.path)
                assert linear.weight is not None
                linear.weight.data[:, at] = 0
    return model


@pytest.mark.parametrize("kind", ["head", "kv_group", "neuron"])
def test_cutting_equals_masking(peer, kind: Kind, tmp_path) -> None:
    """The model with parts masked gives what the model without them gives; it is saved and loads."""
    _, folder = peer
    ids, valid = batch()
    model = load_model(folder, "fp32", tokenizer=False)
    kept = less(model.spec, kind)
    plan = surgery(model.spec, range(model.spec.num_layers), kept, kind)
    with torch.no_grad():
        wanted = masked(load_model(folder, "fp32", tokenizer=False), kept, kind).network(ids, valid)
        whole = model.network(ids, valid)
        cut = cut_model(model, plan)
        assert (cut.network(ids, valid) - wanted)[valid].abs().max() < 1e-5
        assert (whole - wanted)[valid].abs().max() > 1e-3
        assert cut.parameters < model.parameters
        again = load_model(save_model(cut, tmp_path / "out"), "fp32", tokenizer=False)
        assert again.spec == plan.spec
        assert torch.equal(again.network(ids, valid), cut.network(ids, valid))


def test_cutting_the_width_equals_masking(peer, tmp_path) -> None:
    """Numbers of the residual stream that nobody writes; the norms are told of how many are left."""
    _, folder = peer
    ids, valid = batch()
    model = load_model(folder, "fp32", tokenizer=False)
    if model.spec.norm.kind != "rms" or model.spec.embed_scale != 1.0:
        with pytest.raises(BadRequest, match="width"):
            require_hidden(model.spec)
        return
    require_hidden(model.spec)
    stay = torch.tensor([i for i in range(48) if i % 6])
    gone = torch.tensor([i for i in range(48) if i % 6 == 0])
    other = load_model(folder, "fp32", tokenizer=False)
    other.network.stem.embedding.weight.data[:, gone] = 0
    for block in other.blocks():
        for side in hidden_sides(block_modules(other.spec, block.layer)):
            module = block.get_submodule(side.path)
            if side.axis == 0:
                for tensor in module.parameters(recurse=False):
                    tensor.data[gone] = 0
    layers = model.spec.num_layers
    plan = surgery(model.spec, range(layers), [{}] * layers, hidden=stay)
    with torch.no_grad():
        cut = cut_model(model, plan)
        for network in (cut.network, other.network):
            for module in network.modules():
                if isinstance(module, Normalize):  # what is added to a mean square is not scaled
                    module.norm = replace(module.norm, eps=0.0)
        wanted = other.network(ids, valid)
        assert (cut.network(ids, valid) - wanted)[valid].abs().max() < 2e-5
        cut = cut_model(model, plan)
        again = load_model(save_model(cut, tmp_path / "out"), "fp32", tokenizer=False)
        assert again.spec == plan.spec
        assert torch.equal(again.network(ids, valid), cut.network(ids, valid))


def test_equal_cuts_load_in_transformers(peer, tmp_path) -> None:
    """Layers that stay alike, and fewer of them, are what transformers knows."""
    model, folder = peer
    ids, valid = batch()
    ours = load_model(folder, "fp32", tokenizer=False)
    stay = torch.arange(20)
    rows = [{group.name: stay for group in groups(layer, "neuron")} for layer in ours.spec.layers]
    same = len({layer.feed_forward.experts is None for layer in ours.spec.layers}) == 1
    plan = surgery(ours.spec, range(ours.spec.num_layers), rows, "neuron")
    cut = cut_model(ours, plan)
    out = save_model(cut, tmp_path / "out")
    assert same or "per_layer_config" not in Source(out).config
    again = type(model).from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = their_logits(again, ids, valid) - cut.network(ids, valid)
    assert difference[valid].abs().max() < 1e-4


def test_fewer_layers_load(peer, tmp_path) -> None:
    model, folder = peer
    ids, valid = batch()
    ours = load_model(folder, "fp32", tokenizer=False)
    plan = surgery(ours.spec, [1], [{}])
    if "inverse" in str(ours.config) and ours.config.get("scale_attn_by_inverse_layer_idx"):
        with pytest.raises(BadRequest, match="cannot say"):
            cut_model(ours, plan)
        return
    cut = cut_model(ours, plan)
    out = save_model(cut, tmp_path / "out")
    again = type(model).from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = their_logits(again, ids, valid) - cut.network(ids, valid)
    assert difference[valid].abs().max() < 1e-4


def test_names_cover_the_checkpoint(peer) -> None:
    assert Source(peer[1]).extra == ()


def test_every_family_has_a_case() -> None:
    assert {family.architecture for family in FAMILIES} == {name for name, _ in CASES.values()}


def test_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(BadRequest, match="LlamaForCausalLM"):
        spec_of({"architectures": ["T5ForConditionalGeneration"]})
