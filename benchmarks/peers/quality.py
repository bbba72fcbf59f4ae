"""Perplexity at equal bytes: our recipes against the field, one model, one calibration, one evaluator.

    python benchmarks/peers/quality.py --work DIR [--model FOLDER --text FILE --calibration FILE] [--check]

At about 4.25, 3.25 and 2.25 bits for a weight of the blocks, every method compresses the same model with the
same token ids, each peer with its own defaults in its own environment (made under `--work` on first use):

    llm-compressor   GPTQ, and AWQ at 4 bits        GPTQModel    GPTQ
    AutoRound        sign-gradient rounding         HQQ          without data, groups of 64 and 128
    llama.cpp        Q4_K_M, Q3_K_M, Q2_K with an importance matrix of the same tokens, as they are (table
                     of 6 bits) and with the table left alone as the others leave it
    papers           Wanda and SparseGPT written down plainly (sparse_reference.py), 50 % and 2:4

What a peer made is dequantized by the peer's own library into a folder in float32, and one evaluator
reads everything: ours, in torch and float32, documents of held-out text each in a context of its own. Bytes
are those of all tensors that are stored, embedding, head, norms, scales and zero points included (dense.py),
what a peer held in float32 for speed alone (`--dtype`) as in the model's own dtype; zeros of pruned matrices
are left out, and a bit per weight says where they are.

A peer is set beside the recipe of ours with the lowest perplexity among those that take no more bytes. What
was measured is kept under `--work` and not measured again while model, tokens, text and command stay the
same. `--check` ends with an error where a peer is ahead. Results: results/quality-MODEL.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cpu_driver
import dense
import gptq
import numpy as np
import torch

from onecard.calibrate.data import Calibration, calibration_ids
from onecard.checkpoint.load import load_model
from onecard.core.format import Dense, Sparse
from onecard.core.report import environment
from onecard.evaluate import evaluate
from onecard.passes import find_recipe, recipe_of, to_yaml
from onecard.passes.base import Recipe
from onecard.runtime.reference import TorchScorer
from onecard.windows import Reading

HERE = Path(__file__).resolve().parent
SHIPPED = HERE.parent.parent / "src" / "onecard" / "shipped"

PEERS = {
    "llmcompressor": gptq.PEERS[0],
    "gptqmodel": gptq.PEERS[1],
    "autoround": gptq.Peer("autoround", ("auto-round==0.16.1",), ""),
    "hqq": gptq.Peer("hqq", ("hqq==0.2.8.post1",), ""),
}
KINDS = {4: "Q4_K_M", 3: "Q3_K_M", 2: "Q2_K"}
RATES = {4: 2e-4, 3: 5e-4, 2: 1e-3, 0: 5e-4}
"""Of training around what was rounded: the coarser, the more there is to make good."""
GGUF = {
    "attention.q": "attn_q", "attention.k": "attn_k", "attention.v": "attn_v",
    "attention.o": "attn_output", "feed_forward.gate": "ffn_gate", "feed_forward.up": "ffn_up",
    "feed_forward.down": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class Entrant:
    """One method at one level: what makes its folder. `bits` 0: half of the weights out."""

    name: str
    bits: int
    peer: str = ""  # its environment; none: it runs here
    command: tuple[str | Path, ...] = ()  # behind MODEL TOKENS OUT
    recipe: Recipe | None = None  # ours

    @property
    def key(self) -> str:
        words = "".join(c if c.isalnum() else "-" for c in self.name)
        return f"{self.bits or 'sparse'}-{words}"


@dataclass(frozen=True)
class Measured:
    """What came of it."""

    name: str
    bits: int
    ours: bool
    bytes: int
    bits_per_weight: float
    perplexity: float
    kl: float
    seconds: float
    used: str = ""


@dataclass(frozen=True)
class Verdict:
    """A peer beside the best of ours that takes no more bytes; `plain` is the best that leaves the table."""

    peer: str
    bits: int
    bytes: int
    perplexity: float
    ours: str
    ours_bytes: int
    ours_perplexity: float
    plain: str
    plain_perplexity: float | None
    holds: bool


# ---- who takes part ----------------------------------------------------------------------------


def peers(group: int) -> list[Entrant]:
    """Every peer at every level; `group` 0 is one group per row."""
    found, common = [], ("--group", str(group))

    def add(name: str, bits: int, peer: str, script: str, *more: str | Path) -> None:
        found.append(Entrant(name, bits, peer, (HERE / script, "--bits", str(bits), *more)))

    for bits in (4, 3, 2):
        for size in (group, 2 * group) if group else (0,):
            label = f"HQQ, groups of {size}" if size else "HQQ"
            add(label, bits, "hqq", "quality_hqq.py", "--group", str(size))
        kind, script = KINDS[bits], (HERE / "quality_llamacpp.py", "--type", KINDS[bits])
        found.append(Entrant(f"llama.cpp {kind}", bits, "llamacpp", script))
        left = (*script, "--keep-table")
        found.append(Entrant(f"llama.cpp {kind}, table in 16 bits", bits, "llamacpp", left))
    for method in ("wanda", "sparsegpt"):
        for name, more in (("50 %", ()), ("2:4", ("--pattern", "2:4"))):
            words = ("--bits", "16", "--group", "0", "--method", method, *more)
            label = {"wanda": "Wanda", "sparsegpt": "SparseGPT"}[method]
            script = (HERE / "sparse_reference.py", *words)
            found.append(Entrant(f"{label} by its paper, {name}", 0, "", script))
    for bits in (4, 3, 2):
        add("GPTQModel", bits, "gptqmodel", "quality_gptqmodel.py", *common)
        add("llm-compressor GPTQ", bits, "llmcompressor", "quality_llmcompressor.py", *common)
    for bits in (4, 3, 2):
        add("AutoRound", bits, "autoround", "quality_autoround.py", *common)
    script, awq = "quality_llmcompressor.py", (*common, "--method", "awq")
    add("llm-compressor AWQ", 4, "llmcompressor", script, *awq)
    add("AutoRound, asymmetric", 2, "autoround", "quality_autoround.py", *common, "--asymmetric")
    return found


def ours(group: int) -> list[Entrant]:
    """Our recipes: shipped ones, the same in the peers' groups, and mixed bits with rounded tables.

    The means of the last are what fits into the bytes of the peers: of 4, 3 and 2 bits beside a table in 16,
    and of the K-quants.
    """
    shipped = {
        4: ("gptq-int4", "awq-int4", "hqq-int4", "gptq-nf4", "kmeans-4", "autoround-int4"),
        3: ("gptq-int3", "awq-int3", "gptaq-int3", "kmeans-3", "autoround-int3"),
        2: ("gptaq-int2-g32", "kmeans-2", "pq-8x4", "autoround-int2-g32"),
        0: ("wanda-50", "wanda-2of4", "sparsegpt-50", "sparsegpt-2of4"),
    }
    taught = {
        bits: {"distil": {"training": {"steps": 150, "batch": 8, "length": 256, "rate": rate}}}
        for bits, rate in RATES.items()
    }
    grid = {"group": group or None, "correct": 1.0, "sweeps": 1}
    spelled = f"g{group}" if group else "row"
    cheap, dear = list[Entrant](), list[Entrant]()

    def add(to: list[Entrant], name: str, bits: int, *passes: Any) -> None:
        to.append(
            Entrant(name, bits, recipe=recipe_of({"name": name, "passes": list(passes)}, name))
        )

    for bits in (4, 3, 2):
        first = {"gptq": {"bits": bits, **grid}}
        add(cheap, f"gptaq-int{bits}-{spelled}", bits, first)
        add(dear, f"gptaq-int{bits}-{spelled}, taught", bits, first, taught[bits])
        if bits > 2:
            first = {"mixed": {"mean": bits, "tried": 1024, **grid}}
            add(cheap, f"mixed-{bits}-{spelled}", bits, first)
    means = {5.7: 4, 4.7: 3, 3.75: 2, 2.85: 2}
    for mean, bits in means.items() if group else {7.1: 4, **means}.items():
        first = {"mixed": {"mean": mean, "tried": 1024, "correct": 1.0, "sweeps": 1}}
        chain = (first, {"tables": {"bits": 6}})
        add(cheap, f"mixed-{mean:g}, tables-6", bits, *chain)
        add(dear, f"mixed-{mean:g}, tables-6, taught", bits, *chain, taught[bits])
    for name, pattern in (("50 %", None), ("2:4", "2:4")):
        first = {"sparsegpt": {"share": 0.5, "pattern": pattern}}
        add(dear, f"sparsegpt, {name}, taught", 0, first, taught[0])
    found = [
        Entrant(name, b, recipe=find_recipe(name)) for b, names in shipped.items() for name in names
    ]
    slow = [e for e in found if e.name.startswith("autoround")]
    return [*cheap, *(e for e in found if e not in slow), *dear, *slow]


# ---- measuring ---------------------------------------------------------------------------------


class Measuring:
    """One model, its tokens and text, and what is kept of every entrant."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.model = asked, asked.model
        self.folder = asked.work / "quality" / asked.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.dense = load_model(self.model, "fp32")
        self.reference = TorchScorer(self.dense)
        self.text = asked.text.read_text(encoding="utf-8")
        if asked.characters:
            self.text = self.text[-asked.characters :]
        settings = Calibration(asked.samples, asked.length)
        vocabulary = self.dense.spec.vocab_size
        ids = calibration_ids(self.dense.tokenizer, asked.calibration, settings, vocabulary)
        self.ids, self.tokens = ids, self.folder / "tokens.json"
        self.tokens.write_text(json.dumps(ids.tolist()))
        self.whole = dense.stored(self.model, self.model)
        weights = [path.read_bytes() for path in sorted(self.model.glob("*.safetensors"))]
        facts = [*weights, self.tokens.read_bytes(), self.text.encode()]
        self.state = hashlib.sha256(b"".join(hashlib.sha256(f).digest() for f in facts)).hexdigest()

    def read(self, folder: Path | None) -> tuple[float, float]:
        """Perplexity, and KL from the original; None is the original itself."""
        scorer = self.reference if folder is None else TorchScorer(load_model(folder, "fp32"))
        reading = Reading(documents="<|endoftext|>", limit=self.asked.documents)
        said = evaluate(scorer, self.text, reading, None if folder is None else self.reference)
        kl = 0.0 if folder is None else float(said.value("kl"))
        return float(said.value("perplexity")), kl

    def measured(self, entrant: Entrant) -> Measured | None:
        """An entrant, from what is kept where nothing changed; None where nothing is kept and that is all."""
        out = self.folder / entrant.key
        command = [c.name if isinstance(c, Path) else c for c in entrant.command]
        command += self.held(entrant)
        if entrant.recipe:
            command = [to_yaml(entrant.recipe)]
        kept, key = out.with_suffix(".json"), [self.state, self.asked.documents, *command]
        if kept.is_file():
            found = json.loads(kept.read_text())
            if found["key"] == key:
                return Measured(**found["measured"])
        if self.asked.kept:
            return None
        for old in self.folder.glob(f"{entrant.key}*"):
            if old.is_dir() and old.name in (out.name, f"{out.name}-packed", f"{out.name}-plain"):
                shutil.rmtree(old)
        print(f"{entrant.bits or 'sparse'}: {entrant.name} ...", file=sys.stderr, flush=True)
        began = time.perf_counter()
        said = self.made(entrant, out)
        seconds = said.get("seconds", time.perf_counter() - began)
        perplexity, kl = self.read(out)
        size = said.get("bytes") or self.sparse_bytes(entrant)
        made = Measured(
            entrant.name, entrant.bits, entrant.recipe is not None, size,
            8 * size / self.dense.parameters, perplexity, kl, round(seconds, 1), said.get("used", ""),
        )  # fmt: skip
        kept.write_text(json.dumps({"key": key, "measured": asdict(made)}))
        for old in (f"{out.name}-packed", f"{out.name}-plain"):
            shutil.rmtree(self.folder / old, ignore_errors=True)
        return made

    def held(self, entrant: Entrant) -> list[str]:
        """What a peer holds the weights in."""
        return ["--dtype", self.asked.dtype] if entrant.peer in PEERS else []

    def made(self, entrant: Entrant, out: Path) -> dict[str, Any]:
        """The folder OUT, and what its maker said."""
        log, asked = out.with_suffix(".log"), self.asked
        if entrant.recipe:
            recipe = out.with_suffix(".yaml")
            recipe.write_text(to_yaml(entrant.recipe))
            command = [sys.executable, "-m", "onecard", "compress", self.model, out, "--recipe", recipe,
                       "--data", self.tokens, "--no-prove", "--force"]  # fmt: skip
            gptq.run(command, log, asked.threads)
            size = dense.stored(out, self.model)
            return {"bytes": size}
        python, tokens = Path(sys.executable), self.tokens
        if entrant.peer == "llamacpp":
            python, tokens = asked.work / "llamacpp" / "bin" / "python", self.importance()
        elif entrant.peer:
            python = gptq.environment(PEERS[entrant.peer], asked.work)
        script, *words = entrant.command
        command = [python, script, self.model, tokens, out, *words, *self.held(entrant)]
        return gptq.run(command, log, asked.threads, out.parent).said

    def sparse_bytes(self, entrant: Entrant) -> int:
        """Bytes of a model without half of its weights, as our format of the same pattern stores it."""
        pattern = "2:4" if "2:4" in entrant.name else None
        kind = Dense({"BF16": "bf16", "F16": "fp16", "F32": "fp32"}[self.dtype])
        size = self.whole
        for _, linear in self.dense.linears():
            size += Sparse(kind, 0.5, pattern).bytes(linear.shape) - kind.bytes(linear.shape)
        return size

    @property
    def dtype(self) -> str:
        return next(
            entry["dtype"]
            for _, _, entries in dense.headers(self.model)
            for entry in entries.values()
        )

    def importance(self) -> Path:
        """The mean square of every linear's inputs in the original model, under GGUF's names."""
        path = self.folder / "importance.npz"
        sums: dict[str, torch.Tensor] = {}

        def see(name: str) -> Callable[..., None]:
            def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                squares = inputs[0].flatten(0, -2).double().square().sum(0)
                sums[name] = sums.get(name, 0) + squares

            return add

        hooks = []
        for name, linear in self.dense.linears():
            _, index, part = name.split(".", 2)
            hooks.append(linear.register_forward_pre_hook(see(f"blk.{index}.{GGUF[part]}.weight")))
        with torch.no_grad():
            for row in self.ids.split(4):
                self.dense.network(row)
        for hook in hooks:
            hook.remove()
        count = self.ids.numel()
        np.savez(path, **{name: (s / count).float().numpy() for name, s in sums.items()})
        return path


def llamacpp_installs(work: Path) -> bool:
    """Whether llama.cpp's environment is there or can be built."""
    try:
        cpu_driver.install("llamacpp", cpu_driver.ENVIRONMENTS["llamacpp"], work)
    except subprocess.CalledProcessError as error:
        print(f"llama.cpp is left out, it cannot be built: {error}", file=sys.stderr)
        return False
    return True


def shape(m: Measured) -> tuple[bool, bool]:
    """Whether it is rounded, and whether zeros are 2 of every 4: what can be set side by side."""
    return bool(m.bits), not m.bits and ("2:4" in m.name or "2of4" in m.name)


def verdicts(found: list[Measured]) -> list[Verdict]:
    """Every peer beside the best of ours that is no larger; pruned ones beside pruned ones."""
    made = []
    for peer in (m for m in found if not m.ours):
        kind = (m for m in found if m.ours and shape(m) == shape(peer))
        mine = sorted((m for m in kind if m.bytes <= peer.bytes), key=lambda m: m.perplexity)
        if not mine:
            continue
        best, plain = mine[0], next((m for m in mine if "tables" not in m.name), None)
        made.append(
            Verdict(peer.name, peer.bits, peer.bytes, peer.perplexity, best.name, best.bytes,
                    best.perplexity, plain.name if plain else "", plain.perplexity if plain else None,
                    best.perplexity < peer.perplexity)
        )  # fmt: skip
    return made


# ---- what is shown -----------------------------------------------------------------------------


def table(perplexity: float, whole: int, found: list[Measured], said: list[Verdict]) -> str:
    lines = [f"dense{'':39}{whole:>12,} B {perplexity:>16.4f}"]
    for bits in (4, 3, 2, 0):
        lines.append(f"about {bits}.25 bits" if bits else "half of the weights out")
        rows = sorted((m for m in found if m.bits == bits), key=lambda m: m.perplexity)
        for m in rows:
            who = "  onecard " if m.ours else "  "
            up = 100 * (m.perplexity / perplexity - 1)
            lines.append(f"{who + m.name:44}{m.bytes:>12,} B {m.bits_per_weight:6.3f} {m.perplexity:>9.4f}"
                         f" {up:+8.2f} % {m.kl:8.5f} nat {m.seconds:7.1f} s")  # fmt: skip
    lines.append(
        "each peer beside the best of ours in no more bytes, and the best that leaves the table alone"
    )
    for v in said:
        plain = f"{v.plain_perplexity:9.4f}  {v.plain}" if v.plain_perplexity else ""
        theirs = f"  {v.peer:36}{v.bytes:>11,} B {v.perplexity:9.4f}"
        mine = f"{v.ours:34}{v.ours_bytes:>11,} B {v.ours_perplexity:9.4f}"
        lines.append(f"{theirs}   {mine}{'' if v.holds else ' PEER AHEAD'}   {plain}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SHIPPED / "model")
    parser.add_argument("--name", help="of the results (default: demo, or the folder's)")
    parser.add_argument("--text", type=Path, default=SHIPPED / "held_out.txt")
    parser.add_argument("--calibration", type=Path, default=SHIPPED / "calibration.txt")
    parser.add_argument("--work", type=Path, required=True, help="environments, folders, logs")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--documents", type=int, default=256, help="0: all of the text")
    parser.add_argument("--characters", type=int, default=0, help="only the text's last so many")
    parser.add_argument("--group", type=int, default=64, help="0 for one group per row")
    parser.add_argument(
        "--only", nargs="+", default=[], help="entrants whose names contain one of these"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 0])
    parser.add_argument("--kept", action="store_true", help="only what was measured before")
    parser.add_argument("--check", action="store_true", help="fail where a peer is ahead")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of peers' weights"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=HERE.parent.parent / "results")
    asked = parser.parse_args()
    asked.model, asked.work = asked.model.absolute(), asked.work.absolute()
    asked.name = asked.name or ("demo" if asked.model == SHIPPED / "model" else asked.model.name)
    asked.dtype = gptq.fast_dtype(asked.model) if asked.dtype == "auto" else asked.dtype
    torch.set_num_threads(asked.threads)

    measuring = Measuring(asked)
    perplexity, _ = measuring.read(None)
    chosen = [e for e in (*ours(asked.group), *peers(asked.group)) if e.bits in asked.bits]
    if asked.only:
        chosen = [e for e in chosen if any(words in e.name for words in asked.only)]
    ready = {name: True for name in ("", *PEERS)}
    for name, peer in PEERS.items():
        if any(e.peer == name for e in chosen):
            ready[name] = gptq.installs(peer, asked.work)
    if any(e.peer == "llamacpp" for e in chosen):
        ready["llamacpp"] = llamacpp_installs(asked.work)
    found: list[Measured] = []
    path = asked.results / f"quality-{asked.name}.json"
    for entrant in chosen:
        if not ready.get(entrant.peer):
            continue
        try:
            made = measuring.measured(entrant)
        except SystemExit as error:
            print(f"{entrant.name} is left out: {str(error)[-400:]}", file=sys.stderr)
            continue
        found += [made] if made else []
    said = verdicts(found)
    print(table(perplexity, measuring.whole, found, said))
    kept = {
        "environment": environment(
            model=asked.name, samples=asked.samples, length=asked.length, group=asked.group,
            documents=asked.documents, **{"dtype of peers": asked.dtype},
        ),
        "dense": {"bytes": measuring.whole, "perplexity": perplexity},
        "measured": [asdict(m) for m in found],
        "verdicts": [asdict(v) for v in said],
    }  # fmt: skip
    path.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written: {path}")
    behind = [v for v in said if not v.holds]
    if asked.check and behind:
        sys.exit("\n".join(f"{v.peer}, {v.bits} bits: {v.perplexity:.4f}, ours {v.ours_perplexity:.4f}"
                           for v in behind))  # fmt: skip


if __name__ == "__main__":
    main()
