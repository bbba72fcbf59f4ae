"""llama.cpp: runs inside that peer's own environment, started by cpu_driver.py.

    python cpu_llamacpp.py build
    python cpu_llamacpp.py prepare CHECKPOINT WORK [--pure]
    python cpu_llamacpp.py serve WORK [--threads 2] [--build native|noamx]

The source is the one inside llama-cpp-python's source package: that is how it comes from the package
index. `build` compiles it for this very machine (-march=native), with its own tools llama-bench and
llama-quantize, and installs the Python binding without a second build. On a machine with AMX there
are two sets of libraries, because llama.cpp takes its AMX kernels wherever they are compiled in,
whether or not its AVX-512 kernels are faster there: they differ in libggml-cpu.so alone.

The model becomes a GGUF file in bfloat16 (rows of q and k in llama.cpp's order of rotary halves, a
vocabulary of dummies), which llama.cpp itself quantizes: its preset Q4_0, 4 bits in blocks of 32 with a
float16 scale; the output matrix gets 6 or 8 bits there, and embeddings that serve as output likewise.
`--pure` makes everything Q4_0.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import cpu_serve
import numpy as np

PACKAGE = "llama-cpp-python==0.3.36"
PREFIX = Path(sys.prefix)
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=ON",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # libraries find those beside them, wherever they are copied
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


INFO, WARNING, ERROR = 2, 3, 4  # of ggml's log


def libraries(build: str) -> Path:
    return PREFIX / build / "bin"


# ---- build -------------------------------------------------------------------------------------


def build() -> None:
    pip = [sys.executable, "-m", "pip"]
    tools = os.environ | {"PATH": f"{PREFIX / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def run(command: list[str | Path], **more: str) -> None:
        subprocess.run([str(c) for c in command], check=True, env=tools | more)

    sources = PREFIX / "source"
    if not sources.exists():
        part = PREFIX / "source.part"
        shutil.rmtree(part, ignore_errors=True)
        run(
            [
                *pip,
                "download",
                "--quiet",
                "--no-deps",
                "--no-binary=llama-cpp-python",
                "-d",
                part,
                PACKAGE,
            ]
        )
        shutil.unpack_archive(next(part.glob("*.tar.gz")), part)
        mend(part)
        part.rename(sources)
    binding = next(path for path in sources.iterdir() if path.is_dir())
    engine = binding / "vendor" / "llama.cpp"
    launcher = os.environ.get("COMPILER_LAUNCHER")  # such as ccache
    options = [*OPTIONS]
    if launcher:
        options += [f"-DCMAKE_{x}_COMPILER_LAUNCHER={launcher}" for x in ("C", "CXX")]

    tree = PREFIX / "native"
    run(["cmake", "-S", engine, "-B", tree, "-G", "Ninja", *options])
    run(["ninja", "-C", tree, "llama", "llama-bench", "llama-quantize"])
    if "amx_int8" in Path("/proc/cpuinfo").read_text():
        part, whole = PREFIX / "noamx-cpu", PREFIX / "noamx"
        flags = [f"-DCMAKE_{x}_FLAGS={NO_AMX}" for x in ("C", "CXX")]
        run(["cmake", "-S", engine, "-B", part, "-G", "Ninja", *options, *flags])
        run(["ninja", "-C", part, "ggml-cpu"])
        shutil.rmtree(whole, ignore_errors=True)
        shutil.copytree(tree / "bin", whole / "bin", symlinks=True)
        for library in (part / "bin").glob("libggml-cpu.so*"):
            target = whole / "bin" / library.name
            target.unlink(missing_ok=True)
            shutil.copy2(library, target, follow_symlinks=False)
    run([*pip, "install", "--quiet", binding], CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF")


def mend(sources: Path) -> None:
    """gcc before 12.4 and 13.3 (PR 114098) thinks that ldtilecfg reads 8 of its 64 bytes, drops what fills
    the others, and the first AMX instruction ends the process."""
    path = next(sources.glob("*/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"))
    text = path.read_text()
    call = "_tile_loadconfig(&tc);"
    assert call in text
    path.write_text(text.replace(call, '__asm__ volatile("ldtilecfg %0" : : "m"(tc));'))


# ---- prepare -----------------------------------------------------------------------------------

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def renamed(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in NAMES:
        return f"{NAMES[name]}.weight"
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}.weight"


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head from halves (0 .. d/2, d/2 .. d) to pairs (0, d/2, 1, d/2 + 1, ..)."""
    shape = rows.shape
    pairs = rows.reshape(num_heads, 2, shape[0] // num_heads // 2, *shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(shape))


def write_gguf(checkpoint: Path, path: Path) -> None:
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    vocabulary = config["vocab_size"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_name(checkpoint.name)
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_dimension_count(config["head_dim"])
    file.add_rope_freq_base(config["rope_theta"])
    file.add_vocab_size(vocabulary)
    file.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    dummies = vocabulary - len(words)
    words += [f"w{i}" for i in range(dummies)]
    kinds += [gguf.TokenType.NORMAL] * dummies
    file.add_tokenizer_model("llama")
    file.add_token_list(words)
    file.add_token_scores([-float(i) for i in range(vocabulary)])
    file.add_token_types(kinds)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)

    entries, begin = cpu_serve.header(checkpoint)
    data = np.memmap(checkpoint / "model.safetensors", np.uint8, "r", offset=begin)
    for name, entry in entries.items():
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}, bfloat16 is expected"
        start, end = entry["data_offsets"]
        bits = data[start:end].view(np.uint16).reshape(entry["shape"])
        if ".q_proj." in name:
            bits = interleaved(bits, heads)
        if ".k_proj." in name:
            bits = interleaved(bits, kv_heads)
        if bits.ndim == 1:
            file.add_tensor(renamed(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            file.add_tensor(
                renamed(name), bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
            )
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def prepare(checkpoint: Path, work: Path, asked: Namespace) -> None:
    import gguf

    work.mkdir(parents=True, exist_ok=True)
    source, target = work / "bf16.gguf", work / "model.gguf"
    write_gguf(checkpoint, source)
    command = [libraries("native") / "llama-quantize", *(["--pure"] if asked.pure else [])]
    subprocess.run([*command, source, target, "Q4_0"], check=True, stdout=subprocess.DEVNULL)
    source.unlink()
    kinds: dict[str, list[str]] = {}
    for tensor in gguf.GGUFReader(target).tensors:
        kinds.setdefault(tensor.tensor_type.name, []).append(tensor.name)
    common = max(kinds, key=lambda kind: len(kinds[kind]) * (kind != "F32"))
    odd = [f"{n} {k}" for k, names in kinds.items() if k not in ("F32", common) for n in names]
    version = PACKAGE.partition("==")[2]
    note = ", ".join([common, *odd])
    cpu_serve.note(checkpoint, work, f"llama.cpp of llama-cpp-python {version}", note, [target])


# ---- serve -------------------------------------------------------------------------------------


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.c = c = llama_cpp
        c.llama_backend_init()
        self.quiet = c.llama_log_callback(  # kept, because C calls it as long as there is a model
            lambda level, text, _: level in (INFO, WARNING, ERROR) and sys.stderr.buffer.write(text)
        )
        c.llama_log_set(self.quiet, None)
        self.model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        setting = c.llama_context_default_params()
        setting.n_ctx = cpu_serve.CONTEXT
        setting.n_batch = setting.n_ubatch = 512
        setting.n_threads = setting.n_threads_batch = threads
        self.context = c.llama_init_from_model(self.model, setting)
        assert self.model and self.context, f"llama.cpp cannot load {path}"
        self.vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))

    def forward(self, ids: list[int]) -> np.ndarray:
        """Logits of the last token."""
        array = (self.c.llama_token * len(ids))(*ids)
        failed = self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(ids)))
        assert not failed
        last = self.c.llama_get_logits_ith(self.context, -1)  # waits until they are there
        return np.ctypeslib.as_array(last, (self.vocabulary,))

    def clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def prompt(self, ids: list[int]) -> float:
        self.clear()
        began = time.perf_counter()
        self.forward(ids)
        return time.perf_counter() - began

    def decode(self, ids: list[int], steps: int) -> float:
        self.clear()
        logits = self.forward(ids)
        began = time.perf_counter()
        for _ in range(steps):
            logits = self.forward([int(logits.argmax())])
        return time.perf_counter() - began


def load(work: Path, asked: Namespace) -> LlamaCpp:
    os.environ["LLAMA_CPP_LIB_PATH"] = str(libraries(asked.build))
    return LlamaCpp(work / "model.gguf", asked.threads)


def more(parser: ArgumentParser) -> None:
    parser.add_argument("--pure", action="store_true", help="prepare: everything Q4_0")
    parser.add_argument("--build", default="native", choices=("native", "noamx"))


if __name__ == "__main__":
    if sys.argv[1:] == ["build"]:
        build()
    else:
        cpu_serve.command_line(__doc__, prepare, load, more)
