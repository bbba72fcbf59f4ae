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

from onecard.checkpoint.load import load_model
from onecard.evaluate import Reading, cut, log_likelihood, tally
from onecard.runtime.engine import complete, prompt_ids
from onecard.runtime.reference import TorchExecutor
from onecard.runtime.sample import Sampling


@register_model("onecard")
class OnecardLM(LM):
    """`model="onecard", model_args="folder=DIR,dtype=bf16"` in the harness."""

    def __init__(self, folder: str | Path, dtype: str | None = None, **ignored: Any) -> None:
        super().__init__()
        self.model = load_model(folder, dtype)
        self.executor = TorchExecutor(self.model)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it the greedy choice) for each request."""
        pairs = (request.args for request in requests)
        return [
            log_likelihood(self.model, context, continuation) for context, continuation in pairs
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of each whole text, every token predicted once, in windows of the model's context.

        BOS is in front of each; where there is none, windows share a token, so that only the first
        token of the text has no context.
        """
        context = self.model.spec.max_context
        reading = Reading(context, context - 1, bos="each", keep_tail=True)
        found = []
        for request in requests:
            (text,) = request.args
            pieces, _ = cut(self.model.tokenizer, text, reading, context)
            found.append(-sum(tally(self.model, [piece], None).nats for piece in pieces))
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continuations that end before the first stop string of their request."""
        found = []
        for request in requests:
            text, settings = request.args
            stop = settings.get("until") or ()
            ids = prompt_ids(self.model.tokenizer, text)
            room = self.model.spec.max_context
            new = min(int(settings.get("max_gen_toks", 256)), room // 2)
            temperature = (
                float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
            )
            sampling = Sampling(
                new, temperature, stop=(stop,) if isinstance(stop, str) else tuple(stop)
            )
            prompt = ids[-(room - new) :]
            found.append(complete(self.executor, self.model.tokenizer, prompt, sampling).text)
        return found
