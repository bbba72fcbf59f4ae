"""Families: how a `config.json` becomes a Spec, and where each tensor lies in a checkpoint.

A family is data: a function config -> Spec and a table of names. `Stored` says where a module's
tensors lie and how: whole, as a run of rows of a fused matrix (Phi-3), interleaved by head
(GPT-NeoX), or transposed (GPT-2). `{i}` is the layer, `{e}` the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from onecard.core.errors import BadRequest
from onecard.core.spec import Attention, Experts, FeedForward, LayerSpec, Norm, Rope, Spec
from onecard.nn.config import Config, Reader, shown
from onecard.nn.shapes import Sizes, config_of, read_layers


@dataclass(frozen=True)
class Stored:
    """Where a module lies: `part` of `of` row runs of a fused matrix, by head, transposed."""

    name: str
    part: int = 0
    of: tuple[str, ...] = ()
    by_head: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture as transformers names it."""

    architecture: str
    model_type: str
    uniform: Callable[[Config], Spec]
    outer: Mapping[str, Stored]
    block: Mapping[str, Stored]
    prefix: str = ""
    sizes: Sizes = field(default_factory=Sizes)

    def spec(self, config: Config) -> Spec:
        """The Spec of a config.json. Raises BadRequest for what is unknown or impossible."""
        return read_layers(self.uniform, config, self.sizes)

    def config(self, config: Config, spec: Spec) -> dict[str, Any]:
        """A config.json with the sizes of `spec`. Raises BadRequest where it cannot say them."""
        return config_of(self.spec, config, self.sizes, spec)

    def modules(self, spec: Spec, index: int | None = None) -> Iterator[tuple[str, Stored]]:
        """(module path, where it lies) for the stem and tail (index None) or for one block."""
        table = self.outer if index is None else self.block
        experts = None if index is None else spec.layers[index].feed_forward.experts
        for path, stored in table.items():
            routed = path.startswith("feed_forward.") and _is_expert_part(path)
            if index is not None and path.startswith("feed_forward."):
                if routed != (experts is not None):
                    continue
            for e in range(experts.count if experts and "{e}" in path else 1):
                name = stored.name.format(i=index, e=e)
                yield (
                    path.format(e=e),
                    Stored(name, stored.part, stored.of, stored.by_head, stored.transposed),
                )


def _is_expert_part(path: str) -> bool:
    return "expert" in path or "router" in path or "shared" in path


# Configurations ---------------------------------------------------------------------------------


def _window(read: Reader, index: int, kind: str | None) -> int | None:
    """The sliding window of a layer whose `layer_types` entry is `kind`."""
    return read.count("sliding_window") if kind == "sliding_attention" else None


def _layer_types(read: Reader, default: Callable[[int], str]) -> list[str]:
    count = read.layers()
    types = read.get("layer_types", [])
    if types == []:
        return [default(i) for i in range(count)]
    known, fits = ("full_attention", "sliding_attention"), isinstance(types, list)
    if not fits or len(types) != count or any(kind not in known for kind in types):
        raise BadRequest("config.json: layer_types does not name one of "
                         f"{', '.join(known)} for each of {count} layers")  # fmt: skip
    return list(types)


def _llama_like(
    config: Config,
    family: str,
    *,
    types: Callable[[Reader], Callable[[int], str]] = lambda read: lambda i: "full_attention",
    bias: Callable[[Reader], tuple[bool, bool, bool]] = lambda read: (False, False, False),
    head_norm: bool = False,
    experts: Callable[[Reader, int], tuple[int, Experts] | None] = lambda read, i: None,
    **more: Any,
) -> Spec:
    """The common shape: RMS norms before, rope, gated feed-forward. `bias`: qkv, out, mlp."""
    read = Reader(config)
    heads, kv_heads, head_dim = read.heads()
    qkv_bias, out_bias, mlp_bias = bias(read)
    layers = []
    for i, kind in enumerate(_layer_types(read, types(read))):
        routed = experts(read, i)
        layers.append(LayerSpec(
            Attention(heads, kv_heads, head_dim, head_dim**-0.5, read.rope(head_dim, kind),
                      _window(read, i, kind), qkv_bias, out_bias, head_norm),
            FeedForward(routed[0] if routed else read.count("intermediate_size"),
                        read.activation(), True, mlp_bias, routed[1] if routed else None),
        ))  # fmt: skip
    return Spec(
        family, read.count("vocab_size"), read.count("hidden_size"), tuple(layers),
        Norm("rms", read.epsilon("rms_norm_eps", 1e-6)), read.context(),
        tied=read.flag("tie_word_embeddings", more.pop("tied", False)), **more,
    )  # fmt: skip


def _llama(config: Config) -> Spec:
    def bias(read: Reader) -> tuple[bool, bool, bool]:
        attention = read.flag("attention_bias", False)
        return attention, attention, read.flag("mlp_bias", False)

    return _llama_like(config, "llama", bias=bias)


def _always_window(read: Reader) -> Callable[[int], str]:
    kind = "full_attention" if read.get("sliding_window") is None else "sliding_attention"
    return lambda i: kind


def _mistral(config: Config) -> Spec:
    return _llama_like(config, "mistral", types=_always_window)


def _qwen_windows(read: Reader) -> Callable[[int], str]:
    on = read.flag("use_sliding_window", False) and read.get("sliding_window") is not None
    first = read.count("max_window_layers", 28, least=0)
    return lambda i: "sliding_attention" if on and i >= first else "full_attention"


def _qwen2(config: Config) -> Spec:
    return _llama_like(config, "qwen2", types=_qwen_windows, bias=lambda read: (True, False, False))


def _qwen3_bias(read: Reader) -> tuple[bool, bool, bool]:
    on = read.flag("attention_bias", False)
    return on, on, False


def _qwen3(config: Config) -> Spec:
    return _llama_like(config, "qwen3", types=_qwen_windows, bias=_qwen3_bias, head_norm=True)


def _mixtral(config: Config) -> Spec:
    def experts(read: Reader, i: int) -> tuple[int, Experts]:
        count = read.count("num_local_experts", 8, most=1024)
        top = read.count("num_experts_per_tok", 2, most=count)
        return read.count("intermediate_size"), Experts(count, top, True)

    return _llama_like(config, "mixtral", types=_always_window, experts=experts)


def _qwen_experts(shared: bool) -> Callable[[Reader, int], tuple[int, Experts] | None]:
    def experts(read: Reader, i: int) -> tuple[int, Experts] | None:
        sparse = (i + 1) % read.count("decoder_sparse_step", 1) == 0
        plain = read.get("mlp_only_layers", [])
        if not isinstance(plain, list):
            raise read.bad("mlp_only_layers", plain, "a list of layers is needed")
        if i in plain or not sparse:
            return None
        count = read.count("num_experts", read.get("num_local_experts"), most=1024)
        top = read.count("num_experts_per_tok", 8 if not shared else 4, most=count)
        width = read.count("shared_expert_intermediate_size") if shared else 0
        rest = Experts(count, top, read.flag("norm_topk_prob", False), width, shared)
        return read.count("moe_intermediate_size"), rest

    return experts


def _qwen2_moe(config: Config) -> Spec:
    return _llama_like(
        config, "qwen2_moe", types=_qwen_windows, experts=_qwen_experts(True),
        bias=lambda read: (read.flag("qkv_bias", True), False, False),
    )  # fmt: skip


def _qwen3_moe(config: Config) -> Spec:
    return _llama_like(
        config, "qwen3_moe", types=_always_qwen3_moe, bias=_qwen3_bias, head_norm=True,
        experts=_qwen_experts(False),
    )  # fmt: skip


def _always_qwen3_moe(read: Reader) -> Callable[[int], str]:
    on = read.flag("use_sliding_window", False) and read.get("sliding_window") is not None
    return lambda i: "sliding_attention" if on else "full_attention"


def _phi3(config: Config) -> Spec:
    return _llama_like(config, "phi3", types=_always_window)


def _gemma(config: Config, family: str, head_norm: bool, types: Callable[[int], str]) -> Spec:
    read = Reader(config)
    heads, kv_heads, head_dim = read.heads()
    scale = read.positive("query_pre_attn_scalar", 256) ** -0.5
    bias = read.flag("attention_bias", False)
    read.refuse("use_bidirectional_attention", False)
    layers = []
    for i, kind in enumerate(_layer_types(read, types)):
        rope = read.rope(head_dim, kind)
        if kind == "sliding_attention" and read.get("rope_local_base_freq") is not None:
            if kind not in (read.get("rope_parameters") or {}):
                rope = Rope(head_dim, read.theta("rope_local_base_freq"))
        layers.append(LayerSpec(
            Attention(heads, kv_heads, head_dim, scale, rope, _window(read, i, kind), bias, bias,
                      head_norm, read.cap("attn_logit_softcapping")),
            FeedForward(read.count("intermediate_size"),
                        read.activation("hidden_activation", "gelu_pytorch_tanh")),
            "sandwich",
        ))  # fmt: skip
    return Spec(
        family, read.count("vocab_size"), read.count("hidden_size"), tuple(layers),
        Norm("rms", read.epsilon("rms_norm_eps", 1e-6), 1.0), read.context(),
        tied=read.flag("tie_word_embeddings", True), embed_scale=read.count("hidden_size") ** 0.5,
        final_soft_cap=read.cap("final_logit_softcapping"),
    )  # fmt: skip


def _gemma2(config: Config) -> Spec:
    defaults = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                "sliding_window": 4096}  # fmt: skip
    kinds = ("sliding_attention", "full_attention")
    return _gemma({**defaults, **config}, "gemma2", False, lambda i: kinds[i % 2])


def _gemma3(config: Config) -> Spec:
    every = Reader(config).count("sliding_window_pattern", 6)
    defaults = {"sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    return _gemma(
        {**defaults, **config}, "gemma3", True,
        lambda i: "full_attention" if (i + 1) % every == 0 else "sliding_attention",
    )  # fmt: skip


def _gpt2(config: Config) -> Spec:
    read = Reader(config)
    hidden, heads = read.count("n_embd"), read.count("n_head", most=4096)
    read.refuse("add_cross_attention", False)
    if read.get("head_dim") is None and hidden % heads:
        raise BadRequest(f"config.json: n_embd {hidden} over {heads} heads")
    head_dim = read.count("head_dim", hidden // heads, most=8192)
    context = read.count("n_positions", 1024)
    layers = []
    for i in range(read.layers("n_layer")):
        scale = head_dim**-0.5 if read.flag("scale_attn_weights", True) else 1.0
        if read.flag("scale_attn_by_inverse_layer_idx", False):
            scale /= i + 1
        layers.append(LayerSpec(
            Attention(heads, heads, head_dim, scale, bias=True, out_bias=True),
            FeedForward(read.count("n_inner", 4 * hidden),
                        read.activation("activation_function", "gelu_new"), False, True),
        ))  # fmt: skip
    return Spec(
        "gpt2", read.count("vocab_size"), hidden, tuple(layers),
        Norm("layer", read.epsilon("layer_norm_epsilon", 1e-5), bias=True), context,
        tied=read.flag("tie_word_embeddings", True), learned_positions=context,
    )  # fmt: skip


def _neox(config: Config) -> Spec:
    read = Reader(config)
    heads, _, head_dim = read.heads()
    share = read.number("rotary_pct", 0.25, 1e-6, 1.0)
    given = {"partial_rotary_factor": share, "rope_theta": read.theta("rotary_emb_base")}
    rope = Reader({**given, **config}).rope(head_dim)
    bias = read.flag("attention_bias", True)
    layer = LayerSpec(
        Attention(heads, heads, head_dim, head_dim**-0.5, rope, None, bias, bias),
        FeedForward(read.count("intermediate_size"), read.activation("hidden_act", "gelu"),
                    False, True),
        "parallel" if read.flag("use_parallel_residual", True) else "pre",
    )  # fmt: skip
    return Spec(
        "gpt_neox", read.count("vocab_size"), read.count("hidden_size"), (layer,) * read.layers(),
        Norm("layer", read.epsilon("layer_norm_eps", 1e-5), bias=True), read.context(),
        tied=read.flag("tie_word_embeddings", False),
    )  # fmt: skip


def _opt(config: Config) -> Spec:
    read = Reader(config)
    heads, _, head_dim = read.heads()
    read.refuse("layer_norm_elementwise_affine", True)
    before, bias = read.flag("do_layer_norm_before", True), read.flag("enable_bias", True)
    embed = read.count("word_embed_proj_dim", read.count("hidden_size"))
    layer = LayerSpec(
        Attention(heads, heads, head_dim, head_dim**-0.5, bias=bias, out_bias=bias),
        FeedForward(read.count("ffn_dim"), read.activation("activation_function", "relu"),
                    False, bias),
        "pre" if before else "post",
    )  # fmt: skip
    return Spec(
        "opt", read.count("vocab_size"), read.count("hidden_size"), (layer,) * read.layers(),
        Norm("layer", 1e-5, bias=True), read.context(),
        tied=read.flag("tie_word_embeddings", True), learned_positions=read.context() + 2,
        position_offset=2, embed_dim=0 if embed == read.count("hidden_size") else embed,
        final_norm=before and not read.flag("_remove_final_layer_norm", False),
    )  # fmt: skip


# Names ------------------------------------------------------------------------------------------


def _named(**names: str) -> dict[str, Stored]:
    return {path.replace("__", "."): Stored(name) for path, name in names.items()}


def _fused(name: str, paths: tuple[str, ...], **how: Any) -> dict[str, Stored]:
    return {path: Stored(name, part, paths, **how) for part, path in enumerate(paths)}


QKV = ("attention.q", "attention.k", "attention.v")
_LAYER = "model.layers.{i}"

_OUTER = _named(stem__embedding="model.embed_tokens", tail__norm="model.norm", tail__head="lm_head")
_NORMS = _named(
    norm_attention_in=f"{_LAYER}.input_layernorm",
    norm_feed_forward_in=f"{_LAYER}.post_attention_layernorm",
)
_ATTENTION = _named(
    attention__q=f"{_LAYER}.self_attn.q_proj", attention__k=f"{_LAYER}.self_attn.k_proj",
    attention__v=f"{_LAYER}.self_attn.v_proj", attention__o=f"{_LAYER}.self_attn.o_proj",
    attention__q_norm=f"{_LAYER}.self_attn.q_norm", attention__k_norm=f"{_LAYER}.self_attn.k_norm",
)  # fmt: skip


def _mlp(path: str, name: str, parts: str = "gate_proj up_proj down_proj") -> dict[str, Stored]:
    named = zip(("gate", "up", "down"), parts.split(), strict=True)
    return {f"{path}.{part}": Stored(f"{name}.{stored}") for part, stored in named}


_LLAMA = {**_NORMS, **_ATTENTION, **_mlp("feed_forward", f"{_LAYER}.mlp")}
_EXPERTS = _mlp("feed_forward.expert{e}", f"{_LAYER}.mlp.experts.{{e}}")
_QWEN_MOE = {
    **_LLAMA, **_EXPERTS, **_mlp("feed_forward.shared", f"{_LAYER}.mlp.shared_expert"),
    **_named(feed_forward__router=f"{_LAYER}.mlp.gate",
             feed_forward__shared_gate=f"{_LAYER}.mlp.shared_expert_gate"),
}  # fmt: skip
_MIXTRAL = {
    **_NORMS, **_ATTENTION,
    **_mlp("feed_forward.expert{e}", f"{_LAYER}.block_sparse_moe.experts.{{e}}", "w1 w3 w2"),
    **_named(feed_forward__router=f"{_LAYER}.block_sparse_moe.gate"),
}  # fmt: skip
_GEMMA = {
    **_LLAMA,
    **_named(
        norm_attention_out=f"{_LAYER}.post_attention_layernorm",
        norm_feed_forward_in=f"{_LAYER}.pre_feedforward_layernorm",
        norm_feed_forward_out=f"{_LAYER}.post_feedforward_layernorm",
    ),
}
_PHI3 = {
    **_NORMS, **_named(attention__o=f"{_LAYER}.self_attn.o_proj"),
    **_fused(f"{_LAYER}.self_attn.qkv_proj", QKV),
    **_fused(f"{_LAYER}.mlp.gate_up_proj", ("feed_forward.gate", "feed_forward.up")),
    **_named(feed_forward__down=f"{_LAYER}.mlp.down_proj"),
}  # fmt: skip
_GPT2_OUTER = _named(
    stem__embedding="wte", stem__positions="wpe", tail__norm="ln_f", tail__head="lm_head"
)
_GPT2 = {
    **_named(norm_attention_in="h.{i}.ln_1", norm_feed_forward_in="h.{i}.ln_2"),
    **_fused("h.{i}.attn.c_attn", QKV, transposed=True),
    "attention.o": Stored("h.{i}.attn.c_proj", transposed=True),
    "feed_forward.up": Stored("h.{i}.mlp.c_fc", transposed=True),
    "feed_forward.down": Stored("h.{i}.mlp.c_proj", transposed=True),
}
_NEOX_LAYER = "gpt_neox.layers.{i}"
_NEOX_OUTER = _named(
    stem__embedding="gpt_neox.embed_in", tail__norm="gpt_neox.final_layer_norm",
    tail__head="embed_out",
)  # fmt: skip
_NEOX = {
    **_named(
        norm_attention_in=f"{_NEOX_LAYER}.input_layernorm",
        norm_feed_forward_in=f"{_NEOX_LAYER}.post_attention_layernorm",
        attention__o=f"{_NEOX_LAYER}.attention.dense",
        feed_forward__up=f"{_NEOX_LAYER}.mlp.dense_h_to_4h",
        feed_forward__down=f"{_NEOX_LAYER}.mlp.dense_4h_to_h",
    ),
    **_fused(f"{_NEOX_LAYER}.attention.query_key_value", QKV, by_head=True),
}
_OPT_LAYER = "model.decoder.layers.{i}"
_OPT_OUTER = _named(
    stem__embedding="model.decoder.embed_tokens", stem__positions="model.decoder.embed_positions",
    stem__project="model.decoder.project_in", tail__project="model.decoder.project_out",
    tail__norm="model.decoder.final_layer_norm", tail__head="lm_head",
)  # fmt: skip
_OPT = {
    **_named(
        attention__q=f"{_OPT_LAYER}.self_attn.q_proj", attention__k=f"{_OPT_LAYER}.self_attn.k_proj",
        attention__v=f"{_OPT_LAYER}.self_attn.v_proj", attention__o=f"{_OPT_LAYER}.self_attn.out_proj",
        feed_forward__up=f"{_OPT_LAYER}.fc1", feed_forward__down=f"{_OPT_LAYER}.fc2",
    ),
    "norm_attention_in": Stored(f"{_OPT_LAYER}.self_attn_layer_norm"),
    "norm_attention_out": Stored(f"{_OPT_LAYER}.self_attn_layer_norm"),
    "norm_feed_forward_in": Stored(f"{_OPT_LAYER}.final_layer_norm"),
    "norm_feed_forward_out": Stored(f"{_OPT_LAYER}.final_layer_norm"),
}  # fmt: skip

FAMILIES = (
    Family("LlamaForCausalLM", "llama", _llama, _OUTER, _LLAMA),
    Family("MistralForCausalLM", "mistral", _mistral, _OUTER, _LLAMA),
    Family("Qwen2ForCausalLM", "qwen2", _qwen2, _OUTER, _LLAMA),
    Family("Qwen3ForCausalLM", "qwen3", _qwen3, _OUTER, _LLAMA),
    Family("Gemma2ForCausalLM", "gemma2", _gemma2, _OUTER, _GEMMA),
    Family("Gemma3ForCausalLM", "gemma3_text", _gemma3, _OUTER, _GEMMA),
    Family("Phi3ForCausalLM", "phi3", _phi3, _OUTER, _PHI3),
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        _gpt2,
        _GPT2_OUTER,
        _GPT2,
        "transformer.",
        Sizes("n_layer", "n_embd", "n_head", None, width="n_inner", types=None),
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        _neox,
        _NEOX_OUTER,
        _NEOX,
        sizes=Sizes(kv_heads=None, types=None),
    ),
    Family(
        "OPTForCausalLM",
        "opt",
        _opt,
        _OPT_OUTER,
        _OPT,
        sizes=Sizes(kv_heads=None, width="ffn_dim", types=None),
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        _mixtral,
        _OUTER,
        _MIXTRAL,
        sizes=Sizes(routed="intermediate_size", types=None),
    ),
    Family("Qwen2MoeForCausalLM", "qwen2_moe", _qwen2_moe, _OUTER, _QWEN_MOE),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe, _OUTER, _QWEN_MOE),
)


def family_of(config: Config) -> Family:
    """The family of a config.json, by `architectures`, else by `model_type`."""
    names = config.get("architectures") or ()
    name = names[0] if isinstance(names, list) and names else None
    for family in FAMILIES:
        if name == family.architecture or (
            name is None and config.get("model_type") == family.model_type
        ):
            return family
    raise BadRequest(
        f"the architecture {shown(name or config.get('model_type'))} is not supported",
        do="supported: " + ", ".join(family.architecture for family in FAMILIES),
    )


def spec_of(config: Config) -> Spec:
    """The Spec of a config.json. Raises BadRequest for what is unknown or impossible."""
    return family_of(config).spec(config)
