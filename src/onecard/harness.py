"""An adapter for lm-evaluation-harness, so that its tasks can be run on any onecard folder.

    pip install lm-eval
    python -c "import onecard.harness; ..."      see docs/evaluation.md

`OnecardLM` answers the three kinds of requests the harness makes: log likelihoods of continuations,
rolling log likelihoods of whole texts, and greedy or sampled generation until a stop string. The
harness is imported here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest
from onecard.evaluate import Reading, cut, log_likelihoods, tally
from onecard.runtime.engine import Runner, complete, prompt_ids
from onecard.runtime.sample import Sampling
from onecard.runtime.score import Scorer

LONGEST = 32768
"""Ids of a context, at most."""
TOGETHER = 64
"""Requests that are read together."""


@register_model("onecard")
class OnecardLM(LM):
    """`model="onecard", model_args="folder=DIR"` in the harness; `engine=reference,dtype=bf16` for torch."""

    def __init__(
        self, folder: str | Path, engine: str = "native", dtype: str | None = None, **ignored: Any
    ) -> None:
        super().__init__()
        self.scorer, self.runner = _opened(folder, engine, dtype)
        self.tokenizer, self.context = self.scorer.tokenizer, self.scorer.max_context

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it the greedy choice) for each request."""
        found: list[tuple[float, bool]] = []
        pairs = [request.args for request in requests]
        for start in range(0, len(pairs), TOGETHER):
            found += log_likelihoods(self.scorer, pairs[start : start + TOGETHER])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each whole text, every token predicted once, in windows of the model's context.

        BOS is in front of each; where there is none, windows share a token, so that only the first
        token of the text has no context.
        """
        reading = Reading(self.context, self.context - 1, bos="each", keep_tail=True)
        found = []
        for request in requests:
            (text,) = request.args
            pieces, _ = cut(self.tokenizer, text, reading, self.context)
            found.append(-sum(tally(self.scorer, [piece], None).nats for piece in pieces))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations that end before the first stop string of their request."""
        found = []
        for request in requests:
            text, settings = request.args
            stop = settings.get("until") or ()
            ids = prompt_ids(self.tokenizer, text)
            new = min(int(settings.get("max_gen_toks", 256)), self.context // 2)
            temperature = (
                float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
            )
            sampling = Sampling(
                new, temperature, stop=(stop,) if isinstance(stop, str) else tuple(stop)
            )
            prompt = ids[-(self.context - new) :]
            found.append(complete(self.runner, self.tokenizer, prompt, sampling).text)
        return found


def _opened(folder: str | Path, engine: str, dtype: str | None) -> tuple[Scorer, Runner]:
    """What reads and what generates."""
    if engine == "reference":
        from onecard.checkpoint.load import load_model
        from onecard.runtime.reference import TorchExecutor, TorchScorer

        model = load_model(folder, dtype)
        return TorchScorer(model), TorchExecutor(model)
    if engine != "native" or dtype is not None:
        raise BadRequest(f"engine {engine} with dtype {dtype}", do="engine=reference takes a dtype")
    from onecard.checkpoint.source import Source
    from onecard.runtime.cpu import CpuSettings, CpuStepper
    from onecard.runtime.scheduler import Engine, Limits
    from onecard.runtime.score import NativeScorer

    source = Source(folder)
    tokenizer: Tokenizer = source.tokenizer()
    stepper = CpuStepper(source, CpuSettings(context=min(source.spec.max_context, LONGEST)))
    # They take turns on one pool: what the scorer writes must not be taken for what the engine knew.
    return NativeScorer(stepper, tokenizer), Engine(stepper, tokenizer, Limits(reuse=False))
