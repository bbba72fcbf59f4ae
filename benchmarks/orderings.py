"""Which method stays nearer to the original than which: every ordering a row, on trained models.

    python benchmarks/orderings.py [--only WORDS] [--small] [--check]

Subjects: the shipped model on its own held-out text, stories260K on TinyStories, and both on Chinese text
(paragraphs of Wikipedia), of which neither has learned a word: perplexities there go up to billions, a
rounded model may by chance have the lower one, and what is compared is the divergence from the original,
KL in nats. Passes are calibrated on the kind of text that is read, on other parts of it.

    rounding         dense < GPTQ, AWQ, AutoRound < round to nearest, at 4, 3 and 2 bits
    pruning          dense < SparseGPT, Wanda < magnitude, half of the weights and 2 of every 4
    factorizing      dense < whitened < plain, at 75 % of the bytes
    mixed bits       sites by measured harm < first and last block at 8 bits, in no more bytes

A row is {subject, claim, left, right, measure, left_value, right_value, holds}: left is said to be below
right. Everything is calibrated and read by the same ids. Training has orderings of its own (training.py).
`--small` reads and calibrates on little, to try the script; its rows are not kept. `--check` ends with 1
where a row does not hold that is not in KNOWN. Results: results/orderings.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from onecard.calibrate.walk import Reached
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.load import load_model
from onecard.checkpoint.text import read_text
from onecard.core.report import Row, environment
from onecard.evaluate import evaluate
from onecard.nn.model import Model
from onecard.passes import (
    AWQ,
    GPTQ,
    AutoRound,
    Factorize,
    Mixed,
    Prune,
    RoundToNearest,
    SparseGPT,
)
from onecard.passes.base import BlockPass, Recipe
from onecard.passes.walked import apply
from onecard.runtime.reference import TorchScorer
from onecard.windows import Reading

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "orderings.json"
DATA = Path(os.environ.get("ONECARD_DATA", ROOT.parent / "shared" / "data"))
STORIES = DATA / "stories260K"
CHINESE = DATA / "zh_text" / "zh_wiki_cmrc_paragraphs.txt"
END = "<|endoftext|>"

STEPS = 50
"""Of AutoRound: a quarter of the usual number."""

KNOWN: dict[tuple[str, str], str] = {
    ("demo", "Wanda < magnitude, 50 %"): "its inputs have no outliers",
    ("demo", "Wanda < magnitude, 2:4"): "its inputs have no outliers",
}
"""Orders of papers that these models do not keep, and why."""


@dataclass(frozen=True)
class Subject:
    """A model, the ids it is calibrated on [samples, length], and the text it is read on."""

    name: str
    folder: Path
    learned: Tensor
    text: str
    reading: Reading
    measure: str = "perplexity"


@dataclass(frozen=True)
class Claim:
    """`left` is below `right`; both are names of what `entrants` makes, or `dense`."""

    claim: str
    left: str
    right: str
    measure: str = ""  # the subject's


@dataclass(frozen=True)
class Ordering:
    """A claim that was measured."""

    subject: str
    claim: str
    left: str
    right: str
    measure: str
    left_value: float
    right_value: float
    holds: bool


@dataclass(frozen=True)
class EndsAtEight(GPTQ):
    """GPTQ whose first and last of `layers` blocks have 8 bits: the usual rule of thumb."""

    layers: int = 8

    def site(self, site: Reached) -> Iterator[Row]:
        ends = ("blocks.0", f"blocks.{self.layers - 1}")
        yield from GPTQ.site(replace(self, bits=8) if site.block in ends else self, site)


def entrants(model: Model) -> dict[str, BlockPass]:
    """name -> the pass that makes it."""
    found: dict[str, BlockPass] = {}
    layers = model.spec.num_layers
    for bits in (4, 3, 2):
        found[f"rounding, {bits} bits"] = RoundToNearest(bits)
        found[f"AWQ, {bits} bits"] = AWQ(bits)
        found[f"GPTQ, {bits} bits"] = GPTQ(bits)
        found[f"AutoRound, {bits} bits"] = AutoRound(bits, steps=STEPS)
        mean = (16 + bits * (layers - 2)) / layers
        found[f"ends at 8, others at {bits} bits"] = EndsAtEight(bits, layers=layers)
        found[f"mixed, {mean:g} bits"] = Mixed(mean=mean, tried=1024)
    for name, pattern in (("50 %", None), ("2:4", "2:4")):
        found[f"SparseGPT, {name}"] = SparseGPT(0.5, pattern)
        found[f"Wanda, {name}"] = Prune("wanda", 0.5, pattern, "row")
        found[f"magnitude, {name}"] = Prune("l1", 0.5, pattern)
    found["plain SVD, 75 %"] = Factorize("plain", share=0.75)
    found["whitened SVD, 75 %"] = Factorize("whitened", share=0.75)
    return found


def claims(model: Model) -> list[Claim]:
    """All that is said."""
    found, layers = [], model.spec.num_layers
    for bits in (4, 3, 2):
        for name in ("GPTQ", "AWQ", "AutoRound"):
            own, plain = f"{name}, {bits} bits", f"rounding, {bits} bits"
            found.append(Claim(f"dense < {own}", "dense", own))
            found.append(Claim(f"{name} < rounding, {bits} bits", own, plain))
        mean = (16 + bits * (layers - 2)) / layers
        found.append(Claim(f"mixed < ends at 8, {mean:g} bits", f"mixed, {mean:g} bits",
                           f"ends at 8, others at {bits} bits", "kl"))  # fmt: skip
    for kind in ("50 %", "2:4"):
        for name in ("SparseGPT", "Wanda"):
            own, plain = f"{name}, {kind}", f"magnitude, {kind}"
            found.append(Claim(f"dense < {own}", "dense", own))
            found.append(Claim(f"{name} < magnitude, {kind}", own, plain))
    found.append(Claim("dense < whitened SVD, 75 %", "dense", "whitened SVD, 75 %"))
    found.append(Claim("whitened < plain SVD, 75 %", "whitened SVD, 75 %", "plain SVD, 75 %"))
    return found


# ---- subjects ----------------------------------------------------------------------------------


def subjects(small: bool) -> list[Subject]:
    """Those whose files are there."""
    samples, limit = (8, 4) if small else (64, 64)
    length = 128 if small else 256
    demo = load_model(SHIPPED)
    own = Reading(documents=END, limit=limit)
    foreign = Reading(window=256, limit=limit // 2)
    found = [
        Subject("demo", SHIPPED, windows(demo, read_text(None), samples, length),
                read_text(None, "held_out.txt"), own)
    ]  # fmt: skip
    chinese = CHINESE.read_text(encoding="utf-8") if CHINESE.is_file() else ""
    if STORIES.is_dir():
        text = (DATA / "tinystories" / "tinystories_sample_2MiB.txt").read_text(encoding="utf-8")
        stories = load_model(STORIES)
        learned, held = text[:1_000_000].replace(END, ""), text[-200_000:]
        found.append(
            Subject("stories260K", STORIES, windows(stories, learned, samples, length), held, own)
        )
    for subject in list(found) if chinese else ():
        ids = windows(load_model(subject.folder), chinese[:200_000], samples, length)
        name = f"{subject.name}, Chinese"
        found.append(Subject(name, subject.folder, ids, chinese[-100_000:], foreign, "kl"))
    if len(found) < 4:
        print(f"{DATA} has not all there is: {len(found)} of 4 subjects", file=sys.stderr)
    return found


def windows(model: Model, text: str, samples: int, length: int) -> Tensor:
    """ids [samples, length], the first of a text."""
    ids = model.tokenizer.encode(text[: 20 * samples * length])
    return torch.tensor(ids[: samples * length]).view(-1, length)


# ---- measuring ---------------------------------------------------------------------------------


def measured(subject: Subject) -> tuple[dict[str, dict[str, float]], list[Ordering]]:
    """(perplexity, KL and bytes of the linears of everything, the orderings)."""
    dense = load_model(subject.folder, "fp32")
    reference = TorchScorer(dense)
    said = evaluate(reference, subject.text, subject.reading)
    found = {"dense": {"perplexity": said.value("perplexity"), "kl": 0.0, "bytes": size(dense)}}
    for name, chosen in entrants(dense).items():
        began = time.perf_counter()
        model = load_model(subject.folder, "fp32")
        apply(model, Recipe(name, (chosen,)), subject.learned if chosen.calibrated else None)
        said = evaluate(TorchScorer(model), subject.text, subject.reading, reference)
        found[name] = {
            "perplexity": said.value("perplexity"), "kl": said.value("kl"), "bytes": size(model)
        }  # fmt: skip
        print(f"{subject.name:22} {name:28} {found[name]['perplexity']:12.3f} {found[name]['kl']:9.5f} nat"
              f" {found[name]['bytes']:9} B {time.perf_counter() - began:6.1f} s", flush=True)  # fmt: skip
    orderings = []
    for c in claims(dense):
        measure = c.measure or subject.measure
        left, right = found[c.left][measure], found[c.right][measure]
        fits = not c.claim.startswith("mixed") or found[c.left]["bytes"] <= found[c.right]["bytes"]
        orderings.append(
            Ordering(subject.name, c.claim, c.left, c.right, measure, round(left, 6), round(right, 6),
                     left < right and fits)
        )  # fmt: skip
    return found, orderings


def size(model: Model) -> int:
    """Bytes of the linears of the blocks."""
    return sum(linear.format.bytes(linear.shape) for _, linear in model.linears())


def table(orderings: list[Ordering]) -> str:
    lines = []
    for o in orderings:
        note = "" if o.holds else f"  NO  {KNOWN.get((o.subject, o.claim), '')}"
        values = f"{o.left_value:12.4f} < {o.right_value:12.4f}"
        lines.append(f"{o.subject:22} {o.claim:34} {o.measure:10} {values}{note}".rstrip())
    held = sum(o.holds for o in orderings)
    return "\n".join([*lines, f"{held} of {len(orderings)} hold"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="subjects whose names contain this")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    kept = json.loads(OUT.read_text()) if OUT.is_file() else {"measured": {}, "orderings": []}
    wrong: list[Ordering] = []
    shown: list[Ordering] = []
    for subject in subjects(asked.small):
        if asked.only not in subject.name:
            continue
        found, orderings = measured(subject)
        shown += orderings
        wrong += [o for o in orderings if not o.holds and (o.subject, o.claim) not in KNOWN]
        others = [row for row in kept["orderings"] if row["subject"] != subject.name]
        kept = {
            "environment": environment(),
            "measured": {**kept["measured"], subject.name: found},
            "orderings": [*others, *(asdict(o) for o in orderings)],
        }
        if not asked.small:
            OUT.write_text(json.dumps(kept, indent=1) + "\n")
    print(table(shown))
    if asked.check and wrong:
        sys.exit(f"{len(wrong)} orderings do not hold")


if __name__ == "__main__":
    main()
