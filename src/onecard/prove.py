"""The proof that goes with a result: quality against the original on held-out text, and a sample of each.

Both models are in memory for it, so it is made by itself for small models only, and for larger ones
when it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from onecard.checkpoint.text import read_text
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.device import available_memory
from onecard.core.report import Report, Row
from onecard.evaluate import Progress, Reading, evaluate
from onecard.runtime.engine import Result, Runner, complete, prompt_ids
from onecard.runtime.sample import Sampling

PROMPT, SAMPLED = "The function returns", 48
SMALL = 100_000_000
"""Parameters up to which a proof takes seconds."""
DOCUMENTS = Reading(documents="<|endoftext|>", limit=32)


def is_small(parameters: int, memory: int | None) -> bool:
    """A proof of two dense models of this size is quick, fits beside what else there is, and is possible."""
    if find_spec("torch") is None:
        return False
    needed = 2 * 4 * parameters + (1 << 30)
    return parameters <= SMALL and needed < (available_memory() if memory is None else memory)


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
    from onecard.checkpoint.load import load_model
    from onecard.runtime.reference import TorchExecutor, TorchScorer

    dense, made = load_model(original), load_model(result)
    words = read_text(text, "held_out.txt")
    reading = DOCUMENTS if text is None else Reading()
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
