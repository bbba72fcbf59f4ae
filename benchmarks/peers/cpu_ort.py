"""ONNX Runtime GenAI: runs inside that peer's own environment, started by cpu_driver.py.

    python cpu_ort.py prepare CHECKPOINT WORK [--block 32]
    python cpu_ort.py serve WORK [--threads 2]

The export is the package's own model builder for int4 on a CPU: symmetric 4 bits in blocks of 32, the
output matrix included, embeddings left as they are unless they serve as output, activations rounded to 8 bits
(accuracy level 4). Serving is the `Generator`, which has a forward pass in `append_tokens` and one in
every `generate_next_token` after the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from importlib.metadata import version
from pathlib import Path

import cpu_serve


def prepare(checkpoint: Path, work: Path, asked: Namespace) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    command += ["-i", str(checkpoint), "-o", str(work), "-c", str(work / "cache")]
    command += ["--extra_options", f"block_size={asked.block}", "accuracy_level=4"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    files = sorted(work.glob("*.onnx*"))
    engine = f"ONNX Runtime GenAI {version('onnxruntime-genai')} (runtime {version('onnxruntime')})"
    weights = f"int4 symmetric, blocks of {asked.block}, accuracy level 4"
    cpu_serve.note(checkpoint, work, engine, weights, files)


class OnnxRuntime:
    def __init__(self, work: Path, threads: int) -> None:
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        setting = onnxruntime_genai.Config(str(work))
        setting.overlay(
            json.dumps(
                {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            )
        )
        self.model = onnxruntime_genai.Model(setting)
        whole = json.loads((work / "genai_config.json").read_text())
        self.vocabulary = whole["model"]["vocab_size"]

    def generator(self, tokens: int):
        setting = self.genai.GeneratorParams(self.model)
        # As short as it is long: no end token.
        setting.set_search_options(do_sample=False, max_length=tokens, min_length=tokens)
        return self.genai.Generator(self.model, setting)

    def prompt(self, ids: list[int]) -> float:
        generator = self.generator(len(ids) + 1)
        began = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()  # takes the likeliest; its logits are there
        return time.perf_counter() - began

    def decode(self, ids: list[int], steps: int) -> float:
        generator = self.generator(len(ids) + steps + 1)
        generator.append_tokens(ids)
        generator.generate_next_token()
        began = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
        seconds = time.perf_counter() - began
        assert len(generator.get_sequence(0)) == len(ids) + steps + 1
        return seconds


def load(work: Path, asked: Namespace) -> OnnxRuntime:
    return OnnxRuntime(work, asked.threads)


def more(parser: ArgumentParser) -> None:
    parser.add_argument("--block", type=int, default=32, help="prepare: weights per scale")


if __name__ == "__main__":
    cpu_serve.command_line(__doc__, prepare, load, more)
