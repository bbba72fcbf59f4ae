"""A model folder becomes modules, block by block, and modules become stored tensors again.

Where everything lies is told by `Source` (source.py, no torch); `block(source, i)` reads one block.
Peak memory of reading a block: the block, plus its largest fused tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from onecard.checkpoint.finite import damaged
from onecard.checkpoint.shards import Array
from onecard.checkpoint.source import Place, Source, verify
from onecard.core.errors import BadRequest, nearest
from onecard.core.format import Dense, Format, Integers, Weight
from onecard.kernels.reference import DTYPES, NAMES, pack, unpack
from onecard.nn.layers import Embedding, Linear, Matrix
from onecard.nn.model import Model
from onecard.nn.transformer import Block, Stem, Tail, Transformer

__all__ = ["Source", "as_array", "block", "load_model", "modules", "read", "stem", "stored_arrays",
           "tail", "verify"]  # fmt: skip

FLOATS = ("fp32", "bf16", "fp16")


def modules(
    source: Source, root: nn.Module, index: int | None, split: bool | None = None
) -> Iterator[tuple[str, nn.Module, Place]]:
    """(path below root, module, where it lies) for stem, tail or a block; `split` as in `places`."""
    side = "" if index is not None else f"{type(root).__name__.lower()}."
    for place in source.places(index, split):
        if place.path.startswith(side):
            below = place.path.removeprefix(side)
            yield below, root.get_submodule(below), place


def read(source: Source, name: str) -> Tensor:
    """One stored tensor. BadRequest where it holds NaN or infinite values."""
    entry, data = source.checkpoint.read(name)
    if not data.size:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    tensor = torch.frombuffer(data.data, dtype=DTYPES[entry.dtype]).view(entry.shape)
    if not is_finite(tensor):
        raise damaged(name, int((~torch.isfinite(tensor)).sum()))
    return tensor


def stem(source: Source, dtype: torch.dtype | None = None) -> Stem:
    with torch.device("meta"):
        root = Stem(source.spec)
    _fill(source, root, None, dtype)
    return root


def block(source: Source, index: int, dtype: torch.dtype | None = None) -> Block:
    """Block `index` with its weights in `dtype` (None: as stored); packed weights stay packed."""
    with torch.device("meta"):
        root = Block(source.spec, index)
    _fill(source, root, index, dtype)
    return root


def tail(source: Source, dtype: torch.dtype | None = None) -> Tail:
    with torch.device("meta"):
        root = Tail(source.spec)
    _fill(source, root, None, dtype)
    return root


def _fill(source: Source, root: nn.Module, index: int | None, dtype: torch.dtype | None) -> None:
    """The weights of a part of the network, in place of the meta tensors it was built with."""
    kept: dict[str, Tensor] = {}

    def tensor_of(place: Place, part: str) -> Tensor:
        name = f"{place.stored.name}.{part}"
        if not place.stored.of:
            return read(source, name)
        if name not in kept:
            kept[name] = read(source, name)
        return kept[name]

    def parts_of(place: Place, format: Format) -> dict[str, Tensor]:
        shape = (place.total, place.module.shape[1])
        if source.bytewise(place):
            return as_words(tensor_of(place, "weight"), tensor_of(place, "weight_scale"), format)
        return {part: tensor_of(place, part) for part in format.parts(shape)}

    for _, module, place in modules(source, root, index):
        if not place.stored.of:
            kept.clear()
        format = source.format_at(place)
        for name in place.module.tensors():
            if name == "weight" and isinstance(module, Matrix) and format is not None:
                module.replace(_cut_packed(parts_of(place, format), module.shape, format, place))
                if isinstance(module, Embedding):
                    module.compute = dtype or DTYPES[source.dtype]
                    continue
                assert isinstance(module, Linear)
                inputs = source.inputs_at(place)
                stored = inputs is not None and inputs.static and source.input_scale(place)
                module.round(inputs, tensor_of(place, "input_scale") if stored else None)
                continue
            tensor = tensor_of(place, name)
            if name == "weight" and place.stored.transposed:
                tensor = tensor.T
            tensor = _cut(tensor, place).contiguous()
            tensor = tensor.to(dtype) if dtype else tensor
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
            if name == "weight" and isinstance(module, Matrix):
                module.format = Dense(NAMES[tensor.dtype])


def as_words(q: Tensor, scale: Tensor, format: Format) -> dict[str, Tensor]:
    """The parts of integers that lie a byte each, int8 [rows, columns]."""
    assert isinstance(format, Integers)
    return {"weight_packed": pack(q, format.bits), "weight_scale": scale,
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64)}  # fmt: skip


def as_bytes(held: Mapping[str, Tensor], columns: int) -> dict[str, Tensor]:
    """The same integers of 8 bits a byte each; the inverse of `as_words`, other tensors stay."""
    other = {name: t for name, t in held.items() if name not in ("weight_packed", "weight_shape")}
    return {"weight": unpack(held["weight_packed"], 8, columns), **other}


def _cut_packed(
    parts: dict[str, Tensor], shape: tuple[int, int], format: Format, place: Place
) -> Weight:
    """The packed Weight of one linear, cut out of a fused one where it is part of it."""
    if not place.stored.of:
        return Weight(format, shape, parts)
    assert isinstance(format, Integers), f"{format.name} is never fused"
    cut = {"weight_shape": torch.tensor(shape, dtype=torch.int64)}
    for name in ("weight_packed", "weight_scale"):
        cut[name] = _cut(parts[name], place).contiguous()
    if format.zero_point:
        zeros = parts["weight_zero_point"].T.contiguous()
        zero = unpack(zeros, format.bits, place.total).T
        cut["weight_zero_point"] = pack(_cut(zero, place).T, format.bits).T.contiguous()
    return Weight(format, shape, {name: cut[name] for name in format.parts(shape)})


def _cut(tensor: Tensor, place: Place) -> Tensor:
    """The rows of one part of a fused tensor [rows, ...]."""
    rows = place.rows
    return tensor[rows] if isinstance(rows, slice) else tensor[torch.from_numpy(rows)]


def _join(tensors: list[Tensor], places: list[Place]) -> Tensor:
    """The inverse of `_cut` for all parts together."""
    joined = tensors[0].new_empty((places[0].total, *tensors[0].shape[1:]))
    for tensor, place in zip(tensors, places, strict=True):
        rows = place.rows
        joined[rows if isinstance(rows, slice) else torch.from_numpy(rows)] = tensor
    return joined


def stored_arrays(
    source: Source, root: nn.Module, index: int | None, split: bool = False
) -> dict[str, Array]:
    """name -> array of every tensor of a part of the network, as the checkpoint spells and lays it."""
    arrays: dict[str, Array] = {}
    found = {path: (module, place) for path, module, place in modules(source, root, index, split)}
    for path, (module, place) in found.items():
        stored = place.stored
        if stored.of and stored.part:
            continue
        if path == "head" and source.spec.tied:
            continue
        together = [found[p] for p in stored.of] or [(module, place)]
        held = _merged(together)
        if isinstance(module, Linear) and module.scheme.bytewise:
            held = as_bytes(held, module.shape[1])
        for part, tensor in held.items():
            arrays[f"{stored.name}.{part}"] = as_array(tensor)
    return arrays


def _merged(together: list[tuple[nn.Module, Place]]) -> dict[str, Tensor]:
    """The stored tensors of one module, or of the parts of a fused one joined."""
    modules, places = ([m for m, _ in together], [p for _, p in together])
    first, stored = modules[0], places[0].stored
    names = [
        n for n, t in (*first.named_parameters(recurse=False), *first.named_buffers(recurse=False))
    ]
    if not isinstance(first, Linear) or len(modules) == 1:
        held = {name: getattr(first, name) for name in names}
        if stored.transposed and "weight" in held:
            held["weight"] = held["weight"].T
        return held
    schemes = {m.scheme for m in modules if isinstance(m, Linear)}
    if len(schemes) > 1:
        raise BadRequest(
            f"{stored.name} is stored as one matrix, its parts have different formats",
            seen=", ".join(sorted(scheme.name for scheme in schemes)),
            do="give its parts one format",
        )
    merged = {}
    for name in names:
        tensors = [getattr(m, name) for m in modules]
        if name == "input_scale":
            merged[name] = tensors[0]  # they read one input
        elif name == "weight_shape":
            merged[name] = torch.tensor([sum(int(t[0]) for t in tensors), int(tensors[0][1])])
        elif name == "weight_zero_point":
            assert isinstance(first.format, Integers)
            bits = first.format.bits
            zeros = [
                unpack(t.T.contiguous(), bits, place.module.shape[0]).T
                for t, place in zip(tensors, places, strict=True)
            ]
            merged[name] = pack(_join(zeros, places).T, bits).T.contiguous()
        else:
            merged[name] = _join(tensors, places)
            if name == "weight" and stored.transposed:
                merged[name] = merged[name].T
    return merged


def as_array(tensor: Tensor) -> Array:
    """A tensor as (dtype, shape, bytes) without a copy where it is contiguous."""
    tensor = tensor.detach().cpu().contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,))  # one number is contiguous with any stride
    data = flat.view(torch.uint8).numpy() if tensor.numel() else b""
    return NAMES[tensor.dtype], tuple(tensor.shape), data


def is_finite(tensor: Tensor) -> bool:
    """Neither NaN nor infinite anywhere: both survive in the smallest or the largest value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return not bool((tensor.view(torch.uint8) & 0x7F == 0x7F).any())
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def compute_dtype(source: Source, wanted: str) -> str:
    """What this processor computes in, unless a dtype is wanted: bf16 where the weights are and it multiplies
    them, else fp32, as torch is far slower in bf16 where there is no instruction for it."""
    if wanted != "auto":
        return wanted
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if source.dtype == "bf16" and fast else "fp32"


def load_model(
    folder: str | Path, dtype: str | None = None, device: str = "cpu", tokenizer: bool = True
) -> Model:
    """A whole model in memory. `dtype`: fp32, bf16, fp16 or None for what is stored.

    Raises BadRequest when the folder is not a model that can be run, or is a damaged result.
    """
    if dtype is not None and dtype not in FLOATS:
        raise BadRequest(f"a model cannot be held in {dtype!r}", do=nearest(dtype, FLOATS))
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BadRequest("no CUDA device is available here", do="device='cpu'")
    source = Source(folder)
    verify(source.folder)
    kind = DTYPES[dtype or source.dtype]
    with torch.device("meta"):
        network = Transformer(replace(source.spec, tied=False))
    network.spec = source.spec
    network.stem = stem(source, kind)
    network.blocks = nn.ModuleList(block(source, i, kind) for i in range(source.spec.num_layers))
    network.tail = tail(source, kind)
    if source.spec.tied:
        network.tie()
    return Model(
        network.eval().to(device), source.spec, source.family, source.config,
        source.tokenizer() if tokenizer else None, source.folder,
    )  # fmt: skip
