"""OpenVINO GenAI: runs inside that peer's own environment, started by cpu_driver.py.

    python cpu_openvino.py prepare CHECKPOINT WORK [--group 128] [--asymmetric]
    python cpu_openvino.py serve WORK [--threads 2] [--precision f32]

The export is `optimum-cli export openvino --weight-format int4`, its own rounding to nearest: symmetric
4 bits in groups, embeddings and output matrix 8 bits, as it does by itself. A group that does not divide
a matrix' width becomes the next smaller one that does.

Serving is `LLMPipeline` with everything at its default on a CPU (paged attention, 8-bit cache) but the
number of threads, and no cache of prompts seen before. On a CPU with AMX that default computes in
bfloat16; `--precision f32` rounds activations to 8 bits instead, which was slower for prompts and faster
for decoding. One request makes N + 1 tokens: the first one's time is the prompt's, the others' is the
decoding's, by the pipeline's own clock.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

import cpu_serve


def prepare(checkpoint: Path, work: Path, asked: Namespace) -> None:
    import openvino_genai

    config = json.loads((checkpoint / "config.json").read_text())
    widths = (config["hidden_size"], config["intermediate_size"])
    group = asked.group
    while any(width % group for width in widths):
        group //= 2
    command = [Path(sys.prefix) / "bin" / "optimum-cli", "export", "openvino"]
    command += ["--model", checkpoint, "--task", "text-generation-with-past"]
    command += ["--weight-format", "int4", "--group-size", str(group)]
    command += [] if asked.asymmetric else ["--sym"]
    subprocess.run([*command, work], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    files = [work / "openvino_model.bin", work / "openvino_model.xml"]
    kind = "asymmetric" if asked.asymmetric else "symmetric"
    engine = f"OpenVINO GenAI {openvino_genai.__version__}"
    weights = f"int4 {kind}, groups of {group}; embeddings and output int8 per row"
    cpu_serve.note(checkpoint, work, engine, weights, files)


class OpenVino:
    def __init__(self, work: Path, threads: int, precision: str | None) -> None:
        import numpy as np
        import openvino
        import openvino_genai

        self.np, self.openvino = np, openvino
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = cpu_serve.CONTEXT  # a prompt goes through in one piece
        self.pipeline = openvino_genai.LLMPipeline(
            str(work),
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=threads,
            PERFORMANCE_HINT="LATENCY",
            **({"INFERENCE_PRECISION_HINT": precision} if precision else {}),
        )
        self.make_setting = openvino_genai.GenerationConfig
        self.vocabulary = json.loads((work / "config.json").read_text())["vocab_size"]

    def generate(self, ids: list[int], tokens: int) -> tuple[float, float]:
        """Seconds until the first token, seconds of the others."""
        setting = self.make_setting()
        setting.max_new_tokens = tokens
        setting.ignore_eos = True
        setting.do_sample = False
        inputs = self.openvino.Tensor(self.np.array([ids], self.np.int64))
        began = time.perf_counter()
        made = self.pipeline.generate(inputs, setting)
        whole = time.perf_counter() - began
        assert len(made.tokens[0]) == tokens, f"{len(made.tokens[0])} tokens, {tokens} were asked"
        first = made.perf_metrics.get_ttft().mean / 1000
        others = made.perf_metrics.get_generate_duration().mean / 1000 - first
        assert first + others <= whole
        return first, others

    def prompt(self, ids: list[int]) -> float:
        return self.generate(ids, 1)[0]

    def decode(self, ids: list[int], steps: int) -> float:
        return self.generate(ids, steps + 1)[1]


def load(work: Path, asked: Namespace) -> OpenVino:
    return OpenVino(work, asked.threads, asked.precision)


def more(parser: ArgumentParser) -> None:
    parser.add_argument("--group", type=int, default=128, help="prepare: weights per scale")
    parser.add_argument("--asymmetric", action="store_true", help="prepare: with zero points")
    parser.add_argument("--precision", help="serve: f32, bf16 or f16 between matrices")


if __name__ == "__main__":
    cpu_serve.command_line(__doc__, prepare, load, more)
