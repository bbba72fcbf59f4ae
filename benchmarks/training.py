"""What training gains, in orderings: a table of held-out perplexities on the small trained Llama.

    python benchmarks/training.py [--check] [--steps 180]

Model: stories260K; trained on the first 1.5 MB of TinyStories, read on the last 100 kB, both by documents
with BOS in front. Every pair of `ORDER` had the same text, batches, rate and number of steps:

    a smaller student learns more from its teacher than from the text alone
    pruning a little, recovering, and pruning again beats pruning at once and recovering as long
    2-bit and ternary weights that were trained while rounded beat the best rounding after training

`--check` ends with an error where an ordering does not hold. Results: results/training.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from onecard.calibrate.train import Training, training_ids
from onecard.checkpoint.load import load_model
from onecard.evaluate import Reading, evaluate
from onecard.nn.model import Model
from onecard.passes import GPTQ, QAT, Distil, Prune, Recover, RoundToLevels, RoundToNearest
from onecard.passes.base import Data, Pass, Recipe
from onecard.passes.distill import Targets, distil
from onecard.passes.student import inherit
from onecard.passes.walked import apply
from onecard.runtime.reference import TorchScorer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ONECARD_DATA", ROOT.parent / "shared" / "data"))
MODEL, TEXT = DATA / "stories260K", DATA / "tinystories" / "tinystories_sample_2MiB.txt"
END = "<|endoftext|>"
LEARNED, HELD_OUT = 1_500_000, 100_000
ORDER = (
    ("3 layers, distilled", "3 layers, next token"),
    ("3 layers, next token", "3 layers, untrained"),
    ("80 % pruned in 3 steps, recovered", "80 % pruned at once, recovered"),
    ("80 % pruned at once, distilled", "80 % pruned at once, recovered"),
    ("80 % pruned at once, recovered", "80 % pruned"),
    ("int2 QAT, learned scales", "int2 GPTQ"),
    ("int2 GPTQ", "int2 rounding"),
    ("ternary QAT", "ternary rounding"),
    ("ternary QAT", "int2 GPTQ"),
    ("binary QAT", "binary rounding"),
)  # fmt: skip


Maker = Callable[[torch.Tensor, Training], Model]


def student(targets: Targets | None) -> Maker:
    """Three of the five layers, taught."""

    def made(ids: torch.Tensor, training: Training) -> Model:
        teacher = load_model(MODEL)
        spec = replace(teacher.spec, layers=teacher.spec.layers[:3])
        model = inherit(teacher, spec)
        if targets is not None:
            settings = Distil(targets, training=training)
            distil(model, load_model(MODEL), ids, settings, Data(ids))
        return model

    return made


def compressed(passes: Callable[[Training], tuple[Pass, ...]]) -> Maker:
    def made(ids: torch.Tensor, training: Training) -> Model:
        model = load_model(MODEL)
        apply(model, Recipe("r", passes(training)), ids)
        return model

    return made


def gradual(training: Training) -> tuple[Pass, ...]:
    """60 %, 72 %, 80 % with a quarter, a quarter and half of the steps behind them."""
    quarter = replace(training, steps=training.steps // 4, decay=0.0)
    half = replace(training, steps=training.steps // 2)
    return (Prune(share=0.6), Recover(training=quarter),
            Prune(share=0.72), Recover(training=replace(quarter, warmup=0.0)),
            Prune(share=0.8), Recover(training=half))  # fmt: skip


def runs() -> dict[str, Maker]:
    """name -> what makes the model."""
    return {
        "dense": lambda ids, training: load_model(MODEL),
        "3 layers, untrained": student(None),
        "3 layers, next token": student(Targets(soft=0.0, hard=1.0)),
        "3 layers, distilled": student(Targets(soft=1.0, hard=0.0)),
        "3 layers, distilled, hidden states too": student(Targets(soft=1.0, hidden=1.0)),
        "80 % pruned": compressed(lambda t: (Prune(share=0.8),)),
        "80 % pruned at once, recovered": compressed(lambda t: (Prune(share=0.8), Recover(training=t))),
        "80 % pruned at once, recovered by rank 8": compressed(
            lambda t: (Prune(share=0.8), Recover("lora", training=replace(t, rate=2 * t.rate)))),
        "80 % pruned in 3 steps, recovered": compressed(gradual),
        "80 % pruned at once, distilled": compressed(lambda t: (Prune(share=0.8), Distil(training=t))),
        "int2 rounding": compressed(lambda t: (RoundToNearest(bits=2, group=None),)),
        "int2 GPTQ": compressed(lambda t: (GPTQ(bits=2, group=None),)),
        "int2 QAT, learned scales": compressed(lambda t: (QAT("lsq", bits=2, group=None, training=t),)),
        "ternary rounding": compressed(lambda t: (RoundToLevels("ternary", group=None),)),
        "ternary QAT": compressed(lambda t: (QAT("ternary", group=None, training=t),)),
        "binary rounding": compressed(lambda t: (RoundToLevels("binary", group=None),)),
        "binary QAT": compressed(lambda t: (QAT("binary", group=None, training=t),)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--only", default="", help="rows whose names contain this; others are kept")
    asked = parser.parse_args()
    words = TEXT.read_text(encoding="utf-8")
    training = Training(asked.steps, batch=4, length=256, rate=2e-3)
    with tempfile.TemporaryDirectory() as folder:
        learned = Path(folder) / "learned.txt"
        learned.write_text(words[:LEARNED], encoding="utf-8")
        dense = load_model(MODEL)
        ids = training_ids(dense.tokenizer, learned, training, dense.spec.vocab_size, END)
    print(
        f"{len(ids)} windows of 256 tokens, {training.steps} steps of {training.batch}", flush=True
    )
    path = ROOT / "results" / "training.json"
    kept = {"steps": training.steps, "batch": training.batch, "windows": len(ids)}
    rows: dict[str, float] = {}
    if asked.only and path.is_file():
        before = json.loads(path.read_text())
        rows = before["perplexity"] if {k: before[k] for k in kept} == kept else {}
    for name, made in runs().items():
        if asked.only not in name:
            continue
        began = time.perf_counter()
        model = made(ids, training)
        report = evaluate(TorchScorer(model), words[-HELD_OUT:], Reading(documents=END))
        rows[name] = round(float(report.value("perplexity") or 0), 4)
        print(f"{name:44} {rows[name]:10.3f}  {time.perf_counter() - began:6.1f} s", flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**kept, "perplexity": rows}, indent=1) + "\n")
    known = [pair for pair in ORDER if all(name in rows for name in pair)]
    wrong = [f"{less!r} ({rows[less]}) is not below {more!r} ({rows[more]})"
             for less, more in known if not rows[less] < rows[more]]  # fmt: skip
    if asked.check and wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
