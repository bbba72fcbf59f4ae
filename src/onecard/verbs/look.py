"""Verbs that look and change nothing: at this machine, at a model's headers, at the shipped recipes."""

from __future__ import annotations

from typing import Annotated

from onecard.core.report import Report
from onecard.running import Whole
from onecard.verbs.shared import Flag, Json, Name, app, say_what_is_measured, show


@app.command
def info(*, refresh: Annotated[bool, Flag] = False, json: Json = False) -> None:
    """Show this machine: cores, instruction sets, memory, measured bandwidth and peaks, GPU.

    Parameters
    ----------
    refresh
        measure again instead of using the cached figures; those of single kernels when next asked for
    """
    from onecard import cost
    from onecard.kernels import cpu, tune

    if refresh:
        cost.forget()
    if cpu.available():
        tune.apply(refresh)
    show(cpu.info(refresh), json)


@app.command
def inspect(
    model: Name,
    /,
    *,
    context: Whole | None = None,
    batch: Whole = 1,
    device: str | None = None,
    fusions: Annotated[bool, Flag] = False,
    json: Json = False,
) -> None:
    """Show what a model is made of: bytes by part, formats, KV cache. Reads headers only.

    With --device also what it takes there in several formats, whether that fits, and how fast it can be.

    Parameters
    ----------
    context
        tokens of context for the KV cache (none: 2048, or as many as the model is made for)
    batch
        sequences at once for the KV cache
    device
        `auto` for this machine, or a known one: "RTX 4090", "Raspberry Pi 5" ...
    fusions
        list what the native engine does in one go instead
    """
    from onecard.inspect import inspect_model

    report = inspect_model(model, context, batch, fusions, device, say_what_is_measured)
    show(report, json)


@app.command
def recipes(name: str | None = None, /, *, json: Json = False) -> None:
    """List the shipped recipes and what each is good for, or print one as a file.

    Parameters
    ----------
    name
        print this recipe as YAML, to start one of your own from
    """
    from onecard.core.report import Row
    from onecard.passes import SHIPPED, find_recipe, to_yaml

    if name is not None and not json:
        print(to_yaml(find_recipe(name)), end="")
        return
    chosen = [find_recipe(name)] if name is not None else []
    lines = [(r.name, r.good_for) for r in chosen] or [(n, good_for) for n, _, good_for in SHIPPED]
    notes = tuple(("recipe", to_yaml(recipe)) for recipe in chosen)
    rows = tuple(Row(n, "good_for", what) for n, what in lines)
    show(Report(rows, title="Recipes", notes=notes), json)
