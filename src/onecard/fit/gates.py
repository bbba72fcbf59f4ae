"""Whether a compressed model still says what the original would: on held-out text, and on its own words.

The own words are what the original itself writes behind beginnings of held-out text, drawn from its
distribution (temperature 1). There a model shows damage that text of others hides: what it is sure of, and
mistakes that follow from its own. KL, agreement and perplexity are taken on both; `quality` is the worse
text's, by the measure that the goal names (goal.py).

What was made is read by the engine that will serve it, with its rounded inputs, head and cache, so that all
that this costs counts too; the original beside it with nothing rounded. For another device, and where the
native engine is missing, both are read in torch, float32. Only what is predicted from `FIRST` tokens of
context on counts in the own words, as the beginnings are not the original's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onecard.checkpoint.load import load_model
from onecard.checkpoint.source import Source
from onecard.checkpoint.text import read_text
from onecard.core.errors import BadRequest
from onecard.core.report import write_text
from onecard.evaluate import Progress, tally
from onecard.fit.goal import Measure
from onecard.fit.result import Gate
from onecard.kernels import cpu
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.engine import Runner, complete
from onecard.runtime.reference import TorchExecutor, TorchScorer
from onecard.runtime.sample import Sampling
from onecard.runtime.scheduler import Engine
from onecard.runtime.score import NativeScorer, Scorer
from onecard.windows import Piece, Pieces, Reading

FIRST, WRITTEN = 16, 112
"""Tokens of a beginning, and that the original writes behind it."""
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Texts:
    """What the gates read: pieces of held-out text, and of what the original wrote."""

    held_out: tuple[Piece, ...]
    own: tuple[Piece, ...]


def held_out_pieces(source: Source, text: Path | None, tokens: int) -> list[Piece]:
    """Held-out text in pieces, about so many tokens; documents where the shipped text is read."""
    words = read_text(text, "held_out.txt")
    reading = Reading(documents=SEPARATOR) if text is None else Reading(window=512)
    if text is not None and source.spec.max_context < 512:
        reading = Reading()
    found: list[Piece] = []
    count = 0
    for piece in Pieces(source.tokenizer(), words, reading, min(source.spec.max_context, 512)):
        found.append(piece)
        count += len(piece.ids) - piece.first
        if count >= tokens:
            break
    return found


def runner_of(source: Source, positions: int) -> Runner:
    """What writes: the native engine, or torch where it is missing."""
    if cpu.available():
        return Engine(CpuStepper(source, CpuSettings(context=positions)), source.tokenizer())
    return TorchExecutor(load_model(source.folder))


def own_words(
    source: Source, beginnings: Sequence[Piece], count: int, progress: Progress
) -> list[Piece]:
    """What a model writes behind `count` beginnings, by itself; the same words at every call."""
    room = min(source.spec.max_context, FIRST + WRITTEN)
    runner, tokenizer = runner_of(source, room), source.tokenizer()
    found = []
    for number, piece in enumerate(beginnings[:count]):
        progress(number, count, "own words")
        ids = list(piece.ids[: min(FIRST, room // 2)])
        said = complete(
            runner, tokenizer, ids,
            Sampling(room - len(ids), temperature=1.0, seed=number, ignore_eos=True),
        )  # fmt: skip
        whole = tuple(ids) + tuple(said.ids)
        found.append(Piece(whole, len(ids), max(1, len(said.text.encode("utf-8", "replace")))))
    return found


def texts_of(
    source: Source, text: Path | None, tokens: int, kept: Path,
    progress: Progress = lambda done, total, what: None,
) -> Texts:  # fmt: skip
    """Both texts; `kept` is a file that they lie in from the first call on."""
    if kept.is_file():
        data = json.loads(kept.read_text(encoding="utf-8"))
        return Texts(
            *(tuple(Piece(tuple(i), f, n) for i, f, n in data[name]) for name in ("held", "own"))
        )
    held = held_out_pieces(source, text, tokens)
    count = max(4, min(len(held), tokens // (2 * WRITTEN)))
    own = own_words(source, held, count, progress)
    data = {"held": [[list(p.ids), p.first, p.nbytes] for p in held],
            "own": [[list(p.ids), p.first, p.nbytes] for p in own]}  # fmt: skip
    write_text(kept, json.dumps(data))
    return Texts(tuple(held), tuple(own))


def judged(
    original: Path, made: Path, texts: Texts, cache: str | None = None, here: bool = True,
    progress: Progress = lambda done, total, what: None,
) -> tuple[Gate, ...]:  # fmt: skip
    """KL, agreement and perplexity of what was made, on both texts; keys and values held in `cache`.

    `here`: it will be run on this processor.
    """
    theirs: Scorer
    ours: Scorer
    if here and cpu.available():
        longest = max(len(piece.ids) for piece in (*texts.held_out, *texts.own))
        unrounded = CpuSettings(context=longest, head="stored", exact=("all",))
        theirs = native_scorer(original, unrounded)
        ours = native_scorer(made, CpuSettings(context=longest, cache=cache))
    else:
        theirs = TorchScorer(load_model(original, "fp32"))
        ours = TorchScorer(load_model(made, "fp32"), cache)
    found = []
    for name, pieces in (("held-out", texts.held_out), ("own words", texts.own)):
        progress(0, len(pieces), f"judging on {name}")
        after, before = tally(ours, pieces, theirs), tally(theirs, pieces, None)
        count = after.tokens
        found.append(Gate(
            name, max(0.0, after.kl / count), after.agreed / count,
            math.exp(min(700.0, after.nats / count)), math.exp(min(700.0, before.nats / count)), count,
        ))  # fmt: skip
    return tuple(found)


def native_scorer(folder: Path, settings: CpuSettings) -> NativeScorer:
    source = Source(folder)
    return NativeScorer(CpuStepper(source, settings), source.tokenizer())


def quality(gates: Sequence[Gate], measure: Measure) -> float:
    """The share of `measure` that is kept, on the worse text."""
    return min(kept(gate, measure) for gate in gates)


def kept(gate: Gate, measure: Measure) -> float:
    """The share of `measure` that is kept on one text."""
    if measure == "likelihood":
        return math.exp(-gate.kl)
    if measure == "perplexity":
        return gate.before / gate.perplexity
    return gate.agreement


def keep(path: Path, gates: Sequence[Gate]) -> None:
    write_text(path, json.dumps([asdict(gate) for gate in gates]))


def read_kept(path: Path) -> tuple[Gate, ...] | None:
    """What `keep` wrote there, None where there is nothing."""
    if not path.is_file():
        return None
    data: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Gate(**gate) for gate in data)


# What a KL means for the other measures, before anything is measured --------------------------------

DISAGREEMENT = 0.58
"""1 - agreement over the root of KL: 0.54 to 0.62 on the shipped model from int8 down to int3."""


def harm_of(share: float, measure: Measure) -> float:
    """The KL, nats per token, that keeps a share of a measure, before anything was measured."""
    if measure == "agreement":
        return ((1 - share) / DISAGREEMENT) ** 2
    return -math.log(share)


def share_of(harm: float, measure: Measure) -> float:
    """The share of a measure that a KL keeps, before anything was measured; the inverse of `harm_of`."""
    if measure == "agreement":
        return max(0.0, 1 - DISAGREEMENT * math.sqrt(max(harm, 0.0)))
    return math.exp(-min(harm, 700.0))


def require_text(source: Source, text: Path | None) -> None:
    """BadRequest where held-out text cannot be read or is too short."""
    if not held_out_pieces(source, text, 1):
        raise BadRequest("the held-out text is too short", do="give a longer one")
