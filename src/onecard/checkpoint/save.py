"""The last steps of a result: one file or shards, config.json, tokenizer, manifest.

Parts become `model.safetensors` when they are small together, else one shard each with an index. The
manifest names the sha256 of every file, of the source's files and all settings, so that a result says
where it came from and a damaged copy is noticed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecard import __version__
from onecard.checkpoint.journal import check_target, shard_name
from onecard.checkpoint.packed import must_split, quantization_config
from onecard.checkpoint.shards import (
    copy_range,
    header_of,
    read_header,
    sha256_of,
    write_chunks,
    write_file,
)
from onecard.checkpoint.source import MANIFEST, Source
from onecard.core.errors import BadRequest
from onecard.core.report import write_text
from onecard.core.scheme import Scheme

if TYPE_CHECKING:
    from torch import nn

    from onecard.nn.model import Model

SINGLE_FILE = 256 << 20
CARRIED = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
           "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
           "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE")  # fmt: skip


def assemble(folder: Path, parts: Mapping[Path, str]) -> dict[str, str]:
    """A new folder with one model file, joined of part files, or with them as shards and an index.

    `parts` gives the sha256 of each part file, in order; returns those of the final weight files.
    Parts that become shards are moved.
    """
    folder.mkdir()
    files = list(parts)
    if sum(file.stat().st_size for file in files) <= SINGLE_FILE:
        entries = {name: entry for file in files for name, entry in read_header(file).items()}
        header, order = header_of({name: (e.dtype, e.shape) for name, e in entries.items()})
        data = itertools.chain.from_iterable(copy_range(entries[name]) for name in order)
        digest = write_chunks(folder / "model.safetensors", itertools.chain((header,), data))
        return {"model.safetensors": digest}
    weight_map, total, finals = {}, 0, {}
    for number, (file, digest) in enumerate(parts.items()):
        final = shard_name(number + 1, len(files))
        for name, entry in read_header(file).items():
            weight_map[name] = final
            total += entry.nbytes
        os.replace(file, folder / final)
        finals[final] = digest
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    return finals


def complete(
    folder: Path,
    source: Source,
    config: Mapping[str, Any],
    weights: Mapping[str, str],
    made: Mapping[str, Any],
) -> None:
    """config.json, what is carried over from the source, and the manifest, beside the weights.

    The manifest holds the sha256 of every file (`weights` gives those of the weight files), the names of
    what was carried over, and `made`, how the folder came about.
    """
    write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False))
    carried = [name for name in CARRIED if (source.folder / name).is_file()]
    for name in carried:
        shutil.copyfile(source.folder / name, folder / name)
    small = (f for f in folder.iterdir() if f.suffix in (".json", ".yaml") and f.name != MANIFEST)
    files = {**weights, **{f.name: sha256_of(f) for f in small}}
    names = {"files": dict(sorted(files.items())), "carried": carried}
    manifest = {"onecard": __version__, **names, **made}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))


def source_hashes(source: Source) -> dict[str, str]:
    """What the source held: the sum of each weight file, the sha256 of its config."""
    weights = {file.name: source.checkpoint.sum_of(file) for file in source.checkpoint.files}
    return {**weights, "config.json": sha256_of(source.folder / "config.json")}


def config_with(source: Source, schemes: Mapping[str, Scheme], split: bool) -> dict[str, Any]:
    """The source's config.json with the `quantization_config` of packed modules (stored names)."""
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if schemes:
        linears = linear_names(source)
        plain = set(schemes) <= linears
        config["quantization_config"] = quantization_config(
            schemes, sorted(linears), plain, split, source.dtype
        )
    return config


def linear_names(source: Source) -> set[str]:
    """Stored names of the linears that are Linears to transformers."""
    names = {source.name("lm_head")}
    for index in range(source.spec.num_layers):
        for place in source.places(index):
            if place.module.kind == "linear" and not place.stored.transposed:
                names.add(place.stored.name)
    return names


def save_model(model: Model, out: str | Path, made: Mapping[str, Any] | None = None) -> Path:
    """Save a model from memory, in the layout and under the names of the folder it came from.

    OUT appears by rename when it is complete. Raises BadRequest when it is not empty.
    """
    from onecard.checkpoint.load import stored_arrays

    if model.source is None:
        raise BadRequest("the model has no source folder to take names and tokenizer from")
    source, out = Source(model.source).shaped(model.spec), Path(out).expanduser().resolve()
    check_target(out, source.folder, force=False)
    work = out.with_name(f".{out.name}.saving")
    folder = work / "result"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    roots: list[tuple[str, nn.Module, int | None]] = [("stem", model.network.stem, None)]
    roots += [(f"block-{i:05d}", block, i) for i, block in enumerate(model.blocks())]
    roots += [("tail", model.network.tail, None)]
    schemes: dict[str, Scheme] = {}
    parts: dict[Path, str] = {}
    split = must_split([linear.format for _, linear in model.linears() if not linear.format.dense])
    for part, root, index in roots:
        arrays = stored_arrays(source, root, index, split)
        schemes |= packed_schemes(source, root, index, split)
        file = work / f"{part}.safetensors"
        parts[file] = write_file(file, arrays)
    weights = assemble(folder, parts)
    about = {"source": source_hashes(source), **(made or {})}
    complete(folder, source, config_with(source, schemes, split), weights, about)
    if out.is_dir():
        out.rmdir()
    os.replace(folder, out)
    shutil.rmtree(work, ignore_errors=True)
    return out


def packed_schemes(
    source: Source, root: nn.Module, index: int | None, split: bool
) -> dict[str, Scheme]:
    """stored name -> Scheme of the packed modules of a part of the network."""
    from onecard.checkpoint.load import modules
    from onecard.nn.layers import Matrix

    return {
        place.stored.name: module.scheme
        for _, module, place in modules(source, root, index, split)
        if isinstance(module, Matrix) and not module.format.dense
    }
