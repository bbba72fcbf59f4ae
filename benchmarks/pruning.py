"""What pruning costs, by score: perplexity on text that was not seen, kept in results/pruning.json.

    python benchmarks/pruning.py [--stories FOLDER TEXT] [--check]

The shipped model on the shipped texts, and, where its folder and a text of its kind are given, the
stories260K model: dense, then half of the weights, or 2 of every 4, out by each score. Then, on the same
model, 80 % by magnitude: at once and recovered, and in three rounds with as many steps of recovery in all.

`--check` ends with 1 where dense < SparseGPT < Wanda, magnitude < random does not hold, on stories260K
Wanda < magnitude, or iterative < one shot. On the shipped model, which has no outliers, magnitude is ahead
of Wanda (LOG.md).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onecard.calibrate.latent import trainable
from onecard.calibrate.train import Training, train
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.load import load_model
from onecard.checkpoint.text import read_text
from onecard.nn.model import Model
from onecard.passes import Prune, SparseGPT
from onecard.passes.base import Recipe
from onecard.passes.walked import apply

OUT = Path(__file__).parent.parent / "results" / "pruning.json"
LENGTH, SEEN, HELD = 256, 32, 16
"""Tokens of a window; windows that are calibrated on, and read for the perplexity."""
ROUNDS, STEPS = (0.5, 0.7, 0.8), 160
"""Shares in turn, and steps of recovery in all: half of them behind the last, where the rate falls."""


def windows(model: Model, text: str, count: int) -> Tensor:
    ids = model.tokenizer.encode(text)[: count * LENGTH]
    return torch.tensor(ids).view(-1, LENGTH)


def perplexity(model: Model, ids: Tensor) -> float:
    nats = 0.0
    with torch.no_grad():
        for row in ids.split(1):
            logits = model.network(row)[:, :-1].flatten(0, 1).float()
            nats += float(F.cross_entropy(logits, row[:, 1:].flatten()))
    return round(float(torch.tensor(nats / len(ids)).exp()), 3)


def by_score(folder: Path, seen: Tensor, held: Tensor) -> dict[str, Any]:
    """variant -> perplexity, for both shapes of pruning."""
    found: dict[str, Any] = {"dense": perplexity(load_model(folder, "fp32"), held)}
    for name, pattern in (("50 %", None), ("2:4", "2:4")):
        passes = {
            "sparsegpt": SparseGPT(0.5, pattern),
            "wanda": Prune("wanda", 0.5, pattern, "row"),
            "magnitude": Prune("l1", 0.5, pattern),
            "random": Prune("random", 0.5, pattern),
        }
        for score, p in passes.items():
            model = load_model(folder, "fp32")
            apply(model, Recipe(score, (p,)), seen)
            found[f"{name} {score}"] = perplexity(model, held)
    return found


def in_rounds(folder: Path, seen: Tensor, held: Tensor, shares: tuple[float, ...]) -> float:
    """Perplexity after pruning by magnitude to each share in turn, with recovery behind each."""
    model = load_model(folder, "fp32")
    for number, share in enumerate(shares):
        apply_to_pruned(model, share, seen)
        last = number == len(shares) - 1
        steps = STEPS // 2 if last else STEPS // 2 // (len(shares) - 1)
        steps, decay = (STEPS if len(shares) == 1 else steps), 0.5 if last else 0.01
        training = Training(steps=steps, length=LENGTH, rate=1e-3, decay=decay, seed=number)
        with trainable(model) as trainee:

            def loss(batch: Tensor) -> Tensor:
                logits = model.network(batch)[:, :-1].flatten(0, 1)
                return F.cross_entropy(logits, batch[:, 1:].flatten())

            train(trainee.parameters, loss, seen, training, settle=trainee.settle)
    return perplexity(model, held)


def apply_to_pruned(model: Model, share: float, seen: Tensor) -> None:
    """One stage on a model that may hold sparse matrices already."""
    from onecard.passes.base import Data
    from onecard.passes.memory import run_stage

    run_stage(model, (Prune("l1", share),), Data(seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stories", nargs=2, type=Path, metavar=("FOLDER", "TEXT"))
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    rows: dict[str, Any] = {}
    model = load_model(SHIPPED)
    seen = windows(model, read_text(None, "calibration.txt"), SEEN)
    held = windows(model, read_text(None, "held_out.txt"), HELD)
    rows["demo"] = by_score(SHIPPED, seen, held)
    if chosen.stories:
        folder, path = chosen.stories
        text = path.read_text(encoding="utf-8")
        ids = windows(load_model(folder), text[:2_000_000], 8 * SEEN + HELD)
        learned, held = ids[:-HELD], ids[-HELD:]
        rows["stories260K"] = by_score(folder, learned[:SEEN], held)
        rows["stories260K, 80 % by magnitude, recovered"] = {
            "iterative": in_rounds(folder, learned, held, ROUNDS),
            "one shot": in_rounds(folder, learned, held, ROUNDS[-1:]),
            "training": asdict(Training(steps=STEPS, length=LENGTH, rate=1e-3)),
        }
    OUT.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    if chosen.check and not all(ordered(name, found) for name, found in rows.items()):
        sys.exit(1)


def ordered(model: str, found: dict[str, Any]) -> bool:
    """Whether the orders that are expected of a table hold."""
    if "iterative" in found:
        return bool(found["iterative"] < found["one shot"])
    for name in ("50 %", "2:4"):
        best, wanda, magnitude, worst = (
            found[f"{name} {score}"] for score in ("sparsegpt", "wanda", "magnitude", "random")
        )
        if not found["dense"] < best < min(wanda, magnitude) <= max(wanda, magnitude) < worst:
            return False
        if model != "demo" and wanda >= magnitude:
            return False
    return True


if __name__ == "__main__":
    main()
