"""llama.cpp's K-quants of one model for quality.py, in the environment that cpu_llamacpp.py builds.

    python quality_llamacpp.py MODEL IMPORTANCE.npz OUT --type Q4_K_M [--keep-table]

The model becomes GGUF in float32, llama-quantize makes the type with an importance matrix (the mean square
of every linear's inputs over the calibration tokens in the original model, which is what llama-imatrix
collects; it comes as an array per tensor, under GGUF's names), and the gguf package reads it back.
`--keep-table` leaves the embedding, which is the head as well, in bfloat16, as the other peers do; the type
by itself gives it 6 bits. Rows that are no multiple of 256 fall back to other types: "used" says which types
there are.
"""

from __future__ import annotations

import argparse
import collections
import json
import struct
import subprocess
import time
from pathlib import Path

import cpu_llamacpp
import dense
import gguf
import numpy as np
import peer


def write_gguf(model: Path, path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters", config)
    file = gguf.GGUFWriter(path, "llama")
    file.add_name(model.name)
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(config["num_attention_heads"])
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_dimension_count(config["head_dim"])
    file.add_rope_freq_base(rope["rope_theta"])
    file.add_vocab_size(config["vocab_size"])
    file.add_file_type(gguf.LlamaFileType.ALL_F32)
    file.add_tokenizer_model("llama")  # nothing is tokenized: dummies
    file.add_token_list([f"w{i}" for i in range(config["vocab_size"])])
    file.add_token_scores([-float(i) for i in range(config["vocab_size"])])
    file.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    for name, array in dense.read(model).items():
        file.add_tensor(cpu_llamacpp.renamed(name), paired(name, array, config, forth=True))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def paired(name: str, array: np.ndarray, config: dict[str, int], forth: bool) -> np.ndarray:
    """Rows of q and k in GGUF's order of rotary pairs, or back."""
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }.get(name.split(".")[-2])
    if heads is None:
        return array
    order = cpu_llamacpp.interleaved(np.arange(len(array)), heads)
    return array[order] if forth else array[np.argsort(order)]


def write_importance(arrays: dict[str, np.ndarray], path: Path) -> None:
    """llama.cpp's file of importances: per tensor its name, a number of calls, and the sums over them."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(arrays)))
        for name, values in arrays.items():
            spelled = name.encode()
            file.write(struct.pack("<i", len(spelled)) + spelled)
            file.write(struct.pack("<ii", 1, len(values)) + values.astype(np.float32).tobytes())


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("model", type=Path)
    words.add_argument("importance", type=Path)
    words.add_argument("out", type=Path)
    words.add_argument("--type", required=True)
    words.add_argument("--keep-table", action="store_true")
    asked = words.parse_args()
    source, made, importance = (
        asked.out.with_suffix(e) for e in (".f32.gguf", ".gguf", ".imatrix")
    )
    began = time.perf_counter()
    write_gguf(asked.model, source)
    write_importance(dict(np.load(asked.importance)), importance)
    loaded = time.perf_counter()
    command = [cpu_llamacpp.libraries("native") / "llama-quantize", "--imatrix", importance]
    if asked.keep_table:
        command += ["--token-embedding-type", "bf16", "--output-tensor-type", "bf16"]
    subprocess.run([*command, source, made, asked.type], check=True, stdout=subprocess.DEVNULL)
    solved = time.perf_counter()
    config = json.loads((asked.model / "config.json").read_text())
    tensors = {t.name: t for t in gguf.GGUFReader(made).tensors}

    def tensor(name: str) -> np.ndarray:
        held = tensors[cpu_llamacpp.renamed(name)]
        return paired(
            name, gguf.quants.dequantize(held.data, held.tensor_type), config, forth=False
        )

    dense.write(asked.model, asked.out, tensor)
    source.unlink()
    saved = time.perf_counter()
    kinds = collections.Counter(t.tensor_type.name for t in tensors.values())
    version = cpu_llamacpp.PACKAGE.partition("==")[2]
    used = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if kind != "F32")
    peer.say(f"llama.cpp of llama-cpp-python {version}", used, began, loaded, solved, saved,
             bytes=sum(int(t.n_bytes) for t in tensors.values()))  # fmt: skip


if __name__ == "__main__":
    main()
