"""The passes there are, recipe files, and the recipes that are shipped.

A recipe file is YAML: `passes:` with a list of one-key mappings, a pass and its settings.

    name: my-recipe
    passes:
      - prune: {share: 0.3}
      - gptq: {bits: 4, group: 64}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from onecard.core.errors import BadRequest, nearest
from onecard.core.settings import fill
from onecard.passes.awq import AWQ
from onecard.passes.base import Pass, Recipe
from onecard.passes.distill import Distil, Targets
from onecard.passes.fuse import Fuse
from onecard.passes.gptq import GPTQ
from onecard.passes.hqq import HQQ
from onecard.passes.layers import DropLayers
from onecard.passes.prune import Prune
from onecard.passes.quantize import RoundToNearest
from onecard.passes.recover import Recover
from onecard.passes.scales import Scale, Smooth

PASSES: tuple[type[Pass], ...] = (
    RoundToNearest, GPTQ, AWQ, HQQ, Scale, Smooth, Prune, DropLayers, Recover, Distil, Fuse,
)  # fmt: skip

RECIPES = (
    Recipe("rtn-int8", (RoundToNearest(bits=8),),
           "half the size of bf16, practically the same answers, seconds, no data"),
    Recipe("rtn-int4", (RoundToNearest(bits=4),),
           "a quarter of the size in seconds, no data; gptq-int4 is better when there is time"),
    Recipe("gptq-int8", (GPTQ(bits=8),), "int8 with the last of its error made good"),
    Recipe("gptq-int4", (GPTQ(bits=4),), "the usual choice: a quarter of the size, little lost"),
    Recipe("gptq-int4-g32", (GPTQ(bits=4, group=32),), "4.5 bits per weight, closer to the original"),
    Recipe("gptq-int3", (GPTQ(bits=3),), "when 4 bits do not fit: visible loss, far less than rounding"),
    Recipe("gptq-int2-g32", (GPTQ(bits=2, group=32, zero_point=True),),
           "the smallest integers; expect damage, measure it"),
    Recipe("awq-int4", (AWQ(bits=4),), "int4 by scales and clipping; less is changed than by GPTQ"),
    Recipe("awq-int3", (AWQ(bits=3),), "int3 by scales and clipping"),
    Recipe("awq-gptq-int4", (Scale(bits=4), GPTQ(bits=4)), "AWQ's scales, then GPTQ"),
    Recipe("awq-gptq-int3", (Scale(bits=3), GPTQ(bits=3)), "AWQ's scales, then GPTQ"),
    Recipe("hqq-int4", (HQQ(bits=4),), "int4 without data, better than rounding, in seconds"),
    Recipe("magnitude-50", (Prune(share=0.5),),
           "half of the weights set to zero: a baseline that hurts language models; see its report"),
    Recipe("magnitude-2of4", (Prune(pattern="2:4"),), "the 2:4 pattern by magnitude, a baseline"),
    Recipe("magnitude-20-gptq-int4", (Prune(share=0.2), GPTQ(bits=4)),
           "a chain: a fifth of the weights to zero, the damage made good while rounding to int4"),
    Recipe("drop-layers-25", (DropLayers(share=0.25),),
           "a quarter of the layers out: the same speed-up everywhere, prompt and decode; reasoning suffers"),
    Recipe("drop-layers-10-gptq-int4", (DropLayers(share=0.1), GPTQ(bits=4)),
           "a chain: the least influential tenth of the layers out, the rest by GPTQ in int4"),
    Recipe("magnitude-50-distil", (Prune(share=0.5), Distil()),
           "half of the weights to zero, the rest trained towards the original: minutes for small models"),
    Recipe("iterative-50",
           (Prune(share=0.25), Recover(), Prune(share=0.4), Recover(), Prune(share=0.5), Distil()),
           "zeros in three steps with training between them: less damage than at once, three times the time"),
    Recipe("drop-layers-25-distil-gptq-int4",
           (DropLayers(share=0.25, most=None), Distil(Targets(hidden=0.5)), GPTQ(bits=4)),
           "a chain: a quarter of the layers out, the rest taught by the original, then int4"),
)  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a YAML file. BadRequest with the nearest known name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_recipe(path)
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    known = [recipe.name for recipe in RECIPES]
    raise BadRequest(
        f"there is no recipe {name!r}", nearest(name, known), "or give a file that ends in .yaml"
    )


class Plain(yaml.SafeLoader):
    """YAML without aliases, with which a few lines can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file; every key and value is checked."""
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("it is too large")
        data = yaml.load(path.read_text(encoding="utf-8"), Plain)  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise BadRequest(f"the recipe {path} cannot be read", seen=str(error)[:300]) from error
    return recipe_of(data, str(path))


def recipe_of(data: Any, where: str) -> Recipe:
    """A recipe from plain data, as a recipe file has it."""
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list):
        raise BadRequest(f"{where} has no list of passes", do="passes: [{gptq: {bits: 4}}]")
    for key in data:
        if key not in ("name", "passes", "good_for"):
            raise BadRequest(
                f"{where} has an unknown key {key!r}",
                do=nearest(str(key), ("name", "passes", "good_for")),
            )
    passes = tuple(_pass(item, f"{where}: pass {i + 1}") for i, item in enumerate(data["passes"]))
    for key in ("name", "good_for"):
        if not isinstance(data.get(key, ""), str):
            raise BadRequest(f"{where}: {key} is not text")
    return Recipe(data.get("name", Path(where).stem), passes, data.get("good_for", ""))


def _pass(item: Any, where: str) -> Pass:
    known = {cls.key: cls for cls in PASSES}
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise BadRequest(f"{where} is not one name with its settings", do="- gptq: {bits: 4}")
    key, settings = next(iter(item.items()))
    if key not in known:
        raise BadRequest(f"{where} is {key!r}", do=nearest(str(key), known))
    if not isinstance(settings or {}, dict):
        raise BadRequest(
            f"{where}: the settings of {key} are {settings!r}", do="a mapping is needed"
        )
    return fill(known[key], settings or {}, f"{where}: {key}")


def to_yaml(recipe: Recipe) -> str:
    """A recipe as a file that `read_recipe` takes."""
    data = {"name": recipe.name, "good_for": recipe.good_for, "passes": recipe.settings()}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
