"""What is to be fitted, checked: everything that headers, settings and texts can answer before any work.

Budgets that contradict each other, what cannot fit in any format with any block left out, what is compressed
already, texts that the tokenizer does not know: each is said here, and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from onecard.calibrate.data import Calibration, calibration_ids, digest
from onecard.calibrate.walk import Progress
from onecard.checkpoint.journal import check_space, check_target
from onecard.checkpoint.save import source_hashes
from onecard.checkpoint.source import Source, verify
from onecard.core.device import available_memory, resident
from onecard.core.errors import BadRequest
from onecard.core.settings import format_size
from onecard.core.spec import parameter_count, sites
from onecard.fit import gates as judge
from onecard.fit import planner, removal
from onecard.fit.candidates import CACHES, Trial, trial_of
from onecard.fit.costs import Costs, Fixed
from onecard.fit.goal import Goal
from onecard.fit.planner import Group, Infeasible, Limits, Option
from onecard.fit.result import FILE, read_fit
from onecard.fit.sensitivity import Sensitivity, default_home, known, look_bytes, table_formats
from onecard.passes import job as jobs
from onecard.passes.base import Recipe
from onecard.passes.plan import BeyondCap, Settings
from onecard.passes.planned import Chosen, Planned
from onecard.passes.walked import check_ids

SUMS_UP = 1.2
"""Harms measured alone come to less than what they do together: 1.08 to 1.37 on the shipped model at 2.25 to
3.5 bits per weight. The first promise is raised by it."""
LOOKED_AT = 400_000
"""Bytes of a text that are looked at for whether it is the tokenizer's."""
SPLIT = 1.0
"""Tokens per character above which a text is said not to be the tokenizer's."""
UNKNOWN = 0.05
"""The share of tokens that stand for anything unknown above which the same is said."""

Quiet: Progress = lambda done, total, what: None  # noqa: E731


@dataclass(frozen=True)
class Request:
    """What to fit, into what, how, and from which texts."""

    model: str
    out: Path
    goal: Goal
    data: Path | None = None
    held_out: Path | None = None
    cap: int | None = None
    force: bool = False
    task: Path | None = None  # questions to judge on, too
    home: Path | None = None  # where sensitivities are kept


@dataclass(frozen=True)
class Job:
    """A request that was checked: nothing is done yet, and what can be known from headers is."""

    request: Request
    source: Source
    ids: Tensor
    warnings: tuple[str, ...] = ()

    @property
    def goal(self) -> Goal:
        return self.request.goal

    @property
    def effort(self) -> Trial:
        """What the effort tries of a model of this size."""
        return trial_of(self.goal.effort, parameter_count(self.source.spec))

    @property
    def trial(self) -> Trial:
        """The same, and what it does to leave blocks out where some have to go."""
        return replace(self.effort, left_out=True) if self.cramped else self.effort

    @cached_property
    def cramped(self) -> bool:
        """Whether the budgets are beyond the smallest formats, so that blocks have to go."""
        try:
            planner.solve(list(self.places().values()), self.limits(None))
        except Infeasible:
            return True
        return False

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.source, self.goal)

    @cached_property
    def tables(self) -> tuple[str, ...]:
        """Formats of the embedding and head that are choices: rounding them takes the model in memory."""
        room = self.request.cap or available_memory()
        fits = 8 * parameter_count(self.source.spec) < room
        return tuple(f.name for f in table_formats(self.source, self.effort.tables)) if fits else ()

    @cached_property
    def fixed(self) -> Fixed:
        return self.costs.fixed(bool(self.tables))

    def places(self, found: Sensitivity | None = None) -> dict[str, list[Option]]:
        """place -> options; without sensitivities, of which only costs are known."""
        return self.costs.options(self.effort.formats, promised(found), self.tables)

    def groups(
        self, places: Mapping[str, Sequence[Option]], found: Sensitivity | None = None
    ) -> list[Group]:  # fmt: skip
        """The blocks that may be left out of these places."""
        return self.costs.groups(places, promised(found))

    def limits(self, harm: float | None) -> Limits:
        """What is left for the options when everything fixed is paid."""
        goal, fixed = self.goal, self.fixed
        return Limits(
            None if goal.size is None else goal.size - fixed.size,
            None if goal.memory is None else goal.memory - fixed.memory,
            None if goal.speed is None else 1 / goal.speed - fixed.seconds,
            harm,
        )

    @property
    def harm(self) -> float | None:
        """The KL that the quality asked for allows, before anything was measured."""
        goal = self.goal
        return None if goal.quality is None else judge.harm_of(goal.quality, goal.measure)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What goes in, by content: the model, and every text that it is measured or judged on."""
        model = json.dumps(source_hashes(self.source), sort_keys=True).encode()
        return {
            "model": hashlib.sha256(model).hexdigest()[:16],
            "calibration": digest(self.ids),
            "held-out text": judge.name_of(self.request.held_out),
            "questions": judge.name_of(self.request.task),
        }

    @property
    def work(self) -> Path:
        return self.request.out.parent / f".{self.request.out.name}.fit"


def promised(found: Sensitivity | None) -> dict[str, dict[str, float]] | None:
    """Harms as they are promised; None where none are known."""
    if found is None:
        return None
    return {w: {n: SUMS_UP * h for n, h in own.items()} for w, own in found.harms.items()}


def prepare(request: Request) -> Job:
    """Check everything that can be checked from headers, settings and text. Raises BadRequest."""
    out = Path(request.out).expanduser().resolve()
    request = replace(request, out=out)
    source, goal = Source(request.model), request.goal
    verify(source.folder)
    if source.compressed:
        raise BadRequest(
            f"{source.called} is compressed already ({', '.join(source.format_names())})",
            "fit starts from the original numbers",
            "fit the original; or go on from this one: onecard distill ORIGINAL "
            f"{source.called} OUT trains it, onecard inspect {source.called} --device auto says what fits",
        )
    if goal.context and goal.context > source.spec.max_context:
        raise BadRequest(f"--context {goal.context}",
                         f"{source.called} is made for {source.spec.max_context} tokens")  # fmt: skip
    check_target(out, source.folder, request.force)
    trial = trial_of(goal.effort, parameter_count(source.spec))
    length = min(trial.length, source.spec.max_context)
    tokenizer = source.tokenizer()
    given = request.data is not None and request.data.suffix == ".json"
    wanted = Calibration(max(1, trial.tokens // length), length)
    ids = calibration_ids(
        None if given else tokenizer, request.data, wanted, source.spec.vocab_size
    )
    check_ids(ids, source.spec)
    judge.require_text(source, request.held_out)
    judge.require_questions(request.task, goal.measure)
    texts = (request.data, request.held_out)
    job = Job(request, source, ids, tuple(said for text in texts for said in warned(source, text)))
    require_possible(job)
    require_room(job)
    return job


def warned(source: Source, text: Path | None) -> list[str]:
    """What is odd about a text: that the tokenizer cuts it into bytes, or does not have its words."""
    if text is None or text.suffix == ".json":
        return []
    with text.open("rb") as file:
        words = file.read(LOOKED_AT).decode("utf-8", "ignore")
    tokenizer = source.tokenizer()
    ids = tokenizer.encode(words)
    rate, unknown = len(ids) / max(1, len(words)), tokenizer.unknown(ids)
    if unknown > UNKNOWN:
        said = f"has no token for {unknown:.0%} of {text.name}"
    elif rate > SPLIT:
        said = f"cuts {text.name} into {rate:.1f} tokens per character"
    else:
        return []
    return [
        f"the tokenizer {said}: it does not know this language, and what is measured on it says little"
    ]


def require_possible(job: Job) -> None:
    """BadRequest where even the cheapest formats are beyond a budget, with every block but one left out: the
    nearest, and what to relax."""
    places = job.places()
    try:
        removal.solve(list(places.values()), job.limits(None), job.groups(places))
    except Infeasible as error:
        raise explained(job, error) from error


def require_room(job: Job) -> None:
    """BadRequest where measuring, or compressing in the smallest formats, would take more memory than it may,
    or more room than there is on the disk."""
    request, places, held = job.request, job.places(), resident()
    need = held + look_bytes(job.source, job.ids, job.trial)
    room = request.cap or held + available_memory()
    home = request.home or default_home()
    new = not known(job.source, job.ids, job.trial, home)
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    if new and not (there.is_dir() and os.access(there, os.W_OK)):
        raise BadRequest(f"sensitivities cannot be kept in {home}", f"{there} cannot be written to",
                         "set XDG_CACHE_HOME to a folder that can")  # fmt: skip
    if new and need > room:
        quick = held + look_bytes(
            job.source, job.ids, trial_of("quick", parameter_count(job.source.spec))
        )
        lighter = f"--effort quick, which takes {format_size(quick)}" if quick < need else ""
        raise BadRequest(
            f"sensitivities at {job.goal.effort} effort take {format_size(need)} of memory",
            f"{format_size(room)} {'may be taken' if request.cap else 'are free'}",
            " or ".join(filter(None, (lighter, "raise --cap" if request.cap else ""))),
        )  # fmt: skip
    smallest = {w: min(own, key=lambda option: option.size) for w, own in places.items()}
    sites = tuple(Chosen(w, o.format) for w, o in smallest.items() if w.startswith("blocks."))
    settings = Settings(Calibration(*job.ids.shape), request.data, memory=request.cap, force=True)
    recipe = Recipe("fit", (Planned(sites),))
    try:
        plan = jobs.way_of(recipe).make_plan(job.source, recipe, settings, job.ids)
    except BeyondCap as error:
        raise BadRequest(error.what, error.seen, "raise --cap") from error
    check_space(request.out, plan.disk)


def explained(job: Job, error: Infeasible) -> BadRequest:
    """What the nearest possible is, in the words of the goal."""
    goal, fixed = job.goal, job.fixed
    if error.name == "harm":
        least = judge.share_of(error.least, goal.measure)
        near = math.floor(0.9999 * least * 1e4) / 1e4
        return BadRequest(f"no plan keeps {goal.quality:g} of the {goal.measure}",
                          f"the best possible here is {least:.5f}", f"--quality {near:g}")  # fmt: skip
    asked = {"size": goal.size, "memory": goal.memory, "seconds": goal.speed}[error.name]
    total = error.least + getattr(fixed, error.name)
    all_blocks = planner.least_cost(list(job.places().values()), error.name)
    all_blocks = max(total, all_blocks + getattr(fixed, error.name))
    if error.name == "seconds":
        return BadRequest(f"--speed {asked:g} tokens/s is beyond {job.costs.device.name}",
                          f"the most that is predicted, in the smallest formats, is {1 / all_blocks:.3g} "
                          f"with all blocks, {1 / total:.3g} with all but one left out",
                          f"--speed {0.95 / all_blocks:.3g}, or a smaller --context")  # fmt: skip
    beside = format_size(min(fixed.memory, total))  # norms go with their blocks
    words = f"{beside} of it is the program, norms and work space; " * (error.name == "memory")
    return BadRequest(
        f"{job.source.called} does not fit into --{error.name} {format_size(float(asked or 0))}",
        f"{words}the least possible in any format tried is {format_size(all_blocks)} with all blocks, "
        f"{format_size(total)} with all but one left out",
        f"--{error.name} {roomy(all_blocks)}"
        + (", or a smaller --context or --batch" if error.name == "memory" else ""),
    )  # fmt: skip


def roomy(least: float) -> str:
    """A budget to write on the command line that so many bytes fit into."""
    unit, name = (2**20, "MiB") if least > 2**24 else (2**10, "KiB")
    return f"{math.ceil(1.01 * least / unit)}{name}"


TRIED, SOLVED, ROUNDED = 5e-3, 2e-7, 2e-8
"""Seconds: of a candidate of a site, whatever its size; of a weight solved for; of one rounded."""


def seconds(job: Job) -> float:
    """What the sensitivities will take, from products timed on the spot; 0 where they are known."""
    from onecard.passes.forecast import estimate_seconds, linear_weights, product_seconds

    if known(job.source, job.ids, job.trial, job.request.home or default_home()):
        return 0.0
    spec, trial = job.source.spec, job.trial
    weights, head = linear_weights(spec), spec.vocab_size * spec.embed_size
    places = sum(len(sites(layer)) for layer in spec.layers)
    begun = spec.num_layers / trial.together if trial.together else places * len(trial.anchors)
    begun += spec.num_layers * trial.left_out
    through = len(trial.tables) + len(CACHES) - 1  # from the first block on; the others from theirs
    found = product_seconds(weights, trial.tried * (begun / 2 + through), "fp32")
    found += product_seconds(head, trial.tried * (begun + through), "fp32")
    found += TRIED * places * len(trial.formats)
    if trial.rounding == "gptq":
        found += estimate_seconds(spec, job.ids, "fp32", False)
        return found + SOLVED * weights * len(trial.formats)
    return found + product_seconds(weights, job.ids.numel(), "fp32") + ROUNDED * weights


def is_finished(request: Request) -> bool:
    """OUT holds the whole result of this very request: the same goal, model, texts and questions. Raises
    BadRequest where it holds that of another one, and is not to be replaced."""
    out = Path(request.out).expanduser()
    if not (out / FILE).is_file():
        return False
    done, job = read_fit(out), prepare(replace(request, force=True))
    before = {said.name: said.text for said in done.inputs}
    other = [f"--{field.name}" for field in fields(Goal)
             if getattr(done.goal, field.name) != getattr(request.goal, field.name)]  # fmt: skip
    other += [name for name, now in job.inputs.items() if before.get(name) != now]
    if other and not request.force:
        raise BadRequest(f"{out} is the result of another fit", f"it differs in: {', '.join(other)}",
                         "--force replaces it; or give a new folder")  # fmt: skip
    if not other:
        verify(out)
    return not other
