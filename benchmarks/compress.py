"""What compressing costs: time and memory on the 1.1 B-parameter Llama shape, and how light the door is.

    python benchmarks/compress.py [--model DIR] [--check]

Makes the checkpoint (random weights, make_llama.py) unless one is given. Rounding to int4 under 2 GiB is
timed beside copying the same file, A B A B in one run, each into memory that the system has just got
back, and the ratio's median is printed with its spread: once into the page cache, as both leave their
files, and once until the files are on the disk (fsync). `busy_elsewhere` says how many cores other
processes kept busy meanwhile (Linux): above 0.1 the seconds are of little use, and are not judged. Children
start from compiled modules, as installed ones do. GPTQ int4 runs once under 3 GiB. Peak memory is the
child's own maximum resident set. `--check` ends with an error where a figure misses what
docs/performance.md promises.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROUNDS = 5
SAMPLES, LENGTH = 16, 512


def measured(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a command; its failure is ours."""
    compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=compiled
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    scale = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * scale


def onecard(*words: object) -> list[str]:
    return [sys.executable, "-m", "onecard", *map(str, words)]


def copying(model: Path, work: Path) -> tuple[float, float]:
    """Seconds to copy the weights file, and to get the copy onto the disk as well."""
    start = time.perf_counter()
    shutil.copyfile(model / "model.safetensors", work / "copy")
    seconds = time.perf_counter() - start
    on_disk = seconds + flushing([work / "copy"])
    (work / "copy").unlink()
    return seconds, on_disk


def recycle(model: Path, work: Path) -> None:
    """Leave the system memory to fill that it has just got back; a virtual machine's fresh memory is slow."""
    shutil.copyfile(model / "model.safetensors", work / "copy")
    (work / "copy").unlink()


def flushing(files: Iterable[Path]) -> float:
    """Seconds until files are on the disk."""
    start = time.perf_counter()
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - start


def busy_seconds() -> float:
    """Processor seconds that all processes have used since the machine started; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process and of its children that ended."""
    return sum(os.times()[:4])


def elsewhere() -> Callable[[], float]:
    """From now on: how many cores other processes kept busy, once it is asked."""
    began, busy, own = time.perf_counter(), busy_seconds(), own_seconds()

    def cores() -> float:
        used = busy_seconds() - busy - (own_seconds() - own)
        return max(used, 0) / (time.perf_counter() - began)

    return cores


def rounding(model: Path, work: Path) -> dict[str, float]:
    """Round-to-nearest int4 under 2 GiB against copying, interleaved."""
    ratios, ratios_on_disk, copies, seconds, peaks = [], [], [], [], []
    others = elsewhere()
    for _ in range(ROUNDS):
        recycle(model, work)
        copied, copied_on_disk = copying(model, work)
        recycle(model, work)
        took, peak = measured(
            onecard("compress", model, work / "rtn", "--recipe", "rtn-int4", "--memory", "2GiB")
        )
        took_on_disk = took + flushing((work / "rtn").iterdir())
        shutil.rmtree(work / "rtn")
        ratios.append(copied / took)
        ratios_on_disk.append(copied_on_disk / took_on_disk)
        copies.append(copied)
        seconds.append(took)
        peaks.append(peak)
    return {
        "copy_seconds": statistics.median(copies),
        "rtn_seconds": statistics.median(seconds),
        "rtn_speed_of_copy": statistics.median(ratios),
        "rtn_speed_of_copy_least": min(ratios),
        "rtn_speed_of_copy_most": max(ratios),
        "rtn_speed_of_copy_on_disk": statistics.median(ratios_on_disk),
        "rtn_peak_bytes": max(peaks),
        "busy_elsewhere": others(),
    }


def second_order(model: Path, work: Path) -> dict[str, float]:
    """GPTQ int4 under 3 GiB on random ids."""
    ids = work / "ids.json"
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    rows = [[(7919 * i + 104729 * s) % vocabulary for i in range(LENGTH)] for s in range(SAMPLES)]
    ids.write_text(json.dumps(rows))
    others = elsewhere()
    took, peak = measured(
        onecard("compress", model, work / "gptq", "--recipe", "gptq-int4", "--data", ids,
                "--memory", "3GiB")
    )  # fmt: skip
    report = json.loads((work / "gptq" / "report.json").read_text())["rows"]
    planned = next(row["value"] for row in report if row["what"] == "planned_peak_bytes")
    return {
        "gptq_seconds": took, "gptq_peak_bytes": peak, "gptq_planned_bytes": planned,
        "gptq_busy_elsewhere": others(),
    }  # fmt: skip


def door() -> dict[str, float]:
    """Seconds of `import onecard` and of `onecard --help`, the start of Python taken off; medians."""
    found: dict[str, list[float]] = {"python": [], "import": [], "help": []}
    for _ in range(9):
        found["python"].append(measured([sys.executable, "-c", "pass"])[0])
        found["import"].append(measured([sys.executable, "-c", "import onecard"])[0])
        found["help"].append(measured(onecard("--help"))[0])
    python = statistics.median(found["python"])
    return {
        "import_seconds": statistics.median(found["import"]) - python,
        "help_seconds": statistics.median(found["help"]),
    }


LIMITS = {
    "rtn_speed_of_copy": (0.5, None), "rtn_peak_bytes": (None, 2 << 30),
    "gptq_peak_bytes": (None, 3 << 30), "import_seconds": (None, 0.2), "help_seconds": (None, 0.4),
}  # fmt: skip

TIMED, QUIET = ("rtn_speed_of_copy", "import_seconds", "help_seconds"), 0.1


def missed(figures: dict[str, float]) -> list[str]:
    """The figures outside their limits."""
    found = []
    for name, (least, most) in LIMITS.items():
        value = figures[name]
        if name in TIMED and figures["busy_elsewhere"] > QUIET:
            print(f"{name} is not judged: other processes kept the machine busy")
            continue
        if (least is not None and value < least) or (most is not None and value > most):
            found.append(f"{name} is {value:.4g}, promised {least or ''}..{most or ''}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = asked.model
        if model is None:
            model = work / "llama-1.1b"
            subprocess.run(
                [sys.executable, HERE / "make_llama.py", model, "--shape", "1.1b"], check=True
            )
        figures = {**door(), **rounding(model, work), **second_order(model, work)}
    figures["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    for name, value in figures.items():
        print(
            f"{name:26} {value / 2**20:10.1f} MiB"
            if "bytes" in name
            else f"{name:26} {value:10.3f}"
        )
    results = HERE.parent / "results"
    results.mkdir(exist_ok=True)
    (results / "compress.json").write_text(json.dumps(figures, indent=1) + "\n")
    if asked.check and (problems := missed(figures)):
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
