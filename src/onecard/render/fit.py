"""The result of a fit as one self-contained page (templates/fit.html), and several results beside each other.

The answer in a sentence comes first, then what was promised beside what was measured, then pictures
(fit_plots.py), and at the end every place in numbers, how each number was obtained, and how to run it. As in
page.py all text is cleaned once and escaped by the template; the page asks nobody for anything.

`compared` makes a report of several results, fits and other reports, which is drawn like any comparison: a
line each, size against quality, what each of them wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from onecard.core.report import BITS_PER_WEIGHT, UNITS, Report, Row, environment
from onecard.core.settings import format_size
from onecard.fit.result import FitResult, Promise, Said, Sample
from onecard.render import fit_plots, values
from onecard.render.page import _LINE, _TEXT, templates
from onecard.render.tables import MOST, Cell, Table
from onecard.render.values import by_place, capital, label_of, sure

SHARES = ("likelihood", "agreement", "accuracy", "right answers")
NAMES = {"decode": "decoding", "prompt": "reading a prompt", "kl": "KL", "size": "weight files"}
TOLD = 2  # samples of a comparison


def fit_to_html(fit: FitResult) -> str:
    """One self-contained page."""
    fit = cleaned(fit)
    harms = fit_plots.harm_of(fit)
    return templates().get_template("fit.html").render(
        fit=fit,
        title=f"{fit.model} fitted",
        promises=promises(fit),
        front=fit_plots.front_of(fit),
        bits=fit_plots.bits_of(fit),
        harms=harms[:2], more_harms=harms[2:],
        memory=fit_plots.memory_of(fit),
        speeds=fit_plots.speeds_of(fit),
        gates=gates(fit), attempts=attempts(fit), outside=places(fit, inside=False),
        places=places(fit, inside=True), left_out=max(0, len(fit.places) - MOST),
        how=[(named(p.what), p.how) for p in fit.promises] + pairs(fit.how)
        + [("what would keep it", fit.nearest)] * bool(fit.nearest),
        budgets=budgets(fit), seconds=pairs(fit.seconds), environment=pairs(fit.environment),
    )  # fmt: skip


# Tables -------------------------------------------------------------------------------------------


def promises(fit: FitResult) -> Table:
    """What was asked and whether it was kept, what was promised, measured; and what the original has."""
    lines = [
        [
            Cell(capital(named(p.what)), _asked(p)),
            _promised(p),
            _cell(p, p.measured),
            _cell(p, p.original),
        ]
        for p in fit.promises
    ]
    head = ("", "promised", "measured", "original")
    return Table("Promised and measured", head, [("", lines)])


def _asked(promise: Promise) -> str:
    """The budget, and whether it holds."""
    if promise.asked is None:
        return ""
    bound = f"{'at most' if promise.at_most else 'at least'} {shown(promise, promise.asked)}"
    return bound + {True: ": kept", False: ": NOT KEPT", None: ""}[promise.kept]


def _cell(promise: Promise, value: float | None, small: str = "") -> Cell:
    if value is None:
        return Cell("")
    return Cell(shown(promise, value), small, number=True)


def _promised(promise: Promise) -> Cell:
    if promise.predicted is None:
        return Cell("")
    give = promise.uncertainty
    return _cell(promise, promise.predicted, f"± {shown(promise, give)}" if give else "")


def shown(promise: Promise, value: float) -> str:
    """A number with its unit."""
    if promise.unit == "B":
        return format_size(value)
    if promise.unit == "1/s":
        return fit_plots.tokens(value)
    if promise.what in SHARES:
        return f"{100 * value:.2f} %"
    text = f"{value:,.4f}" if abs(value) < 1 else f"{value:,.3f}"
    return f"{text} {promise.unit}".rstrip()


def named(what: str) -> str:
    return NAMES.get(what, label_of(what))


def budgets(fit: FitResult) -> list[tuple[str, str]]:
    """What was asked for, in words."""
    goal = fit.goal
    found = list(goal.bounds())
    found.append(
        (
            "--context",
            "as the model is made for" if goal.context is None else f"{goal.context:,} tokens",
        )
    )
    found += [("--batch", f"{goal.batch}")] if goal.batch > 1 else []
    if fit.largest_batch is not None:
        found.append(
            ("largest batch", f"{fit.largest_batch:,} sequences at once fit into --memory")
        )
    found += [("--recover", f"{goal.recover:g} minutes")] if goal.recover else []
    return [*found, ("--effort", goal.effort), ("--device", goal.device)]


def gates(fit: FitResult) -> Table | None:
    """What each text says of the result."""
    if not fit.gates:
        return None
    head = ("text", "KL per token", "agreement", "perplexity", "original's", "tokens")
    lines = [
        [Cell(g.text), _number(f"{g.kl:.4f}"), _number(f"{100 * g.agreement:.2f} %"),
         _number(f"{g.perplexity:,.3f}"), _number(f"{g.before:,.3f}"), _number(f"{g.tokens:,}")]
        for g in fit.gates
    ]  # fmt: skip
    return Table("Quality on texts that it was not made with", head, [("", lines)])


def attempts(fit: FitResult) -> Table | None:
    """Every round of planning, compressing and judging."""
    if not fit.attempts:
        return None
    head = ("round", "size", "promised", "measured", "passed")
    lines = [
        [Cell(a.what), _number(format_size(a.size)), _number(f"{100 * a.promised:.2f} %"),
         _number(f"{100 * a.quality:.2f} %"), Cell({True: "yes", False: "no", None: ""}[a.passed])]
        for a in fit.attempts
    ]  # fmt: skip
    return Table("Rounds", head, [("", lines)])


def places(fit: FitResult, inside: bool) -> Table | None:
    """What each place got, and why."""
    head = ("place", "format", "bits", "KL alone", "file", "memory", "why")
    lines = [
        [Cell(p.where), Cell(p.format), _number(f"{p.bits_per_weight:.2f}"), _number(f"{p.harm:.2g}"),
         _number(format_size(p.size)), _number(format_size(p.memory)), Cell(p.why)]
        for p in fit.places if (p.layer is not None) == inside
    ]  # fmt: skip
    title = "Every place" if inside else "Outside the layers"
    return Table(title, head, [("", lines[:MOST])]) if lines else None


def _number(text: str) -> Cell:
    return Cell(text, number=True)


def pairs(said: Sequence[Said]) -> list[tuple[str, str]]:
    return [(each.name, each.text) for each in said]


# At the door --------------------------------------------------------------------------------------


def cleaned(fit: FitResult) -> FitResult:
    """The same result with every string fit to be shown."""
    found: FitResult = _cleaned(fit, _LINE)
    return found


def _cleaned(value: Any, signs: dict[int, int]) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").translate(signs)
    if isinstance(value, tuple):
        return tuple(_cleaned(each, signs) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = _TEXT if isinstance(value, Said | Sample) else signs
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return replace(value, **{name: _cleaned(each, own) for name, each in fields.items()})
    return value


# Several results ----------------------------------------------------------------------------------


def fit_report(fit: FitResult) -> Report:
    """One fit in the words of reports, for a terminal."""
    rows = tuple(rows_of("model", fit))
    facts = {said.name: said.text for said in fit.environment}
    return Report(rows, dict(facts), fit.model, (("answer", fit.answer), ("run", fit.run)))


def compared(results: Sequence[tuple[str, FitResult | Report]]) -> Report:
    """One report of several results under their names."""
    rows: list[Row] = []
    answers: list[str] = []
    runs: list[str] = []
    samples: list[tuple[str, str]] = []
    for name, found in results:
        if isinstance(found, FitResult):
            rows += rows_of(name, found)
            answers.append(f"{name}: {found.answer}")
            runs.append(found.run)
            told = [(each.prompt, each.result) for each in found.samples]
        else:
            rows += [replace(r, where=name, before=None) for r in found.rows if r.where == "model"]
            said = dict(found.notes)
            answers += [f"{name}: {said['answer']}"] if "answer" in said else []
            runs += [said["run"]] if "run" in said else []
            told = [
                (kind.removeprefix("sample: "), text)
                for kind, text in found.notes
                if kind.startswith("sample: ")
            ]
        samples += [(f"sample: {name}: {prompt}", text) for prompt, text in told[:TOLD]]
    notes = [
        ("answer", _best(rows, len(results))),
        ("convention: bits per weight", BITS_PER_WEIGHT),
    ]
    notes += [("Each in a sentence", "\n".join(answers))] if answers else []
    notes += [*samples, *([("run", "\n".join(runs))] if runs else [])]
    names = ", ".join(name for name, _ in results)
    return Report(tuple(rows), environment(), f"{len(results)} results: {names}", tuple(notes))


def _best(rows: Sequence[Row], count: int) -> str:
    """Which is the smallest, the nearest to its original, the fastest."""
    found = []
    for what, word, best in (
        ("file_bytes", "the smallest", min), ("kl", "the nearest to its original", min),
        ("perplexity", "of the least perplexity", min), ("decode_tokens_per_second", "the fastest", max),
    ):  # fmt: skip
        known = by_place(list(rows), what)
        if len(known) > 1:
            row = best(known.values(), key=sure)
            found.append(f"{row.where} is {word} ({values.shown(row)})")
    return f"{'; '.join(found)}." if found else f"{count} results."


def rows_of(name: str, fit: FitResult) -> list[Row]:
    """A fit in the words of reports: measured where it was measured, else promised."""
    words = {"size": "file_bytes", "memory": "needed_bytes", "decode": "decode_tokens_per_second",
             "prompt": "prompt_tokens_per_second", "perplexity": "perplexity", "kl": "kl",
             "agreement": "top1_agreement"}  # fmt: skip
    rows = []
    weights = sum(place.weights for place in fit.places if place.format != "gone")
    if fit.bits_per_weight is not None:
        rows.append(Row.of(name, "bits_per_weight", fit.bits_per_weight))
    elif weights:
        bits = sum(place.weights * place.bits_per_weight for place in fit.places) / weights
        rows.append(Row.of(name, "bits_per_weight", bits))
    for promise in fit.promises:
        value = promise.measured if promise.measured is not None else promise.predicted
        if promise.what in words and value is not None:
            what, number = words[promise.what], int(value) if promise.unit == "B" else value
            rows.append(Row(name, what, number, UNITS.get(what, promise.unit)))
    known = {row.what for row in rows}
    if fit.gates and "top1_agreement" not in known:
        rows.append(Row.of(name, "top1_agreement", min(gate.agreement for gate in fit.gates)))
    if fit.gates and "perplexity" not in known:
        rows.append(Row.of(name, "perplexity", fit.gates[0].perplexity))
    if fit.largest_batch is not None:
        rows.append(Row(name, "largest_batch", fit.largest_batch))
    return [*rows, Row(name, "everything_kept", fit.kept)]
