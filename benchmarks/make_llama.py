"""A Llama checkpoint of a benchmark shape with random weights, for timing what does not depend on them.

    python benchmarks/make_llama.py OUT --shape 1.1b|135m [--layers 4] [--seed 0]

Writes the usual folder: config.json, model.safetensors in bfloat16, tokenizer.json. Matrices are normal with
deviation 0.02, norms are 1. Values are drawn, rounded and written a few million at a time, so that memory
stays under two hundred megabytes whatever the shape. A seed gives the same weights, byte for byte.

The tokenizer is a byte-level one trained on the docstrings of Python's standard library: any text goes
in, and its ids all lie below the model's vocabulary, most of which it leaves unused. It depends on the
Python that ran.

    model.safetensors = u64 length of the header | header, JSON, padded to 8 | tensors, back to back
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import struct
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
CHUNK = 1 << 22  # values drawn at once; part of what makes a seed's weights what they are
LEARNED = 8192  # tokens of the tokenizer


@dataclass(frozen=True)
class Shape:
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    width: int  # of the feed-forward
    vocabulary: int
    tied: bool
    context: int = 2048

    @property
    def kv(self) -> int:
        return self.hidden // self.num_heads * self.num_kv_heads


SHAPES = {
    "1.1b": Shape(2048, 22, 32, 4, 5632, 32000, tied=False),
    "135m": Shape(576, 30, 9, 3, 1536, 49152, tied=True),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, sizes) of every tensor in the order of the file; a matrix is [out, in]."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for i in range(shape.num_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (shape.hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (shape.hidden, shape.hidden)
        yield f"{layer}.self_attn.k_proj.weight", (shape.kv, shape.hidden)
        yield f"{layer}.self_attn.v_proj.weight", (shape.kv, shape.hidden)
        yield f"{layer}.self_attn.o_proj.weight", (shape.hidden, shape.hidden)
        yield f"{layer}.post_attention_layernorm.weight", (shape.hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (shape.width, shape.hidden)
        yield f"{layer}.mlp.up_proj.weight", (shape.width, shape.hidden)
        yield f"{layer}.mlp.down_proj.weight", (shape.hidden, shape.width)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def values(sizes: tuple[int, ...], seed: tuple[int, int]) -> Iterator[np.ndarray]:
    """One tensor as bfloat16, in pieces."""
    count = math.prod(sizes)
    draw = np.random.default_rng(seed)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        if len(sizes) == 1:
            yield bfloat16(np.ones(size, np.float32))
        else:
            yield bfloat16(draw.standard_normal(size, np.float32) * np.float32(0.02))


def write_weights(path: Path, shape: Shape, seed: int) -> int:
    """Writes the file and returns its bytes; it appears under its name only when complete."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in tensors(shape):
        start, end = end, end + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for index, (_, sizes) in enumerate(tensors(shape)):
            for piece in values(sizes, (seed, index)):
                file.write(piece)
    part.replace(path)
    return 8 + len(text) + end


def config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden // shape.num_heads,
        "intermediate_size": shape.width,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def docstrings() -> Iterator[str]:
    """Those of the standard library's own modules. The code is parsed, never run."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_text("utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                yield text


def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LEARNED,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(docstrings(), trainer)
    return made


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="so many, not the shape's own")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    shape = SHAPES[asked.shape]
    shape = replace(shape, num_layers=asked.layers or shape.num_layers)

    asked.out.mkdir(parents=True, exist_ok=True)
    made = tokenizer()
    assert made.get_vocab_size() <= shape.vocabulary
    made.save(str(asked.out / "tokenizer.json"))
    write_json(
        asked.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "model_max_length": shape.context,
        },
    )
    write_json(asked.out / "config.json", config(shape))
    size = write_weights(asked.out / "model.safetensors", shape, asked.seed)
    parameters = sum(math.prod(sizes) for _, sizes in tensors(shape))
    print(f"{asked.out}: {parameters / 1e6:.1f} M parameters, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
