"""The native engine against the torch network: every family, whole prompts, chunks and single tokens.

With stored weights and float32 inputs the engine differs from the network in two ways alone: the cache
holds keys and values in fp16, and sums have another order. So there are two bounds: against a network
whose keys and values are rounded to fp16 too (float32 noise), and against the plain one (what fp16
costs). With default settings inputs and the head are rounded to int8 as well; then the oracle is a
network that rounds the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from test_families import CASES, random_model

from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.core.format import Integers
from onecard.core.spec import Rope
from onecard.kernels import cpu, layout, reference, rope, structs
from onecard.nn.graph import groups, surgery
from onecard.nn.layers import Linear
from onecard.nn.transformer import Cache, Transformer
from onecard.passes.activations import Activations
from onecard.passes.base import Recipe
from onecard.passes.cut import cut_model
from onecard.passes.job import Settings, compress, prepare
from onecard.passes.quantize import RoundToNearest
from onecard.passes.walked import apply
from onecard.runtime.cpu import PAGE, CpuSettings, CpuStepper
from onecard.runtime.pages import CACHES, position_bytes
from onecard.runtime.steps import Feed
from onecard.runtime.weights import HEAD_BLOCK

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")

EXACT = CpuSettings(threads=2, rows=64, cache="fp16", head="stored", exact=("all",))
EXACT_CACHE = CpuSettings(threads=2, rows=64, cache="fp16")
NOISE = 2e-4
"""Of float32 sums in another order, relative to the largest logit. A key or value on the edge between two
fp16 numbers may take the other one (measured: up to 1e-4), so the median has a bound of its own."""
MEDIAN = 1e-5
FP16 = 2e-3
"""Of fp16 keys and values, relative to the largest logit (measured: up to 6e-4)."""
GO = np.zeros(1, np.int32)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def scattered(stepper: CpuStepper, positions: int, first: int = 0) -> np.ndarray:
    """A page table that is neither ordered nor dense."""
    count = -(-positions // PAGE)
    order = np.random.default_rng(stepper.pages).permutation(stepper.pages)
    return np.ascontiguousarray(order[first : first + count], np.int32)


def fed_logits(stepper: CpuStepper, ids: Sequence[int], pieces: Sequence[int]) -> np.ndarray:
    """Logits of all positions, the ids fed in pieces of these lengths."""
    assert sum(pieces) == len(ids)
    table, past, rows = scattered(stepper, len(ids)), 0, []
    for length in pieces:
        new = np.array(ids[past : past + length], np.int32)
        (fed,) = stepper.step([Feed(new, past, table, "all")], 1, GO)
        assert fed.status == "ok" and fed.logits is not None
        rows.append(fed.logits)
        past += length
    return np.concatenate(rows)


def network_logits(network: Transformer, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return network(torch.tensor([ids]))[0].float().numpy()


def with_fp16_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the network attends to keys and values that were rounded to fp16."""
    plain = reference.attend
    monkeypatch.setattr(
        reference,
        "attend",
        lambda q, k, v, *more: plain(q, k.half().float(), v.half().float(), *more),
    )


def some_ids(count: int, vocab: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


def distance(mine: np.ndarray, theirs: np.ndarray, of=np.max) -> float:
    """The largest difference (or another one), relative to the largest logit."""
    assert mine.shape == theirs.shape and np.isfinite(mine).all()
    return float(of(np.abs(mine - theirs)) / np.abs(theirs).max())


def close(mine: np.ndarray, theirs: np.ndarray) -> bool:
    return distance(mine, theirs) < NOISE and distance(mine, theirs, np.median) < MEDIAN


def length_of(case: str) -> int:
    """Positions that are fed: past a window and a page where the context has room."""
    return 8 if case == "llama-dynamic" else 45


# Exact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_network(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(case).save_pretrained(tmp_path)
    stepper = CpuStepper(tmp_path, EXACT)
    network = load_model(tmp_path, "fp32", tokenizer=False).network
    count = length_of(case)
    ids = some_ids(count, stepper.vocab_size)
    whole = fed_logits(stepper, ids, [count])
    for pieces in (
        [1] * count,
        [count // 2 + 1, 1, 1, count - count // 2 - 3],
        [3] + [1] * (count - 3),
    ):
        np.testing.assert_array_equal(fed_logits(stepper, ids, pieces), whole, str(pieces))
    assert distance(whole, network_logits(network, ids)) < FP16
    with_fp16_cache(monkeypatch)
    assert close(whole, network_logits(network, ids))
    stepper.close()


@pytest.mark.parametrize(
    "case", ["llama", "mistral", "gemma2", "neox", "qwen2-moe-mixed", "opt-post"]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_folders(
    case: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are widened without loss; norms and biases too."""
    random_model(case).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    stepper = CpuStepper(tmp_path, EXACT)
    network = load_model(tmp_path, "fp32", tokenizer=False).network
    ids = some_ids(20, stepper.vocab_size)
    with_fp16_cache(monkeypatch)
    assert close(fed_logits(stepper, ids, [11, 1, 8]), network_logits(network, ids))


def test_short_longrope_context_has_short_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine fixes the frequencies by its own context; a network of 8 positions has the short ones."""
    random_model("phi3-long").save_pretrained(tmp_path)
    short = CpuStepper(tmp_path, CpuSettings(2, 8, 64, "fp16", head="stored", exact=("all",)))
    network = load_model(tmp_path, "fp32", tokenizer=False).network
    ids = some_ids(8, short.vocab_size)
    with_fp16_cache(monkeypatch)
    assert close(fed_logits(short, ids, [8]), network_logits(network, ids))
    long = CpuStepper(tmp_path, EXACT)
    assert distance(fed_logits(long, ids, [8]), network_logits(network, ids)) > 1e-3


def test_head_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No family of ours has one; the struct does."""
    random_model("llama").save_pretrained(tmp_path)
    plain = CpuStepper(tmp_path, EXACT)
    ids = some_ids(12, plain.vocab_size)
    bias = np.random.default_rng(0).standard_normal(plain.vocab_size).astype(np.float32)
    described = CpuStepper._described

    def biased(stepper: CpuStepper) -> structs.Model:
        model = described(stepper)
        model.head.bias = bias.ctypes.data
        return model

    monkeypatch.setattr(CpuStepper, "_described", biased)
    found = fed_logits(CpuStepper(tmp_path, EXACT), ids, [7, 5])
    np.testing.assert_array_equal(found, fed_logits(plain, ids, [12]) + bias)


@pytest.mark.parametrize(
    "case", ["llama", "gemma2", "gpt2", "neox", "opt-post", "phi3", "qwen2-moe"]
)
def test_layers_that_differ(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other heads, key/value heads and neurons in every layer: cut, saved, run by the engine."""
    random_model(case).save_pretrained(tmp_path / "whole")
    model = load_model(tmp_path / "whole", "fp32", tokenizer=False)
    for kind in ("kv_group", "neuron"):
        kept = [
            {group.name: torch.arange(max(1, group.count - 1 - i)) for group in groups(layer, kind)}
            for i, layer in enumerate(model.spec.layers)
        ]
        model = cut_model(model, surgery(model.spec, range(len(kept)), kept, kind))
    assert len(set(model.spec.layers)) == len(model.spec.layers)
    stepper = CpuStepper(save_model(model, tmp_path / "cut"), EXACT)
    ids = some_ids(20, stepper.vocab_size)
    whole = fed_logits(stepper, ids, [20])
    assert distance(whole, network_logits(model.network, ids)) < FP16
    np.testing.assert_array_equal(fed_logits(stepper, ids, [1] * 20), whole)
    stepper.close()


@pytest.mark.parametrize(
    "cache, bound", [("fp16", 2e-3), ("bf16", 1.5e-2), ("int8", 4e-2), ("fp8", 0.2), ("int4", 0.4)]
)
def test_what_the_cache_costs(cache: str, bound: float, tmp_path: Path) -> None:
    for case in ("llama", "gemma2", "mistral"):
        random_model(case).save_pretrained(tmp_path / case)
        network = load_model(tmp_path / case, "fp32", tokenizer=False).network
        stepper = CpuStepper(
            tmp_path / case, CpuSettings(2, None, 64, cache, head="stored", exact=("all",))
        )
        ids = some_ids(45, stepper.vocab_size)
        found = fed_logits(stepper, ids, [30, 1, 14])
        cost = distance(found, network_logits(network, ids))
        assert 0 < cost < bound
        held = Cache(network.spec, 1, 45, torch.float32, held=cache)
        with torch.no_grad():
            simulated = network(torch.tensor([ids]), cache=held)[0].numpy()
        assert distance(found, simulated, np.median) < 0.1 * distance(
            found, network_logits(network, ids), np.median
        )


@pytest.mark.parametrize("cache", CACHES)
def test_a_position_takes_the_bytes_that_are_told(cache: str, tmp_path: Path) -> None:
    for case in ("llama", "gemma2", "phi3"):
        random_model(case).save_pretrained(tmp_path / case)
        held, pages = [], (1, 3)
        for count in pages:
            context = count * PAGE
            stepper = CpuStepper(tmp_path / case, CpuSettings(1, context, 32, cache))
            own = [
                position_bytes(layer.attention.num_kv_heads, layer.attention.head_dim, cache)
                * context
                for layer in stepper.spec.layers
            ]
            held.append(stepper.nbytes - sum(-(-size // 4096) * 4096 for size in own))
            assert stepper.pages == count
        assert held[0] == held[1], case


def test_every_case_in_every_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One family of each kind, whatever the processor had: all come as near."""
    with_fp16_cache(monkeypatch)
    for case in ("gemma3", "opt-post", "qwen2-moe-mixed", "neox"):
        random_model(case).save_pretrained(tmp_path / case)
        network = load_model(tmp_path / case, "fp32", tokenizer=False).network
        ids = some_ids(40, 101)
        theirs = network_logits(network, ids)
        for isa in cpu.isas():
            cpu.force_isa(isa)
            try:
                stepper = CpuStepper(tmp_path / case, EXACT)
            finally:
                cpu.force_isa(None)
            mine = fed_logits(stepper, ids, [33, 1, 6])
            assert close(mine, theirs), (case, isa)
            stepper.close()


# Rounded inputs -------------------------------------------------------------------------------------


def rounded(x: torch.Tensor, block: int) -> torch.Tensor:
    """Inputs as the engine rounds them: int8 in blocks, scale = max / 127."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    top = blocks.abs().amax(-1, keepdim=True)
    codes = torch.where(top > 0, (blocks * (127.0 / top)).round(), 0)
    return (codes * (top / 127.0)).flatten(-2)[..., : x.shape[-1]]


def round_inputs(network: Transformer) -> None:
    """From now on the network rounds what the engine does with default settings."""
    for name, module in network.named_modules():
        if not isinstance(module, Linear):
            continue
        if name == "tail.head" and module.format.dense:
            pieces = [
                reference.to_dense(reference.round_to_nearest(piece, Integers(8, None)))
                for piece in module.matrix().split(HEAD_BLOCK, 1)
            ]
            module.replace(reference.from_dense(torch.cat(pieces, 1)))
            block = HEAD_BLOCK
        elif module.format.dense or module.inputs is not None:
            continue
        else:
            block = layout.integers(module.shape, module.format).block
        module.register_forward_pre_hook(lambda _, given, block=block: (rounded(given[0], block),))


def packed_folder(model: Path, out: Path, bits: int, group: int | None, zero: bool) -> Path:
    passes = (RoundToNearest(bits, group, zero_point=zero),)
    compress(prepare(model, out, Recipe("r", passes), Settings()))
    return out


def check_rounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short prompts against a network that rounds alike. A number on the edge between two codes may take
    the other one, and changes all that follows; so most prompts must agree to the noise of float32, all of
    them about, and those of dense models with a network that does not round at all."""
    stepper = CpuStepper(folder, CpuSettings(threads=2, rows=64, cache="fp16"))
    network = load_model(folder, "fp32", tokenizer=False).network
    prompts = [some_ids(4, stepper.vocab_size, seed) for seed in range(15)]
    mine = [fed_logits(stepper, ids, [4]) for ids in prompts]
    for ids, whole in zip(prompts, mine, strict=True):
        np.testing.assert_array_equal(fed_logits(stepper, ids, [1, 2, 1]), whole)
    plain = [network_logits(network, ids) for ids in prompts]
    round_inputs(network)
    with monkeypatch.context() as patch:
        with_fp16_cache(patch)
        twin = [network_logits(network, ids) for ids in prompts]
    apart = np.array([distance(a, b) for a, b in zip(mine, twin, strict=True)])
    assert np.median(apart) < 1e-5 and apart.max() < TWIN
    if not any(layer.feed_forward.experts for layer in network.spec.layers):  # chosen by a hair
        assert max(distance(a, b) for a, b in zip(mine, plain, strict=True)) < PLAIN


TWIN = 6e-2
PLAIN = 6e-2


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt2", "mixtral", "qwen2-moe", "opt-post"])
@pytest.mark.parametrize("bits, zero", [(8, False), (4, False), (4, True), (3, True), (2, True)])
def test_rounded_inputs_per_channel(
    case: str, bits: int, zero: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(case).save_pretrained(tmp_path / "model")
    check_rounded(
        packed_folder(tmp_path / "model", tmp_path / "out", bits, None, zero), monkeypatch
    )


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits, zero", [(8, True), (4, False), (3, False), (2, True)])
def test_rounded_inputs_in_groups(
    tiny: Path, group: int, bits: int, zero: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rounded(packed_folder(tiny, tmp_path / "out", bits, group, zero), monkeypatch)


@pytest.mark.parametrize("inputs", ["int8-token", "int8-static"])
@pytest.mark.parametrize("case", ["llama", "gpt2", "phi3", "qwen2-moe"])
def test_inputs_are_rounded_as_a_folder_says(
    case: str, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model(case).save_pretrained(tmp_path / "model")
    for number, weights in enumerate((RoundToNearest(8, None), RoundToNearest(4))):
        model = load_model(tmp_path / "model", tokenizer=False)
        ids = torch.tensor([some_ids(64 if number else 40, 100, seed) for seed in range(4)])
        apply(model, Recipe("r", (weights, Activations(inputs))), ids[:, : model.spec.max_context])
        check_rounded(save_model(model, tmp_path / str(number)), monkeypatch)


def test_linears_of_one_input_that_round_it_differently(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny, tokenizer=False)
    apply(model, Recipe("r", (RoundToNearest(8, None), Activations())), None)
    model.network.blocks[1].linear("attention.k").round(None)  # type: ignore[operator]
    out = save_model(model, tmp_path / "out")
    with pytest.raises(BadRequest, match=r"blocks\.1.*each in its own way"):
        CpuStepper(out, EXACT_CACHE)
    CpuStepper(out, EXACT).close()


def test_exact_names_linears(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each linear that stays exact brings the logits nearer to the plain network's."""
    folder = packed_folder(tiny, tmp_path / "out", 4, 128, False)
    network = load_model(folder, "fp32", tokenizer=False).network
    ids = some_ids(40, 300)
    with_fp16_cache(monkeypatch)
    plain = network_logits(network, ids)
    found = [
        distance(
            fed_logits(
                CpuStepper(folder, CpuSettings(2, None, 64, "fp16", head="stored", exact=e)),
                ids,
                [40],
            ),
            plain,
        )
        for e in ((), ("down",), ("down", "attention.o", "up", "gate"), ("all",))
    ]
    assert found[0] > found[2] > found[3] and found[3] < 1e-3 and found[1] != found[0]


# Frequencies ----------------------------------------------------------------------------------------


ROPES = {
    "default": Rope(16),
    "big theta": Rope(128, 1e6),
    "linear": Rope(64, 1e4, "linear", (("factor", 3.0),)),
    "dynamic": Rope(32, 1e4, "dynamic", (("factor", 2.0),)),
    "llama3": Rope(128, 5e5, "llama3", (
        ("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0)), 8192),
    "llama3 small": Rope(16, 5e5, "llama3", (
        ("factor", 32.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0)), 16),
    "yarn": Rope(64, 1e4, "yarn", (("factor", 4.0),), 4096),
    "yarn odd": Rope(10, 1e4, "yarn", (("factor", 4.0),), 16),
    "yarn whole": Rope(128, 1e6, "yarn", (
        ("factor", 40.0), ("beta_fast", 32), ("beta_slow", 1), ("mscale", 1.0), ("mscale_all_dim", 0.7),
        ("truncate", False)), 4096),
    "yarn scaled": Rope(64, 1e4, "yarn", (("factor", 4.0), ("attention_factor", 0.8)), 4096),
    "yarn of one": Rope(64, 1e4, "yarn", (("factor", 1.0),), 4096),
    "longrope": Rope(8, 1e4, "longrope", (
        ("short_factor", [1.0, 1.1, 1.2, 1.3]), ("long_factor", [2.0, 2.5, 3.0, 4.0])), 64),
    "longrope scaled": Rope(8, 1e4, "longrope", (
        ("short_factor", [1.0, 1.1, 1.2, 1.3]), ("long_factor", [2.0, 2.5, 3.0, 4.0]),
        ("factor", 16.0), ("attention_factor", 1.2)), 64),
    "longrope of one": Rope(8, 1e4, "longrope", (
        ("short_factor", [1.0, 1.1, 1.2, 1.3]), ("long_factor", [2.0, 2.5, 3.0, 4.0]), ("factor", 1.0)), 64),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("length", [1, 64, 65, 4096, 131072])
@pytest.mark.parametrize("context", [128, 4096])
def test_frequencies_are_the_references(kind: str, length: int, context: int) -> None:
    """To an ulp or two: NumPy's power is not torch's."""
    theirs, their_scale = reference.rope_frequencies(ROPES[kind], length, context)
    mine, scale = rope.frequencies(ROPES[kind], length, context)
    assert mine.dtype == np.float32 and mine.flags.c_contiguous
    np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-6)
    assert scale == pytest.approx(their_scale, rel=1e-12)


def test_frequencies_of_the_families(tmp_path: Path) -> None:
    """What configs of every family become: all kinds are among them."""
    seen = set()
    for case in CASES:
        random_model(case).save_pretrained(tmp_path / case)
        spec = Source(tmp_path / case).spec
        for layer in spec.layers:
            row = layer.attention.rope
            if row is None:
                continue
            seen.add(row.kind)
            mine, scale = rope.frequencies(row, spec.max_context, spec.max_context)
            theirs, their_scale = reference.rope_frequencies(
                row, spec.max_context, spec.max_context
            )
            np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-6)
            assert scale == pytest.approx(their_scale)
    assert seen == {"default", "linear", "dynamic", "llama3", "yarn", "longrope"}


def test_unknown_frequencies_are_an_error() -> None:
    with pytest.raises(ValueError, match="spiral"):
        rope.frequencies(Rope(8, 1e4, "spiral"), 8, 8)
