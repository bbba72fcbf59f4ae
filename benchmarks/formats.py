"""How fast the native engine runs a model in each format, beside its own dense int8. No torch.

    python benchmarks/formats.py MODEL [--threads 2] [--turns 3] [--only NAME ...] [--out results/F.json]

MODEL gives the shape (make_llama.py --shape 1.1b); its weights are not read. Instead the stored parts of one
matrix of each shape are drawn at random (codes, scales, tables, masks with as many bits as the format says),
laid out as a model's would be (kernels/forms.py), and copied for every layer, so that each product reads
memory of its own. The head is int8 in blocks of 32 as usual, with --head the model's format.

Every format is measured beside dense int8 in turns, three of each unless --turns says otherwise, and the best
of each counts: what a token takes in decoding (16 tokens behind 32), and a prompt of 256 tokens. `share` is
what is read per token over that time, as part of the speed of reading the same memory.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onecard.checkpoint.source import Source
from onecard.core.device import usable_cores
from onecard.core.format import (
    Format,
    LowRank,
    Shape,
    Sparse,
    parse_format,
)
from onecard.kernels import cpu, forms, layout
from onecard.kernels.structs import RMS, SPARSE, Matrix, Norm
from onecard.runtime import cpu as runtime
from onecard.runtime import weights as laid_out
from onecard.runtime.sample import Sampling
from onecard.runtime.steps import Draw, Feed

REFERENCE = "int8-g128"
FORMATS = (
    "int8-g128", "int8-row", "int4-g128", "int3-g128", "int2-g128", "int2-g128-zp", "ternary-g128",
    "ternary-row", "binary-g128", "nf4-g64", "fp4-g64", "mxfp4", "nvfp4", "fp8-row", "fp8-block",
    "codebook1", "codebook2", "codebook3", "codebook3-row", "codebook4", "codebook4-row", "codebook5",
    "codebook6", "codebook8", "codebook8x4", "codebook4x2", "sparse0.5(int8-g128)",
    "sparse2:4(int8-g128)", "sparse0.5(bf16)", "sparse0.7(int8-g128)", "sparse0.5(int4-g128)",
    "sparse2:4(int4-g128)", "lowrank(int8-row)", "lowrank(int8-row)+int2-g128", "hashed8", "bf16",
)  # fmt: skip
WHY = {
    "codebook8": "as many bits as int8; its entries are rounded to int8, and there is no lookup",
    "fp8": "as many bits as int8; rounded to int8 in blocks of 32, whose scales are 0.5 bit more",
    "hashed": "every weight is fetched from another place: expanded to int8 when it is laid out",
    "nvfp4": "two scales in a block of 32 inputs: expanded to int8 in blocks of 32",
    "bf16": "no rounding at all, and twice the bytes",
}


def drawn(rng: np.random.Generator, format: Format, shape: Shape) -> dict[str, NDArray[Any]]:
    """Stored parts of a matrix: random codes and masks, scales of a usual size."""
    made: dict[str, NDArray[Any]] = {}
    for name, (dtype, sizes) in format.parts(shape).items():
        count = int(np.prod(sizes))
        if name.endswith("weight_mask"):
            made[name] = masked(rng, format, shape)
        elif dtype in ("int32", "uint8", "fp8"):
            octets = rng.integers(0, 256, count * (4 if dtype == "int32" else 1), np.uint8)
            if dtype != "int32":  # an exponent about 1, a number that is not NaN
                octets = octets % 4 + 120 if dtype == "uint8" else octets & 0xB7
            made[name] = octets.view(np.int32 if dtype == "int32" else np.uint8).reshape(sizes)
        elif dtype == "int64":
            made[name] = np.array(shape)
        else:
            floats = rng.standard_normal(count, np.float32) * np.float32(0.02)
            if "scale" in name or "global" in name:
                floats = np.abs(floats) + np.float32(1e-3)
            if dtype == "bf16":
                made[name] = (floats.view(np.uint32) >> 16).astype(np.uint16).reshape(sizes)
            else:
                made[name] = floats.astype(layout.ARRAYS[dtype]).reshape(sizes)
    return made


def masked(rng: np.random.Generator, format: Format, shape: Shape) -> NDArray[np.uint8]:
    """A mask with exactly the bits that a sparse format keeps."""
    assert isinstance(format, Sparse)
    rows, columns = shape
    if format.pattern:
        kept, of = map(int, format.pattern.split(":"))
        order = rng.random((rows * columns // of, of), np.float32).argsort(1)
        bits = (order < kept).reshape(shape)
    else:
        slots = format.slots(shape)
        bits = rng.random(rows * columns, np.float32) < slots / (rows * columns)
        much = int(bits.sum()) - slots
        wrong = rng.permutation(np.flatnonzero(bits if much > 0 else ~bits))[: abs(much)]
        bits[wrong] ^= True
        bits = bits.reshape(shape)
    return np.packbits(bits, axis=1, bitorder="little")


def aligned(count: int) -> layout.Bytes:
    memory = np.empty(count + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + count]


class Drawn:
    """What runtime/weights.py's Weights tells the stepper, for random weights in one format."""

    def __init__(self, source: Source, format: str, head: bool, threads: int) -> None:
        self.rng, self.threads = np.random.default_rng(0), threads
        self.hidden, self.vocab = source.spec.hidden, source.spec.vocab_size
        self.made: dict[Shape, list[tuple[str, Matrix, layout.Bytes]]] = {}
        self.name, self.head, self.kept, self.read = format, head, [], 0
        self.given: dict[str, Matrix] = {}
        self.shapes = {
            (p.path if i is None else f"blocks.{i}.{p.path}"): p.module.shape
            for i in source.parts()
            for p in source.places(i)
            if p.module.kind == "linear"
        }
        table = self.rng.standard_normal((self.vocab, self.hidden), np.float32)
        self.table = (table.view(np.uint32) >> 16).astype(np.uint16)
        self.ones = np.ones(max(self.hidden, 1 << 15), np.float32)
        self.embedding_dtype, self.embedding = "bf16", self.table.ctypes.data

    def linears(self) -> dict[str, Shape]:
        return self.shapes

    def norm(self, path: str) -> Norm:
        return Norm(None if path.endswith(("q_norm", "k_norm", "_out")) else self.ones.ctypes.data,
                    None, RMS, 1e-5)  # fmt: skip

    def vector(self, path: str) -> None:
        return None

    def format_of(self, shape: Shape) -> Format:
        if self.name.startswith("lowrank("):  # half the bytes of int8, what is left included
            probe = parse_format(self.name.replace("lowrank", "lowrank1"))
            assert isinstance(probe, LowRank)
            rest = probe.rest.bytes(shape) if probe.rest else 0
            rank = (shape[0] * shape[1] // 2 - rest) // (shape[0] + shape[1]) // 16 * 16
            return parse_format(self.name.replace("lowrank", f"lowrank{max(rank, 16)}"))
        return parse_format(self.name)

    def pieces(self, shape: Shape, head: bool) -> list[tuple[str, Matrix, layout.Bytes]]:
        """(what it is to the product, matrix, its bytes) of one shape, laid out once."""
        if shape not in self.made:
            format = self.format_of(shape)
            if head:
                whole = [("", layout.rounded(shape, 32), None)]
            elif isinstance(format, LowRank):
                whole = [(end, *piece) for end, piece in format.pieces(shape).items()]
                whole = [
                    (laid_out.PIECES[end], laid_out._layout(f, s, s), (f, s)) for end, f, s in whole
                ]
            else:
                whole = [("", laid_out._layout(format, shape, shape), (format, shape))]
            self.made[shape] = []
            for end, matrix, what in whole:
                out = aligned(layout.size(matrix))
                if what is None:
                    out[:] = np.resize(
                        self.rng.integers(0, 128, 1 << 20, np.uint8) & 0xBB, out.size
                    )
                else:
                    parts = drawn(self.rng, *what)
                    forms.fill(matrix, parts, slice(None), what[1], what[0], out, self.threads)
                self.made[shape].append((end, matrix, out))
        return self.made[shape]

    def matrix(self, path: str, exact: bool = False) -> Matrix:
        """The same one whenever it is asked for: it is counted and held once."""
        if path not in self.given:
            self.given[path] = self.drawn(path) if path in self.shapes else Matrix()
        return self.given[path]

    def drawn(self, path: str) -> Matrix:
        rows, columns = self.shapes[path]
        made = Matrix()
        for end, matrix, data in self.pieces(
            (rows, columns), path == "tail.head" and not self.head
        ):
            own, copy = Matrix.from_buffer_copy(matrix), aligned(data.size)
            copy[:] = data
            own.data = copy.ctypes.data
            self.kept += [own, copy]
            self.read += used(own, copy)
            if end:
                setattr(made, end[1:], ctypes.addressof(own))
            else:
                made = own
        return made


def used(matrix: Matrix, data: layout.Bytes) -> int:
    """Bytes that a product reads: of a sparse layout, which has room for more, what is there."""
    if matrix.kind != SPARSE:
        return data.size
    begins = data[: 8 * -(-matrix.rows // 16)].view(np.uint64).astype(np.int64)
    return int((begins[-1] - begins[0]) * len(begins) / max(1, len(begins) - 1))


class Model:
    """A stepper of random weights, and the best times seen."""

    def __init__(self, source: Source, name: str, head: bool, threads: int) -> None:
        weights = Drawn(source, name, head, threads)
        runtime.open_weights = lambda *_: weights  # type: ignore[assignment]
        settings = runtime.CpuSettings(threads=threads, context=512, rows=256)
        self.stepper = runtime.CpuStepper(source, settings)
        weights.made.clear()
        self.read, self.token, self.prompt = weights.read, 9e9, 9e9
        self.table = np.arange(self.stepper.pages, dtype=np.int32)

    def _step(self, ids: int, past: int, most: int) -> float:
        new = np.arange(3, 3 + ids, dtype=np.int32)
        none = np.zeros(0, np.int32)
        draw = Draw(Sampling(temperature=0), new, ids, np.zeros(0), none, most)
        start = time.perf_counter()
        self.stepper.step([Feed(new, past, self.table, "none", draw)], most, np.zeros(1, np.int32))
        return time.perf_counter() - start

    def decode(self, tokens: int = 16) -> None:
        self._step(32, 0, 1)
        self.token = min(self.token, self._step(1, 32, tokens) / tokens)

    def read_prompt(self) -> None:
        self.prompt = min(self.prompt, self._step(256, 0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", nargs="+", default=FORMATS)
    parser.add_argument("--head", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    source, threads = Source(asked.model), asked.threads
    bandwidth = cpu.library().oc_read_bandwidth(1 << 29, threads, 0.5)
    print(f"{cpu.isa()}, {threads} threads, {bandwidth / 1e9:.1f} GB/s", flush=True)
    reference = Model(source, REFERENCE, asked.head, threads)
    rows = []
    print(
        f"{'format':28} {'MB/token':>8} {'tokens/s':>8} {'x int8':>6} {'share':>5} {'prompt/s':>8} {'x':>5}"
    )
    for name in asked.only:
        model = Model(source, name, asked.head, threads)
        reference.token = reference.prompt = 9e9
        for turn in range(asked.turns):
            reference.decode()
            model.decode()
            if turn < 2:
                reference.read_prompt()
                model.read_prompt()
        row = {
            "format": name, "bytes": model.read, "decode": 1 / model.token,
            "ratio": reference.token / model.token, "share": model.read / model.token / bandwidth,
            "prompt": 256 / model.prompt, "prompt_ratio": reference.prompt / model.prompt,
            "int8_decode": 1 / reference.token,
        }  # fmt: skip
        why = next((w for prefix, w in WHY.items() if name.startswith(prefix)), "")
        if not why and not name.startswith("lowrank"):
            why = forms.widened(parse_format(name))
        rows.append(row | {"why": why})
        print(
            f"{name:28} {model.read / 1e6:8.0f} {row['decode']:8.1f} {row['ratio']:6.2f} "
            f"{row['share']:5.2f} {row['prompt']:8.0f} {row['prompt_ratio']:5.2f} {why}",
            flush=True,
        )
        model.stepper.close()
        del model
        gc.collect()
    if asked.out:
        about = {"isa": cpu.isa(), "threads": threads, "bandwidth": bandwidth, "head": asked.head}
        asked.out.write_text(json.dumps(about | {"formats": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
