"""Prompt and decoding speed on this CPU, engine against engine: all are loaded, one measures at a time.

    python benchmarks/peers/cpu_driver.py install --work DIR
    python benchmarks/peers/cpu_driver.py prepare CHECKPOINT --work DIR
    python benchmarks/peers/cpu_driver.py measure CHECKPOINT --work DIR [--against llamacpp]

Every peer is installed in an environment of its own under `--work`, from the package index, with the pins
below, and makes its own 4-bit files of the checkpoint (weights may be random: make_llama.py). `measure`
starts all engines and asks them in turn, in rounds A B C, B C A, ...: first for a prompt of 512
tokens each, then for 128 tokens of decoding each. What cpu_serve.py says is the protocol.

A speed is the median over the rounds. A ratio is taken inside each round, engine over `--against`, and its
median and quartiles are shown: what slows the machine for a minute slows both sides of it. Next to every
measurement are the shares of the machine that went elsewhere in the meantime: to the other engines
(which ought to sleep), to anybody else, and to the host's other guests. A measurement that
anybody else disturbed is repeated, twice at most.

`--hold COMMAND` names a program that waits until the machine is quiet and then runs what follows it, like
`flock FILE`. It is taken for loading and for as many rounds as fit into `--hold-seconds`, then given back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
TORCH = "torch==2.13.0"
TRIES, DISTURBED = 3, 0.03  # a share of the machine
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Environment:
    pins: tuple[str, ...]
    torch: bool = True
    without: tuple[str, ...] = ()  # what comes along and does harm
    build: str | None = None  # a script that goes on from there


# optimum brings torchvision, whose build on the index wants torch's build for CUDA.
ENVIRONMENTS = {
    "llamacpp": Environment(
        ("cmake==4.4.4", "ninja==1.13.2", "gguf==0.19.0", "numpy==2.4.6"),
        torch=False,
        build="cpu_llamacpp.py",
    ),
    "openvino": Environment(
        (
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            "transformers==5.5.4",
        ),
        without=("torchvision",),
    ),
    "ort": Environment(
        (
            "onnxruntime-genai==0.18.0",
            "onnxruntime==1.31.1",
            "onnx==1.23.2",
            "onnx_ir==1.1.0",
            "transformers==5.23.0",
        )
    ),
    "transformers": Environment(("transformers==5.23.0",)),
}


@dataclass(frozen=True)
class Engine:
    """A row of the comparison: `command` with its braces filled, in an environment, on a prepared model."""

    name: str
    command: tuple[str | Path, ...]
    environment: str | None = None  # none: the Python that runs the driver
    model: str | None = None  # what `prepare` makes, by name; none: the checkpoint itself
    prepare: tuple[str | Path, ...] = ()
    default: bool = True  # measured where --engines does not say


def peer(name: str, script: str, *options: str, like: str | None = None, **more: Any) -> Engine:
    return Engine(
        name,
        ("{python}", HERE / script, "serve", "{model}", "--threads", "{threads}", *options),
        environment=like or name,
        model=like or name,
        prepare=() if like else ("{python}", HERE / script, "prepare", "{checkpoint}", "{model}"),
        **more,
    )


ENGINES = (
    replace(peer("onecard", "cpu_onecard.py"), environment=None),
    peer("llamacpp", "cpu_llamacpp.py"),
    peer("llamacpp-noamx", "cpu_llamacpp.py", "--build", "noamx", like="llamacpp"),
    peer("openvino", "cpu_openvino.py"),
    peer("openvino-f32", "cpu_openvino.py", "--precision", "f32", like="openvino"),
    peer("ort", "cpu_ort.py"),
    peer("transformers", "cpu_transformers.py"),
)


def filled(command: tuple[str | Path, ...], engine: Engine, asked: argparse.Namespace) -> list[str]:
    python = (
        asked.work / engine.environment / "bin" / "python" if engine.environment else sys.executable
    )
    facts = {
        "python": python,
        "checkpoint": asked.checkpoint,
        "model": model_folder(engine, asked),
        "threads": asked.threads,
    }
    return [str(part).format(**facts) for part in command]


def model_folder(engine: Engine, asked: argparse.Namespace) -> Path:
    return asked.work / "models" / asked.checkpoint.name / (engine.model or engine.name)


def setting(asked: argparse.Namespace) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(asked.threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's, which would wait busily
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


# ---- install and prepare -----------------------------------------------------------------------


def install(name: str, wanted: Environment, work: Path) -> None:
    folder = work / name
    done = folder / "pins.txt"
    pins = [*([TORCH] if wanted.torch else []), *wanted.pins]
    if done.exists() and done.read_text().split() == pins:
        return
    print(f"making {folder}: {', '.join(pins)}", file=sys.stderr)
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if wanted.torch:  # first and alone, so that no other package chooses the build
        subprocess.run([*pip, "install", TORCH], check=True)
    subprocess.run([*pip, "install", *pins], check=True)
    if wanted.without:
        subprocess.run([*pip, "uninstall", "--yes", *wanted.without], check=True)
    if wanted.build:
        subprocess.run([str(python), str(HERE / wanted.build), "build"], check=True)
    done.write_text("\n".join(pins) + "\n")


def prepare(engine: Engine, asked: argparse.Namespace) -> None:
    folder = model_folder(engine, asked)
    if engine.prepare and not (folder / "prepared.json").exists():
        print(f"{engine.name}: preparing {folder}", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.parent / f"{engine.name}-prepare.log"
        with log.open("wb") as out:
            command = filled(engine.prepare, engine, asked)
            done = subprocess.run(command, stdout=out, stderr=out, env=setting(asked), check=False)
        if done.returncode:
            sys.exit(f"{log.read_text(errors='replace')[-2000:]}\n{engine.name} failed; see {log}")
    if facts := prepared(engine, asked):
        print(
            f"{engine.name:15} {facts['bytes'] / 2**20:8.1f} MiB "
            f"{facts['bits_per_weight']:6.2f} bits per weight   {facts['weights']}"
        )


def prepared(engine: Engine, asked: argparse.Namespace) -> dict[str, Any]:
    path = model_folder(engine, asked) / "prepared.json"
    return json.loads(path.read_text()) if path.exists() else {}


# ---- a loaded engine ---------------------------------------------------------------------------


@dataclass
class Loaded:
    engine: Engine
    process: subprocess.Popen[str]
    log: Path
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    @property
    def requests(self) -> IO[str]:
        assert self.process.stdin
        return self.process.stdin

    def line(self, wanted: str) -> str:
        """The next line that begins so; libraries may print others."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(wanted):
                return line
        tail = self.log.read_text(errors="replace")[-2000:]
        sys.exit(f"{tail}\n\n{self.engine.name} ended; all of it: {self.log}")

    def cpu_seconds(self) -> float:
        """Of all its threads so far."""
        after = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after[11]) + int(after[12])) / TICKS


def start(engine: Engine, asked: argparse.Namespace) -> Loaded:
    log = asked.work / "logs" / f"{asked.checkpoint.name}-{engine.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as errors:
        process = subprocess.Popen(
            filled(engine.command, engine, asked),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            env=setting(asked),
        )
    loaded = Loaded(engine, process, log)
    loaded.line("ready")
    return loaded


def machine_seconds() -> tuple[float, float]:
    """(seconds that this machine's cores worked, seconds that the host took from them)."""
    first = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(x) / TICKS for x in first[:8])
    return user + nice + system + irq + softirq, steal


def ask(one: Loaded, request: str, everybody: list[Loaded]) -> dict[str, float]:
    others = [each for each in everybody if each is not one]
    idle = sum(each.cpu_seconds() for each in others)
    own, (worked, stolen), began = one.cpu_seconds(), machine_seconds(), time.perf_counter()
    one.requests.write(request + "\n")
    answer = json.loads(one.line("{"))
    wall = time.perf_counter() - began
    idle = sum(each.cpu_seconds() for each in others) - idle
    own = one.cpu_seconds() - own
    now_worked, now_stolen = machine_seconds()
    cores = (os.cpu_count() or 1) * wall
    answer["others"] = idle / cores
    answer["foreign"] = max(0.0, now_worked - worked - own - idle) / cores
    answer["stolen"] = (now_stolen - stolen) / cores
    return answer


def ask_undisturbed(one: Loaded, request: str, everybody: list[Loaded]) -> dict[str, float]:
    """Asks again where others worked meanwhile, and takes the answer that they disturbed least."""
    answers = []
    for _ in range(TRIES):
        answers.append(ask(one, request, everybody))
        if answers[-1]["foreign"] <= DISTURBED:
            break
    return min(answers, key=lambda answer: answer["foreign"])


# ---- rounds ------------------------------------------------------------------------------------


GRACE = 25  # seconds over --hold-seconds after which a hold ends by itself, whatever became of us


@contextmanager
def held(running: list[Loaded], asked: argparse.Namespace) -> Iterator[Callable[[], bool]]:
    """While it lasts the machine is ours; what it yields says whether that is still so.

    `--hold` runs a `cat` that ends with its input, or by itself if that does not come. A hold may have
    stopped every process that computes: then its child wakes this one and the engines first.
    """
    if not asked.hold:
        yield lambda: True
        return
    ours = [str(pid) for pid in (os.getpid(), *(one.process.pid for one in running))]
    wake = f'kill -CONT "$@"; exec timeout {asked.hold_seconds + GRACE:.0f} cat'
    command = [*shlex.split(asked.hold), "sh", "-c", wake, "sh", *ours]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guard:
        assert guard.stdin and guard.stdout
        guard.stdin.write(b"quiet\n")
        guard.stdin.flush()
        guard.stdout.readline()  # comes back once it runs
        try:
            yield lambda: guard.poll() is None
        finally:
            with suppress(BrokenPipeError):
                guard.stdin.close()


def measure(engines: list[Engine], asked: argparse.Namespace) -> list[Loaded]:
    running: list[Loaded] = []
    requests = (f"prompt {asked.prompt}", f"decode {asked.decode}")
    try:
        with held(running, asked):
            for engine in engines:
                print(f"{engine.name}: loading", file=sys.stderr)
                running.append(start(engine, asked))
            for one in running:  # not counted: first use allocates and compiles
                ask(one, requests[0], running)
                ask(one, "decode 8", running)
        done, longest = 0, 0.0
        while done < asked.rounds:
            with held(running, asked) as quiet:
                until = time.perf_counter() + asked.hold_seconds
                first = True
                while done < asked.rounds and (first or time.perf_counter() + longest < until):
                    began, first = time.perf_counter(), False
                    turn = done % len(running)
                    answers = [
                        (one, request, ask_undisturbed(one, request, running))
                        for request in requests
                        for one in running[turn:] + running[:turn]
                    ]
                    longest = max(longest, time.perf_counter() - began)
                    if not quiet():
                        print(
                            "the hold ended within a round, which is not counted", file=sys.stderr
                        )
                        break
                    for one, request, answer in answers:
                        one.samples.setdefault(request.split()[0], []).append(answer)
                    done += 1
                    disturbed = max(answer["foreign"] for _, _, answer in answers)
                    print(
                        f"round {done}: {time.perf_counter() - began:.1f} s, "
                        f"at most {100 * disturbed:.0f} % of the machine with others",
                        file=sys.stderr,
                    )
    finally:
        for one in running:
            with suppress(BrokenPipeError):
                one.requests.close()
            one.process.wait()
    return running


# ---- what is shown -----------------------------------------------------------------------------


def speeds(one: Loaded, verb: str) -> list[float]:
    return [sample["tokens"] / sample["seconds"] for sample in one.samples[verb]]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(one: Loaded, base: Loaded, verb: str) -> list[float]:
    return [a / b for a, b in zip(speeds(one, verb), speeds(base, verb), strict=True)]


def table(measured: list[Loaded], base: Loaded, asked: argparse.Namespace) -> str:
    lines = []
    for verb in ("prompt", "decode"):
        head = (verb, "tok/s", "quartiles", f"over {base.engine.name}", "quartiles")
        lines.append((*head, "resident MiB", "bits/weight", "others", "foreign", "stolen"))
        for one in measured:
            low, middle, high = spread(speeds(one, verb))
            under, ratio, over = spread(ratios(one, base, verb))
            samples = one.samples[verb]
            shares = (max(s[k] for s in samples) for k in ("others", "foreign", "stolen"))
            bits = prepared(one.engine, asked).get("bits_per_weight")
            lines.append(
                (
                    one.engine.name,
                    f"{middle:.1f}",
                    f"{low:.1f} .. {high:.1f}",
                    f"{ratio:.3f}",
                    f"{under:.3f} .. {over:.3f}",
                    f"{max(s['rss'] for s in samples) / 2**20:.0f}",
                    f"{bits:.2f}" if bits else "",
                    *(f"{100 * share:.1f} %" for share in shares),
                )
            )
        lines.append(("",) * 10)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def report(measured: list[Loaded], base: Loaded, asked: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []

    def row(where: str, what: str, value: float | None, unit: str) -> None:
        if value is not None:
            rows.append(
                {"where": where, "what": what, "value": value, "unit": unit, "before": None}
            )

    for one in measured:
        where = f"{asked.checkpoint.name} {one.engine.name}"
        facts = prepared(one.engine, asked)
        row(where, "file_bytes", facts.get("bytes"), "B")
        row(where, "bits_per_weight", facts.get("bits_per_weight"), "bit")
        for verb in ("prompt", "decode"):
            row(where, f"{verb}_tokens_per_second", spread(speeds(one, verb))[1], "tok/s")
            if one is not base:
                ratio = spread(ratios(one, base, verb))[1]
                row(where, f"{verb}_over_{base.engine.name}", ratio, "")
        resident = max(s["rss"] for samples in one.samples.values() for s in samples)
        row(where, "resident_bytes", resident, "B")
    known = {one.engine.name: prepared(one.engine, asked) for one in measured}
    return {
        "rows": rows,
        "environment": {
            "processor": processor(),
            "threads": asked.threads,
            "python": platform.python_version(),
            "date": datetime.now(UTC).date().isoformat(),
            "model": asked.checkpoint.name,
            "rounds": asked.rounds,
            "prompt": asked.prompt,
            "decode": asked.decode,
            "engines": {name: facts.get("engine") for name, facts in known.items()},
            "weights": {name: facts.get("weights") for name, facts in known.items()},
        },
        "samples": {one.engine.name: one.samples for one in measured},
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [engine.name for engine in ENGINES]
    parser.add_argument("verb", choices=("install", "prepare", "measure"))
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, required=True, help="environments, models and logs")
    parser.add_argument("--engines", nargs="+", choices=names)
    parser.add_argument("--against", choices=names, help="default: the first engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--hold", help="a command that waits for a quiet machine")
    parser.add_argument("--hold-seconds", type=float, default=90)
    parser.add_argument("--results", type=Path, default=HERE.parents[1] / "results")
    asked = parser.parse_args()
    chosen = [
        engine
        for engine in ENGINES
        if (engine.name in asked.engines if asked.engines else engine.default)
    ]
    asked.work = asked.work.absolute()
    if asked.verb == "install":
        for name in dict.fromkeys(engine.environment for engine in chosen if engine.environment):
            install(name, ENVIRONMENTS[name], asked.work)
        return
    if not asked.checkpoint:
        parser.error(f"{asked.verb} needs a checkpoint")
    asked.checkpoint = asked.checkpoint.absolute()
    if asked.verb == "prepare":
        for engine in chosen:
            prepare(engine, asked)
        return
    missing = [e.name for e in chosen if e.model and not prepared(e, asked)]
    if missing:
        parser.error(f"not prepared: {', '.join(missing)}")
    against = asked.against or chosen[0].name
    if against not in [engine.name for engine in chosen]:
        parser.error(f"--against {against} is not among the engines measured")

    measured = measure(chosen, asked)
    base = next(one for one in measured if one.engine.name == against)
    print(table(measured, base, asked))
    asked.results.mkdir(parents=True, exist_ok=True)
    path = asked.results / f"cpu-peers-{asked.checkpoint.name}.json"
    path.write_text(json.dumps(report(measured, base, asked), indent=2) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
