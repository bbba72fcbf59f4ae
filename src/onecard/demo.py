"""The whole story on the shipped model: make it smaller in several ways, prove each, run each.

Every variant is an ordinary result folder below OUT, made by the same streamed job as `onecard
compress`, and measured on held-out text that the model has never seen: perplexity, KL and agreement
with the dense model, speed, and how it continues one prompt.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from onecard.calibrate.data import Calibration
from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.journal import check_target, partial_of
from onecard.checkpoint.load import Source, load_model
from onecard.checkpoint.shards import Checkpoint
from onecard.checkpoint.text import read_text
from onecard.core.device import resident_peak
from onecard.core.errors import BadRequest
from onecard.core.report import Report, Row, environment, write_text
from onecard.evaluate import Progress, Reading, evaluate
from onecard.nn.model import Model
from onecard.passes.base import Recipe
from onecard.passes.gptq import GPTQ
from onecard.passes.job import Settings, compress, file_bytes, parameter_count, prepare
from onecard.passes.prune import Prune
from onecard.passes.quantize import RoundToNearest
from onecard.prove import PROMPT, sample
from onecard.runtime.reference import TorchScorer

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


def run_demo(
    out: Path, force: bool = False, progress: Progress = lambda done, total, what: None
) -> Report:
    """Make and measure all variants; OUT gets one folder each and report.json."""
    if not (SHIPPED / "config.json").is_file():
        raise BadRequest(
            "the shipped model is missing from this installation", do="reinstall onecard"
        )
    check_target(out, SHIPPED, force)
    given, out = out, out.resolve()
    if force:
        shutil.rmtree(out, ignore_errors=True)  # check_target has seen that it is a result
        shutil.rmtree(partial_of(out), ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    started, steps = time.perf_counter(), len(VARIANTS) + 1
    text = read_text(None, "held_out.txt")
    progress(0, steps, "dense")
    dense = load_model(SHIPPED)
    checkpoint, count = Checkpoint(SHIPPED), parameter_count(Source(SHIPPED))
    rows, notes = measure(dense, dense, "dense", text, checkpoint, count)
    conventions = []
    for number, recipe in enumerate(VARIANTS):
        progress(number + 1, steps, recipe.name)
        folder = out / recipe.name.replace(" ", "-").replace("%", "percent")
        prepared = prepare(SHIPPED, folder, recipe, Settings(CALIBRATION))
        found = compress(prepared)
        variant = load_model(folder)
        more, said = measure(variant, dense, recipe.name, text, Checkpoint(folder), count)
        rows += more
        rows.append(Row(recipe.name, "compress_seconds", found.value("seconds", "walk"), "s"))
        notes += said
        conventions = [note for note in found.notes if note[0].startswith("convention")]
    progress(steps, steps, "done")
    papers = {p.title: p.paper for recipe in VARIANTS for p in recipe.passes}
    notes += [*conventions, *((f"reference: {title}", paper) for title, paper in papers.items())]
    notes.append(("run", f'onecard run {given / "int4-GPTQ"} "{PROMPT}"'))
    notes.append(("speed", "the reference executor expands packed weights once when it starts, so "
                  "tokens per second here are those of dense arithmetic"))  # fmt: skip
    rows.append(Row("demo", "seconds", round(time.perf_counter() - started, 1), "s"))
    rows.append(Row.of("demo", "peak_memory_bytes", resident_peak()))
    report = Report(
        tuple(rows), environment(model="the shipped demo model"),
        "onecard demo: one model, six ways of making it smaller", tuple(notes),
    )  # fmt: skip
    write_text(out / "report.json", report.to_json())
    return report


def measure(
    model: Model, dense: Model, name: str, text: str, checkpoint: Checkpoint, count: int
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Bytes, quality, speed and a sample of one variant."""
    quality = evaluate(TorchScorer(model), text, DOCUMENTS, TorchScorer(dense), where=name)
    result = sample(model)
    rows = [
        Row.of(name, "file_bytes", file_bytes(checkpoint)),
        Row.of(name, "bits_per_weight", 8 * checkpoint.nbytes / count),
        *(row for row in quality.rows if row.what in ("perplexity", "kl", "top1_agreement")),
        Row.of(name, "decode_tokens_per_second", result.decode_tokens_per_second),
    ]
    notes = [(f"sample: {name}", PROMPT + result.text)]
    return rows, notes + (list(quality.notes) if name == "dense" else [])
