"""One training loop whose loss is an argument: recovery, QAT and distillation differ in nothing else.

Step s takes the windows that (seed, s) names (every epoch all of them, in an order of its own), adds up
their gradient in `accumulate` pieces, clips its norm, and moves the parameters by AdamW (Loshchilov and
Hutter, arXiv 1711.05101) or, for matrices of blocks, by Muon with AdamW's step size (Liu et al., arXiv
2502.16982). With f the share of the steps or of the minutes that are gone,

    rate(f) = rate * min(1, f / warmup, (1 - f) / decay)

Parameters and moments are float32; `bf16` multiplies in bfloat16 where the processor has units for it.

What is kept is one safetensors file, written by rename: parameters, moments, the step, the losses and a
key of what is being trained. It is written between the loss of a step and its update, so what it holds
has been seen to give a finite loss. A run that was killed goes on from there and, with a number of steps,
ends in the same bits. A loss that is no number ends the work: the parameters go back to what was kept.

Memory: 16 bytes per trained parameter (itself, gradient, two moments; 4 more for the copy that is kept
without a file), and the activations of
batch / accumulate windows, of which `checkpointing` keeps one hidden state per block.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onecard.calibrate.data import Calibration, calibration_ids, digest
from onecard.calibrate.walk import Progress
from onecard.checkpoint.load import as_array
from onecard.checkpoint.shards import fresh, pread, read_header, write_file
from onecard.checkpoint.text import check_vocabulary, read_text
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest, FailedWork
from onecard.core.report import Row
from onecard.kernels.reference import DTYPES

STATE = "training.safetensors"
BETAS = (0.9, 0.95)
MOST_STEPS, MOST_MINUTES = 10**9, 365 * 24 * 60
SMALLEST_BF16 = 1 << 21
"""Parameters below which converting to bfloat16 costs more than multiplying in it saves."""

Loss = Callable[[Tensor], Tensor]
"""Windows of ids [B, T] -> the scalar that falls."""


@dataclass(frozen=True)
class Training:
    """How long, on how much, how fast. `minutes`, where given, count instead of `steps`."""

    steps: int = 200
    minutes: float | None = None
    batch: int = 8
    length: int = 256
    accumulate: int = 1
    rate: float = 3e-4
    warmup: float = 0.05
    decay: float = 0.5
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    checkpointing: bool = False
    save_minutes: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise BadRequest(f"{self.steps} steps of training", do=f"1 to {MOST_STEPS} steps")
        if self.minutes is not None and not 0 < self.minutes <= MOST_MINUTES:
            raise BadRequest(f"{self.minutes:g} minutes of training",
                             do=f"above 0, up to {MOST_MINUTES} (a year)")  # fmt: skip
        if not (1 <= self.batch <= 1 << 16 and 2 <= self.length <= 1 << 20):
            raise BadRequest(f"batches of {self.batch} windows of {self.length} tokens",
                             do="1 to 65536 windows of 2 to 1048576 tokens")  # fmt: skip
        if not 1 <= self.accumulate <= self.batch:
            raise BadRequest(f"a batch of {self.batch} windows in {self.accumulate} pieces",
                             do="accumulate is at most batch")  # fmt: skip
        if not (0 < self.rate <= 1 and self.clip > 0):
            raise BadRequest(f"rate {self.rate}, clip {self.clip}",
                             do="rate in (0, 1], clip above 0")  # fmt: skip
        if not 0 <= self.rate * self.weight_decay < 1:
            raise BadRequest(f"weight_decay {self.weight_decay} at a rate of {self.rate}",
                             do="rate * weight_decay, what an update takes off, lies in [0, 1)")  # fmt: skip
        if not (0 <= self.warmup < 1 and 0 <= self.decay <= 1 and self.save_minutes >= 0):
            raise BadRequest(f"warmup {self.warmup}, decay {self.decay}",
                             do="both are shares of the training, warmup below 1")  # fmt: skip

    def rate_at(self, gone: float) -> float:
        """The learning rate when the share `gone` of the training is over."""
        up = gone / self.warmup if self.warmup else 1.0
        down = (1 - gone) / self.decay if self.decay else 1.0
        return self.rate * max(0.0, min(1.0, up, down))


@dataclass(frozen=True)
class Course:
    """What a training was: its losses step by step, its seconds, tokens seen."""

    losses: tuple[float, ...]
    seconds: float
    tokens: int

    def rows(self, where: str) -> list[Row]:
        """Loss at the start and at the end (means of a tenth of the steps), before being the start's."""
        tenth = max(1, len(self.losses) // 10)
        first = sum(self.losses[:tenth]) / tenth
        last = sum(self.losses[-tenth:]) / tenth
        return [Row(where, "training_loss", last, "", first),
                Row(where, "training_steps", len(self.losses)),
                Row(where, "training_tokens", self.tokens),
                Row(where, "training_seconds", round(self.seconds, 2), "s")]  # fmt: skip


# Windows ------------------------------------------------------------------------------------------


def training_ids(
    tokenizer: Tokenizer | None,
    path: Path | None,
    settings: Training,
    vocab_size: int,
    documents: str | None = None,
) -> Tensor:
    """All windows [n, length] of a text that the training can use. BadRequest where they are too few.

    `documents` separates the documents of a text: each is stripped and begins with BOS, as models have
    learned it, and windows are cut from them one after the other.
    """
    wanted = 1 << 16 if settings.minutes is not None else settings.steps * settings.batch
    wanted = min(max(wanted, settings.batch), 1 << 16)
    given = path is not None and path.suffix == ".json"
    if documents is None or tokenizer is None or given:
        ids = calibration_ids(tokenizer, path, Calibration(wanted, settings.length), vocab_size)
        return checked_ids(ids, settings)
    if not documents:
        raise BadRequest("documents cannot be separated by nothing",
                         do="give what stands between them, <|endoftext|> say")  # fmt: skip
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    row: list[int] = []
    for text in read_text(path).split(documents):
        if text.strip():
            row += first + tokenizer.encode(text.strip())
    check_vocabulary(row, vocab_size)
    count = len(row) // settings.length
    return checked_ids(
        torch.tensor(row[: count * settings.length]).view(-1, settings.length), settings
    )


def checked_ids(ids: Tensor, settings: Training) -> Tensor:
    """Windows cut to the length that is trained on. BadRequest where they do not fill one batch."""
    if ids.shape[1] > settings.length:
        pieces = ids.shape[1] // settings.length
        ids = ids[:, : pieces * settings.length].reshape(-1, settings.length)
    if len(ids) < settings.batch:
        raise BadRequest(
            f"the training text gives {len(ids)} windows of {ids.shape[1]} tokens, "
            f"one step needs {settings.batch}",
            do="give more samples, a longer text, shorter windows or smaller batches",
        )
    return ids


def batch_of(ids: Tensor, step: int, settings: Training) -> Tensor:
    """The windows of a step [batch, T]."""
    rows = []
    for number in range(step * settings.batch, (step + 1) * settings.batch):
        epoch, at = divmod(number, len(ids))
        rows.append(_order(settings.seed + epoch, len(ids))[at])
    return ids[torch.tensor(rows)]


@lru_cache(maxsize=2)
def _order(seed: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


# The loop -----------------------------------------------------------------------------------------


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    ids: Tensor,
    settings: Training,
    *,
    settle: Callable[[], None] = lambda: None,
    folder: Path | None = None,
    key: Mapping[str, Any] | None = None,
    adopt: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> Course:
    """Lower `loss` of the windows `ids` [n, T]. `settle` is called behind every update.

    With a folder the state lies there and a second call goes on from it; `adopt` goes on also where the
    settings differ (a lower rate, more steps). FailedWork where the loss is no number.
    """
    optimizers = _optimizers(parameters, settings)
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    what = {"ids": digest(ids), "optimizer": settings.optimizer, "parameters": shapes}
    how = {**asdict(settings), "save_minutes": None, "threads": torch.get_num_threads()}
    facts = {"what": {**(key or {}), **what}, "how": how}
    facts = json.loads(json.dumps(facts))
    kept = _Kept(None if folder is None else folder / STATE, parameters, optimizers, facts)
    losses, before = kept.recall(adopt)
    known = len(losses)
    began = saved = time.monotonic()
    limit = None if settings.minutes is None else 60 * settings.minutes
    bf16 = computes_bf16(settings.dtype, sum(p.numel() for p in parameters.values()))
    while True:
        step, seconds = len(losses), before + time.monotonic() - began
        gone = step / settings.steps if limit is None else seconds / limit
        if gone >= 1:
            break
        batch = batch_of(ids, step, settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = _gradient(loss, batch, settings.accumulate, parameters)
        norm = nn.utils.clip_grad_norm_(parameters.values(), settings.clip)
        if not (math.isfinite(value) and bool(torch.isfinite(norm))):
            raise kept.no_number(losses, settings)
        if time.monotonic() - saved >= 60 * settings.save_minutes:
            kept.keep(losses, seconds)
            saved = time.monotonic()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.rate_at(gone)
            optimizer.step()
        settle()
        losses.append(value)
        told = f"step {step + 1}, loss {value:.3f}"
        if limit is None:
            progress(step + 1, settings.steps, told)
        else:
            progress(int(min(seconds, limit)), int(limit), told)
    for parameter in parameters.values():
        parameter.grad = None
    if step > known:  # no loss so far has seen what the last update made
        piece = batch_of(ids, step, settings).tensor_split(settings.accumulate)[0]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if not math.isfinite(loss(piece).item()):
                raise kept.no_number(losses, settings)
    kept.keep(losses, seconds)
    return Course(tuple(losses), seconds, len(losses) * settings.batch * ids.shape[1])


def computes_bf16(dtype: str, count: int) -> bool:
    """Whether products of `count` parameters are made in bfloat16."""
    if dtype == "auto":
        return count >= SMALLEST_BF16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == "bf16"


def _gradient(
    loss: Loss, batch: Tensor, pieces: int, parameters: Mapping[str, nn.Parameter]
) -> float:
    """Leaves the gradient of the mean loss over a batch in `.grad`; returns that loss."""
    for parameter in parameters.values():
        parameter.grad = None
    total = 0.0
    for piece in batch.tensor_split(pieces):
        value = loss(piece) * (len(piece) / len(batch))
        value.backward()  # type: ignore[no-untyped-call]
        total += value.item()
    return total


def _optimizers(
    parameters: Mapping[str, nn.Parameter], settings: Training
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks where it was asked for, AdamW for the rest."""
    muon = {
        name for name, p in parameters.items()
        if settings.optimizer == "muon" and name.startswith("blocks.") and p.ndim == 2
    }  # fmt: skip
    rest = [p for name, p in parameters.items() if name not in muon]
    decayed, plain = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay},
              {"params": plain, "weight_decay": 0.0}]  # fmt: skip
    made: list[torch.optim.Optimizer] = []
    if rest:
        made.append(torch.optim.AdamW([g for g in groups if g["params"]], settings.rate, BETAS,
                                      fused=True))  # fmt: skip
    if muon:
        made.append(torch.optim.Muon([parameters[name] for name in parameters if name in muon],
                                     settings.rate, settings.weight_decay,
                                     adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    return made


class _Kept:
    """The last state that was seen to be good: in a file, or without one the parameters in memory."""

    def __init__(
        self,
        path: Path | None,
        parameters: Mapping[str, nn.Parameter],
        optimizers: list[torch.optim.Optimizer],
        facts: dict[str, Any],
    ) -> None:
        self.path, self.parameters, self.facts = path, parameters, facts
        self.optimizers = optimizers
        self.names = {id(p): name for name, p in parameters.items()}
        self.step = 0
        self.good = {name: p.detach().clone() for name, p in parameters.items()}

    def recall(self, adopt: bool) -> tuple[list[float], float]:
        """Losses so far and seconds spent, the state put in place; nothing where none was kept."""
        if self.path is None or not self.path.is_file():
            return [], 0.0
        arrays = _read(self.path)
        facts = json.loads(bytes(arrays["key"].tolist()))
        for part in ("what", "how"):
            old, new = facts[part], self.facts[part]
            differing = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
            if differing and (part == "what" or not adopt):
                raise BadRequest(
                    f"{self.path.parent} holds unfinished training of another kind",
                    "it differs in: " + ", ".join(differing),
                    "--force throws it away" + ("" if part == "what" else "; --resume goes on from "
                                                "it with the new settings"),
                )  # fmt: skip
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(arrays[f"weights.{name}"])
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = self.names[id(parameter)]
                for moment in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
                    if f"{moment}.{name}" in arrays:
                        optimizer.state[parameter][moment] = arrays[f"{moment}.{name}"]
        self._remember(len(arrays["losses"]))
        return arrays["losses"].tolist(), float(arrays["seconds"][0])

    def keep(self, losses: list[float], seconds: float) -> None:
        """Remember the parameters as they are now."""
        for name, parameter in self.parameters.items():
            if not bool(torch.isfinite(parameter).all()):
                back = self.restore()
                raise FailedWork(f"training made {name} infinite",
                                 do=f"the weights of step {back} are kept; lower the rate")  # fmt: skip
        self._remember(len(losses))
        if self.path is None:
            return
        arrays: dict[str, Tensor] = {f"weights.{name}": p for name, p in self.parameters.items()}
        for optimizer in self.optimizers:
            for of, state in optimizer.state.items():
                name = self.names[id(of)]
                arrays |= {f"{moment}.{name}": value for moment, value in state.items()}
        arrays["losses"] = torch.tensor(losses, dtype=torch.float64)
        arrays["seconds"] = torch.tensor([seconds], dtype=torch.float64)
        arrays["key"] = torch.tensor(list(json.dumps(self.facts).encode()), dtype=torch.uint8)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, {name: as_array(tensor) for name, tensor in arrays.items()})

    def no_number(self, losses: list[float], settings: Training) -> FailedWork:
        """What is told of a loss that is no number, once the kept parameters are back."""
        back = self.restore()
        if not losses:
            return FailedWork("the loss is no number before the first update",
                              do="look at the model's weights, and at those in the loss")  # fmt: skip
        return FailedWork(
            f"the loss is no number at step {len(losses)}",
            f"the last losses were {', '.join(f'{x:.4g}' for x in losses[-3:])}",
            f"the weights of step {back} are kept; lower the rate ({settings.rate:g})",
        )

    def restore(self) -> int:
        """Put the kept parameters back; the step they are of."""
        kept: Mapping[str, Tensor] = self.good
        if self.path is not None and self.path.is_file():
            arrays = _read(self.path)
            kept = {name: arrays[f"weights.{name}"] for name in self.parameters}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(kept[name])
        return self.step

    def _remember(self, step: int) -> None:
        self.step = step
        if self.path is not None:
            self.good = {}
            return
        for name, parameter in self.parameters.items():
            self.good[name].copy_(parameter.detach())


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a state."""
    return {
        name: torch.frombuffer(pread(entry.path, entry.begin, fresh(entry.nbytes)),
                               dtype=DTYPES[entry.dtype]).view(entry.shape)
        if entry.nbytes else torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        for name, entry in read_header(path).items()
    }  # fmt: skip
