"""Verbs that say how good a model is, how fast it is, and what was found of it before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from onecard.core.errors import BadRequest
from onecard.core.report import Report, write_text
from onecard.running import AS_STORED, USUAL, Compute, Native, Whole, Wholes, opened
from onecard.terminal import Progress, say
from onecard.verbs.shared import Flag, Json, Name, app, show

if TYPE_CHECKING:
    from onecard.fit.result import FitResult


@app.command(name="eval")
def evaluate(
    model: Name,
    /,
    *,
    data: Path | None = None,
    against: str | None = None,
    window: Whole = 0,
    stride: Whole = 0,
    bos: Literal["start", "each", "none"] = "start",
    documents: str | None = None,
    limit: Whole = 0,
    task: Path | None = None,
    template: Literal["question", "plain"] = "question",
    compute: Compute = AS_STORED,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Measure a model: perplexity, bits per byte, KL and agreement with a reference, choice tasks.

    Parameters
    ----------
    data
        text to read; without it, the shipped held-out text
    against
        a reference model for KL and top-1 agreement
    window
        tokens per context (0: the model's own, at most 2048)
    stride
        tokens between windows (0: the window)
    bos
        where the beginning-of-sequence token goes: start, each, none
    documents
        cut the text at this separator; each document is read on its own
    limit
        only the first N documents, windows or questions (0: all)
    task
        JSON lines of {question, choices, gold} instead of a text
    template
        how a question becomes a prompt
    """
    from onecard import evaluate as ev
    from onecard.checkpoint.text import read_text

    if stride and not task and (documents is not None or data is None):
        raise BadRequest(
            "documents are read from their beginnings, with no stride",
            do="--stride is for one stream: --data FILE without --documents",
        )
    reading = ev.Reading(window, stride, bos, documents, limit)
    if task and (data or against or window or stride or documents):
        raise BadRequest("--task answers questions, it reads no text", do="leave out --data, --against, "
                         "--window, --stride and --documents")  # fmt: skip
    questions = ev.read_questions(task)[: limit or None] if task else []
    text = "" if task else read_text(data, "held_out.txt")
    if data is None and documents is None:
        reading = ev.Reading(window, stride, bos, "<|endoftext|>", limit)
    subject = opened(model, compute, native)
    other = None if against is None else opened(against, compute, native)
    longest = None if task or reading.documents else window or 2048
    with Progress("eval") as progress:
        if task:
            found = ev.choose(subject.scorer(), questions, template, progress=progress)
        else:
            reference = None if other is None else other.scorer(longest)
            found = ev.evaluate(
                subject.scorer(longest), text, reading, reference, progress=progress
            )
    name = task.name if task else data.name if data else "the shipped held-out text"
    facts = found.environment | subject.facts()
    show(Report(found.rows, facts, f"{model} on {name}", found.notes), json)


@app.command
def bench(
    model: Name,
    /,
    *,
    prompt: Wholes = (128, 512),
    decode: Wholes = (128,),
    batch: Wholes = (1, 4),
    behind: Whole = 8,
    repeat: Whole = 3,
    against: str | None = None,
    isa: tuple[str, ...] = (),
    serve: Annotated[bool, Flag] = False,
    native: Native = USUAL,
    json: Json = False,
) -> None:
    """Measure the native engine: prompt and decode speed, memory, shares of what the machine can do.

    Parameters
    ----------
    prompt
        ids of a prompt (may be given several times)
    decode
        ids that are written, one by one (may be given several times)
    batch
        how many at once (may be given several times)
    behind
        ids of the context that the written ones follow
    repeat
        measurements of each, of which the median is shown
    against
        another model, measured in turn with this one; ratios are taken turn by turn
    isa
        instruction-set classes to compare, all for all of them (may be given several times)
    serve
        load the model, say ready, and answer lines such as `prompt 512` and `decode 128` with JSON
    """
    from onecard import bench as benches

    if serve:
        benches.serve(model, native.settings())
        return
    sizes = benches.Sizes(prompt, decode, batch, repeat, behind)
    models = [model] if against is None else [model, against]
    with Progress("bench") as progress:
        found = benches.bench(models, sizes, native.settings(), isa, progress=progress)
    show(found, json)


@app.command
def report(*folders: Path, out: Path | None = None, json: Json = False) -> None:
    """Show a result again and write its page anew; several results on one page, beside each other.

    Parameters
    ----------
    folders
        folders with a fit.json or a report.json
    out
        where the page goes (default: report.html, of one result in its folder, else in this one)
    """
    from onecard.fit.result import FitResult
    from onecard.render import compared, fit_report, fit_to_html, to_html

    if not folders:
        raise BadRequest("no result was named", do="onecard report FOLDER, or several folders")
    found = list(zip(_names(folders), map(_result, folders), strict=True))
    (_, first), several = found[0], len(found) > 1
    beside = folders[0] if folders[0].is_dir() else folders[0].parent
    page = out or (Path() if several else beside) / "report.html"
    if page.is_dir() or not page.parent.is_dir():
        wrong = "is a folder" if page.is_dir() else f"there is no folder {page.parent}"
        raise BadRequest(f"the page cannot be written to {page}", wrong, "--out FILE.html")
    if several:
        made = compared(found)
    else:
        made = fit_report(first) if isinstance(first, FitResult) else first
    show(made, json)
    alone = isinstance(first, FitResult) and not several
    write_text(page, fit_to_html(first) if alone else to_html(made))  # type: ignore[arg-type]
    say(f"page: {page}")


def _names(folders: Sequence[Path]) -> list[str]:
    """What results are called: their folders' own names, with as much in front as tells them apart."""
    paths = [f.resolve() if f.is_dir() else f.resolve().with_suffix("") for f in folders]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    again = Counter[str]()
    for number, name in enumerate(names):
        again[name] += 1
        names[number] = name if again[name] == 1 else f"{name} ({again[name]})"
    return names


def _result(folder: Path) -> FitResult | Report:
    """What a folder, or one of its files, says of itself."""
    from onecard.fit.result import FILE, FitResult

    path = folder
    if folder.is_dir():
        path = next(
            (folder / name for name in (FILE, "report.json") if (folder / name).is_file()), folder
        )
    if not path.is_file():
        raise BadRequest(f"there is no report at {folder}", do="give a folder that onecard wrote")
    try:
        text = path.read_text(encoding="utf-8")
        return FitResult.from_json(text) if path.name == FILE else Report.from_json(text)
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text", seen=str(error)) from error
    except BadRequest as error:
        raise BadRequest(f"{path}: {error.what}", error.seen, error.do) from error
