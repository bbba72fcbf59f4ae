"""How fast the native attention is, beside this machine's roof.

    python benchmarks/attention.py [--threads N] [--isa CLASS] [--dtype fp16|bf16|int8]

Prompt: GFLOP/s of the causal half of 512 and 2048 tokens, and milliseconds for all layers of the 1.1 B Llama
shape. Decode: GB/s of keys and values read by one query. The best of a few repeats.
"""

from __future__ import annotations

import argparse
import ctypes
import random
from array import array

from onecard.core.device import usable_cores
from onecard.kernels import cpu

SHAPES = {"1.1 B": (32, 4, 64, 22), "7 B": (32, 32, 128, 32), "8 B": (32, 8, 128, 32)}


def floats(count: int) -> array[float]:
    some = [random.gauss(0, 1) for _ in range(4099)]
    return array("f", (some * (count // len(some) + 1))[:count])


def seconds(
    shape: tuple[int, int, int], dtype: str, past: int, count: int, threads: int
) -> tuple[float, float]:
    """Of storing everything, and of attention: the best within about half a second."""
    heads, kv_heads, dim = shape
    k, v = floats((past + count) * kv_heads * dim), floats((past + count) * kv_heads * dim)
    q, y = floats(count * heads * dim), floats(count * heads * dim)
    longs, times = ctypes.c_int64 * 1, (ctypes.c_double * 2)()
    repeats = 2
    while repeats:
        code = cpu.library().oc_attend(
            heads, kv_heads, dim, 0, dim**-0.5, 0.0, cpu.CODES[dtype], 1, longs(past), longs(count),
            *(x.buffer_info()[0] for x in (k, v, q)), threads, repeats, y.buffer_info()[0], times,
        )  # fmt: skip
        assert code == 0
        repeats = int(0.5 / sum(times)) if repeats == 2 else 0
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa")
    parser.add_argument("--dtype")
    parser.add_argument("--shape", default="1.1 B")
    options = parser.parse_args()
    native, threads = cpu.library(), options.threads
    print(
        f"read {native.oc_read_bandwidth(1 << 30, threads, 0.5) / 1e9:.1f} GB/s, {threads} threads"
    )
    *shape, layers = SHAPES[options.shape]
    heads, kv_heads, dim = shape
    for isa in [options.isa] if options.isa else cpu.isas():
        cpu.force_isa(isa)
        peaks = {d: native.oc_peak(cpu.CODES[d], threads, 0.1) / 1e9 for d in ("fp32", "bf16")}
        print(f"{isa}: fp32 {peaks['fp32']:.0f}, bf16 {peaks['bf16']:.0f} GFLOP/s")
        for dtype in [options.dtype] if options.dtype else ("fp16", "bf16", "int8"):
            line = f"  {dtype}"
            for count in (512, 2048):
                store, took = seconds((heads, kv_heads, dim), dtype, 0, count, threads)
                speed = 2 * heads * dim * count * (count + 1) / took / 1e9
                line += f" | {count}: {speed:5.0f} GFLOP/s, {layers * took * 1e3:6.1f} ms"
                line += f" + {layers * store * 1e3:.1f} to store"
            for past in (1000, 100_000):
                _, took = seconds((heads, kv_heads, dim), dtype, past, 1, threads)
                size = 2 * kv_heads * (dim * {"int8": 1}.get(dtype, 2) + 4 * (dtype == "int8"))
                line += f" | decode {past}: {size * past / took / 1e9:.1f} GB/s {took * 1e6:.0f} us"
            print(line, flush=True)


if __name__ == "__main__":
    main()
