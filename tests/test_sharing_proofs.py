"""Slow proofs (make proofs): sharing and factorizing on trained models, in the order the papers promise.

Rows go to results/sharing-MODEL.json: divergence from the original on held-out text, bytes of the linears.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT

from onecard.calibrate.data import Calibration, calibration_ids
from onecard.checkpoint.load import load_model
from onecard.checkpoint.text import read_text
from onecard.core.report import Report, Row, environment
from onecard.evaluate import evaluate
from onecard.passes import GPTQ, Cluster, Factorize, LowRankPlus, RoundToNearest
from onecard.passes.base import BlockPass, Recipe
from onecard.passes.walked import apply
from onecard.runtime.reference import TorchScorer
from onecard.windows import Reading

pytestmark = pytest.mark.slow

PASSES: dict[str, BlockPass] = {
    "int3 rounding": RoundToNearest(3),
    "int3 rounding, groups of 32": RoundToNearest(3, 32),
    "3-bit k-means, no data": Cluster(3, per="row", weigh=False, compensate=False),
    "3-bit k-means, weighted": Cluster(3, per="row", compensate=False, rounds=0),
    "3-bit k-means, errors made good": Cluster(3, per="row", rounds=0),
    "3-bit k-means, tables fitted": Cluster(3, per="row"),
    "int3 GPTQ": GPTQ(3),
    "int3 GPTQ, groups of 32": GPTQ(3, 32),
    "int3 GPTQ + rank 8": LowRankPlus(8, bits=3),
    "low rank 75 %, plain": Factorize("plain", share=0.75),
    "low rank 75 %, activation": Factorize("activation", share=0.75),
    "low rank 75 %, whitened": Factorize("whitened", share=0.75),
}
RISING = (
    ("3-bit k-means, tables fitted", "3-bit k-means, weighted"),
    ("3-bit k-means, errors made good", "3-bit k-means, weighted"),
    ("3-bit k-means, weighted", "3-bit k-means, no data"),
    ("3-bit k-means, no data", "int3 rounding"),
    ("int3 GPTQ + rank 8", "int3 GPTQ"),
    ("low rank 75 %, whitened", "low rank 75 %, activation"),
    ("low rank 75 %, activation", "low rank 75 %, plain"),
)
"""Pairs: the first is nearer to the original."""


@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_the_order(name: str, data: Path) -> None:
    model: str | Path = name if name == "demo" else data / name
    text = None if name == "demo" else data / "tinystories" / "tinystories_sample_2MiB.txt"
    held_out = read_text(text, "held_out.txt")
    reading = Reading(documents="<|endoftext|>", limit=16)
    dense = load_model(model, "fp32")
    settings = Calibration(32, 128)
    if text is not None:  # what is scored is not learned from
        held_out, learned = held_out[:60_000], held_out[60_000:]
        ids = torch.tensor(dense.tokenizer.encode(learned)[: 32 * 128]).view(32, 128)
    else:
        ids = calibration_ids(dense.tokenizer, None, settings, dense.spec.vocab_size)
    reference = TorchScorer(dense)
    rows, found = [], {}
    for label, p in PASSES.items():
        if name != "demo" and "groups of 32" in label:  # they do not divide its rows of 172
            continue
        made = load_model(model, "fp32")
        apply(made, Recipe(label, (p,)), ids if p.needs else None)
        report = evaluate(TorchScorer(made), held_out, reading, reference)
        found[label] = float(report.value("kl"))  # type: ignore[arg-type]
        size = sum(linear.format.bytes(linear.shape) for _, linear in made.linears())
        count = sum(linear.shape[0] * linear.shape[1] for _, linear in made.linears())
        rows += [Row.of(label, "kl", found[label]), Row(label, "bits_of_linears", 8 * size / count, "bit"),
                 Row.of(label, "perplexity", report.value("perplexity"))]  # fmt: skip
        print(f"{name:12} {label:34} {found[label]:8.4f} nat {8 * size / count:6.2f} bit")
    kept = Report(tuple(rows), environment(model=name, samples=32, length=128), f"sharing: {name}")
    (ROOT / "results" / f"sharing-{name}.json").write_text(kept.to_json() + "\n")
    for better, worse in RISING:
        assert found[better] < found[worse], (better, worse, found)
