"""Which of several ways is the fastest on this machine, measured once and then remembered. No torch, NumPy.

The processor's own word is not enough: a class of wider vectors may be slower where it lowers the clock or
is emulated, and how far ahead decoding has to call for weights is a matter of the memory behind it (between
2 and 16 KiB on the machines seen so far, and the wrong one halves the speed). So both are tried:

    class   64 rows and one row times a small int4 matrix. Candidates are the classes whose results have the
            bits of the best one (csrc/onecard.h): with a fused multiply-add, without tiles
    reach   one row times a matrix that no cache holds, with all cores

None of it changes a result. It takes half a second, in a process of its own, when a model is first opened
here, and the library's own choice stays unless another is faster by MARGIN: beside busy programs figures
scatter. The answer lies in ~/.cache/onecard/tuned.json (XDG_CACHE_HOME respected) by processor, cores,
features and library. A file that is damaged or says what makes no sense is measured again; where nothing
can be kept nothing is measured. `onecard info --refresh` measures again.

ONECARD_ISA names the class. ONECARD_TUNE=off leaves everything else as the library begins.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from onecard.core.device import Device, cpu_facts, usable_cores
from onecard.core.errors import BadRequest, FailedWork, nearest
from onecard.kernels import cpu
from onecard.kernels.structs import Matrix

FILE = "tuned.json"
ALIKE = ("avx2", "avxvnni", "avx512", "avx512bf16")
"""Classes that give the same bits."""
REACHES = ((8192, 12288), (2048, 2048), (1024, 4096), (4096, 8192), (16384, 24576))
"""(near, far) in bytes; the first is what the library begins with."""
MARGIN = 0.08
TURNS = 9
SMALL = (768, 2048)
BLOCK = 128
LEAST, MOST = 64 << 20, 256 << 20  # bytes of a matrix that no cache holds

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Tuning:
    """What was the fastest."""

    isa: str
    near: int
    far: int

    @staticmethod
    def read(value: Any) -> Tuning:
        """What `asdict` made, if it makes sense here. Raises BadRequest."""
        wanted = ("isa", "near", "far")
        if not isinstance(value, dict) or sorted(value) != sorted(wanted):
            raise BadRequest("that is no tuning")
        isa, near, far = (value[name] for name in wanted)
        if isa not in candidates() or [near, far] not in [list(reach) for reach in REACHES]:
            raise BadRequest("that is no tuning of this machine")
        return Tuning(isa, near, far)


@functools.cache
def settle() -> None:
    """Makes this process run as this machine likes it best; the first call of a process counts."""
    apply()


def apply(refresh: bool = False) -> None:
    """The same at every call, measured anew where that is asked for."""
    named = os.environ.get("ONECARD_ISA")
    if named and named not in cpu.isas():
        raise BadRequest(
            f"ONECARD_ISA names {named!r}, which this machine does not run",
            do=nearest(named, cpu.isas()),
        )
    found = None if os.environ.get("ONECARD_TUNE") == "off" else _tuning(refresh)
    if found:
        cpu.library().oc_reach(found.near, found.far)
        cpu.prefer_isa(found.isa)
    if named:
        cpu.prefer_isa(named)


def _tuning(refresh: bool) -> Tuning | None:
    machine = key(cpu_facts())
    if not refresh:
        with suppress(KeyError, BadRequest):
            return Tuning.read(cpu.remembered(FILE)[machine])
    if not cpu.remember(FILE, machine, None):
        return None
    try:
        found = Tuning.read(cpu.elsewhere("onecard.kernels.tune", 30))
    except (BadRequest, FailedWork):
        return None
    cpu.remember(FILE, machine, asdict(found))
    return found


def key(facts: Device) -> str:
    """The machine and the very library: another build is measured anew."""
    with suppress(OSError):
        stat = os.stat(cpu.library()._name)
        return f"{cpu.machine_key(facts)}, library {stat.st_size} {stat.st_mtime_ns}"
    return cpu.machine_key(facts)


def candidates() -> tuple[str, ...]:
    """The classes to choose from, the library's own choice first."""
    best = cpu.isas()[-1]
    others = [isa for isa in reversed(cpu.isas()) if isa in ALIKE and isa != best]
    return (best, *others) if best in ALIKE else (best,)


def measure() -> Tuning:
    """Here and now, in this process, which it leaves as it was found."""
    cores, caches = usable_cores(), dict(cpu_facts().caches)
    with _Filled(SMALL) as small:
        threads = min(cores, 2)
        # One call is timed inside and the least counts, so what threads cost is not in it.
        isa = fastest(candidates(), lambda isa: _in_class(isa, small, threads))
    columns = SMALL[1]
    size = min(max(2 * caches.get("L3", 0), LEAST), MOST, cpu_facts().memory_available // 8)
    rows = size * 2 // columns // 16 * 16
    if rows < 16:
        return Tuning(isa, *REACHES[0])
    with _Filled((rows, columns)) as large:
        near, far = fastest(REACHES, lambda reach: _with_reach(reach, large, cores))
    return Tuning(isa, near, far)


def fastest(options: Sequence[K], seconds: Callable[[K], float]) -> K:
    """The option of the least time in several turns; the first unless another is better by MARGIN."""
    least = dict.fromkeys(options, math.inf)
    for _ in range(TURNS):
        for option in options:
            least[option] = min(least[option], seconds(option))
    best = min(options, key=lambda option: least[option])
    return best if least[best] < (1 - MARGIN) * least[options[0]] else options[0]


def _in_class(isa: str, matrix: _Filled, threads: int) -> float:
    cpu.force_isa(isa)
    try:
        return math.sqrt(matrix.seconds(64, threads) * matrix.seconds(1, threads))
    finally:
        cpu.force_isa(None)


def _with_reach(reach: tuple[int, int], matrix: _Filled, threads: int) -> float:
    cpu.library().oc_reach(*reach)
    try:
        return matrix.seconds(1, threads)
    finally:
        cpu.library().oc_reach(*REACHES[0])


class _Filled:
    """An int4 matrix in the kernel layout that holds something, in memory of its own."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.matrix = Matrix(
            rows=shape[0], columns=shape[1], bits=4, block=BLOCK, dtype=cpu.CODES["bf16"]
        )
        size = int(cpu.library().oc_layout_bytes(ctypes.byref(self.matrix)))
        self.memory = mmap.mmap(-1, size + 4096)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.view = ctypes.c_char.from_buffer(self.memory)
        self.matrix.data = ctypes.addressof(self.view)
        ctypes.memset(self.matrix.data, 0x3C, size)  # scales of 0.0115
        self.x = (ctypes.c_float * (64 * shape[1]))(*[0.5, -1.0, 0.25, 2.0] * (16 * shape[1]))
        self.y = (ctypes.c_float * (64 * shape[0] if shape == SMALL else shape[0]))()

    def __enter__(self) -> _Filled:
        return self

    def __exit__(self, *_: object) -> None:
        del self.view
        self.memory.close()

    def seconds(self, rows: int, threads: int) -> float:
        took = ctypes.c_double()
        code = cpu.library().oc_multiply(
            ctypes.byref(self.matrix), ctypes.addressof(self.x), rows, threads, 2,
            ctypes.addressof(self.y), ctypes.byref(took),
        )  # fmt: skip
        if code:
            raise FailedWork("a product could not be measured", seen=f"error {code}")
        return took.value


if __name__ == "__main__":
    print(json.dumps(asdict(measure())))
