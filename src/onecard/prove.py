"""The proof that goes with a result: quality against the original on held-out text, and a sample of each.

Both models are in memory for it, so it is made by itself for small models only, and for larger ones
when it is asked for. Whether it can be made is checked before the work whose result it is about.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from onecard.checkpoint.source import Source
from onecard.checkpoint.text import read_text
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.device import available_memory
from onecard.core.errors import BadRequest
from onecard.core.report import Report, Row
from onecard.core.settings import format_size
from onecard.core.spec import parameter_count
from onecard.evaluate import Progress, evaluate
from onecard.runtime.engine import Result, Runner, complete, prompt_ids
from onecard.runtime.sample import Sampling
from onecard.windows import Pieces, Reading

PROMPT, SAMPLED = "The function returns", 48
SMALL = 100_000_000
"""Parameters up to which a proof takes seconds."""
DOCUMENTS = Reading(documents="<|endoftext|>", limit=32)


def needed(source: Source) -> int:
    """Bytes of two dense models of a size in float32, and what reading them takes."""
    return 2 * 4 * parameter_count(source.spec) + (1 << 30)


def is_small(source: Source, memory: int | None) -> bool:
    """A proof of models of this size is quick, fits beside what else there is, and is possible."""
    if find_spec("torch") is None or parameter_count(source.spec) > SMALL:
        return False
    return needed(source) < (available_memory() if memory is None else memory)


def check(source: Source, text: Path | None, memory: int | None) -> None:
    """BadRequest where no proof of what is made of a model can be made on a text, under a cap."""
    if find_spec("torch") is None:
        raise BadRequest("a proof needs torch, which is not installed",
                         do="--no-prove, or pip install 'onecard[compress]'")  # fmt: skip
    if memory is not None and needed(source) > memory:
        raise BadRequest(f"a proof does not fit into {format_size(memory)}",
                         f"it takes {format_size(needed(source))}", "--no-prove, or raise --memory"
        )  # fmt: skip
    words, reading = _words(text)
    next(iter(Pieces(source.tokenizer(), words, reading, source.spec.max_context)))


def _words(text: Path | None) -> tuple[str, Reading]:
    """The text of a proof and how it is read."""
    return read_text(text, "held_out.txt"), DOCUMENTS if text is None else Reading()


def sample(
    runner: Runner, tokenizer: Tokenizer, prompt: str = PROMPT, tokens: int = SAMPLED
) -> Result:
    """The greedy continuation of a prompt."""
    ids = prompt_ids(tokenizer, prompt)
    room = max(1, min(tokens, runner.max_context - len(ids)))
    return complete(runner, tokenizer, ids, Sampling(room, ignore_eos=True))


def prove(
    original: str | Path, result: Path, report: Report, text: Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> Report:  # fmt: skip
    """`report` with perplexity before and after, KL, agreement and samples."""
    from onecard.checkpoint.load import compute_dtype, load_model
    from onecard.runtime.reference import TorchExecutor, TorchScorer

    dtype = compute_dtype(Source(original), "auto")
    dense, made = load_model(original, dtype), load_model(result, dtype)
    words, reading = _words(text)
    scorer = TorchScorer(dense)
    before = evaluate(scorer, words, reading, progress=progress)
    after = evaluate(TorchScorer(made), words, reading, scorer, progress=progress)
    rows = [
        Row.of("model", "perplexity", after.value("perplexity"), before.value("perplexity")),
        Row.of("model", "kl", after.value("kl")),
        Row.of("model", "top1_agreement", after.value("top1_agreement")),
    ]
    notes = [(f"sample: {name}", PROMPT + sample(TorchExecutor(model), model.tokenizer).text)
             for name, model in (("original", dense), ("compressed", made))]  # fmt: skip
    name = text.name if text else "the shipped held-out text"
    notes += [(title, f"{name}: {said}") for title, said in after.notes]
    return replace(report, rows=(*report.rows[:3], *rows, *report.rows[3:]),
                    notes=(*report.notes, *notes))  # fmt: skip
