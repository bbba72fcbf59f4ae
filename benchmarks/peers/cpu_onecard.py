"""onecard itself, rounded to 4 bits in groups as large as llama.cpp's.

    python cpu_onecard.py prepare CHECKPOINT WORK [--group 32]
    python cpu_onecard.py serve WORK [--threads 2]

Serving is `onecard bench WORK/model --serve`. The bits per weight are those of what the engine reads: the
laid out weights (head in int8) and the embedding, of which a token reads a row, in the checkpoint's dtype.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import cpu_serve

from onecard import __version__
from onecard.bench import Case, Timed
from onecard.runtime.cpu import CpuSettings


def prepare(checkpoint: Path, work: Path, asked: Namespace) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    recipe = work / "recipe.yaml"
    recipe.write_text(f"passes: [{{rtn: {{bits: 4, group: {asked.group}}}}}]\n")
    words = ["compress", checkpoint, work / "model", "--recipe", recipe, "--no-prove"]
    subprocess.run([sys.executable, "-m", "onecard", *map(str, words)], check=True)
    weights = Timed(str(work / "model")).stepper.weights
    size = weights.nbytes
    text = f"int4 in groups of {asked.group}, head int8, embedding {weights.embedding_dtype}"
    cpu_serve.note(checkpoint, work, f"onecard {__version__}", text, [], size)


class Onecard:
    def __init__(self, folder: Path, threads: int) -> None:
        self.timed = Timed(str(folder), CpuSettings(threads=threads, context=cpu_serve.CONTEXT))
        self.vocabulary = self.timed.stepper.vocab_size

    def prompt(self, ids: list[int]) -> float:
        return self.timed.measure(Case("prompt", len(ids), 1))

    def decode(self, ids: list[int], steps: int) -> float:
        return self.timed.measure(Case("decode", steps, 1))


def load(work: Path, asked: Namespace) -> Onecard:
    return Onecard(work / "model", asked.threads)


def more(parser: ArgumentParser) -> None:
    parser.add_argument("--group", type=int, default=32)


if __name__ == "__main__":
    cpu_serve.command_line(__doc__ or "", prepare, load, more)
