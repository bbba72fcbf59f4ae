"""Devices that people have, by their makers' figures: what a model would do there is modelled, not measured.

Each row: memory, speed of reading it, and peaks of matrix units without sparsity, in what the maker
publishes (int8 and 16-bit floats with float32 sums; absent where there is no figure). For GeForce cards the
16-bit figure is that with float32 sums. For laptops and boards the memory is the largest that is sold and the
bandwidth that of all its channels together; a processor alone may reach less.

`device(name)` is generous with spelling: "RTX 4090", "rtx4090" and "rtx-4090" are the same.
"""

from __future__ import annotations

import re

from onecard.core.device import Device
from onecard.core.errors import BadRequest, nearest

G, T = 1e9, 1e12

# name, kind, GiB, GB/s, int8 TOPS, 16-bit TFLOPS
KNOWN: tuple[tuple[str, str, float, float, float | None, float | None], ...] = (
    ("GTX 1080 Ti", "cuda", 11, 484, 45, 11.3),
    ("RTX 2060", "cuda", 6, 336, 103, 26),
    ("RTX 2080 Ti", "cuda", 11, 616, 215, 54),
    ("RTX 3060", "cuda", 12, 360, 102, 25.5),
    ("RTX 3070", "cuda", 8, 448, 163, 40.6),
    ("RTX 3080", "cuda", 10, 760, 238, 59.5),
    ("RTX 3090", "cuda", 24, 936, 284, 71),
    ("RTX 4060", "cuda", 8, 272, 121, 30.2),
    ("RTX 4060 Ti 16GB", "cuda", 16, 288, 177, 44.1),
    ("RTX 4070", "cuda", 12, 504, 233, 58.3),
    ("RTX 4080", "cuda", 16, 717, 390, 97.5),
    ("RTX 4090", "cuda", 24, 1008, 661, 165),
    ("RTX 5070", "cuda", 12, 672, 247, 61.7),
    ("RTX 5080", "cuda", 16, 960, 450, 112.6),
    ("RTX 5090", "cuda", 32, 1792, 838, 209.5),
    ("T4", "cuda", 16, 320, 130, 65),
    ("L4", "cuda", 24, 300, 242, 121),
    ("A10", "cuda", 24, 600, 250, 125),
    ("L40S", "cuda", 48, 864, 733, 362),
    ("A100 40GB", "cuda", 40, 1555, 624, 312),
    ("A100 80GB", "cuda", 80, 2039, 624, 312),
    ("H100", "cuda", 80, 3350, 1979, 989),
    ("H200", "cuda", 141, 4800, 1979, 989),
    ("B200", "cuda", 180, 7700, 4500, 2250),
    ("RX 7900 XTX", "rocm", 24, 960, 123, 123),
    ("MI300X", "rocm", 192, 5300, 2615, 1307),
    ("Apple M1", "unified", 16, 68, None, 2.6),
    ("Apple M2", "unified", 24, 100, None, 3.6),
    ("Apple M2 Ultra", "unified", 192, 800, None, 27.2),
    ("Apple M3 Max", "unified", 128, 400, None, None),
    ("Apple M4", "unified", 32, 120, None, None),
    ("Apple M4 Max", "unified", 128, 546, None, None),
    ("Ryzen AI Max+ 395", "unified", 128, 256, None, 59),
    ("DDR4-3200, 2 channels", "cpu", 64, 51.2, None, None),
    ("DDR5-5600, 2 channels", "cpu", 96, 89.6, None, None),
    ("Core Ultra 7 155H", "cpu", 64, 119.5, None, None),
    ("Ryzen AI 9 HX 370", "cpu", 64, 120, None, None),
    ("Xeon, 8 channels of DDR5-4800", "cpu", 512, 307, None, None),
    ("EPYC 9004", "cpu", 768, 460.8, None, None),
    ("Raspberry Pi 4", "cpu", 8, 12.8, None, None),
    ("Raspberry Pi 5", "cpu", 16, 17.1, None, None),
    ("Jetson Orin Nano Super", "cuda", 8, 102, 33, 17),
    ("Jetson Orin NX", "cuda", 16, 102, 50, 25),
    ("Jetson AGX Orin", "cuda", 64, 205, 138, 43),
    ("Meteor Lake NPU", "npu", 64, 119.5, 11, None),
    ("Lunar Lake NPU", "npu", 32, 136.5, 48, None),
    ("Snapdragon X Elite NPU", "npu", 64, 135, 45, None),
    ("Ryzen AI 300 NPU", "npu", 64, 120, 50, None),
    ("RK3588 NPU", "npu", 32, 34, 6, None),
    ("TPU v4", "tpu", 32, 1228, 275, 275),
    ("TPU v5e", "tpu", 16, 819, 393, 197),
    ("TPU v5p", "tpu", 95, 2765, 918, 459),
    ("TPU v6e", "tpu", 32, 1640, 1836, 918),
    ("Alveo U250", "fpga", 64, 77, 33.3, None),
    ("Alveo U280", "fpga", 8, 460, 24.5, None),
    ("Kria KV260", "fpga", 4, 19.2, 1.4, None),
)  # fmt: skip


def names() -> tuple[str, ...]:
    return tuple(row[0] for row in KNOWN)


def device(name: str) -> Device:
    """The device of that name. Raises BadRequest that names the nearest known one."""
    rows = {_plain(row[0]): row for row in KNOWN}
    if _plain(name) not in rows:
        raise BadRequest(f"no device {name!r} is known", do=nearest(name, ("auto", *names())))
    called, kind, memory, bandwidth, int8, bf16 = rows[_plain(name)]
    peaks = {"int8": int8, "bf16": bf16}
    return Device(
        called, kind=kind, memory_bytes=int(memory * 2**30), memory_available=int(memory * 2**30),
        read_bandwidth=((1, bandwidth * G),),
        peaks=tuple((dtype, peak * T) for dtype, peak in peaks.items() if peak),
    )  # fmt: skip


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())
