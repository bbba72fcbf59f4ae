"""Whether the planner spends bytes better than simpler rules: KL on held-out text at equal budgets.

    python benchmarks/fit.py [--check] [--only demo] [--budgets 3 4.25]

Models: the shipped one; stories260K (kept in bfloat16 here, as models are); a Llama of 0.9 M parameters
trained for this table on TinyStories, from nothing. A budget is bits per weight of the matrices of the
blocks, scales and tables of codebooks included. At each one, on the same candidates, every matrix made by
the same passes on the same calibration text:

    planner      sensitivities, exact knapsack, then two looks around the plan (onecard.fit)
    uniform      one format for all sites: the best on the held-out text of all that the budget allows
    ends high    first and last block in one format, the blocks between in a smaller one: the best on the
                 held-out text of the pairs that leave no room for a larger first one
    random       each site a random candidate, mended at random till the budget holds and nothing random
                 fits any more: the median of 20

The planner never sees the held-out text; the best of the first two rules is chosen on it. `--check` ends
with an error where the planner is not below all three. Results: results/fit.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from onecard.calibrate.data import Calibration, calibration_ids
from onecard.calibrate.latent import trainable
from onecard.calibrate.losses import next_token
from onecard.calibrate.train import Training, train, training_ids
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.load import load_model
from onecard.checkpoint.save import save_model
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.core.format import parse_format
from onecard.core.report import environment
from onecard.core.spec import linear_shapes
from onecard.fit.around import Bank, search
from onecard.fit.candidates import TRIALS, possible, size_of
from onecard.fit.planner import Limits, Option, solve
from onecard.fit.sensitivity import look, shapes_of
from onecard.passes.student import fresh, spec_of

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("ONECARD_DATA", ROOT.parent / "shared" / "data"))
STORIES, TEXT = DATA / "stories260K", DATA / "tinystories" / "tinystories_sample_2MiB.txt"
PATH = ROOT / "results" / "fit.json"
END = "<|endoftext|>"
BUDGETS = (2.25, 2.5, 3.0, 3.5, 4.25, 5.0, 8.0)
RULES = ("uniform", "ends high", "random")
DRAWS, ROUNDS, TOKENS = 20, 2, 4096
LEARNED, HELD_OUT = 1_500_000, 200_000
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 16}  # fmt: skip
TRAINING = Training(steps=700, batch=8, length=256, rate=2e-3)

EXTRA = ("int2-g32", "int2-g64", "int3-g32-zp", "int4-g32-zp", "int5-g32", "int6-g32", "int7-g128",
         "int7-g64", "int7-g32", "codebook4-row", "codebook5", "codebook6x2", "codebook8x2")  # fmt: skip
"""What the simple rules may use besides."""

Choices = dict[str, str]


def models(work: Path) -> dict[str, tuple[Path, Path | None, Path]]:
    """name -> model folder, calibration text (None: the shipped one), held-out text."""
    words = TEXT.read_text(encoding="utf-8")
    seen, unseen = work / "learned.txt", work / "held_out.txt"
    seen.write_text(words[:LEARNED], encoding="utf-8")
    unseen.write_text(words[-HELD_OUT:], encoding="utf-8")
    return {
        "demo": (SHIPPED, None, SHIPPED.parent / "held_out.txt"),
        "stories260K": (work / "stories260K", seen, unseen),
        "trained": (work / "trained", seen, unseen),
    }


def make(name: str, work: Path) -> None:
    """The models that are not there yet."""
    if name == "stories260K":
        save_model(load_model(STORIES, "bf16"), work / name)
    if name == "trained":
        teacher = load_model(STORIES, "fp32")
        source = Source(STORIES)
        config = {**source.config, **SMALL, "dtype": "bfloat16"}
        model = fresh(teacher, spec_of(source, config, "config.json"), 0)
        ids = training_ids(
            model.tokenizer, work / "learned.txt", TRAINING, model.spec.vocab_size, END
        )
        with trainable(model) as trainee:
            course = train(trainee.parameters, lambda b: next_token(model.network(b), b), ids,
                           TRAINING, settle=trainee.settle)  # fmt: skip
        model.network.to(torch.bfloat16)
        print(f"trained: loss {course.losses[0]:.3f} to {statistics.mean(course.losses[-20:]):.3f}")
        save_model(model, work / name)


class Bench:
    """One model with its sensitivities, and how far any choice of formats takes it on held-out text."""

    def __init__(self, folder: Path, text: Path | None, held_out: Path, work: Path) -> None:
        self.source, self.trial = Source(folder), TRIALS["normal"]
        spec, trial = self.source.spec, self.trial
        tokenizer, size = self.source.tokenizer(), spec.vocab_size
        ids = calibration_ids(
            tokenizer, text, Calibration(trial.tokens // trial.length, trial.length), size
        )
        self.held = calibration_ids(tokenizer, held_out, Calibration(TOKENS // 256, 256), size)
        found = look(self.source, ids, trial, work / "sensitivity")
        self.bank = Bank(self.source, ids, ids[: max(1, trial.tried // ids.shape[1])])
        with torch.no_grad():
            for where in self.bank.stats:
                self.bank.put(where, self.source.dtype)
            self.answers = torch.cat(
                [
                    torch.log_softmax(self.bank.model.network(row).float(), -1)
                    for row in self.held.split(1)
                ]
            )
        self.places: dict[str, list[Option]] = {}
        self.shapes: dict[str, list[tuple[int, int]]] = {}
        for index, layer in enumerate(spec.layers):
            for name, shapes in shapes_of(spec, layer).items():
                where = f"blocks.{index}.{name}"
                self.shapes[where] = shapes
                self.places[where] = [
                    Option(n, found.harms[where][n], size_of(f, shapes, self.source.dtype))
                    for n, f in possible(trial.formats, shapes, self.source.dtype).items()
                ]
        self.weights = sum(
            rows * columns
            for layer in spec.layers
            for rows, columns in linear_shapes(spec, layer).values()
        )

    def kl(self, choices: Mapping[str, str]) -> float:
        for where, format in choices.items():
            self.bank.put(where, format)
        return self.bank.kl(self.held, self.answers)

    def size(self, choices: Mapping[str, str]) -> int:
        return sum(
            size_of(parse_format(format), self.shapes[where], self.source.dtype)
            for where, format in choices.items()
        )

    def all_in(self, format: str, places: Sequence[str]) -> Choices | None:
        """Sites in one format, its groups the largest that divide each row; None where it holds them not."""
        found = {}
        for where in places:
            own = parse_format(format).for_row(self.shapes[where][0][1])
            try:
                own.bytes(self.shapes[where][0])
            except BadRequest:
                return None
            found[where] = own.name
        return found

    def simple(self) -> tuple[str, ...]:
        """The formats that the simple rules choose from: more than the planner has."""
        return (*self.trial.formats, *EXTRA)

    # The rules

    def planner(self, room: float) -> tuple[Choices, dict[str, float]]:
        places, limits = list(self.places.values()), Limits(size=room)
        plan = solve(places, limits)
        found = search(self.bank, self.places, limits, plan, ROUNDS)
        chosen = found.plan.options(places)
        about = {
            "predicted": plan.harm,
            "calibration_before": found.before,
            "calibration": found.kl,
        }
        return {where: o.format for where, o in zip(self.places, chosen, strict=True)}, about

    def uniform(self, room: float) -> list[Choices]:
        every = [self.all_in(format, list(self.places)) for format in self.simple()]
        return [c for c in every if c is not None and 0.75 * room < self.size(c) <= room]

    def ends_high(self, room: float) -> list[Choices]:
        last = f"blocks.{self.source.spec.num_layers - 1}."
        ends = [w for w in self.places if w.startswith(("blocks.0.", last))]
        rest = [w for w in self.places if w not in ends]
        found: list[Choices] = []
        for low in self.simple():
            inner = self.all_in(low, rest)
            best: Choices | None = None
            for high in self.simple():
                outer = self.all_in(high, ends)
                if inner is None or outer is None or self.size(inner | outer) > room:
                    continue
                if self.size(outer) * self.part(rest) <= self.size(inner) * self.part(ends):
                    continue
                if best is None or self.size(best) < self.size(inner | outer):
                    best = inner | outer
            if best is not None and self.size(best) > 0.9 * room:
                found.append(best)
        return found

    def part(self, places: Sequence[str]) -> int:
        return sum(rows * columns for where in places for rows, columns in self.shapes[where])

    def random(self, room: float, seed: int) -> Choices:
        draw = random.Random(seed)
        chosen = {where: draw.choice(options) for where, options in self.places.items()}
        total = sum(o.size for o in chosen.values())
        order = list(self.places)
        while total > room:
            where = draw.choice(order)
            smaller = [o for o in self.places[where] if o.size < chosen[where].size]
            if smaller:
                new = draw.choice(smaller)
                total += new.size - chosen[where].size
                chosen[where] = new
        for where in draw.sample(order, len(order)):
            now = chosen[where].size
            larger = [o for o in self.places[where] if now < o.size <= now + room - total]
            if larger:
                new = draw.choice(larger)
                total += new.size - now
                chosen[where] = new
        return {where: o.format for where, o in chosen.items()}


def row_of(bench: Bench, bits: float) -> dict[str, object]:
    """All rules at one budget."""
    room = bits * bench.weights / 8
    began = time.perf_counter()
    choices, about = bench.planner(room)
    row: dict[str, object] = {"bits": bits, "planner": bench.kl(choices), **about,
                              "planner_bits": 8 * bench.size(choices) / bench.weights}  # fmt: skip
    row |= simple_rules(bench, room)
    drawn = sorted(bench.kl(bench.random(room, seed)) for seed in range(DRAWS))
    row |= {"random": statistics.median(drawn), "random_least": drawn[0]}
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def simple_rules(bench: Bench, room: float) -> dict[str, object]:
    """The best of the uniform formats, and of those with high ends."""
    row: dict[str, object] = {}
    for name, many in (("uniform", bench.uniform(room)), ("ends high", bench.ends_high(room))):
        measured = [(bench.kl(c), 8 * bench.size(c) / bench.weights, c) for c in many]
        if measured:
            kl, size, best = min(measured, key=lambda m: m[0])
            row |= {
                name: kl,
                f"{name}_bits": size,
                f"{name}_formats": "/".join(sorted(set(best.values()))),
            }
    return row


def show(name: str, row: Mapping[str, object]) -> None:
    said = [f"{name} {row['bits']}:", f"planner {row['planner']:.5f}"]
    said += [f"{rule} {row[rule]:.5f}" if rule in row else f"{rule} -" for rule in RULES]
    print("  ".join(said), f" {row['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--only", default="", help="models whose names contain this; others are kept"
    )
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    parser.add_argument("--again", action="store_true", help="only the simple rules of known rows")
    parser.add_argument("--work", type=Path, help="keep models and sensitivities here")
    asked = parser.parse_args()
    table: dict[str, dict[str, dict[str, object]]] = {}
    if PATH.is_file():
        table = json.loads(PATH.read_text())["models"]
    with tempfile.TemporaryDirectory() as folder:
        work = (asked.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name, (model, text, held_out) in models(work).items():
            if asked.only not in name:
                continue
            if not model.is_dir():
                make(name, work)
            bench = Bench(model, text, held_out, work)
            for bits in asked.budgets:
                try:
                    known = table.get(name, {}).get(str(bits), {})
                    if asked.again and "planner" in known:
                        row = known | simple_rules(bench, bits * bench.weights / 8)
                    else:
                        row = row_of(bench, bits)
                except BadRequest as error:
                    row = {"bits": bits, "impossible": str(error)}
                    print(name, bits, error)
                else:
                    show(name, row)
                table.setdefault(name, {})[str(bits)] = row
                PATH.parent.mkdir(exist_ok=True)
                about = {
                    "environment": environment(),
                    "tokens": TOKENS,
                    "draws": DRAWS,
                    "rounds": ROUNDS,
                }
                PATH.write_text(json.dumps({**about, "models": table}, indent=1) + "\n")
    wrong = [
        f"{name} at {bits}: {rule} {row[rule]:.5f} is not above the planner's {row['planner']:.5f}"
        for name, rows in table.items() for bits, row in rows.items() for rule in RULES
        if rule in row and not row[rule] > row["planner"]  # type: ignore[operator]
    ]  # fmt: skip
    if asked.check and wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
