"""What every CPU peer says: one model loaded once, then one measurement per line of standard input.

    ready                                    after loading
    prompt 512  ->  {"seconds": 1.9, "tokens": 512, "rss": 812000000}
    decode 128  ->  {"seconds": 4.1, "tokens": 128, "rss": 812000000}

`prompt N`: N token ids go in, the last one's logits come out; the cache was empty before.
`decode N`: after a prompt of 8 tokens, which is not timed, N steps of one token, each the likeliest by
the step before. No end token stops it. Ids are drawn anew for every measurement, so that nothing can be
remembered from the one before. `rss` is the resident memory of the process, in bytes, after it.

Several engines can wait side by side, so between measurements an engine sleeps in a read from standard
input. Whether its threads do so as well is for cpu_driver.py to see.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

LEAD = 8  # tokens in front of those that `decode` times
CONTEXT = 1024  # tokens that an engine's cache has room for, where it wants to know


class Engine(Protocol):
    """Both return seconds."""

    vocabulary: int

    def prompt(self, ids: list[int]) -> float: ...

    def decode(self, ids: list[int], steps: int) -> float: ...


def serve(engine: Engine) -> None:
    draw = random.Random(0)
    print("ready", flush=True)
    for line in sys.stdin:
        verb, _, count = line.partition(" ")
        tokens = int(count)
        size = tokens if verb == "prompt" else LEAD
        ids = [draw.randrange(3, engine.vocabulary) for _ in range(size)]  # 0 to 2 are special
        seconds = engine.prompt(ids) if verb == "prompt" else engine.decode(ids, tokens)
        answer = {"seconds": seconds, "tokens": tokens, "rss": resident()}
        print(json.dumps(answer), flush=True)


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


# ---- the files of a prepared model -------------------------------------------------------------


def header(checkpoint: Path) -> tuple[dict[str, Any], int]:
    """(entry per tensor, where their bytes begin) of model.safetensors."""
    with (checkpoint / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(size))
    entries.pop("__metadata__", None)
    return entries, 8 + size


def note(
    checkpoint: Path, work: Path, engine: str, weights: str, files: list[Path], more: int = 0
) -> None:
    """Keeps what was made, and how large it is (with `more` bytes), where the driver finds it."""
    entries, _ = header(checkpoint)
    parameters = sum(math.prod(entry["shape"]) for entry in entries.values())
    size = more + sum(path.stat().st_size for path in files)
    made = {
        "engine": engine,
        "weights": weights,
        "files": [path.name for path in files],
        "bytes": size,
        "parameters": parameters,
        "bits_per_weight": 8 * size / parameters,
    }
    work.mkdir(parents=True, exist_ok=True)
    (work / "prepared.json").write_text(json.dumps(made, indent=2) + "\n")
    print(json.dumps(made))


# ---- the command line that the peers share -----------------------------------------------------


def command_line(
    about: str,
    prepare: Callable[[Path, Path, argparse.Namespace], None],
    load: Callable[[Path, argparse.Namespace], Engine],
    more: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("prepare", help="make the peer's own files of a checkpoint")
    one.add_argument("checkpoint", type=Path)
    one.add_argument("work", type=Path)
    two = verbs.add_parser("serve", help="load them, then measure on request")
    two.add_argument("work", type=Path)
    two.add_argument("--threads", type=int, default=2)
    for each in (one, two):
        more(each)
    asked = parser.parse_args()
    if asked.verb == "prepare":
        prepare(asked.checkpoint.absolute(), asked.work.absolute(), asked)
    else:
        serve(load(asked.work.absolute(), asked))
