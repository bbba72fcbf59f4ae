"""What a model knows, and how far a compressed one is from its original.

Every number carries its convention (how the text was read: windows.py), because perplexities of
different conventions cannot be compared:

    nats_per_token   mean of -log p(token | context) over the predicted tokens
    perplexity       exp of it
    bits_per_byte    sum of -log2 p over the UTF-8 bytes of the predicted tokens
    kl               mean KL(reference || model) over the predicted positions
    top1_agreement   share of positions where both put the same token first

Choice tasks take the answer with the highest log likelihood, raw and per UTF-8 byte of the answer.
Who reads is a `Scorer` (runtime/score.py): the native engine, or the network in torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onecard.checkpoint.text import check_vocabulary
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import Report, Row, environment
from onecard.runtime.score import Scorer
from onecard.windows import Piece, Pieces, Reading

TOGETHER = 2048
"""Tokens that are given to the scorer at once, about."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tally:
    """Sums over predicted tokens."""

    nats: float = 0.0
    tokens: int = 0
    nbytes: int = 0
    kl: float = 0.0
    agreed: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.nats + other.nats, self.tokens + other.tokens, self.nbytes + other.nbytes,
            self.kl + other.kl, self.agreed + other.agreed,
        )  # fmt: skip


def evaluate(
    model: Scorer, text: str, reading: Reading, reference: Scorer | None = None,
    where: str = "model", progress: Progress = lambda done, total, what: None,
) -> Report:  # fmt: skip
    """Perplexity of a text, and the distance to a reference model if one is given."""
    context = model.max_context
    if reference is not None:
        if reference.vocab_size != model.vocab_size:
            raise BadRequest(
                f"the reference knows {reference.vocab_size} tokens, the model "
                f"{model.vocab_size}", do="they must share a tokenizer",
            )  # fmt: skip
        context = min(context, reference.max_context)
        if reading.window > reference.max_context:
            raise BadRequest(
                f"windows of {reading.window} tokens, the reference's context is "
                f"{reference.max_context}", do=f"--window {context}",
            )  # fmt: skip
    pieces = Pieces(model.tokenizer, text, reading, context)
    total, done, (whole, what) = Tally(), 0, pieces.extent()
    for batch in _batched(pieces):
        check_vocabulary([max(p.ids) for p in batch], model.vocab_size)
        progress(min(done, whole), whole, f"{what} read")
        total += tally(model, batch, reference)
        done += sum(p.nbytes for p in batch) if what == "bytes" else len(batch)
    progress(whole, whole, f"{what} read")
    mean = total.nats / total.tokens
    rows = [
        Row.of(where, "perplexity", math.exp(min(mean, 700.0))),
        Row.of(where, "nats_per_token", mean),
        Row.of(where, "bits_per_byte", total.nats / math.log(2) / max(total.nbytes, 1)),
        Row(where, "predicted_tokens", total.tokens),
    ]
    if reference is not None:
        rows.append(Row.of(where, "kl", total.kl / total.tokens))
        rows.append(Row.of(where, "top1_agreement", total.agreed / total.tokens))
    return Report(
        tuple(rows), environment(), notes=(("convention: perplexity", pieces.convention),)
    )


def cut(tokenizer: Tokenizer, text: str, reading: Reading, context: int) -> tuple[list[Piece], str]:
    """All pieces that a text is read in, and the convention in words."""
    pieces = Pieces(tokenizer, text, reading, context)
    return list(pieces), pieces.convention


def _batched(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Neighbouring pieces together, about TOGETHER tokens at once."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        if batch and size + len(piece.ids) > TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += len(piece.ids)
    if batch:
        yield batch


def tally(model: Scorer, batch: Sequence[Piece], reference: Scorer | None) -> Tally:
    """Score pieces."""
    total = Tally(nbytes=sum(p.nbytes for p in batch))
    contexts, firsts = [p.ids for p in batch], [p.first for p in batch]
    for _, run in model.scores(contexts, firsts, reference):
        if not np.isfinite(run.nats).all():
            raise FailedWork("the model gives logits that are not numbers", do="check its weights")
        kl = 0.0 if run.kl is None else float(run.kl.sum())
        agreed = 0 if run.agreed is None else int(run.agreed.sum())
        total += Tally(float(run.nats.sum()), len(run.nats), 0, kl, agreed)
    return total


# Choice tasks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question with its answers; `gold` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    gold: int


TEMPLATES = {"question": "Question: {}\nAnswer:", "plain": "{}"}


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines of {question, choices, gold}. BadRequest names the bad line."""
    if not path.is_file():
        raise BadRequest(f"there is no file of questions {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text", seen=str(error)) from error
    questions = []
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other line separators
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise BadRequest(
                f"{path}, line {number} is not a question", seen=str(error),
                do='{"question": "...", "choices": ["...", "..."], "gold": 0} is needed',
            ) from error  # fmt: skip
    if not questions:
        raise BadRequest(f"{path} holds no questions")
    return questions


def _question(row: Any) -> Question:
    """A question from one line's JSON. Raises ValueError or TypeError."""
    if not isinstance(row, dict):
        raise TypeError("it is not an object")
    if missing := [name for name in ("question", "choices", "gold") if name not in row]:
        raise ValueError(f"it has no {missing[0]!r}")
    text, choices, gold = row["question"], row["choices"], row["gold"]
    if not isinstance(text, str):
        raise TypeError("the question is not a string")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("choices is not a list of strings")
    if len(choices) < 2:
        raise ValueError(f"{len(choices)} choice{'s' * (not choices)}: there is nothing to choose")
    if not all(choice.strip() for choice in choices):
        raise ValueError("an answer is empty")
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise TypeError("gold is not a whole number")
    if not 0 <= gold < len(choices):
        raise ValueError(f"gold {gold} of {len(choices)} choices")
    return Question(text, tuple(choices), gold)


def choose(
    model: Scorer, questions: Sequence[Question], template: str = "question", where: str = "model",
    progress: Progress = lambda done, total, what: None,
) -> Report:  # fmt: skip
    """Accuracy on questions: the likeliest answer, raw and per byte of the answer."""
    if template not in TEMPLATES:
        raise BadRequest(f"there is no template {template!r}", do=", ".join(TEMPLATES))
    right = right_by_byte = longer = 0
    for number, question in enumerate(questions):
        progress(number, len(questions), "answering")
        answers = [
            split(model.tokenizer, *posed(question, choice, template))
            for choice in question.choices
        ]
        longer += any(len(head) + len(rest) > model.max_context + 1 for head, rest in answers)
        scores = [score for score, _ in token_likelihoods(model, answers)]
        sizes = [len(choice.strip().encode("utf-8", "replace")) for choice in question.choices]
        right += scores.index(max(scores)) == question.gold
        rates = [score / size for score, size in zip(scores, sizes, strict=True)]
        right_by_byte += rates.index(max(rates)) == question.gold
    count = len(questions)
    bos = "in front as the tokenizer sets it" if model.tokenizer.adds_bos else "none"
    cut = f"; {longer} longer than the context lost their beginnings" if longer else ""
    return Report(
        (Row.of(where, "accuracy", right / count),
         Row(where, "accuracy_by_length", right_by_byte / count),
         Row(where, "questions", count)),
        environment(),
        notes=(("convention: accuracy",
                f"zero-shot, prompt {TEMPLATES[template]!r}, BOS {bos}, answer after one space; "
                f"by_length divides the log likelihood by the answer's UTF-8 bytes{cut}"),),
    )  # fmt: skip


def posed(question: Question, choice: str, template: str = "question") -> tuple[str, str]:
    """(prompt, answer) as they are read one behind the other."""
    return TEMPLATES[template].format(question.question), " " + choice.strip()


def log_likelihood(model: Scorer, prompt: str, answer: str) -> tuple[float, bool]:
    """log p(answer | prompt), and whether greedy decoding would give the answer."""
    return log_likelihoods(model, [(prompt, answer)])[0]


def log_likelihoods(model: Scorer, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """`log_likelihood` of several (prompt, answer), read together."""
    return token_likelihoods(model, [split(model.tokenizer, *pair) for pair in pairs])


def split(tokenizer: Tokenizer, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The prompt's tokens and the answer's, which are those that the whole text has and the prompt has not.

    BOS is in front where the tokenizer itself puts it, and where nothing else is: the first token
    needs a context.
    """
    head, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    at = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b),
              max(min(len(head), len(whole) - 1), 0))  # fmt: skip
    needed = tokenizer.bos_id is not None and (tokenizer.adds_bos or at == 0)
    bos = [tokenizer.bos_id] if needed and tokenizer.bos_id is not None else []
    return bos + whole[:at], whole[at:]


def token_likelihoods(
    model: Scorer, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """log p(rest | head) of token ids, the oldest dropped beyond the context; is it the greedy choice?

    A first token without any context is not counted.
    """
    contexts, firsts = [], []
    for head, rest in pairs:
        ids = (head + rest)[-(model.max_context + 1) :]
        contexts.append(ids)
        firsts.append(max(len(ids) - len(rest), 1))
    totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for i, run in model.scores(contexts, firsts):
        totals[i] -= float(run.nats.sum())
        greedy[i] &= bool(run.best.all())
    return list(zip(totals, greedy, strict=True))
