"""Trains the demo model: a Llama of 7.3 million parameters, from nothing, on two CPU cores.

The network is onecard's own. What is chosen here:

* Muon for the matrices of the blocks, AdamW for the embedding (which is also the head) and the
  norms.
* Warm-up, a long stable phase, then a linear decay to zero over the last `decay` of all steps. With
  `--minutes` the decay begins when that share of the time is left, so a budget is kept without
  knowing the speed; with `--steps` it begins at a known step, and a run is reproducible.
* Windows of 256 tokens, and of 512 in the second half of the decay: at 512 attention is half of the
  work, and most documents are shorter.
* One torch thread per worker, and a worker per core that takes whole windows: the tensors of a
  thousand tokens stay in the core's own cache, and nobody waits at the end of every operation for
  the other core. Gradients are summed in the order of the windows. Freed memory is kept by the
  process (mallopt), because page faults would otherwise cost more than the arithmetic.
* The batch of step s is a function of (seed, s): documents are packed with <|endoftext|> between,
  cut into windows, and every epoch visits all windows in an order of its own. With the optimizers
  in the checkpoint, `--resume` alone continues exactly; with a longer time or more steps a finished
  run goes on from the peak rate. `--start FOLDER` takes the weights of a shipped folder instead, and
  `--first` says how many steps they have seen, so that the order of the batches goes on.

    python scripts/train_demo_model.py CORPUS RUN --minutes 80

reads what demo_corpus.py wrote, keeps checkpoint, log and tokens in RUN, and writes RUN/shipped
(the model folder, the two texts, the notice) and RUN/loss.svg.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from onecard.nn.families import family_of, spec_of
from onecard.nn.transformer import Transformer, initialize

END = "<|endoftext|>"
PROMPTS = ("The function returns", "When you create a new database,", "In statistics, the mean")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "use_cache": True,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Settings:
    batch: int = 4096  # tokens per step
    length: int = 256  # of a window at first
    last_length: int = 512  # and in the second half of the decay
    muon: float = 0.008
    adam: float = 0.004
    weight_decay: float = 0.05  # of the matrices
    warmup: int = 60
    decay: float = 0.4  # share of all steps
    clip: float = 1.0
    seed: int = 1
    workers: int = 2
    share: int = 1024  # tokens that a worker takes at a time
    evaluate_every: int = 200
    save_every: int = 100


# ---- text to batches ---------------------------------------------------------------------------


def documents(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split(f"\n{END}\n")


def train_tokenizer(texts: list[str], path: Path) -> Tokenizer:
    """Byte-level BPE: whatever the text, its bytes have tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # prompts begin as documents do
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """One long row of tokens, each document opened by <|endoftext|>."""
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    rows = (token for e in encoded for token in (end, *e.ids))
    return np.fromiter(rows, dtype=np.uint16)


def prepare(corpus: Path, run: Path) -> tuple[Tokenizer, Tensor, Tensor]:
    """Tokenizer, training tokens, held-out tokens; made once."""
    stored, train = run / "tokenizer.json", run / "train.npy"
    if not train.exists():
        run.mkdir(parents=True, exist_ok=True)
        texts = documents(corpus / "train.txt")
        tokenizer = train_tokenizer(texts, stored)
        np.save(train, encode(tokenizer, texts))
    tokenizer = Tokenizer.from_file(str(stored))
    held_out = encode(tokenizer, documents(corpus / "held_out.txt"))
    return tokenizer, as_tensor(np.load(train)), as_tensor(held_out)


def as_tensor(row: np.ndarray) -> Tensor:
    return torch.from_numpy(row.astype(np.int32))


def batch_of(step: int, length: int, tokens: Tensor, settings: Settings) -> Tensor:
    """The windows of one step, [batch / length, length + 1]."""
    count = (len(tokens) - 1) // length
    rows = []
    for i in range(step * settings.batch // length, (step + 1) * settings.batch // length):
        epoch, at = divmod(i, count)
        start = order(settings.seed + epoch, count)[at] * length
        rows.append(tokens[start : start + length + 1])
    return torch.stack(rows).long()


@cache
def order(seed: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


# ---- the loss and its gradient -----------------------------------------------------------------


def loss_of(model: Transformer, rows: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


class Workers:
    """Threads that each take a few sequences through the whole network and back."""

    def __init__(self, model: Transformer, settings: Settings) -> None:
        self.model, self.share = model, settings.share
        self.parameters = list(model.parameters())
        self.pool = ThreadPoolExecutor(settings.workers)

    def shares(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(max(1, self.share // (rows.shape[1] - 1)))

    def gradient(self, batch: Tensor) -> float:
        """Leaves the mean gradient in `.grad`; returns the mean loss."""

        def part(rows: Tensor) -> tuple[float, tuple[Tensor, ...]]:
            loss = loss_of(self.model, rows) * (len(rows) / len(batch))
            return loss.item(), torch.autograd.grad(loss, self.parameters)

        losses, gradients = zip(*self.pool.map(part, self.shares(batch)), strict=True)
        for parameter, pieces in zip(self.parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(pieces).sum(0)
        return sum(losses)

    def evaluate(self, tokens: Tensor, length: int) -> float:
        """Mean nats per token over whole windows, each without the past of the one before."""

        def part(rows: Tensor) -> float:
            with torch.no_grad():
                return loss_of(self.model, rows).item() * len(rows)

        count = (len(tokens) - 1) // length
        rows = tokens[: count * length + 1].long().unfold(0, length + 1, length)
        return sum(self.pool.map(part, self.shares(rows))) / count


# ---- training ----------------------------------------------------------------------------------


def optimizers(model: Transformer, settings: Settings) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2]
    rest = [p for n, p in named.items() if not (n.startswith("blocks.") and p.ndim == 2)]
    return [
        torch.optim.Muon(
            matrices,
            lr=settings.muon,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=settings.adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, first: int, total: int | None, settings: Settings) -> tuple[float, int]:
    """(factor of the peak rate, window length); total is unknown until the decay begins."""
    warm = (step - first + 1) / settings.warmup
    left = 1.0 if total is None else (total - step) / (settings.decay * (total - first))
    return min(1.0, warm, left), settings.length if left > 0.5 else settings.last_length


class Run:
    """The state of a training run, on disk and in memory."""

    def __init__(
        self, folder: Path, model: Transformer, settings: Settings, first: int = 0
    ) -> None:
        self.folder, self.model, self.settings = folder, model, settings
        self.optimizers = optimizers(model, settings)
        self.peaks = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.step, self.seconds, self.smooth = first, 0.0, 0.0
        self.first = first
        self.total: int | None = None

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "smooth": self.smooth,
            "total": self.total,
            "first": self.first,
        }
        temporary = self.folder / "checkpoint.pt.part"
        torch.save(state, temporary)
        temporary.replace(self.folder / "checkpoint.pt")

    def load(self) -> None:
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.total, self.first = state["step"], state["total"], state["first"]
        self.seconds, self.smooth = state["seconds"], state["smooth"]
        log = self.folder / "log.jsonl"
        log.touch()
        kept = (x for x in log.read_text().splitlines() if json.loads(x)["step"] <= self.step)
        log.write_text("".join(f"{line}\n" for line in kept))

    def log(self, **row: float) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.seconds), **row})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as f:
            f.write(line + "\n")

    def train(self, train: Tensor, held_out: Tensor, minutes: float | None) -> None:
        """Until `total`; if that is not known, it is set when the decay's share of time is left."""
        s, workers = self.settings, Workers(self.model, self.settings)
        while self.total is None or self.step < self.total:
            began = time.monotonic()
            if self.total is None and minutes and self.seconds > minutes * 60 * (1 - s.decay):
                self.total = self.first + round((self.step - self.first) / (1 - s.decay))
                self.log(total=self.total)
            factor, length = rate(self.step, self.first, self.total, s)
            for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * factor
            loss = workers.gradient(batch_of(self.step, length, train, s))
            torch.nn.utils.clip_grad_norm_(workers.parameters, s.clip)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
            self.smooth = 0.95 * self.smooth + 0.05 * loss if self.smooth else loss
            last = self.step == self.total
            if self.step % s.evaluate_every == 0 or last:
                held = workers.evaluate(held_out, s.last_length)
                self.log(train=round(self.smooth, 4), held_out=round(held, 4))
            self.seconds += time.monotonic() - began
            if self.step % s.save_every == 0 or last:
                self.save()


# ---- what is shipped ---------------------------------------------------------------------------


def stored_places(model: Transformer) -> Iterator[tuple[str, str]]:
    """(the checkpoint's name, the network's name) of every weight; a tied head is not stored."""
    family = family_of(CONFIG)
    for index in (None, *range(model.spec.num_layers)):
        for path, stored in family.modules(model.spec, index):
            if path == "tail.head" or path.endswith(("q_norm", "k_norm")):
                continue
            where = path if index is None else f"blocks.{index}.{path}"
            yield f"{stored.name}.weight", f"{where}.weight"


def start_from(model: Transformer, folder: Path) -> None:
    """The weights of a shipped folder, in place."""
    stored = load_file(folder / "model" / "model.safetensors")
    with torch.no_grad():
        for name, path in stored_places(model):
            model.get_parameter(path).copy_(stored[name])


def tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's names and bfloat16 values."""
    for name, path in stored_places(model):
        yield name, model.get_parameter(path).detach().to(torch.bfloat16).contiguous()


def ship(model: Transformer, corpus: Path, run: Path, out: Path) -> None:
    """The folder that lies in the package, complete or not there."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    folder = part / "model"
    folder.mkdir(parents=True)
    save_file(dict(tensors(model)), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    shutil.copy(run / "tokenizer.json", folder)
    small = {"bos_token_id": 0, "eos_token_id": 0}
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", small),
        ("tokenizer_config.json", names),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("held_out.txt", "calibration.txt", "NOTICE"):
        shutil.copy(corpus / name, part)
    old = out.with_name(out.name + ".old")
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def sample(model: Transformer, tokenizer: Tokenizer, prompt: str, count: int, heat: float) -> str:
    """`count` tokens behind a prompt, seeded by it."""
    generator = torch.Generator().manual_seed(len(prompt))
    ids = tokenizer.encode(prompt).ids
    for _ in range(count):
        chances = torch.softmax(model(torch.tensor([ids]))[0, -1].float() / heat, -1)
        token = int(torch.multinomial(chances, 1, generator=generator))
        if token == CONFIG["eos_token_id"]:
            break
        ids.append(token)
    return tokenizer.decode(ids)


def curve(log: Path) -> str:
    """The held-out loss over the steps as a small SVG."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    points = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    width, height, left, bottom = 560, 260, 44, 34
    most = points[-1][0]
    low, high = (round(f(v for _, v in points) * 2 + d) / 2 for f, d in ((min, -0.5), (max, 0.5)))

    def x(step: float) -> float:
        return left + (width - left - 10) * step / most

    def y(value: float) -> float:
        return 10 + (height - bottom - 10) * (high - value) / (high - low)

    path = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in points)
    lines, value = [], low
    while value <= high:
        at = f"{y(value) + 4:.1f}"
        lines.append(f'<path d="M{left} {y(value):.1f}H{width - 10}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 6}" y="{at}" text-anchor="end">{value:.1f}</text>')
        value += 0.5
    for step in (0, most // 2, most):
        where = f'x="{x(step):.0f}" y="{height - 16}"'
        anchor = "end" if step == most else "middle"
        lines.append(f'<text {where} text-anchor="{anchor}">{step}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11" fill="#555">\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n'
        + "\n".join(lines)
        + f'\n<polyline points="{path}" fill="none" stroke="#26c" stroke-width="1.6"/>\n'
        f'<text x="{width // 2}" y="{height - 2}" text-anchor="middle">'
        "held-out loss, nats per token, over training steps</text>\n</svg>\n"
    )


def keep_freed_memory() -> None:
    """glibc: no mmap per tensor, no giving back. Where the call is missing nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
    max_maps, trim_threshold, top_pad = -4, -1, -2  # as malloc.h names them, M_MMAP_MAX and so on
    mallopt(max_maps, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start", type=Path, help="a shipped folder to begin from")
    parser.add_argument("--first", type=int, default=0, help="the steps it has seen")
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    if given.minutes is None and given.steps is None and not given.resume:
        parser.error("how long? --minutes N or --steps N")
    settings = Settings(**{name: getattr(given, name) for name in asdict(Settings())})
    keep_freed_memory()
    tokenizer, train, held_out = prepare(given.corpus, given.run)
    model = Transformer(spec_of(CONFIG))
    initialize(model, settings.seed)
    if given.start:
        start_from(model, given.start)
    run = Run(given.run, model, settings, given.first)
    if given.resume:
        run.load()
    else:
        (given.run / "log.jsonl").unlink(missing_ok=True)
    if given.minutes or given.steps:  # a finished run goes on, from the peak rate again
        run.total = given.steps
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(train):,} tokens", flush=True)
    run.train(train, held_out, given.minutes)
    ship(model, given.corpus, given.run, given.run / "shipped")
    (given.run / "loss.svg").write_text(curve(given.run / "log.jsonl"))
    for prompt in PROMPTS:
        print("\n" + sample(model, tokenizer, prompt, 80, 0.7))


if __name__ == "__main__":
    main()
