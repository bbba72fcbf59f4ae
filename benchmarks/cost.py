"""What the cost model says beside what is measured: memory, prompt and decoding of models of random weights.

    python benchmarks/cost.py [--work DIR] [--only TEXT ...] [--turns 3] [--check]

Each case is a shape (make_llama.py), a format and a length of context. The folder is made once: stored
parts are drawn at random (formats.py), the same ones in every layer, which each lie in a file of their own.
Then, in turns, the model is predicted with kernels measured anew, and run in a process of its own that fills
the context in parts of 512 ids and writes a few behind it. The first part is read twice, as what a process
touches for the first time is no part of the model. The least seconds of all turns count on both sides: the
machine is shared, and what disturbs only adds. Memory is the most that the process ever held.

The long contexts of the large shape are run once. results/cost.json keeps the table; `--check` ends with 1
where memory is off by more than 3 % or a speed by more than 12 %.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from formats import drawn
from make_llama import SHAPES, Shape, config, tensors

from onecard.checkpoint.packed import quantization_config
from onecard.checkpoint.shards import Array, write_file
from onecard.checkpoint.source import Source
from onecard.core.device import resident_peak
from onecard.core.format import parse_format
from onecard.core.report import environment
from onecard.core.scheme import Scheme
from onecard.cost import cost
from onecard.kernels import rates
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.sample import GREEDY
from onecard.runtime.steps import Draw, Feed

OUT = Path(__file__).parent.parent / "results" / "cost.json"
MEMORY, SPEED = 0.03, 0.12
PART, NEW, TIMES = 512, 4, 5  # ids of a part of the context, ids written in a call, calls
LONGEST = 4096
FORMATS = ("bf16", "int8-g64", "int4-g64", "int3-g64", "codebook3", "lowrank{}(int8-row)")
RANKS = {"1.1b": 256, "135m": 160}
SPARSE = "sparse0.5(int8-g64)"


@dataclass(frozen=True)
class Case:
    shape: str
    format: str
    context: int

    def __str__(self) -> str:
        return f"{self.shape} {self.format} {self.context}"


CASES = (
    *(Case("135m", f.format(RANKS["135m"]), context) for f in FORMATS for context in (512, 4096)),
    Case("135m", SPARSE, 512),
    *(Case("1.1b", f.format(RANKS["1.1b"]), 512) for f in FORMATS),
    Case("1.1b", "int8-g64", 4096), Case("1.1b", "int4-g64", 4096),
)  # fmt: skip


# Models -------------------------------------------------------------------------------------------


def model(work: Path, case: Case) -> Path:
    """The folder of a case's shape and format."""
    folder = work / f"{case.shape}-{case.format}"
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shape, random = SHAPES[case.shape], np.random.default_rng(0)
    layers: dict[int, dict[str, Array]] = {}
    drawn_once: dict[tuple[int, ...], dict[str, Array]] = {}
    packed = case.format != "bf16"
    format, linears = parse_format(case.format), list[str]()
    for name, sizes in tensors(shape):
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        into = layers.setdefault(layer, {})
        if "_proj" in name and packed:
            linears.append(name.removesuffix(".weight"))
            if sizes not in drawn_once:
                made, parts = drawn(random, format, sizes), format.parts(sizes)
                drawn_once[sizes] = {name: (*parts[name], made[name]) for name in made}
            into |= {f"{linears[-1]}.{part}": array for part, array in drawn_once[sizes].items()}
        else:
            into[name] = ("bf16", sizes, _dense(random, sizes))
    for layer, arrays in layers.items():
        write_file(folder / f"model-{layer + 2:05d}-of-{len(layers):05d}.safetensors", arrays)
    _index(folder, layers)
    (folder / "config.json").write_text(json.dumps(_config(shape, case.format, linears)))
    return folder


def _dense(random: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    if len(sizes) == 1:
        return np.full(sizes, 0x3F80, np.uint16)
    row = random.standard_normal(1 << 20, np.float32) * np.float32(0.02)
    return np.resize((row.view(np.uint32) >> 16).astype(np.uint16), sizes)


def _index(folder: Path, layers: dict[int, dict[str, Array]]) -> None:
    names = {
        name: f"model-{layer + 2:05d}-of-{len(layers):05d}.safetensors"
        for layer, arrays in layers.items() for name in arrays
    }  # fmt: skip
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(shape: Shape, format: str, linears: list[str]) -> dict[str, Any]:
    made = config(shape) | {"max_position_embeddings": 2 * LONGEST}
    if linears:
        schemes = {name: Scheme(parse_format(format)) for name in linears}
        plain = format.startswith("int")
        names = [*linears, "lm_head"]
        made["quantization_config"] = quantization_config(schemes, names, plain, False, "bf16")
    return made


# Measured -----------------------------------------------------------------------------------------


def run(folder: Path, context: int) -> dict[str, Any]:
    """Seconds of the context's parts and of steps behind it, and the most memory held, of this process."""
    source = Source(folder)
    stepper = CpuStepper(source, CpuSettings(context=context + NEW))
    pages, cancel = np.arange(stepper.pages, dtype=np.int32), np.zeros(1, np.int32)
    ids = np.random.default_rng(1).integers(3, source.spec.vocab_size, context, dtype=np.int32)
    none, parts, steps = np.empty(0, np.int32), [], []
    for begin in (0, *range(0, context, PART)):
        ended = begin + PART >= context
        draw = Draw(GREEDY, ids, context, np.empty(0), none, 1) if ended else None
        feed = Feed(ids[begin : begin + PART], begin, pages, draw=draw)
        start = time.perf_counter()
        stepper.step([feed], 1, cancel)
        parts.append(time.perf_counter() - start)
    parts[:2] = [min(parts[:2])]
    for _ in range(TIMES):
        draw = Draw(GREEDY, ids, context, np.empty(0), none, NEW)
        start = time.perf_counter()
        stepper.step([Feed(ids[-1:], context, pages, draw=draw)], NEW, cancel)
        steps.append((time.perf_counter() - start) / NEW)
    return {"parts": parts, "decode": min(steps), "memory": resident_peak()}


def predict(folder: Path, context: int) -> dict[str, float]:
    found = cost(Source(folder), context=context)
    return {"memory": found.memory, "decode": found.decode, "prompt": found.prompt}


def elsewhere(what: str, folder: Path, context: int, cache: str) -> dict[str, Any]:
    """`run` or `predict` in a process of its own."""
    words = [sys.executable, __file__, "--" + what, str(folder), "--context", str(context)]
    done = subprocess.run(
        words,
        env=os.environ | {"XDG_CACHE_HOME": cache},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{what} {folder.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def row(case: Case, folder: Path, turns: int, cache: str) -> dict[str, Any]:
    """A case: what is said and what is so. `cache` is where measurements are remembered."""
    said: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    elsewhere("run", folder, 1, cache)  # laid out, and kept beside the model
    for _ in range(turns):
        (Path(cache) / "onecard" / rates.FILE).unlink(missing_ok=True)
        said.append(elsewhere("predict", folder, case.context, cache))
        seen.append(elsewhere("run", folder, case.context, cache))
    prompt = (
        sum(min(parts) for parts in zip(*(s["parts"] for s in seen), strict=True)) / case.context
    )
    measured = {"memory": max(s["memory"] for s in seen), "prompt": prompt}
    measured["decode"] = min(s["decode"] for s in seen)
    predicted = {what: min(s[what] for s in said) for what in measured}
    error = {what: predicted[what] / measured[what] - 1 for what in measured}
    return asdict(case) | {"predicted": predicted, "measured": measured, "error": error}


def printed(found: dict[str, Any]) -> str:
    said, seen, error = found["predicted"], found["measured"], found["error"]
    return (
        f"{found['shape']:5}{found['format']:22}{found['context']:5}"
        f"{said['memory'] / 1e6:9.1f}{seen['memory'] / 1e6:9.1f} MB {error['memory']:+6.1%}"
        f"{1e3 * said['decode']:9.2f}{1e3 * seen['decode']:9.2f} ms {error['decode']:+6.1%}"
        f"{1e3 * said['prompt']:8.3f}{1e3 * seen['prompt']:8.3f} ms {error['prompt']:+6.1%}"
    )


def keep(found: dict[str, Any], out: Path) -> None:
    """Puts a row in its place in the table."""
    rows = json.loads(out.read_text())["cases"] if out.is_file() else []
    table = {name(each): each for each in [*rows, found]}
    kept = [table[str(case)] for case in CASES if str(case) in table]
    out.write_text(json.dumps({"environment": dict(environment()), "cases": kept}, indent=1) + "\n")


def name(found: dict[str, Any]) -> str:
    return str(Case(found["shape"], found["format"], found["context"]))


def good(found: dict[str, Any]) -> bool:
    error = {what: abs(share) for what, share in found["error"].items()}
    return error["memory"] <= MEMORY and max(error["decode"], error["prompt"]) <= SPEED


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "onecard-cost")
    parser.add_argument("--only", nargs="+", default=())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", help="a folder that remembers the small models' steps")
    parser.add_argument("--prepare", action="store_true", help="make the folders, and nothing else")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--predict", type=Path)
    parser.add_argument("--context", type=int)
    asked = parser.parse_args()
    if asked.run or asked.predict:
        print(
            json.dumps((run if asked.run else predict)(asked.run or asked.predict, asked.context))
        )
        return
    rows: list[dict[str, Any]] = []
    cache = asked.cache or tempfile.mkdtemp(prefix="onecard-cost-")
    print("said and measured".rjust(50), "of a step".rjust(25), "per token of a prompt".rjust(25))
    for case in CASES:
        if not all(any(part.startswith(word) for part in str(case).split()) for word in asked.only):
            continue
        if asked.prepare:
            elsewhere("run", model(asked.work, case), 1, cache)
            continue
        once = case.shape == "1.1b" and case.context == LONGEST
        rows.append(row(case, model(asked.work, case), 1 if once else asked.turns, cache))
        print(printed(rows[-1]), flush=True)
        keep(rows[-1], asked.out)
    if asked.cache is None:
        shutil.rmtree(cache)
    worse = [found for found in rows if not good(found)]
    print(
        f"{len(rows) - len(worse)} of {len(rows)} within {MEMORY:.0%} of memory, {SPEED:.0%} of times"
    )
    if asked.check and worse:
        sys.exit(1)


if __name__ == "__main__":
    main()
