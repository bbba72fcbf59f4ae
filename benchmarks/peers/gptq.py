"""GPTQ here against GPTQ there: the same model, the same token ids, the same evaluator, on this CPU.

    python benchmarks/peers/gptq.py quality --model DIR --text FILE [--calibration FILE] --work DIR
    python benchmarks/peers/gptq.py speed --model DIR --work DIR

`quality` compresses a trained model and scores every result. `speed` needs no training and no text: it
takes random token ids (make_llama.py writes a model of any size for it) and scores nothing. The
question: is perplexity no worse than each peer's, and how many times less does it take.

Peers run with their own defaults, only the weights' bits and group are set, each in its own environment under
`--work`, made on first use with the pins below. They hold the weights in what we compute in (`--dtype`):
bfloat16 where the processor multiplies it, else float32, as torch is hundreds of times slower in bfloat16
without the instruction, and no peer looks. Times, all on one clock:

    seconds     a peer: its solving call alone, model loaded, nothing saved · ours: the whole command
    whole       the whole process, start to exit, loading and saving included
    peak        resident memory of that process at its largest, mapped pages of the checkpoint included

We and a peer take turns, A B A B; a ratio is a peer's `seconds` over our `whole` just before, the reading
that is worst for us, and its median is shown with the least and the most. On a model of a few million
weights a time is mostly start and loading, so only `speed` judges times. Perplexity is read by
transformers in the environment that runs this, from windows of `--length` tokens that do not overlap. A
peer that cannot be installed is left out, and that is said. `--check` ends with an error where a peer
takes less than three times our time (`speed`), or all peers have a lower perplexity (`quality`).
Nothing heavy is imported here, because a child's peak starts from its parent's. Logs of every run stay
under `--work`; the numbers go to results/gptq-*.json as a report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """A package that can do GPTQ, and the script that makes it."""

    name: str
    pins: tuple[str, ...]
    script: str
    dense: bool = (
        False  # its folders cannot be read elsewhere: the script writes a dense one beside
    )


PEERS = (
    Peer(
        "llmcompressor",
        ("llmcompressor==0.14.0.1", "compressed-tensors==0.19.0", "transformers==5.17.0"),
        "gptq_llmcompressor.py",
    ),
    Peer(
        "gptqmodel", ("gptqmodel==7.6.0", "transformers==5.23.0"), "gptq_gptqmodel.py", dense=True
    ),
)
OURS = "onecard"
FASTER = 3.0


@dataclass(frozen=True)
class Run:
    """What one process said and cost."""

    said: dict[str, Any]  # the last line of its output, where that is JSON
    whole: float
    peak: int


@dataclass
class Result:
    method: str
    bits: int
    seconds: float
    whole: float
    peak: int
    used: str
    ratios: list[float] = field(default_factory=list)  # of a peer: its seconds over ours, by turns
    perplexity: float | None = None
    nats: float | None = None


# ---- environments ------------------------------------------------------------------------------


def environment(peer: Peer, work: Path) -> Path:
    """The Python of the peer's own environment, made on first use."""
    folder = work / peer.name
    python = folder / "bin" / "python"
    done = folder / "pins.txt"
    wanted = "\n".join((TORCH, *peer.pins)) + "\n"
    if done.exists() and done.read_text() == wanted:
        return python
    print(f"making {folder}: {', '.join((TORCH, *peer.pins))}", file=sys.stderr)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install(python, [TORCH])  # first and alone, so that no other package chooses the build
    install(python, [TORCH, *peer.pins])
    done.write_text(wanted)
    return python


def install(python: Path, packages: list[str]) -> None:
    """pip install, refused where it would bring an accelerator's libraries by the gigabyte."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    plan = python.parent.parent / "plan.json"
    subprocess.run([*pip, "--dry-run", "--report", str(plan), *packages], check=True)
    names = [item["metadata"]["name"].lower() for item in json.loads(plan.read_text())["install"]]
    heavy = [
        n for n in names if n.startswith(("nvidia-", "cuda-", "triton")) and n != "nvidia-ml-py"
    ]
    if heavy:
        sys.exit(
            f"{' '.join(packages)} would install {', '.join(heavy)}\n"
            "point pip at torch's builds for the CPU (its setting `extra-index-url` or `find-links`)"
        )
    subprocess.run([*pip, *packages], check=True)


# ---- running -----------------------------------------------------------------------------------


def run(command: list[str | Path], log: Path, threads: int, folder: Path | None = None) -> Run:
    """Runs to the end, in `folder`; what it says is kept in `log`.

    Exits with the end of it where the process failed.
    """
    setting = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with log.open("w+b") as errors:
        process = subprocess.Popen(
            [str(c) for c in command],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=setting,
            cwd=folder,
        )
        assert process.stdout
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        whole = time.perf_counter() - began
        errors.write(b"\n---- standard output\n" + output)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        sys.exit(
            f"{tail}\n\n{' '.join(map(str, command))}\nfailed with {process.returncode}; all of it: {log}"
        )
    last = output.decode(errors="replace").strip().rpartition("\n")[2]
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(json.loads(last) if last.startswith("{") else {}, whole, peak)


def run_peer(peer: Peer, bits: int, tokens: Path, out: Path, asked: argparse.Namespace) -> Result:
    command: list[str | Path] = [
        environment(peer, asked.work),
        HERE / peer.script,
        asked.model,
        tokens,
        out,
    ]
    command += ["--bits", str(bits), "--group", str(asked.group), "--dtype", asked.dtype]
    if peer.dense and asked.verb == "quality":
        command += ["--dense", dense_folder(out)]
    done = run(command, out.with_suffix(".log"), asked.threads, out.parent)
    said = done.said
    return Result(said["peer"], bits, said["seconds"], done.whole, done.peak, said["used"])


def run_ours(bits: int, tokens: Path, out: Path, asked: argparse.Namespace) -> Result:
    """The command a user types; the recipe says no more than the peers are told."""
    recipe = out.with_suffix(".yaml")
    group = asked.group or "null"
    recipe.write_text(f"passes:\n  - gptq: {{bits: {bits}, group: {group}}}\n")
    command: list[str | Path] = [sys.executable, "-m", "onecard", "compress", asked.model, out]
    command += ["--recipe", recipe, "--data", tokens]
    done = run(command, out.with_suffix(".log"), asked.threads)
    return Result(OURS, bits, done.whole, done.whole, done.peak, "")


def dense_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}-dense")


def score(folder: Path, windows: Path, asked: argparse.Namespace) -> dict[str, float]:
    log = asked.work / "runs" / f"score-{folder.name}.log"
    command: list[str | Path] = [sys.executable, HERE / "perplexity.py", "score", folder, windows]
    return run(command, log, asked.threads).said


def fast_dtype(model: Path) -> str:
    """The faster here of the checkpoint's dtype and float32; asked in a process of its own."""
    code = (
        "import sys; from onecard.checkpoint.load import Source, compute_dtype; "
        "print(compute_dtype(Source(sys.argv[1]), 'auto'))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, text=True, check=True
    )
    return {"bf16": "bfloat16", "fp32": "float32"}[found.stdout.strip()]


# ---- token ids ---------------------------------------------------------------------------------


def cut(source: Path, out: Path, samples: int | None, asked: argparse.Namespace) -> Path:
    """Windows of token ids, out of text or of ids in .json or .npy."""
    script: list[str | Path] = [sys.executable, HERE / "perplexity.py"]
    command = [*script, "tokens", asked.model, source, out, "--length", str(asked.length)]
    if samples:
        command += ["--samples", str(samples)]
    found = run(command, out.with_suffix(".log"), asked.threads).said
    print(f"{source}: {found['windows']} windows of {asked.length} tokens", file=sys.stderr)
    return out


def random_ids(out: Path, asked: argparse.Namespace) -> Path:
    vocabulary = json.loads((asked.model / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    ids = [[draw.randrange(vocabulary) for _ in range(asked.length)] for _ in range(asked.samples)]
    out.write_text(json.dumps(ids))
    return out


# ---- the comparison ----------------------------------------------------------------------------


def compare(asked: argparse.Namespace) -> tuple[float | None, list[Result]]:
    """(perplexity of the dense model, a result per method and width)."""
    runs = asked.work / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    quality = asked.verb == "quality"
    if quality:
        tokens = cut(
            asked.calibration or asked.text, runs / "calibration.json", asked.samples, asked
        )
        windows = cut(asked.text, runs / "windows.json", None, asked)
        dense = score(asked.model, windows, asked)["perplexity"]
    else:
        given = asked.calibration
        ids = runs / "calibration.json"
        tokens = cut(given, ids, asked.samples, asked) if given else random_ids(ids, asked)
        windows, dense = None, None

    peers = [peer for peer in PEERS if peer.name in asked.methods and installs(peer, asked.work)]
    if not peers and set(asked.methods) != {OURS}:
        sys.exit("none of the peers could be installed")
    results = []
    for bits in asked.bits:
        found = by_turns(peers, bits, tokens, asked)
        for name, runs_of in found.items():
            one = runs_of[0]
            one.seconds = statistics.median(r.seconds for r in runs_of)
            one.whole = statistics.median(r.whole for r in runs_of)
            one.peak = max(r.peak for r in runs_of)
            one.ratios = [ratio for r in runs_of for ratio in r.ratios]
            if windows:
                out = folder_of(name, bits, asked)
                dense_one = dense_folder(out)
                scored = score(dense_one if dense_one.is_dir() else out, windows, asked)
                one.perplexity, one.nats = scored["perplexity"], scored["nats_per_token"]
            results.append(one)
    return dense, results


def installs(peer: Peer, work: Path) -> bool:
    """Whether a peer's environment is there or can be made."""
    try:
        environment(peer, work)
    except subprocess.CalledProcessError as error:
        print(f"{peer.name} is left out, it cannot be installed: {error}", file=sys.stderr)
        return False
    return True


def by_turns(
    peers: list[Peer], bits: int, tokens: Path, asked: argparse.Namespace
) -> dict[str, list[Result]]:
    """method -> its runs: ours, a peer, ours, the next peer ..., so that a slow time hits both of a pair."""
    found: dict[str, list[Result]] = {}

    def ready(name: str) -> Path:
        out = folder_of(name, bits, asked)
        for old in (out, dense_folder(out)):
            shutil.rmtree(old, ignore_errors=True)
        print(f"{name}, {bits} bits ...", file=sys.stderr)
        return out

    for _ in range(asked.repeats):
        for peer in peers or [None]:
            ours = None
            if OURS in asked.methods:
                ours = run_ours(bits, tokens, ready(OURS), asked)
                found.setdefault(OURS, []).append(ours)
            if peer is not None:
                theirs = run_peer(peer, bits, tokens, ready(peer.name), asked)
                theirs.ratios = [theirs.seconds / ours.whole] if ours else []
                found.setdefault(peer.name, []).append(theirs)
    return found


def folder_of(name: str, bits: int, asked: argparse.Namespace) -> Path:
    return Path(asked.work) / "runs" / f"{asked.verb}-{name}-int{bits}"


def missed(results: list[Result]) -> list[str]:
    """What the project promises and these runs did not show."""
    found = []
    for ours in (r for r in results if r.method == OURS):
        peers = [r for r in results if r.method != OURS and r.bits == ours.bits]
        scored = [r.perplexity for r in peers if r.perplexity is not None]
        if ours.perplexity is None:
            slow = [r for r in peers if r.ratios and statistics.median(r.ratios) < FASTER]
            found += [
                f"{r.method}, {r.bits} bits: less than {FASTER:g} times our time" for r in slow
            ]
        elif scored and ours.perplexity > max(scored):
            found.append(
                f"{ours.bits} bits: perplexity {ours.perplexity:.4f}, peers {max(scored):.4f}"
            )
    return found


# ---- what is shown -----------------------------------------------------------------------------


def table(dense: float | None, results: list[Result]) -> str:
    lines = [("method", "bits", "perplexity", "seconds", "whole", "peak MiB", "peer/ours")]
    if dense:
        lines.append(("dense", "", f"{dense:.4f}", "", "", "", ""))
    for r in results:
        ratio = ""
        if r.ratios:
            ratio = f"{statistics.median(r.ratios):.1f} ({min(r.ratios):.1f}-{max(r.ratios):.1f})"
        shown = f"{r.perplexity:.4f}" if r.perplexity else ""
        peak = f"{r.peak / 2**20:.0f}"
        lines.append(
            (r.method, f"{r.bits}", shown, f"{r.seconds:.1f}", f"{r.whole:.1f}", peak, ratio)
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    used = dict.fromkeys(f"{r.method}: {r.used}" for r in results if r.used)
    return "\n".join([*text, "", *used])


def report(dense: float | None, results: list[Result], asked: argparse.Namespace) -> dict[str, Any]:
    """The shape of every report of the project: rows and the environment."""
    rows: list[dict[str, Any]] = []

    def row(
        where: str, what: str, value: float | None, unit: str, before: float | None = None
    ) -> None:
        if value is not None:
            rows.append(
                {"where": where, "what": what, "value": value, "unit": unit, "before": before}
            )

    row("dense", "perplexity", dense, "")
    for r in results:
        where = f"{r.method} gptq int{r.bits}-{f'g{asked.group}' if asked.group else 'row'}"
        row(where, "perplexity", r.perplexity, "", dense)
        row(where, "nats_per_token", r.nats, "nats")
        row(where, "seconds", r.seconds, "s")
        row(where, "whole_seconds", r.whole, "s")
        row(where, "peak_memory_bytes", r.peak, "B")
        for what, of in (("", statistics.median), ("_least", min), ("_most", max)):
            row(where, f"times_ours{what}", of(r.ratios) if r.ratios else None, "")
    return {
        "rows": rows,
        "environment": {
            "processor": processor(),
            "threads": asked.threads,
            "python": platform.python_version(),
            "date": datetime.now(UTC).date().isoformat(),
            "model": asked.model.name,
            "calibration": f"{asked.samples} samples of {asked.length} tokens",
            "repeats": asked.repeats,
            "dtype of peers": asked.dtype,
            "used": {r.method: r.used for r in results if r.used},
        },
    }


def processor() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("quality", "speed"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="what perplexity is read on")
    parser.add_argument(
        "--calibration", type=Path, help="text, or ids [samples, length] in .json or .npy"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="environments, results and logs; gigabytes"
    )
    parser.add_argument("--methods", nargs="+", default=[*(p.name for p in PEERS), OURS])
    parser.add_argument(
        "--bits", type=int, nargs="+", help="default: 4 and 3 for quality, 4 for speed"
    )
    parser.add_argument("--group", type=int, default=128, help="0 for one group per row")
    parser.add_argument("--samples", type=int, help="default: 128 for quality, 16 for speed")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, help="default: 1 for quality, 2 for speed")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of peers' weights"
    )
    parser.add_argument("--check", action="store_true", help="fail where a promise is not kept")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=HERE.parent.parent / "results")
    asked = parser.parse_args()
    quality = asked.verb == "quality"
    if quality and not asked.text:
        parser.error("quality needs --text, the text that perplexity is read on")
    if unknown := set(asked.methods) - {*(p.name for p in PEERS), OURS}:
        parser.error(
            f"no method {', '.join(sorted(unknown))}: there are {', '.join(p.name for p in PEERS)}, {OURS}"
        )
    asked.bits = asked.bits or ([4, 3] if quality else [4])
    asked.samples = asked.samples or (128 if quality else 16)
    asked.repeats = asked.repeats or (1 if quality else 2)
    asked.model, asked.work = asked.model.absolute(), asked.work.absolute()

    asked.dtype = fast_dtype(asked.model) if asked.dtype == "auto" else asked.dtype

    dense, results = compare(asked)
    print(table(dense, results))
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"gptq-{asked.verb}.json"
    path.write_text(json.dumps(report(dense, results, asked), indent=2) + "\n")
    print(f"written: {path}")
    if asked.check and (problems := missed(results)):
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
