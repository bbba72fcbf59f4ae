"""Whether a compressed model still says what the original would: on held-out text, on its own words, and on
questions where some are given.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onecard.checkpoint.load import load_model
from onecard.checkpoint.shards import sha256_of
from onecard.checkpoint.source import Source
from onecard.checkpoint.text import check_vocabulary, read_text
from onecard.core.errors import BadRequest
from onecard.core.report import write_text
from onecard.core.settings import fill
from onecard.evaluate import Progress, Question, choose, posed, read_questions, split, tally
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
USUAL = CpuSettings()
FEWEST = 64
"""Tokens of held-out text to predict, below which nothing can be said of a model."""
QUESTIONED = 2048
"""Tokens of a question with an answer, at most; the oldest are dropped."""
SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Texts:
    """What the gates read: pieces of held-out text, of what the original wrote, and questions."""

    held_out: tuple[Piece, ...]
    own: tuple[Piece, ...]
    questions: tuple[Question, ...] = ()
    asked: str = ""  # where the questions come from


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
    source: Source, text: Path | None, tokens: int, kept: Path, task: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Texts:  # fmt: skip
    """Both texts, and the questions of `task`; the texts lie in the file `kept` from the first call on."""
    questions, asked = ((), "") if task is None else (tuple(read_questions(task)), task.name)
    texts = read_texts(kept)
    if texts is None:
        held = held_out_pieces(source, text, tokens)
        count = max(4, min(len(held), tokens // (2 * WRITTEN)))
        own = own_words(source, held, count, progress)
        found = {"held": held, "own": own}
        data = {name: [[p.ids, p.first, p.nbytes] for p in some] for name, some in found.items()}
        write_text(kept, json.dumps(data))
        texts = tuple(held), tuple(own)
    return Texts(*texts, questions, asked)


def read_texts(path: Path) -> tuple[tuple[Piece, ...], tuple[Piece, ...]] | None:
    """Held-out text and own words that were noted there; None where there are none, or they were damaged."""
    data = noted(path)
    try:
        held, own = (
            tuple(Piece(tuple(map(int, ids)), int(first), int(size)) for ids, first, size in data[name])
            for name in ("held", "own")
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None
    return (held, own) if held and own else None


def judged(
    original: Path, made: Path, texts: Texts, runs: CpuSettings = USUAL, here: bool = True,
    progress: Progress = lambda done, total, what: None,
) -> tuple[Gate, ...]:  # fmt: skip
    """KL, agreement and perplexity of what was made, on both texts, and of right answers.

    `runs`: how the engine runs it; `here`: on this processor.
    """
    theirs: Scorer
    ours: Scorer
    if here and cpu.available():
        longest = max(len(piece.ids) for piece in (*texts.held_out, *texts.own))
        longest = QUESTIONED if texts.questions else longest
        unrounded = CpuSettings(context=longest, head="stored", exact=("all",))
        theirs = native_scorer(original, unrounded)
        ours = native_scorer(made, replace(runs, context=longest))
    else:
        theirs = TorchScorer(load_model(original, "fp32"))
        ours = TorchScorer(load_model(made, "fp32"), runs.cache)
    found = []
    answers = tuple(right_answer(theirs, question) for question in texts.questions)
    for name, pieces in (
        ("held-out", texts.held_out), ("own words", texts.own), (texts.asked, answers)
    ):  # fmt: skip
        if not pieces:
            continue
        progress(0, len(pieces), f"judging on {name}")
        after, before = tally(ours, pieces, theirs), tally(theirs, pieces, None)
        count = after.tokens
        gate = Gate(
            name, max(0.0, after.kl / count), after.agreed / count,
            math.exp(min(700.0, after.nats / count)), math.exp(min(700.0, before.nats / count)), count,
        )  # fmt: skip
        if pieces is answers:
            right, was = (rightly(each, texts.questions, progress) for each in (ours, theirs))
            gate = replace(gate, questions=len(answers), right=right, right_before=was)
        found.append(gate)
    return tuple(found)


def right_answer(model: Scorer, question: Question) -> Piece:
    """A question with its right answer, as it is asked; the answer is predicted."""
    prompt, answer = posed(question, question.choices[question.gold])
    head, rest = split(model.tokenizer, prompt, answer)
    ids = (head + rest)[-(model.max_context + 1) :]
    return Piece(tuple(ids), max(len(ids) - len(rest), 1), len(answer.encode("utf-8", "replace")))


def rightly(model: Scorer, questions: Sequence[Question], progress: Progress) -> float:
    """The share of questions whose likeliest answer by length is the right one."""
    value = choose(model, questions, progress=progress).value("accuracy_by_length")
    assert isinstance(value, float)
    return value


def native_scorer(folder: Path, settings: CpuSettings) -> NativeScorer:
    source = Source(folder)
    return NativeScorer(CpuStepper(source, settings), source.tokenizer())


def quality(gates: Sequence[Gate], measure: Measure) -> float:
    """The share of `measure` that is kept, on the worst text."""
    return min(kept(g, measure) for g in gates if measure != "accuracy" or g.questions)


def kept(gate: Gate, measure: Measure) -> float:
    """The share of `measure` that is kept on one text; a model that is never right has nothing to lose."""
    if measure == "likelihood":
        return math.exp(-gate.kl)
    if measure == "perplexity":
        return gate.before / gate.perplexity
    if measure == "accuracy":
        return min(1.0, gate.right / gate.right_before) if gate.right_before else 1.0
    return gate.agreement


def keep(path: Path, gates: Sequence[Gate]) -> None:
    write_text(path, json.dumps([asdict(gate) for gate in gates]))


def read_kept(path: Path) -> tuple[Gate, ...] | None:
    """What `keep` wrote there, None where there is nothing or something else."""
    try:
        return tuple(fill(Gate, gate, path.name) for gate in noted(path) or ()) or None
    except (AttributeError, BadRequest, TypeError):
        return None


def noted(path: Path) -> Any:
    """The JSON that a run noted for the next, None where there is none, or it was damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


# What a KL means for the other measures, before anything is measured --------------------------------

DISAGREEMENT = 0.58
"""1 - agreement over the root of KL: 0.54 to 0.62 on the shipped model from int8 down to int3."""

CHOICES = ("agreement", "accuracy")
"""What falls with the root of KL; of the answers that change not all were right, so that more is kept."""


def harm_of(share: float, measure: Measure) -> float:
    """The KL, nats per token, that keeps a share of a measure, before anything was measured."""
    if measure in CHOICES:
        return ((1 - share) / DISAGREEMENT) ** 2
    return -math.log(share)


def share_of(harm: float, measure: Measure) -> float:
    """The share of a measure that a KL keeps, before anything was measured; the inverse of `harm_of`."""
    if measure in CHOICES:
        return max(0.0, 1 - DISAGREEMENT * math.sqrt(max(harm, 0.0)))
    return math.exp(-min(harm, 700.0))


def require_text(source: Source, text: Path | None) -> None:
    """BadRequest where held-out text cannot be read, is another model's, or is too short to tell anything."""
    pieces = held_out_pieces(source, text, FEWEST)
    for piece in pieces:
        check_vocabulary(piece.ids, source.spec.vocab_size)
    count = sum(len(piece.ids) - piece.first for piece in pieces)
    if count < FEWEST:
        raise BadRequest(f"the held-out text gives {count} tokens to predict, at least {FEWEST} are needed",
                         do="give a longer one; some thousands tell more")  # fmt: skip


def require_questions(task: Path | None, measure: Measure) -> None:
    """BadRequest where questions cannot be read, or are needed and not given."""
    if task is not None:
        read_questions(task)
    elif measure == "accuracy":
        raise BadRequest("--measure accuracy is of right answers", "there are no questions",
                         "--task FILE, JSON lines of {question, choices, gold}")  # fmt: skip


def name_of(file: Path | None) -> str:
    """A text or a file of questions, as it is now; the shipped one, or none, where none is given."""
    return "" if file is None else f"{file.name} {sha256_of(file)[:16]}"
