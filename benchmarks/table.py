"""A prompt of 512 ids and 512 new ones behind it: memory and speed of every kernel, one after the other.

    python benchmarks/table.py CHECKPOINT --work DIR [--formats bf16 int8 int4-64 ...] [--isa CLASS ...]

Each format is made of the checkpoint once (rounding to nearest; what the weights say does not matter here),
and each kernel has a process of its own, `onecard bench --serve`. Times are medians over the repeats, the new
ids are written behind 512 others, and the last but one column adds both up. Memory is what the process
held at the end, weights that are mapped and were read included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from onecard.core.report import Report, Row, environment
from onecard.kernels import cpu

RECIPES = {
    "bf16": None,
    "int8": "{bits: 8, group: 64}",
    "int4-64": "{bits: 4, group: 64}",
    "int4-32": "{bits: 4, group: 32}",
    "int3-64": "{bits: 3, group: 64}",
    "int2-64": "{bits: 2, group: 64}",
}
PROMPT = NEW = 512


def made(checkpoint: Path, name: str, work: Path) -> Path | None:
    """The checkpoint in a format; made once. None where it cannot be, which was said."""
    recipe = RECIPES[name]
    if recipe is None:
        return checkpoint
    folder = work / f"{checkpoint.name}-{name}"
    if not folder.exists():
        path = work / f"{name}.yaml"
        path.write_text(f"passes: [{{rtn: {recipe}}}]\n")
        command = ["compress", str(checkpoint), str(folder), "--recipe", str(path)]
        done = subprocess.run(
            [sys.executable, "-m", "onecard", *command], stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            return None
    return folder


def measured(folder: Path, isa: str, threads: int, repeat: int) -> dict[str, float]:
    """Medians of one kernel."""
    command = [
        sys.executable,
        "-m",
        "onecard",
        "bench",
        str(folder),
        "--serve",
        "--threads",
        str(threads),
    ]
    served = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        env=os.environ | {"ONECARD_ISA": isa, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert served.stdin and served.stdout

    def ask(request: str) -> dict[str, Any]:
        print(request, file=served.stdin, flush=True)
        answer = json.loads(served.stdout.readline())
        if "error" in answer:
            sys.exit(f"{folder}: {answer['error']}")
        return answer  # type: ignore[no-any-return]

    try:
        if served.stdout.readline().strip() != "ready":
            sys.exit(f"{folder} could not be opened")
        ask(f"prompt {PROMPT}")
        prompts = [ask(f"prompt {PROMPT}") for _ in range(repeat)]
        new = [ask(f"decode {NEW} behind {PROMPT}") for _ in range(repeat)]
    finally:
        served.stdin.close()
        served.wait()
    first = statistics.median(a["seconds"] for a in prompts)
    rest = statistics.median(a["seconds"] for a in new)
    return {
        "time_to_first_token": first,
        "prompt_tokens_per_second": PROMPT / first,
        "decode_tokens_per_second": NEW / rest,
        "total_seconds": first + rest,
        "peak_memory_bytes": max(a["rss"] for a in prompts + new),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="for the formats")
    parser.add_argument("--formats", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--isa", nargs="+", choices=cpu.isas(), default=[cpu.isas()[-1]])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    print(
        f"{'':12}{'class':12}{'first token':>12}{'prompt/s':>10}{'new/s':>8}{'512 + 512':>11}{'memory':>10}"
    )
    for name in asked.formats:
        folder = made(asked.checkpoint.absolute(), name, asked.work.absolute())
        if folder is None:
            print(f"{name:12}cannot be made of {asked.checkpoint}, see above", flush=True)
            continue
        for isa in asked.isa:
            found = measured(folder, isa, asked.threads, asked.repeat)
            total = found.pop("total_seconds")
            rows += [Row.of(f"{name}, {isa}", what, value) for what, value in found.items()]
            print(
                f"{name:12}{isa:12}{found['time_to_first_token']:10.2f} s"
                f"{found['prompt_tokens_per_second']:10.0f}{found['decode_tokens_per_second']:8.1f}"
                f"{total:9.2f} s{found['peak_memory_bytes'] / 2**20:6.0f} MiB",
                flush=True,
            )
    if not rows:
        sys.exit("nothing was measured")
    if asked.results:
        report = Report(
            tuple(rows), environment(threads=asked.threads), f"{asked.checkpoint.name}, 512 + 512"
        )
        asked.results.write_text(report.to_json() + "\n")


if __name__ == "__main__":
    main()
