"""What is told of a fit: its promises beside what was measured, the answer in a sentence, the report.

Every number says whether it was counted, modelled or measured.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onecard.checkpoint.shards import Checkpoint
from onecard.checkpoint.source import Source
from onecard.core.report import BITS_PER_WEIGHT, Report, Row, environment
from onecard.core.settings import format_size
from onecard.core.spec import linear_shapes, parameter_count, sites
from onecard.fit import gates as judge
from onecard.fit import removal
from onecard.fit.choose import Planning, largest_batch, short_of
from onecard.fit.costs import program_bytes
from onecard.fit.goal import MEASURES
from onecard.fit.job import Job
from onecard.fit.mend import Round, nearest
from onecard.fit.planner import GONE, Group, reason
from onecard.fit.result import (
    Attempt,
    FitResult,
    Held,
    Part,
    Place,
    Point,
    Promise,
    Said,
    Speed,
    Tried,
)
from onecard.fit.sensitivity import Sensitivity
from onecard.fit.timing import Load, Seen, flags, slowest, speed_of
from onecard.kernels import cpu
from onecard.passes.job import file_bytes
from onecard.runtime.cpu import CpuSettings, usual_cache
from onecard.runtime.footprint import footprint

MEMORY_UNCERTAIN = 0.03
"""The share by which modelled memory may be off."""
BUSY = 0.1
"""Share of the machine that others may take before it is told with what was measured."""


def told(
    job: Job, found: Sensitivity, best: Round, tried: Sequence[Round], seen: Seen, clock: tuple[Said, ...]
) -> FitResult:  # fmt: skip
    """Everything about a fit, as data."""
    promises = promised(job, best, seen)
    kept = all(p.kept is not False for p in promises)
    out = job.request.out
    run = shlex.join(["onecard", "run", str(out), "The", *flags(best.runs)])
    return FitResult(
        job.source.called, str(out), answered(job, best.planning, promises, kept), kept, job.goal, promises,
        points(job, best), places(job, found, best.planning), memories(job, best),
        speeds(job, best, promises, seen),
        best.gates, attempts(job, tried), seen.samples, how(job, best), clock,
        tuple(Said(name, str(value)) for name, value in facts(job).items()), run,
        left_out=left_out(best.planning),
        largest_batch=largest_batch(job, best.planning), nearest=nearest(job, best),
        inputs=tuple(Said(*each) for each in job.inputs.items()), bits_per_weight=bits_of(best.folder),
    )  # fmt: skip


def bits_of(folder: Path) -> float:
    """Bits per weight of a model folder."""
    source = Source(folder)
    return 8 * source.checkpoint.nbytes / parameter_count(source.spec)


def left_out(planning: Planning) -> tuple[int, ...]:
    """The blocks that a plan goes without, by their numbers in the original."""
    return tuple(sorted(int(block.split(".")[1]) for block in planning.plan.gone))


def facts(job: Job) -> dict[str, str | float | int | bool | None]:
    """What the numbers have to be read with."""
    return {
        **environment(), "device": job.costs.device.name, "effort": job.goal.effort,
        "calibration": f"{job.ids.shape[0]} samples of {job.ids.shape[1]} tokens, "
        f"{job.request.data.name if job.request.data else 'the shipped text'}",
        "original bytes": file_bytes(job.source.checkpoint), "context": job.costs.context,
    }  # fmt: skip


def promised(job: Job, best: Round, seen: Seen) -> tuple[Promise, ...]:
    """What was promised, and what it came to."""
    goal, fixed, plan = job.goal, job.fixed, best.planning.plan
    size = file_bytes(Checkpoint(best.folder))
    memory, step = plan.memory + fixed.memory, plan.seconds + fixed.seconds
    context, batch = job.costs.context, goal.batch
    load = Load.of(context, batch)
    filled, timed = not_run(job, seen), not_run(job, seen)
    if seen.memory is not None:
        filled = (
            "measured: resident peak of `onecard bench` in a process of its own that fills them"
        )
        if load.unwritten:
            filled += f", and {load.unwritten:,} positions of keys and values counted"
        timed = f"measured: {load.decode} tokens of each sequence behind {load.behind}, by `onecard bench`"
        if seen.foreign > BUSY:
            timed += f", {seen.foreign:.0%} of the machine with other programs"
    found = [
        Promise("size", "B", goal.size, True, plan.size + fixed.size, 4096.0 + 0.01 * fixed.size, size,
                file_bytes(job.source.checkpoint), held(goal.size, size),
                "counted from the formats beforehand; measured: bytes of the weight files"),
        Promise("memory", "B", goal.memory, True, memory, MEMORY_UNCERTAIN * memory, seen.memory, None,
                False if goal.memory and seen.wrong
                else held(goal.memory, seen.memory if seen.memory is not None else memory),
                f"counted from the engine's layout with {context} tokens of {batch} sequences; {filled}"),
    ]  # fmt: skip
    if step > 0:
        how, spread = speed_of(job)
        speed = 1 / step
        enough = None
        if goal.speed is not None:
            seen_or_said = speed if seen.decode is None else seen.decode
            enough = seen_or_said >= slowest(job) and not seen.wrong
        found.append(Promise("decode", "1/s", goal.speed, False, speed,
                             None if spread is None else spread * speed, seen.decode,
                             seen.before_decode, enough,
                             f"{how}, behind {context} tokens; {timed}"))  # fmt: skip
    if seen.prompt is not None:
        found.append(Promise("prompt", "1/s", None, False, None, None, seen.prompt, seen.before_prompt, None,
                             f"prompts of {load.prompt} tokens, by `onecard bench`"))  # fmt: skip
    predicted = judge.share_of(best.planning.harm, goal.measure)
    low = judge.share_of(best.planning.harm * job.trial.uncertainty, goal.measure)
    quality = judge.quality(best.gates, goal.measure)
    found.append(Promise(
        goal.measure, "", goal.quality, False, predicted, predicted - low, quality, 1.0,
        None if goal.quality is None else quality >= goal.quality, MEASURES[goal.measure],
    ))  # fmt: skip
    worst = max(best.gates, key=lambda gate: gate.kl)
    found.append(Promise("kl", "nat", None, True, best.planning.harm,
                         best.planning.harm * (job.trial.uncertainty - 1), worst.kl, 0.0, None,
                         f"mean KL(original || result) per token, the worse text: {worst.text}"))  # fmt: skip
    found += [
        Promise("right answers", "", None, False, None, None, g.right, g.right_before, None,
                f"share of {g.questions} questions of {g.text}, likeliest answer by length")
        for g in best.gates if g.questions
    ]  # fmt: skip
    outside = best.gates[0]
    found.append(Promise("perplexity", "", None, True, None, None, outside.perplexity, outside.before, None,
                         f"on {outside.text} text, {outside.tokens} tokens"))  # fmt: skip
    return tuple(found)


def not_run(job: Job, seen: Seen) -> str:
    """Why nothing was measured, where that is so."""
    other = f", it is meant for {job.costs.device.name}" if job.goal.device != "auto" else ""
    return f"not measured{': ' + seen.wrong if seen.wrong else other}"


def held(asked: float | None, got: float | None) -> bool | None:
    return None if asked is None or got is None else got <= asked


def answered(
    job: Job, planning: Planning, promises: Sequence[Promise], kept: bool
) -> str:  # fmt: skip
    """The answer in one sentence."""
    by = {p.what: p for p in promises}
    size, memory, quality = by["size"], by["memory"], by[job.goal.measure]
    shrunk = (size.original or 0) / max(1.0, size.measured or 1)
    held_in = memory.measured if memory.measured is not None else memory.predicted
    said = f"{job.source.called} {'fits' if kept else 'does not fit as asked'}: " if kept else ""
    said += f"{format_size(size.measured or 0)}, {shrunk:.2f}× smaller"
    if gone := planning.plan.gone:
        said += f", {len(gone)} of {job.source.spec.num_layers} blocks left out"
    said += f", {format_size(held_in or 0)} in memory with {job.costs.context} tokens"
    if "decode" in by:
        speed = by["decode"].measured or by["decode"].predicted or 0.0
        said += f", {speed:,.0f} tokens/s" if speed >= 100 else f", {speed:.3g} tokens/s"
    said += f", {quality.measured:.2%} of the original's {job.goal.measure} kept."
    if kept:
        return said
    missed = [f"{p.what} {_shown(p, p.measured if p.measured is not None else p.predicted)}, asked for "
              f"{_shown(p, p.asked)}" for p in promises if p.kept is False]  # fmt: skip
    return f"{job.source.called} does not keep what was asked ({'; '.join(missed)}): {said}"


def _shown(promise: Promise, value: float | None) -> str:
    if value is None:
        return "?"
    return format_size(value) if promise.unit == "B" else f"{value:.4g}"


def points(job: Job, best: Round) -> tuple[Point, ...]:
    """The Pareto front of the plan's options, and the plan itself; with blocks left out where that was a
    choice."""
    planning, fixed = best.planning, job.fixed
    options, plan = list(planning.places.values()), planning.plan
    count = parameter_count(job.source.spec)
    groups = planning.groups if job.cramped or job.trial.rounds else ()
    plans = [(p, False) for p in removal.front(options, "size", groups) if p.picks != plan.picks]
    found = []
    for plan, chosen in [*plans, (planning.plan, True)]:
        harm, size = plan.harm * planning.factor, plan.size + fixed.size
        found.append(Point(size, plan.memory + fixed.memory, 8 * size / count, harm,
                           judge.share_of(harm, job.goal.measure), chosen, len(plan.gone)))  # fmt: skip
    return tuple(sorted(found, key=lambda p: p.size))


def places(job: Job, found: Sensitivity, planning: Planning) -> tuple[Place, ...]:
    """What every place got and why; and of every layer whether it was left out."""
    plan, told = planning.plan, []
    for (where, options), option in zip(
        planning.places.items(), plan.options(list(planning.places.values())), strict=True
    ):
        words = where.split(".", 2)
        layer = int(words[1]) if words[0] == "blocks" else None
        weights = weights_of(job, where)
        why = "gone with its layer"
        if option.format != GONE:
            why = reason(options, options.index(option), plan.price, plan.priced)
        told.append(Place(
            where, layer, words[2] if layer is not None else where, weights, option.format,
            8 * option.size / weights if weights else 0.0, option.harm, option.size, option.memory, why,
            tuple(Tried(o.format, o.harm, o.size, o.memory, o.seconds) for o in options),
        ))  # fmt: skip
    groups = {group.name: group for group in planning.groups}
    for index in range(job.source.spec.num_layers):
        where = f"blocks.{index}"
        gone = where in plan.gone
        tried = tuple(
            Tried(name, harm, 0, 0, 0.0) for name, harm in found.harms.get(where, {}).items()
        )
        why = (
            layer_reason(job, planning, groups[where])
            if where in groups
            else "leaving it out was not tried"
        )
        harm = groups[where].harm if gone else 0.0
        told.append(
            Place(where, index, "layer", 0, GONE if gone else "kept", 0.0, harm, 0, 0, why, tried)
        )
    return tuple(told)


def layer_reason(job: Job, planning: Planning, group: Group) -> str:
    """Why a layer went or stayed: what leaving it out alone does, and what its places do and cost instead."""
    plan, options = planning.plan, list(planning.places.values())
    alone = f"leaving it out alone harms {group.harm:.2g} nat"
    if group.name in plan.gone:
        if job.cramped:
            why = "in the smallest formats all blocks together are beyond the budget"
        else:
            why = "measured to be better than the best plan with all blocks"
        least = sum(min(o.size for o in options[m]) for m in group.members)
        return f"{alone} and saves {least / 1024:.4g} KiB or more; {why}"
    chosen = plan.options(options)
    harm = sum(chosen[m].harm for m in group.members)
    size = sum(chosen[m].cost(plan.priced) for m in group.members)
    said = f"{alone}, keeping it {harm:.2g} nat"
    if plan.priced != "seconds":
        said += f" and {size / 1024:.4g} KiB"
        if plan.price:
            said += f", which would buy {plan.price * size:.2g} nat elsewhere"
    return said


def weights_of(job: Job, where: str) -> int:
    """Weights of a site, or of the tables."""
    spec = job.source.spec
    if where == "tables":
        return spec.vocab_size * spec.embed_size * (1 if spec.tied else 2)
    if not where.startswith("blocks."):
        return 0
    _, index, name = where.split(".", 2)
    layer = spec.layers[int(index)]
    shapes = linear_shapes(spec, layer)
    own = next(site for site in sites(layer) if site.name == name)
    return sum(shapes[path][0] * shapes[path][1] for path in own.linears)


def memories(job: Job, best: Round) -> tuple[Held, ...]:
    """Memory by component, at lengths of context up to the model's own."""
    if not cpu.available():
        return ()
    chosen = best.planning.chosen()["cache"].format
    cache = usual_cache() if chosen == "fp16" else chosen
    source, most = Source(best.folder), job.source.spec.max_context
    lengths = sorted({job.costs.context, most, *(most >> n for n in range(6) if most >> n >= 64)})
    found = []
    for length in lengths:
        parts = footprint(source, length, job.goal.batch, CpuSettings(cache=cache)).parts()
        sizes = [Part(n, program_bytes() if n == "program" else size) for n, size in parts]
        found.append(Held(length, tuple(sizes)))
    return tuple(found)


def speeds(job: Job, best: Round, promises: Sequence[Promise], seen: Seen) -> tuple[Speed, ...]:
    """Speed by phase, beside what the machine could do at best."""
    bandwidth = job.costs.device.bandwidth()
    found = []
    for promise in promises:
        if promise.what not in ("decode", "prompt"):
            continue
        roof = None
        if promise.what == "decode" and bandwidth and promise.predicted:
            chosen = best.planning.chosen().values()
            roof = bandwidth / max(1.0, sum(o.memory for o in chosen))
        context = job.costs.context
        if promise.what == "prompt":
            context = Load.of(context, job.goal.batch).prompt
        found.append(Speed(promise.what, context, promise.predicted, promise.measured,
                           promise.original, roof))  # fmt: skip
    return tuple(found)


def attempts(job: Job, tried: Sequence[Round]) -> tuple[Attempt, ...]:
    measure = job.goal.measure
    return tuple(
        Attempt(file_bytes(Checkpoint(t.folder)) if t.folder.is_dir() else 0,
                judge.share_of(t.planning.harm, measure), judge.quality(t.gates, measure), t.passed, t.what)
        for t in tried
    )  # fmt: skip


def how(job: Job, best: Round) -> tuple[Said, ...]:
    """Where the numbers come from."""
    looked = best.planning.looked
    found = [
        ("bits per weight", BITS_PER_WEIGHT),
        ("quality", MEASURES[job.goal.measure]),
        ("harm", "KL(original || model with this place alone in this format), nats per token on "
         "calibration text; " + ("a few formats of each site by running the rest of the model, the others "
         "by their error at the site" if not job.trial.together else "a block at a time by running the rest "
         "of the model, dealt out to sites and formats by their errors")),
        ("plan", "a multiple-choice knapsack, solved "
         f"{'to a bound' if best.planning.plan.gap else 'exactly'}; at most "
         f"{best.planning.plan.gap:.2g} nat above the optimum of these sums"),
        ("gates", f"{', '.join(f'{g.tokens} tokens of {g.text}' for g in best.gates)}; "
         + ("the result as the engine runs it, the original with nothing rounded" if job.costs.here
         else "both models in float32")),
    ]  # fmt: skip
    if gone := left_out(best.planning):
        blocks = ", ".join(map(str, gone))
        found.append((
            "left out", f"blocks {blocks} of the original, counted from 0; what is promised is "
            + ("the KL of the whole plan as measured on calibration text" if looked else
               "their KL as measured, together, on calibration text, and the harms of the other places"),
        ))  # fmt: skip
    if looked:
        found.append(
            (
                "look around the plan",
                f"KL on calibration text {looked[0]:.4g} before, {looked[1]:.4g} after",
            )
        )
    return tuple(Said(*each) for each in (*found, *(("warning", text) for text in job.warnings)))


# The report ---------------------------------------------------------------------------------------


def report_of(job: Job, best: Round, result: FitResult) -> Report:
    """The report of the job that made it, with what was promised and measured on top."""
    report, by = best.report, {p.what: p for p in result.promises}
    size = by["size"]
    rows = [
        Row.of("model", "file_bytes", int(size.measured or 0), int(size.original or 0)),
        Row.of("model", "bits_per_weight", result.bits_per_weight, bits_of(job.source.folder)),
        Row("model", "kept", result.kept),
        Row("model", result.goal.measure + "_kept", by[result.goal.measure].measured),
        Row.of("model", "perplexity", by["perplexity"].measured, by["perplexity"].original),
        Row.of("model", "kl", by["kl"].measured),
        Row.of("model", "top1_agreement", min(g.agreement for g in result.gates)),
    ]  # fmt: skip
    for what, name in (("memory", "peak_memory_bytes"), ("decode", "decode_tokens_per_second"),
                       ("prompt", "prompt_tokens_per_second")):  # fmt: skip
        if what in by and by[what].measured is not None:
            rows.append(Row.of("run", name, by[what].measured, by[what].original))
    for promise in result.promises:
        if promise.predicted is not None:
            rows.append(Row("promise", promise.what, promise.predicted, promise.unit))
    if result.largest_batch is not None:
        rows.append(Row("model", "largest_batch", result.largest_batch))
    rows += [
        Row(p.where, "planned", p.format) for p in result.places if (p.part == "layer") == (p.format == GONE)
    ]  # fmt: skip
    kept = [row for row in report.rows if row.where != "model" and row.what not in ("format",)]
    notes = [("answer", result.answer), *((said.name, said.text) for said in result.how)]
    notes += [
        (f"sample: {s.prompt}", f"original: {s.original} | result: {s.result}")
        for s in result.samples
    ]
    notes.append(("run", result.run))
    return replace(report, rows=(*rows, *kept), title=f"onecard fit {job.source.called}: {result.answer}",
                   notes=tuple(notes))  # fmt: skip


def dry(job: Job, planning: Planning) -> Report:
    """What would be done, from the plan alone."""

    plan, fixed = planning.plan, job.fixed
    found = [
        Row("plan", "file_bytes", plan.size + fixed.size, "B", file_bytes(job.source.checkpoint)),
        Row("plan", "memory_bytes", plan.memory + fixed.memory, "B"),
        Row("plan", job.goal.measure, judge.share_of(planning.harm, job.goal.measure)),
        Row("plan", "kl", planning.harm, "nat"),
    ]  # fmt: skip
    if plan.seconds + fixed.seconds > 0:
        found.append(Row.of("plan", "decode_tokens_per_second", 1 / (plan.seconds + fixed.seconds)))
    if (batch := largest_batch(job, planning)) is not None:
        found.append(Row("plan", "largest_batch", batch))
    found += [Row(block, "planned", GONE) for block in plan.gone]
    found += [
        Row(where, "planned", option.format)
        for where, option in planning.chosen().items() if option.format != GONE
    ]  # fmt: skip
    notes = (
        (
            "quality",
            MEASURES[job.goal.measure]
            + f"; predicted within a factor of {job.trial.uncertainty:g} of KL",
        ),
        *([("speed", speed_said(job))] if plan.seconds + fixed.seconds > 0 else []),
        *(("warning", text) for text in (*job.warnings, short_of(job, planning)) if text),
    )
    return Report(tuple(found), environment(), "Plan, nothing was done", notes)


def speed_said(job: Job) -> str:
    """How a predicted speed was obtained."""
    how, spread = speed_of(job)
    return f"{how}, behind {job.costs.context} tokens" + (
        f", give or take {spread:.0%}" if spread else ""
    )


def explained(result_places: Sequence[Place]) -> Report:
    """Why each place got what it got."""
    rows = [
        Row(p.where, "why", p.why)
        for p in result_places if p.why and not (p.format == GONE and p.part != "layer")
    ]  # fmt: skip
    return Report(tuple(rows), environment(), "Why each place got what it got")
