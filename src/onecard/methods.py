"""The whole story on the shipped model: make it smaller in several ways, prove each, run each.

Every variant is an ordinary result folder below OUT, made by the same streamed job as `onecard
compress`, and measured on held-out text that the model has never seen: perplexity, KL and agreement
with the dense model, in torch. Then all are loaded by the engine of `onecard run`, which continues one
prompt with each, and are timed in turn on one thread, which is enough for so small a model: what slows
the machine for a while slows all of them.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from onecard.calibrate.data import Calibration
from onecard.checkpoint.hub import SHIPPED, shipped
from onecard.checkpoint.journal import check_target, partial_of
from onecard.checkpoint.load import Source, compute_dtype, load_model
from onecard.checkpoint.shards import Checkpoint
from onecard.checkpoint.text import read_text
from onecard.core.device import resident_peak
from onecard.core.report import Report, Row, environment, write_text
from onecard.core.spec import parameter_count
from onecard.evaluate import Progress, Reading, evaluate
from onecard.kernels import cpu
from onecard.nn.model import Model
from onecard.passes.base import Recipe
from onecard.passes.gptq import GPTQ
from onecard.passes.job import Settings, compress, file_bytes, is_finished, prepare
from onecard.passes.prune import Prune
from onecard.passes.quantize import RoundToNearest
from onecard.prove import PROMPT, SAMPLED, sample
from onecard.runtime.cpu import CpuSettings, CpuStepper
from onecard.runtime.engine import Runner
from onecard.runtime.reference import TorchExecutor, TorchScorer
from onecard.runtime.scheduler import Engine

VARIANTS = (
    Recipe("int8", (RoundToNearest(bits=8),)),
    Recipe("int4 rounding", (RoundToNearest(bits=4),)),
    Recipe("int4 GPTQ", (GPTQ(bits=4),)),
    Recipe("int3 rounding", (RoundToNearest(bits=3),)),
    Recipe("int3 GPTQ", (GPTQ(bits=3),)),
    Recipe("50 % pruning", (Prune(share=0.5),)),
)
DOCUMENTS = Reading(documents="<|endoftext|>", limit=64)
CALIBRATION = Calibration(samples=64, length=512)
TIMED, ROUNDS = 128, 7
"""Ids that are decoded for a speed, and how often."""


def run_methods(
    out: Path, force: bool = False, progress: Progress = lambda done, total, what: None
) -> Report:
    """Make and measure all variants; OUT gets one folder each and report.json.

    Killed, a second call goes on behind the last variant that was finished. Raises BadRequest where OUT holds
    something else.
    """
    shipped()
    given, out = out, out.resolve()
    if is_begun(out):
        for recipe in VARIANTS:
            if not is_made(out / folder_name(recipe), recipe):
                check_target(out / folder_name(recipe), SHIPPED, force=True)
    else:
        check_target(out, SHIPPED, force, [folder_name(recipe) for recipe in VARIANTS])
        if force:
            shutil.rmtree(out, ignore_errors=True)  # check_target has seen that it is a result
    out.mkdir(parents=True, exist_ok=True)
    started, steps = time.perf_counter(), len(VARIANTS) + 2
    text = read_text(None, "held_out.txt")
    progress(0, steps, "dense")
    dtype = compute_dtype(Source(SHIPPED), "auto")
    dense = load_model(SHIPPED, dtype)
    checkpoint, count = Checkpoint(SHIPPED), parameter_count(Source(SHIPPED).spec)
    rows, notes = measure(dense, dense, "dense", text, checkpoint, count)
    folders = {"dense": SHIPPED}
    conventions = []
    for number, recipe in enumerate(VARIANTS):
        progress(number + 1, steps, recipe.name)
        folder = folders[recipe.name] = out / folder_name(recipe)
        found = made(folder, recipe)
        model = load_model(folder, dtype)
        more, _ = measure(model, dense, recipe.name, text, Checkpoint(folder), count)
        rows += more
        rows.append(Row(recipe.name, "compress_seconds", found.value("seconds", "walk"), "s"))
        conventions = [note for note in found.notes if note[0].startswith("convention")]
    progress(steps - 1, steps, "speed")
    more, said = run(folders)
    rows, notes = rows + more, notes + said
    progress(steps, steps, "done")
    papers = {p.title: p.paper for recipe in VARIANTS for p in recipe.passes}
    notes += [*conventions, *((f"reference: {title}", paper) for title, paper in papers.items())]
    notes.append(("run", f'onecard run {given / "int4-GPTQ"} "{PROMPT}"'))
    rows.append(Row("methods", "seconds", round(time.perf_counter() - started, 1), "s"))
    rows.append(Row.of("methods", "peak_memory_bytes", resident_peak()))
    report = Report(
        tuple(rows), environment(model="the shipped demo model"),
        "one model, six ways of making it smaller", tuple(notes),
    )  # fmt: skip
    write_text(out / "report.json", report.to_json())
    return report


def folder_name(recipe: Recipe) -> str:
    """What the folder of a variant is called."""
    return recipe.name.replace(" ", "-").replace("%", "percent")


def is_begun(out: Path) -> bool:
    """OUT holds variants, finished or not, and nothing else: it was interrupted there."""
    known = [Path(folder_name(recipe)) for recipe in VARIANTS]
    names = {path.name for folder in known for path in (folder, partial_of(folder))}
    found = [path.name for path in out.iterdir()] if out.is_dir() else []
    return bool(found) and names.issuperset(found)


def is_made(folder: Path, recipe: Recipe) -> bool:
    """A variant is there, from before an interruption."""
    return is_finished(SHIPPED, folder, recipe, Settings(CALIBRATION))


def made(folder: Path, recipe: Recipe) -> Report:
    """The report of one variant, which is made unless it was before."""
    if is_made(folder, recipe):
        return Report.from_json((folder / "report.json").read_text(encoding="utf-8"))
    return compress(prepare(SHIPPED, folder, recipe, Settings(CALIBRATION, force=True)))


def measure(
    model: Model, dense: Model, name: str, text: str, checkpoint: Checkpoint, count: int
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Bytes and quality of one variant, and how they were measured."""
    quality = evaluate(TorchScorer(model), text, DOCUMENTS, TorchScorer(dense), where=name)
    rows = [
        Row.of(name, "file_bytes", file_bytes(checkpoint)),
        Row.of(name, "bits_per_weight", 8 * checkpoint.nbytes / count),
        *(row for row in quality.rows if row.what in ("perplexity", "kl", "top1_agreement")),
    ]
    return rows, list(quality.notes)


def run(folders: Mapping[str, Path]) -> tuple[list[Row], list[tuple[str, str]]]:
    """Speed of every variant by turns, and how it continues the prompt."""
    runners = {name: runner_of(folder) for name, folder in folders.items()}
    tokenizer = Source(SHIPPED).tokenizer()
    notes = [(f"sample: {name}", PROMPT + sample(runner, tokenizer, tokens=SAMPLED).text)
             for name, runner in runners.items()]  # fmt: skip
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            speed = sample(runner, tokenizer, tokens=TIMED).decode_tokens_per_second
            speeds[name].append(speed or 0.0)
    rows = [Row.of(name, "decode_tokens_per_second", statistics.median(found))
            for name, found in speeds.items()]  # fmt: skip
    engine = f"native engine ({cpu.isa()}), one thread" if cpu.available() else "reference engine"
    notes.append(("speed", f"{engine}, {TIMED} tokens behind the prompt, median of {ROUNDS} turns"))
    return rows, notes


def runner_of(folder: Path) -> Runner:
    """What `onecard run` runs a folder with; in torch where the native library is missing."""
    if not cpu.available():
        return TorchExecutor(load_model(folder))
    source = Source(folder)
    return Engine(CpuStepper(source, CpuSettings(threads=1, context=512)), source.tokenizer())
