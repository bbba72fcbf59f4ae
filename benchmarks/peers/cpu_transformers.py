"""transformers in bfloat16, nothing quantized: what a model costs before anything is done to it.

    python cpu_transformers.py prepare CHECKPOINT WORK
    python cpu_transformers.py serve WORK [--threads 2]

Eager torch, its own attention kernel, a growing cache, logits of the last token only; the loop of
decoding is written out here, since `generate` adds its own work to every token.
"""

from __future__ import annotations

import time
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path

import cpu_serve


def prepare(checkpoint: Path, work: Path, asked: Namespace) -> None:
    work.mkdir(parents=True, exist_ok=True)
    link = work / "checkpoint"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint)
    engine = f"transformers {version('transformers')} (torch {version('torch')})"
    cpu_serve.note(checkpoint, work, engine, "bfloat16", [checkpoint / "model.safetensors"])


class Transformers:
    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        import transformers

        self.torch, self.new_cache = torch, transformers.DynamicCache
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, local_files_only=True
        ).eval()
        self.vocabulary = self.model.config.vocab_size

    def forward(self, ids, cache):
        """The likeliest next token, [1, 1]."""
        found = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1:].argmax(-1)

    def prompt(self, ids: list[int]) -> float:
        began = time.perf_counter()
        self.forward(self.torch.tensor([ids]), self.new_cache(config=self.model.config))
        return time.perf_counter() - began

    def decode(self, ids: list[int], steps: int) -> float:
        cache = self.new_cache(config=self.model.config)
        token = self.forward(self.torch.tensor([ids]), cache)
        began = time.perf_counter()
        for _ in range(steps):
            token = self.forward(token, cache)
        return time.perf_counter() - began


def load(work: Path, asked: Namespace) -> Transformers:
    return Transformers(work / "checkpoint", asked.threads)


if __name__ == "__main__":
    cpu_serve.command_line(__doc__, prepare, load)
