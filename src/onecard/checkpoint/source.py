"""A model folder, opened and checked by its headers; arrays are read when asked for. No torch here.

`places` says for the stem and tail, or for one block, which modules there are and where each lies in
this checkpoint. How a module lies there (whole, a run of rows of a fused matrix, by head, transposed)
is the family's `Stored`; `Place.rows` are the rows of the stored matrix that are its own. Packed
words are expanded by `expanded` alone; bf16 numbers are uint16 in NumPy, fp8 numbers uint8.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.checkpoint.hub import called, find_model
from onecard.checkpoint.packed import Schemes
from onecard.checkpoint.shards import Checkpoint, read_json, sha256_of
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest
from onecard.core.format import DENSE, Format, Integers
from onecard.core.scheme import Inputs, byte_parts
from onecard.core.spec import Module, Spec, block_modules, outer_modules
from onecard.kernels.expand import expand, floats, pack, unpack
from onecard.nn.families import Family, Stored, family_of

MANIFEST = "manifest.json"
IGNORED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias",
           "attention.masked_bias", "attention.rotary_emb.inv_freq")  # fmt: skip
KINDS: dict[str, Any] = {
    "fp64": np.float64, "fp32": np.float32, "fp16": np.float16, "bf16": np.uint16, "fp8": np.uint8,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8,
    "bool": np.bool_,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Place:
    """A module and where it lies: `stored` as this checkpoint spells it, `rows` of `total` are its own."""

    path: str
    module: Module
    stored: Stored
    rows: slice | NDArray[np.int64]
    total: int


class Source:
    """A model folder. Raises BadRequest where its files do not hold what its config.json says; with
    `whole=False` tensors may be `missing`, and nothing can be read."""

    def __init__(self, folder: str | Path, whole: bool = True) -> None:
        self.folder, self.called = find_model(folder), called(folder)
        if not (self.folder / "config.json").is_file():
            raise BadRequest(f"{self.folder} holds no model", seen="there is no config.json")
        self.config = read_json(self.folder / "config.json")
        self.family: Family = family_of(self.config)
        self.spec: Spec = self.family.spec(self.config)
        self.checkpoint = Checkpoint(self.folder)
        self._rename = self._naming()
        schemes = self.config.get("quantization_config")
        self.schemes = Schemes(schemes) if isinstance(schemes, dict) else None
        if "lm_head.weight" not in self.checkpoint and not self.spec.tied:
            head = self.name(self._stored("tail.head"))
            if not any(n.startswith(f"{head}.") for n in self.checkpoint.entries):
                self.spec = replace(self.spec, tied=True)
                self.config = {**self.config, "tie_word_embeddings": True}
        self.missing, self.extra = self._check()
        if whole and self.missing:
            others = len(self.missing) - 1
            raise BadRequest(
                f"{self.folder} lacks the tensor {self.missing[0]}",
                f"and {others} more" if others else "",
                "the download is incomplete, or config.json is another model's",
            )

    @property
    def dtype(self) -> str:
        """The dtype of most weights, `bf16` say."""
        kinds: Counter[str] = Counter()
        for entry in self.checkpoint.entries.values():
            if entry.dtype in DENSE:
                kinds[entry.dtype] += entry.nbytes
        return kinds.most_common(1)[0][0] if kinds else "fp32"

    @property
    def compressed(self) -> bool:
        return bool(self.format_names())

    @property
    def split(self) -> bool:
        """The parts of fused matrices lie each alone here."""
        return self.schemes is not None and self.schemes.split

    def format_names(self) -> list[str]:
        """Names of the packed formats in the folder."""
        found = (self.format_at(place) for index in self.parts() for place in self.places(index))
        return sorted({format.name for format in found if format})

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder)

    def shaped(self, spec: Spec) -> Source:
        """This layout for a model of other sizes: its names and places, for writing."""
        if spec == self.spec:
            return self
        other = copy.copy(self)
        other.config, other.spec = self.family.config(self.config, spec), spec
        return other

    # names

    def _stored(self, path: str) -> str:
        return self.family.outer[path].name

    def _naming(self) -> tuple[str, str]:
        """(cut, put): what this checkpoint's names lack and add at their front."""
        name = self._stored("stem.embedding")
        first = name.split(".")[0] + "." if name.count(".") else ""
        for cut, put in (("", ""), ("", self.family.prefix), (first, ""), ("", "language_model.")):
            lies = f"{put}{name.removeprefix(cut)}.weight"
            if lies in self.checkpoint or f"{lies}_packed" in self.checkpoint:
                return cut, put
        raise BadRequest(
            f"{self.folder} lacks the embedding", f"no tensor {name}.weight in its safetensors",
            f"its config.json says {self.family.architecture}: is that what the files hold?",
        )  # fmt: skip

    def name(self, stored: str) -> str:
        """A family's name as this checkpoint spells it."""
        cut, put = self._rename
        if stored == "lm_head" and put != "language_model.":
            return stored
        return put + stored.removeprefix(cut)

    # structure

    def parts(self) -> tuple[int | None, ...]:
        """What `places` takes: None for the stem and tail, then every block."""
        return (None, *range(self.spec.num_layers))

    def places(self, index: int | None, split: bool | None = None) -> Iterator[Place]:
        """The modules of a block by their path in it, or `stem.embedding` ... `tail.head`.

        `split`: as in a folder whose fused matrices lie in parts (None: as in this one).
        """
        alone = self.split if split is None else split
        spec = self.spec
        modules = outer_modules(spec) if index is None else block_modules(spec, spec.layers[index])
        heads = 0 if index is None else spec.layers[index].attention.num_heads
        for path, named in self.family.modules(spec, index):
            if path not in modules:
                continue
            tied = path == "tail.head" and spec.tied
            lies = self.family.outer["stem.embedding"] if tied else named
            stored = replace(lies, name=self.name(lies.name))
            if alone and modules[path].kind == "linear" and (lies.of or lies.transposed):
                stored = Stored(f"blocks.{index}.{path}")
            sizes = [modules[sibling].shape[0] for sibling in stored.of]
            total = sum(sizes) or modules[path].shape[0]
            yield Place(path, modules[path], stored, _rows(stored, sizes, heads), total)

    def _check(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """All tensors have their shapes, before anything is read. Returns names of those that are not
        there, in the order of the network, and of those that are not used."""
        expected: set[str] = set()
        missing: dict[str, None] = {}
        for index in self.parts():
            for place in self.places(index):
                for part, dtypes, shape in self._expected(place):
                    name = f"{place.stored.name}.{part}"
                    expected.add(name)
                    if name not in self.checkpoint:
                        missing[name] = None
                        continue
                    entry = self.checkpoint.entries[name]
                    if entry.dtype not in dtypes:
                        raise BadRequest(
                            f"{name} is stored as {entry.dtype}",
                            do=f"it should be {' or '.join(dtypes)}",
                        )
                    if entry.shape != shape:
                        raise BadRequest(
                            f"{name} has shape {list(entry.shape)}, "
                            f"config.json makes it {list(shape)}"
                        )
        extra = set(self.checkpoint.entries) - expected
        unused = sorted(name for name in extra if not name.endswith(IGNORED))
        return tuple(missing), tuple(unused)

    def _expected(self, place: Place) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
        """(suffix, dtypes, shape) of the tensors that hold a module, as they lie in the file."""
        format = self.format_at(place)
        for name, own in place.module.tensors().items():
            shape = (place.total, *own[1:])
            if name == "weight" and format is not None:
                rows, columns = shape
                try:
                    parts = format.parts((rows, columns))
                    if self.bytewise(place):
                        parts = byte_parts(format, (rows, columns))
                except BadRequest as problem:
                    raise BadRequest(
                        f"{place.stored.name}: {problem.what}", do=problem.do
                    ) from problem
                for part, (dtype, sizes) in parts.items():
                    yield part, (dtype,), sizes
            elif name == "weight" and place.stored.transposed:
                yield name, DENSE, tuple(reversed(shape))
            else:
                yield name, DENSE, shape
        inputs = self.inputs_at(place)
        if inputs is not None and inputs.static:
            yield "input_scale", DENSE, (1,)

    def format_at(self, place: Place) -> Format | None:
        """The packed format of a linear or of the embedding, None for what is dense.

        The embedding is packed in our own folders alone, as symmetric integers. BadRequest for others.
        """
        if place.module.kind == "linear":
            return self.format_of(place.stored)
        if place.path != "stem.embedding" or self.schemes is None or not self.schemes.own:
            return None
        format = self.format_of(place.stored)
        if format is not None and (not isinstance(format, Integers) or format.zero_point):
            raise BadRequest(
                f"the embedding is stored as {format.name}", do="it is read as symmetric integers"
            )
        return format

    def inputs_at(self, place: Place) -> Inputs | None:
        """How a packed linear rounds what it reads."""
        if self.schemes is None or self.format_at(place) is None:
            return None
        scheme = self.schemes.find(place.stored.name)
        return scheme.inputs if scheme else None

    def input_scale(self, place: Place) -> float:
        """The stored scale of the inputs of a linear. BadRequest where it is not above zero."""
        name = f"{place.stored.name}.input_scale"
        dtype, array = self.array(name)
        scale = float(floats(array, dtype)[0])
        if not 0 < scale < np.inf:
            raise BadRequest(f"{name} is {scale}", do="a scale is finite and above zero")
        return scale

    def bytewise(self, place: Place) -> bool:
        """Whether the integers of a packed linear lie here a byte each."""
        weight = self.checkpoint.entries.get(f"{place.stored.name}.weight")
        format = self.format_at(place)
        return (
            weight is not None and weight.dtype == "int8"
            and isinstance(format, Integers) and not format.zero_point
        )  # fmt: skip

    def format_of(self, stored: Stored) -> Format | None:
        """The packed format of a stored module, None when it is dense."""
        entries = self.checkpoint.entries
        weight = entries.get(f"{stored.name}.weight")
        if weight is not None and weight.dtype in DENSE:
            return None
        scale = entries.get(f"{stored.name}.weight_scale")
        if self.schemes is None:
            if scale is not None:
                raise BadRequest(
                    f"{stored.name} is packed, but config.json has no quantization_config"
                )
            return None
        scheme = self.schemes.find(stored.name)
        if scheme is None and scale is not None:
            raise BadRequest(
                f"{stored.name} is packed, but no scheme of quantization_config covers it"
            )
        format = scheme.format if scheme else None
        if format is None or self.schemes.own:
            return format
        return format.scaled(scale.dtype) if scale is not None and scale.dtype in DENSE else format

    # reading

    def array(self, name: str) -> tuple[str, NDArray[Any]]:
        """(dtype, array) of one stored tensor as it lies in the file."""
        entry, data = self.checkpoint.read(name)
        return entry.dtype, data.view(KINDS[entry.dtype]).reshape(entry.shape)

    def dense(self, place: Place, part: str = "weight") -> tuple[str, NDArray[Any]]:
        """(dtype, contiguous array) of the weight or the bias of a module that is not packed."""
        dtype, array = self.array(f"{place.stored.name}.{part}")
        if part == "weight" and place.stored.transposed:
            array = array.T
        return dtype, np.ascontiguousarray(array[place.rows])

    def packed(
        self, place: Place, format: Format
    ) -> tuple[NDArray[np.int32], NDArray[Any], NDArray[np.int8] | None]:
        """Words, scales and zero points [rows, groups] of a packed linear."""
        name = place.stored.name
        assert isinstance(format, Integers)
        words, scale = self._words(place, format), self.array(f"{name}.weight_scale")[1]
        zero = None
        if format.zero_point:
            along = self.array(f"{name}.weight_zero_point")[1]
            codes = unpack(along.T, format.bits, place.total).astype(np.int16) - 2 ** (
                format.bits - 1
            )
            zero = np.ascontiguousarray(codes.astype(np.int8).T[place.rows])
        rows = place.rows
        return np.ascontiguousarray(words[rows]), np.ascontiguousarray(scale[rows]), zero

    def expanded(self, place: Place, format: Format) -> NDArray[np.float32]:
        """The matrix of a packed linear in float32."""
        shape = (place.total, place.module.shape[1])
        return np.ascontiguousarray(expand(self.parts_of(place, format), shape, format)[place.rows])

    def parts_of(self, place: Place, format: Format) -> dict[str, NDArray[Any]]:
        """The stored parts of a packed linear, with all of its rows."""
        names, name = format.parts((place.total, place.module.shape[1])), place.stored.name
        if self.bytewise(place):
            assert isinstance(format, Integers)
            return {"weight_packed": self._words(place, format),
                    "weight_scale": self.array(f"{name}.weight_scale")[1]}  # fmt: skip
        return {part: self.array(f"{name}.{part}")[1] for part in names}

    def _words(self, place: Place, format: Integers) -> NDArray[np.int32]:
        """The packed words of integers, however they lie here."""
        name = place.stored.name
        if self.bytewise(place):
            return pack(self.array(f"{name}.weight")[1], format.bits)
        return self.array(f"{name}.weight_packed")[1]


def _rows(stored: Stored, sizes: list[int], heads: int) -> slice | NDArray[np.int64]:
    """The rows of a stored matrix that are those of one part; `sizes` of all its parts."""
    if not stored.of:
        return slice(None)
    if stored.by_head:
        order = np.arange(sum(sizes)).reshape(heads, len(sizes), -1)
        return order[:, stored.part].reshape(-1)
    end = list(accumulate(sizes))[stored.part]
    return slice(end - sizes[stored.part], end)


def verify(folder: Path, sha256: Callable[[Path], str] = sha256_of) -> None:
    """The files of a result are those its manifest names. BadRequest where one was damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    files = read_json(path).get("files")
    for name, expected in (files if isinstance(files, dict) else {}).items():
        file = folder / Path(str(name)).name
        if not file.is_file():
            raise BadRequest(f"{folder} lacks {name}, which its manifest names")
        if sha256(file) != expected:
            raise BadRequest(
                f"{file} is not what was written: its sha256 differs from the manifest's",
                do="copy the result again, or delete manifest.json if you changed it yourself",
            )
