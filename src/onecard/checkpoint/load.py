"""A model folder becomes modules, block by block, and modules become stored tensors again.

`Source` opens a folder and checks all of it by its headers; `block(i)` reads one block. How a module
lies in the file (whole, a run of rows of a fused matrix, by head, transposed) is the family's
`Stored`; `_cut` and `_join` apply it. Peak memory of reading a block: the block, plus its largest
fused tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onecard.checkpoint.hub import find_model
from onecard.checkpoint.packed import Schemes
from onecard.checkpoint.shards import Array, Checkpoint, read_json, sha256_of
from onecard.checkpoint.tokenizer import Tokenizer
from onecard.core.errors import BadRequest
from onecard.core.format import DENSE, Format, Weight
from onecard.core.spec import Spec
from onecard.kernels.reference import DTYPES, NAMES, pack, unpack
from onecard.nn.families import Family, Stored, family_of
from onecard.nn.layers import Linear
from onecard.nn.model import Model
from onecard.nn.transformer import Block, Stem, Tail, Transformer

IGNORED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias",
           "attention.masked_bias", "attention.rotary_emb.inv_freq")  # fmt: skip


class Source:
    """A model folder, opened and checked by its headers; weights are read when asked for."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = find_model(folder)
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
            if (
                f"{head}.weight" not in self.checkpoint
                and f"{head}.weight_packed" not in self.checkpoint
            ):
                self.spec = replace(self.spec, tied=True)
                self.config = {**self.config, "tie_word_embeddings": True}
        self.extra = self._check()

    @property
    def dtype(self) -> str:
        """The dtype of most weights, `bf16` say."""
        kinds: Counter[str] = Counter()
        for entry in self.checkpoint.entries.values():
            if entry.dtype in ("fp32", "fp16", "bf16"):
                kinds[entry.dtype] += entry.nbytes
        return kinds.most_common(1)[0][0] if kinds else "fp32"

    @property
    def compressed(self) -> bool:
        return any(name.endswith(".weight_packed") for name in self.checkpoint.entries)

    def format_names(self) -> list[str]:
        """Names of the packed formats in the folder."""
        packed = (
            n.removesuffix(".weight_packed")
            for n in self.checkpoint.entries
            if n.endswith(".weight_packed")
        )
        formats = (self.format_of(Stored(name)) for name in packed)
        return sorted({format.name for format in formats if format})

    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.folder)

    # names

    def _stored(self, path: str) -> str:
        return self.family.outer[path].name

    def _naming(self) -> tuple[str, str]:
        """(cut, put): what this checkpoint's names lack and add at their front."""
        name = self._stored("stem.embedding")
        first = name.split(".")[0] + "." if name.count(".") else ""
        for cut, put in (("", ""), ("", self.family.prefix), (first, ""), ("", "language_model.")):
            if f"{put}{name.removeprefix(cut)}.weight" in self.checkpoint:
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

    def modules(
        self, root: nn.Module, index: int | None
    ) -> Iterator[tuple[str, nn.Module, Stored]]:
        """(path below root, module, where it lies) for stem, tail or a block."""
        side = type(root).__name__.lower()
        for path, stored in self.family.modules(self.spec, index):
            if index is None and not path.startswith(f"{side}."):
                continue
            below = path.removeprefix(f"{side}.") if index is None else path
            tied_head = index is None and below == "head" and self.spec.tied
            lies = self.family.outer["stem.embedding"] if tied_head else stored
            try:
                module = root.get_submodule(below)
            except AttributeError:
                continue
            yield below, module, replace(lies, name=self.name(lies.name))

    def roots(self) -> Iterator[tuple[nn.Module, int | None]]:
        """Every part of the network on the meta device: shapes, no memory."""
        with torch.device("meta"):
            yield Stem(self.spec), None
            for index in range(self.spec.num_layers):
                yield Block(self.spec, index), index
            yield Tail(self.spec), None

    def _check(self) -> tuple[str, ...]:
        """All tensors are there in their shapes, before anything is read. Returns unused names."""
        expected: set[str] = set()
        for root, index in self.roots():
            for _, module, stored in self.modules(root, index):
                for part, shape in self._expected(module, stored, root):
                    name = f"{stored.name}.{part}"
                    expected.add(name)
                    if name not in self.checkpoint:
                        raise BadRequest(
                            f"{self.folder} lacks the tensor {name}",
                            do="the download is incomplete, or config.json is another model's",
                        )
                    seen, dtype = (
                        self.checkpoint.entries[name].shape,
                        self.checkpoint.entries[name].dtype,
                    )
                    if part in ("weight", "bias") and dtype not in DENSE:
                        raise BadRequest(
                            f"{name} is stored as {dtype}", do=f"weights are {', '.join(DENSE)}"
                        )
                    if seen != shape:
                        raise BadRequest(
                            f"{name} has shape {list(seen)}, config.json makes it {list(shape)}"
                        )
        extra = set(self.checkpoint.entries) - expected
        return tuple(sorted(name for name in extra if not name.endswith(IGNORED)))

    def _expected(
        self, module: nn.Module, stored: Stored, root: nn.Module
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(suffix, shape) of the tensors that hold a module, as they lie in the file."""
        siblings = [root.get_submodule(path) for path in stored.of] or [module]
        for name, parameter in module.named_parameters(recurse=False):
            shape = list(parameter.shape)
            shape[0] = sum(next(iter(s.parameters())).shape[0] for s in siblings)
            format = self.format_of(stored)
            if name == "weight" and isinstance(module, Linear) and format is not None:
                for part, (_, sizes) in format.parts((shape[0], shape[1])).items():
                    yield part, sizes
            elif name == "weight" and stored.transposed:
                yield name, tuple(reversed(shape))
            else:
                yield name, tuple(shape)

    def format_of(self, stored: Stored) -> Format | None:
        """The packed format of a stored module, None when it is dense."""
        entry = self.checkpoint.entries.get(f"{stored.name}.weight_scale")
        if entry is None or f"{stored.name}.weight_packed" not in self.checkpoint:
            return None
        if self.schemes is None:
            raise BadRequest(f"{stored.name} is packed, but config.json has no quantization_config")
        return replace(self.schemes.format_of(stored.name), scale=entry.dtype)

    # reading

    def tensor(self, name: str) -> Tensor:
        """One stored tensor. BadRequest where it holds NaN or infinite values."""
        entry, data = self.checkpoint.read(name)
        if not data.size:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        tensor = torch.frombuffer(data.data, dtype=DTYPES[entry.dtype]).view(entry.shape)
        if not is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise BadRequest(
                f"{name} holds {bad} values that are NaN or infinite",
                do="the checkpoint is damaged or was trained into overflow: fetch it again",
            )
        return tensor

    def stem(self, dtype: torch.dtype | None = None) -> Stem:
        return self._filled(Stem, None, dtype)

    def block(self, index: int, dtype: torch.dtype | None = None) -> Block:
        """Block `index` with its weights in `dtype` (None: as stored); packed weights stay packed."""
        return self._filled(lambda spec: Block(spec, index), index, dtype)

    def tail(self, dtype: torch.dtype | None = None) -> Tail:
        return self._filled(Tail, None, dtype)

    def _filled(self, build, index: int | None, dtype: torch.dtype | None):  # type: ignore[no-untyped-def]
        with torch.device("meta"):
            root = build(self.spec)
        kept: dict[str, Tensor] = {}
        for _, module, stored in self.modules(root, index):
            if not stored.of:
                kept.clear()
            for name in [n for n, _ in module.named_parameters(recurse=False)]:
                format = self.format_of(stored)
                if name == "weight" and isinstance(module, Linear) and format is not None:
                    module.replace(self._packed(module, stored, format, root, kept))
                    continue
                full = f"{stored.name}.{name}"
                tensor = (
                    kept.setdefault(full, self.tensor(full)) if stored.of else self.tensor(full)
                )
                if name == "weight" and stored.transposed:
                    tensor = tensor.T
                tensor = _cut(tensor, stored, root).contiguous()
                tensor = tensor.to(dtype) if dtype else tensor
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
                if name == "weight" and isinstance(module, Linear):
                    module.format = replace(module.format, dense=NAMES[tensor.dtype],
                                            bits=8 * tensor.element_size())  # fmt: skip
        return root

    def _packed(self, module: Linear, stored: Stored, format: Format, root: nn.Module,
                kept: dict[str, Tensor]) -> Weight:  # fmt: skip
        """The packed Weight of one linear, cut out of a fused one where it is part of it."""
        parts = {}
        for part in format.parts(module.shape):
            full = f"{stored.name}.{part}"
            tensor = kept.setdefault(full, self.tensor(full)) if stored.of else self.tensor(full)
            if stored.of and part == "weight_zero_point":
                rows = sum(_rows(root, stored))
                zero = unpack(tensor.T.contiguous(), format.bits, rows).T
                tensor = pack(_cut(zero, stored, root).T, format.bits).T.contiguous()
            elif part == "weight_shape":
                tensor = torch.tensor(module.shape, dtype=torch.int64)
            else:
                tensor = _cut(tensor, stored, root).contiguous()
            parts[part] = tensor
        return Weight(format, module.shape, parts)


def _rows(root: nn.Module, stored: Stored) -> list[int]:
    """Rows of each part of a fused matrix."""
    return [
        next(iter(root.get_submodule(path).state_dict().values())).shape[0] for path in stored.of
    ]


def _cut(tensor: Tensor, stored: Stored, root: nn.Module) -> Tensor:
    """The rows of one part of a fused tensor [rows, ...]."""
    if not stored.of:
        return tensor
    if stored.by_head:
        heads = root.get_submodule("attention").spec.num_heads  # type: ignore[union-attr]
        by_head = tensor.unflatten(0, (heads, len(stored.of), -1))
        return by_head[:, stored.part].flatten(0, 1)
    return tensor.split(_rows(root, stored))[stored.part]


def _join(tensors: list[Tensor], stored: Stored, root: nn.Module) -> Tensor:
    """The inverse of `_cut` for all parts together."""
    if stored.by_head:
        heads = root.get_submodule("attention").spec.num_heads  # type: ignore[union-attr]
        return torch.stack([t.unflatten(0, (heads, -1)) for t in tensors], 1).flatten(0, 2)
    return torch.cat(tensors)


def stored_arrays(source: Source, root: nn.Module, index: int | None) -> dict[str, Array]:
    """name -> array of every tensor of a part of the network, as the checkpoint spells and lays it."""
    arrays: dict[str, Array] = {}
    for path, module, stored in source.modules(root, index):
        if stored.of and stored.part:
            continue
        if path == "head" and source.spec.tied:
            continue
        modules = [root.get_submodule(p) for p in stored.of] or [module]
        for part, tensor in _merged(modules, stored, root).items():
            arrays[f"{stored.name}.{part}"] = as_array(tensor)
    return arrays


def _merged(modules: list[nn.Module], stored: Stored, root: nn.Module) -> dict[str, Tensor]:
    """The stored tensors of one module, or of the parts of a fused one joined."""
    first = modules[0]
    names = [
        n for n, t in (*first.named_parameters(recurse=False), *first.named_buffers(recurse=False))
    ]
    if not isinstance(first, Linear) or len(modules) == 1:
        held = {name: getattr(first, name) for name in names}
        if stored.transposed and "weight" in held:
            held["weight"] = held["weight"].T
        return held
    formats = {m.format for m in modules if isinstance(m, Linear)}
    if len(formats) > 1:
        raise BadRequest(
            f"{stored.name} is stored as one matrix, its parts have different formats",
            seen=", ".join(sorted(format.name for format in formats)),
            do="give its parts one format",
        )
    merged = {}
    for name in names:
        tensors = [getattr(m, name) for m in modules]
        if name == "weight_shape":
            merged[name] = torch.tensor([sum(int(t[0]) for t in tensors), int(tensors[0][1])])
        elif name == "weight_zero_point":
            bits = first.format.bits
            zeros = [
                unpack(t.T.contiguous(), bits, rows).T
                for t, rows in zip(tensors, _rows(root, stored), strict=True)
            ]
            merged[name] = pack(_join(zeros, stored, root).T, bits).T.contiguous()
        else:
            merged[name] = _join(tensors, stored, root)
            if name == "weight" and stored.transposed:
                merged[name] = merged[name].T
    return merged


def as_array(tensor: Tensor) -> Array:
    """A tensor as (dtype, shape, bytes) without a copy where it is contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return NAMES[tensor.dtype], tuple(tensor.shape), data


MANIFEST = "manifest.json"


def verify(folder: Path) -> None:
    """The files of a result are those its manifest names. BadRequest where one was damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    files = read_json(path).get("files")
    for name, expected in (files if isinstance(files, dict) else {}).items():
        file = folder / Path(str(name)).name
        if not file.is_file():
            raise BadRequest(f"{folder} lacks {name}, which its manifest names")
        if sha256_of(file) != expected:
            raise BadRequest(
                f"{file} is not what was written: its sha256 differs from the manifest's",
                do="copy the result again, or delete manifest.json if you changed it yourself",
            )


def is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinite anywhere: both survive in the smallest or the largest value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def load_model(
    folder: str | Path, dtype: str | None = None, device: str = "cpu", tokenizer: bool = True
) -> Model:
    """A whole model in memory. `dtype`: fp32, bf16, fp16 or None for what is stored.

    Raises BadRequest when the folder is not a model that can be run, or is a damaged result.
    """
    source = Source(folder)
    verify(source.folder)
    kind = DTYPES[dtype or source.dtype]
    with torch.device("meta"):
        network = Transformer(replace(source.spec, tied=False))
    network.spec = source.spec
    network.stem = source.stem(kind)
    network.blocks = nn.ModuleList(source.block(i, kind) for i in range(source.spec.num_layers))
    network.tail = source.tail(kind)
    if source.spec.tied:
        network.tail.head.weight = network.stem.embedding.weight
    return Model(
        network.eval().to(device), source.spec, source.family, source.config,
        source.tokenizer() if tokenizer else None, source.folder,
    )  # fmt: skip
