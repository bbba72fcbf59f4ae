"""The passes there are, recipe files, and the recipes that are shipped.

A recipe file is YAML: `passes:` with a list of one-key mappings, a pass and its settings.

    name: my-recipe
    passes:
      - prune: {share: 0.3}
      - gptq: {bits: 4, group: 64}
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from onecard.core.errors import BadRequest, nearest
from onecard.core.settings import fill
from onecard.passes.base import Pass, Recipe

if TYPE_CHECKING:
    from onecard.passes.activations import Activations as Activations
    from onecard.passes.autoround import AutoRound as AutoRound
    from onecard.passes.awq import AWQ as AWQ
    from onecard.passes.codebook import Cluster as Cluster
    from onecard.passes.distill import Distil as Distil
    from onecard.passes.fuse import Fuse as Fuse
    from onecard.passes.gptq import GPTQ as GPTQ
    from onecard.passes.gptq_levels import GPTQLevels as GPTQLevels
    from onecard.passes.hashing import Hash as Hash
    from onecard.passes.hqq import HQQ as HQQ
    from onecard.passes.layers import DropLayers as DropLayers
    from onecard.passes.levels import RoundToLevels as RoundToLevels
    from onecard.passes.lowrank import Factorize as Factorize
    from onecard.passes.mixed import Mixed as Mixed
    from onecard.passes.planned import Planned as Planned
    from onecard.passes.prune import Prune as Prune
    from onecard.passes.qat import QAT as QAT
    from onecard.passes.quantize import RoundToNearest as RoundToNearest
    from onecard.passes.recover import Recover as Recover
    from onecard.passes.remainder import LowRankPlus as LowRankPlus
    from onecard.passes.rotate import Rotate as Rotate
    from onecard.passes.scales import Scale as Scale
    from onecard.passes.scales import Smooth as Smooth
    from onecard.passes.sparsegpt import SparseGPT as SparseGPT
    from onecard.passes.structure import CutUnits as CutUnits
    from onecard.passes.tables import Tables as Tables

PASSES = {
    "rtn": ("quantize", "RoundToNearest"),
    "levels": ("levels", "RoundToLevels"),
    "gptq": ("gptq", "GPTQ"),
    "gptq-levels": ("gptq_levels", "GPTQLevels"),
    "mixed": ("mixed", "Mixed"),
    "planned": ("planned", "Planned"),
    "awq": ("awq", "AWQ"),
    "autoround": ("autoround", "AutoRound"),
    "hqq": ("hqq", "HQQ"),
    "scale": ("scales", "Scale"),
    "activations": ("activations", "Activations"),
    "rotate": ("rotate", "Rotate"),
    "smooth": ("scales", "Smooth"),
    "prune": ("prune", "Prune"),
    "kmeans": ("codebook", "Cluster"),
    "hash": ("hashing", "Hash"),
    "svd": ("lowrank", "Factorize"),
    "lowrank_plus": ("remainder", "LowRankPlus"),
    "sparsegpt": ("sparsegpt", "SparseGPT"),
    "cut": ("structure", "CutUnits"),
    "drop_layers": ("layers", "DropLayers"),
    "recover": ("recover", "Recover"),
    "distil": ("distill", "Distil"),
    "qat": ("qat", "QAT"),
    "tables": ("tables", "Tables"),
    "fuse": ("fuse", "Fuse"),
}
"""key -> file and class, imported when a recipe names it: one that only rounds does without torch."""

SHIPPED: tuple[tuple[str, list[Any], str], ...] = (
    ("rtn-int8", [{"rtn": {"bits": 8}}],
     "half the size of bf16, practically the same answers, seconds, no data"),
    ("rtn-int4", [{"rtn": {"bits": 4}}],
     "a quarter of the size in seconds, no data; gptq-int4 is better when there is time"),
    ("rtn-fp8", [{"levels": {"table": "fp8-row"}}],
     "floats of 8 bits: half the size of bf16, for machines that multiply fp8; no data"),
    ("rtn-nf4", [{"levels": {"table": "nf4"}}],
     "4 bits whose levels follow a normal distribution: closer than rtn-int4, no data"),
    ("rtn-mxfp4", [{"levels": {"table": "mxfp4"}}],
     "4.25 bits in the Open Compute layout; coarser than nf4, for machines that multiply it"),
    ("rtn-nvfp4", [{"levels": {"table": "nvfp4"}}],
     "4.5 bits, a scale of 8 bits for every 16 weights: the finer of the two fp4 layouts"),
    ("mixed-4", [{"mixed": {"mean": 4.0}}],
      "the bytes of int4, spent where the answers suffer most; measures every site first"),
    ("mixed-3", [{"mixed": {"mean": 3.0}}], "the bytes of int3, spent where the answers suffer most"),
    ("mixed-tables-4", [{"mixed": {"mean": 4.0, "correct": 1.0}}, {"tables": {"bits": 6}}],
     "mixed-4 aimed at the original's outputs, embedding and head in 6 bits: for small models, where these "
     "are most of the bytes"),
    ("mixed-tables-3", [{"mixed": {"mean": 3.0, "correct": 1.0}}, {"tables": {"bits": 6}}],
     "the same at 3 bits: closer than gptq-int3, and far smaller where the vocabulary is large"),
    ("mixed-tables-3-distil",
     [{"mixed": {"mean": 3.0, "correct": 1.0}}, {"tables": {"bits": 6}},
      {"distil": {"training": {"rate": 5e-4}}}],
     "a chain: the same, then taught by the original around what was rounded"),
    ("gptq-nf4", [{"gptq-levels": {"table": "nf4"}}],
      "rtn-nf4 with the errors made good while rounding"),
    ("w8a8", [{"smooth": {}}, {"rtn": {"bits": 8, "group": None}}, {"activations": {}}],
      "weights and inputs in int8, a scale per row and per token: for machines that multiply int8"),
    ("w8a8-static", [{"smooth": {"sites": "all"}}, {"rtn": {"bits": 8, "group": None}},
                     {"activations": {"inputs": "int8-static", "search": 20}}],
      "w8a8 with stored scales of inputs: nothing to look for while it runs, more is lost"),
    ("w4a8", [{"smooth": {}}, {"gptq": {"bits": 4}}, {"activations": {}}],
      "int4 by GPTQ and inputs in int8, a scale per token"),
    ("w8a8-fp8", [{"levels": {"table": "fp8-row"}}, {"activations": {"inputs": "fp8-token"}}],
      "weights and inputs in fp8, a scale per row and per token; no data"),
    ("gptq-int8", [{"gptq": {"bits": 8}}], "int8 with the last of its error made good"),
    ("gptq-int4", [{"gptq": {"bits": 4}}],
     "the usual choice: a quarter of the size, little lost"),
    ("gptq-int4-g32", [{"gptq": {"bits": 4, "group": 32}}],
     "4.5 bits per weight, closer to the original"),
    ("gptq-int3", [{"gptq": {"bits": 3}}],
     "when 4 bits do not fit: visible loss, far less than rounding"),
    ("gptq-int2-g32", [{"gptq": {"bits": 2, "group": 32, "zero_point": True}}],
     "the smallest integers; expect damage, measure it"),
    ("awq-int4", [{"awq": {"bits": 4}}],
     "int4 by scales and clipping; less is changed than by GPTQ"),
    ("awq-int3", [{"awq": {"bits": 3}}], "int3 by scales and clipping"),
    ("awq-gptq-int4", [{"scale": {"bits": 4}}, {"gptq": {"bits": 4}}], "AWQ's scales, then GPTQ"),
    ("awq-gptq-int3", [{"scale": {"bits": 3}}, {"gptq": {"bits": 3}}], "AWQ's scales, then GPTQ"),
    ("autoround-int4", [{"autoround": {"bits": 4}}],
      "int4 learned block by block from a start by GPTQ: minutes instead of seconds"),
    ("autoround-int3", [{"autoround": {"bits": 3}}], "int3 learned block by block"),
    ("autoround-int2-g32", [{"autoround": {"bits": 2, "group": 32, "zero_point": True}}],
      "the smallest integers, learned block by block; expect damage, measure it"),
    ("gptaq-int3", [{"gptq": {"bits": 3, "correct": 1.0}}],
      "GPTQ that aims at the original's outputs; clearly better than gptq-int3 for twice its time"),
    ("gptaq-int2-g32", [{"gptq": {"bits": 2, "group": 32, "zero_point": True, "correct": 1.0,
                                  "sweeps": 2}}], "GPTQ that aims at the original's outputs"),
    ("rotate-gptq-int4", [{"rotate": {}}, {"gptq": {"bits": 4}}],
      "outliers spread by rotations first: for models with large activations"),
    ("hqq-int4", [{"hqq": {"bits": 4}}], "int4 without data, better than rounding, in seconds"),
    ("magnitude-50", [{"prune": {"share": 0.5}}],
     "half of the weights set to zero: a baseline that hurts language models; see its report"),
    ("magnitude-2of4", [{"prune": {"pattern": "2:4"}}], "the 2:4 pattern by magnitude, a baseline"),
    ("wanda-50", [{"prune": {"criterion": "wanda", "share": 0.5, "scope": "row"}}],
     "half of the weights out by weight times input: quick, far less hurt than by magnitude"),
    ("wanda-2of4", [{"prune": {"criterion": "wanda", "pattern": "2:4"}}],
     "2 of every 4 weights out by weight times input, for machines that multiply that pattern"),
    ("sparsegpt-50", [{"sparsegpt": {"share": 0.5}}],
     "half of the weights out, the others make it good: the best half without training"),
    ("sparsegpt-2of4", [{"sparsegpt": {"pattern": "2:4"}}],
     "2 of every 4 weights out, the others make it good; better than wanda-2of4, slower"),
    ("sparsegpt-50-gptq-int4", [{"sparsegpt": {"share": 0.5}}, {"gptq": {"bits": 4}}],
     "a chain: half of the weights out, the others by GPTQ in int4"),
    ("neurons-20", [{"cut": {"unit": "neuron", "by": "taylor", "share": 0.2, "budget": "global",
                             "multiple": 32}}],
     "the feed-forward neurons that the loss feels least, layers differ: plain dense matrices, faster "
     "everywhere; needs the whole model in memory"),
    ("heads-20", [{"cut": {"unit": "head", "by": "taylor", "share": 0.2, "budget": "global"}}],
     "a fifth of the attention heads, as near as groups that share keys allow, layers differ: less work "
     "at long context; needs the whole model in memory"),
    ("heads-neurons-gptq-int4",
     [{"cut": {"unit": "head", "by": "taylor", "share": 0.1, "budget": "global"}},
      {"cut": {"unit": "neuron", "by": "taylor", "share": 0.2, "multiple": 128}},
      {"gptq": {"bits": 4}}],
     "a chain: a tenth of the heads and a fifth of the neurons out, the rest by GPTQ in int4"),
    ("drop-layers-25", [{"drop_layers": {"share": 0.25}}],
     "a quarter of the layers out: faster by that at everything; reasoning suffers first"),
    ("drop-layers-10-gptq-int4", [{"drop_layers": {"share": 0.1}}, {"gptq": {"bits": 4}}],
     "a chain: the least influential tenth of the layers out, the rest by GPTQ in int4"),
    ("magnitude-20-gptq-int4", [{"prune": {"share": 0.2}}, {"gptq": {"bits": 4}}],
     "a chain: a fifth of the weights to zero, the damage made good while rounding to int4"),
    ("kmeans-4", [{"kmeans": {"bits": 4}}],
     "16 values for every long row, errors made good: as small as gptq-int4 there, and closer"),
    ("kmeans-3", [{"kmeans": {"bits": 3}}],
     "8 values for every long row, errors made good: when 4 bits do not fit, before gptq-int3"),
    ("kmeans-2", [{"kmeans": {"bits": 2}}],
     "4 values for every row: about 2 bits per weight, visible loss, far less than two-bit integers"),
    ("kmeans-4-rounding", [{"kmeans": {"bits": 4, "weigh": False, "compensate": False}}],
     "16 values for every row without data: closer than rounding to int4 at the same size"),
    ("pq-8x2", [{"kmeans": {"bits": 8, "vector": 2}}],
     "pairs of weights from 256 for a whole matrix: 4 bits per weight, for matrices of even rows"),
    ("pq-8x4", [{"kmeans": {"bits": 8, "vector": 4}}],
     "fours from 256: 2 bits per weight; visible loss, fine-tune the tables behind it"),
    ("hashed-8", [{"hash": {"factor": 8}}],
     "an eighth of the numbers, no codes: ruins a trained model by itself, a start for training one"),
    ("svd-50", [{"svd": {"metric": "plain", "share": 0.5}}],
     "two thin factors at half the bytes by the plain decomposition: a baseline, see svd-whitened-50"),
    ("svd-activation-50", [{"svd": {"metric": "activation", "share": 0.5}}],
     "the same with large inputs protected (ASVD)"),
    ("svd-whitened-50", [{"svd": {"metric": "whitened", "share": 0.5}}],
     "the factors that keep the outputs best: half the bytes and half the work; train behind it"),
    ("svd-whitened-80", [{"svd": {"metric": "whitened", "share": 0.8}}],
     "four fifths of the bytes: less is lost"),
    ("lowrank-32-gptq-int4", [{"lowrank_plus": {"rank": 32, "bits": 4}}],
     "int4 and a correction of rank 32 in int8: closer than gptq-int4 for a little more"),
    ("lowrank-32-gptq-int3", [{"lowrank_plus": {"rank": 32, "bits": 3}}],
     "int3 and a correction of rank 32 in int8: between gptq-int3 and gptq-int4 in size and loss"),
    ("lowrank-32-sparse-50",
     [{"lowrank_plus": {"rank": 32, "rest": "sparse", "bits": None, "factor_bits": None}}],
     "half of the weights and a few directions: less is lost than with half of the weights alone"),
    ("magnitude-50-distil", [{"prune": {"share": 0.5}}, {"distil": {}}],
     "half of the weights out, the others taught by the original: minutes for small models"),
    ("iterative-50",
     [{"prune": {"share": 0.25}}, {"recover": {}}, {"prune": {"share": 0.4}}, {"recover": {}},
      {"prune": {"share": 0.5}}, {"distil": {}}],
     "half of the weights out in three steps, trained in between: less damage than at once"),
    ("drop-layers-25-distil-gptq-int4",
     [{"drop_layers": {"share": 0.25, "most": None}}, {"distil": {"targets": {"hidden": 0.5}}},
      {"gptq": {"bits": 4}}],
     "a chain: a quarter of the layers out, the rest taught by the original, then int4"),
    ("qat-int2", [{"qat": {"kind": "lsq", "bits": 2}}],
     "2 bits with learned scales: needs text and time, far better than any rounding at 2 bits"),
    ("qat-ternary", [{"qat": {"kind": "ternary"}}],
     "-1, 0, 1 and a scale, trained as in BitNet: long training, the smallest that still speaks"),
)  # fmt: skip
"""The shipped recipes: name, passes as a recipe file has them, what it is good for."""


def __getattr__(name: str) -> Any:
    for file, cls in PASSES.values():
        if cls == name:
            return getattr(importlib.import_module(f"onecard.passes.{file}"), cls)
    raise AttributeError(f"onecard.passes has no {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(cls for _, cls in PASSES.values())})


def find_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a YAML file. BadRequest with the nearest known name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return read_recipe(path)
    for known, passes, good_for in SHIPPED:
        if known == name:
            return recipe_of({"name": name, "passes": passes, "good_for": good_for}, name)
    close = nearest(name, [known for known, _, _ in SHIPPED])
    raise BadRequest(
        f"there is no recipe {name!r}",
        close if close.startswith("did") else "",
        "`onecard recipes` lists them; or give a file that ends in .yaml",
    )


class Plain(yaml.SafeLoader):
    """YAML without aliases, with which a few lines can stand for gigabytes, with every key once, and
    without numbers to the base of 60, of which the pattern 2:4 would be one.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return self.DEFAULT_SCALAR_TAG if number and ":" in value else tag

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), "a key")
            raise yaml.YAMLError(f"{twice} is there twice, line {node.start_mark.line + 1}")
        return found


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file; every key and value is checked."""
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("it is too large")
        data = yaml.load(path.read_text(encoding="utf-8"), Plain)  # a SafeLoader
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise BadRequest(
            f"the recipe {path} cannot be read", str(error)[:300],
            "`onecard recipes NAME` prints one to begin with" ) from error  # fmt: skip
    return recipe_of(data, str(path))


def recipe_of(data: Any, where: str) -> Recipe:
    """A recipe from plain data, as a recipe file has it."""
    for key in data if isinstance(data, dict) else ():
        if key not in ("name", "passes", "good_for"):
            raise BadRequest(
                f"{where} has an unknown key {key!r}",
                do=nearest(str(key), ("name", "passes", "good_for")),
            )
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list):
        raise BadRequest(f"{where} has no list of passes", do="passes: [{gptq: {bits: 4}}]")
    passes = tuple(_pass(item, f"{where}: pass {i + 1}") for i, item in enumerate(data["passes"]))
    for key in ("name", "good_for"):
        if not isinstance(data.get(key, ""), str):
            raise BadRequest(f"{where}: {key} is not text", do="write it in quotes")
    return Recipe(data.get("name", Path(where).stem), passes, data.get("good_for", ""))


def _pass(item: Any, where: str) -> Pass:
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1:
        raise BadRequest(f"{where} is not one name with its settings", do="- gptq: {bits: 4}")
    key, settings = next(iter(item.items()))
    if key not in PASSES:
        raise BadRequest(f"{where} is {key!r}", do=nearest(str(key), PASSES))
    if not isinstance(settings or {}, dict):
        raise BadRequest(
            f"{where}: the settings of {key} are {settings!r}", do="a mapping is needed"
        )
    cls: type[Pass] = __getattr__(PASSES[key][1])
    return fill(cls, settings or {}, f"{where}: {key}")


def to_yaml(recipe: Recipe) -> str:
    """A recipe as a file that `read_recipe` takes."""
    data = {"name": recipe.name, "good_for": recipe.good_for, "passes": recipe.settings()}
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
