"""The native CPU library: found, loaded with ctypes, measured with. No torch, no NumPy.

The library is `_native` beside this file; the environment variable ONECARD_NATIVE names another one
(a debug or sanitizer build). Its contract is csrc/onecard.h. It has the same kernels for several
instruction-set classes and picks the best; `isas` tells which run here, `force_isa` changes which.

`probe` measures this CPU once, in a process of its own: the gigabytes that are read do not count
towards the caller's peak memory, and an instruction that a virtual machine promises but refuses
ends only the child. The result is kept in ~/.cache/onecard/device.json (XDG_CACHE_HOME respected).
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from onecard.core.device import Device, cpu_facts, usable_cores, with_memory_now
from onecard.core.errors import BadRequest, FailedWork, nearest
from onecard.core.format import Integers
from onecard.core.report import Report, Row, environment, write_text
from onecard.core.settings import parse_size

ABI = 5
CODES = {"fp32": 0, "fp16": 1, "bf16": 2, "int8": 3, "fp8": 4, "int4": 5}
PEAKS = ("int8", "int4", "bf16", "fp32")

SECONDS = 0.3  # for each measured number
BUFFER = 2 << 30  # bytes to read, so that no cache holds them; memory permitting

# The library ------------------------------------------------------------------------------------


def available() -> bool:
    """Whether the native library is there and loads."""
    try:
        library()
    except BadRequest:
        return False
    return True


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded native library. Raises BadRequest that says how to get one."""
    path = _library_path()
    try:
        native = ctypes.CDLL(str(path))
        found = native.oc_abi()
        if found == ABI:
            return _with_prototypes(native)
    except (OSError, AttributeError) as error:
        raise BadRequest(
            "the native CPU library does not load", seen=f"{path}: {error}", do=_again()
        ) from error
    raise BadRequest(
        "the native CPU library is of another version of onecard",
        seen=f"{path} has interface {found}, this package needs {ABI}",
        do=_again(),
    )


def isas() -> tuple[str, ...]:
    """The instruction-set classes that were compiled and run here, worst first."""
    native = library()
    known = range(native.oc_isa_count())
    return tuple(native.oc_isa_name(i).decode() for i in known if native.oc_isa_supported(i))


def isa() -> str:
    """The instruction-set class in use."""
    native = library()
    return str(native.oc_isa_name(native.oc_isa()).decode())


def force_isa(name: str | None) -> None:
    """Makes every later call in this process use one class; None goes back to the best."""
    native = library()
    if name is None:
        native.oc_isa_force(-1)
        return
    if name not in isas():
        raise BadRequest(
            f"this machine does not run the instruction-set class {name!r}",
            do=nearest(name, isas()),
        )
    native.oc_isa_force(_isa_index(name))


def prefer_isa(name: str) -> None:
    """Makes one of `isas` the best, which is in use where none is forced."""
    library().oc_isa_prefer(_isa_index(name))


def _isa_index(name: str) -> int:
    native = library()
    names = [native.oc_isa_name(i).decode() for i in range(native.oc_isa_count())]
    return names.index(name)


def _library_path() -> Path:
    override = os.environ.get("ONECARD_NATIVE")
    if override:
        return Path(override).resolve()
    for suffix in (".so", ".dylib"):
        path = Path(__file__).with_name(f"_native{suffix}")
        if path.exists():
            return path
    raise BadRequest(
        "the native CPU library is missing",
        seen=f"there is no _native library in {Path(__file__).parent}",
        do="install a C++ compiler (gcc 11, clang 12 or newer) and cmake, then reinstall onecard",
    )


def _again() -> str:
    """What helps against a library that is there and of no use."""
    if os.environ.get("ONECARD_NATIVE"):
        return "ONECARD_NATIVE names it: build it again from this source, or unset the variable"
    return "reinstall onecard"


def _with_prototypes(native: ctypes.CDLL) -> ctypes.CDLL:
    """csrc/onecard.h, once more."""
    c_int, c_int64, c_double, pointer = (
        ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p,
    )  # fmt: skip
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "oc_isa_count": (c_int, []),
        "oc_isa_name": (ctypes.c_char_p, [c_int]),
        "oc_isa_supported": (c_int, [c_int]),
        "oc_isa": (c_int, []),
        "oc_isa_force": (c_int, [c_int]),
        "oc_isa_prefer": (c_int, [c_int]),
        "oc_reach": (c_int, [c_int64, c_int64]),
        "oc_read_bandwidth": (c_double, [c_int64, c_int, c_double]),
        "oc_peak": (c_double, [c_int, c_int, c_double]),
        "oc_peak_unit": (ctypes.c_char_p, [c_int]),
        "oc_round_pack": (
            c_int64,
            [pointer, c_int, c_int64, c_int64, c_int, c_int64, c_int, c_int, *[pointer] * 3],
        ),
        "oc_pack": (c_int, [pointer, c_int64, c_int64, c_int, c_int, pointer]),
        "oc_to_dense": (
            c_int,
            [pointer, pointer, c_int, pointer, c_int64, c_int64, c_int, c_int64, c_int, c_int,
             pointer],
        ),
        "oc_round_columns": (
            c_int,
            [*[pointer] * 6, c_int64, c_int64, c_int, c_int, *[pointer] * 3],
        ),
        "oc_search_grid": (
            c_int,
            [pointer, pointer, c_int64, c_int64, c_int, c_int64, c_int, pointer, c_int, c_int, c_int,
             pointer, pointer],
        ),
        "oc_engine_open": (c_int, [pointer, pointer, pointer]),
        "oc_engine_need": (c_int, [pointer, pointer, pointer, pointer]),
        "oc_engine_close": (None, [pointer]),
        "oc_engine_bytes": (c_int64, [pointer]),
        "oc_engine_step": (c_int, [pointer, pointer, c_int64, c_int, pointer]),
        "oc_multiply": (c_int, [pointer, pointer, c_int64, c_int, c_int, pointer, pointer]),
        "oc_attend": (
            c_int,
            [c_int, c_int, c_int, c_int64, ctypes.c_float, ctypes.c_float, c_int, c_int64,
             *[pointer] * 5, c_int, c_int, pointer, pointer],
        ),
        "oc_layout_bytes": (c_int64, [pointer]),
        "oc_layout_integers": (
            c_int64, [pointer, pointer, c_int, pointer, pointer, c_int64, c_int, pointer],
        ),
        "oc_layout_dense": (c_int64, [pointer, pointer, c_int, c_int, pointer]),
        "oc_layout_quantize": (c_int64, [pointer, pointer, c_int, c_int, pointer]),
        "oc_layout_table": (
            c_int64, [pointer, pointer, pointer, c_int64, pointer, c_int, pointer],
        ),
        "oc_layout_sparse": (c_int64, [pointer, pointer, c_int, pointer]),
        "oc_checksum": (c_int, [pointer, c_int64, c_int, pointer]),
        "oc_sample_scratch": (c_int64, [c_int64]),
        "oc_sample": (ctypes.c_int32, [pointer, c_int64, pointer, pointer]),
        "oc_rows": (pointer, []),
    }  # fmt: skip
    for name, (result, arguments) in prototypes.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    return native


# Rounding ---------------------------------------------------------------------------------------


def round_pack(
    weight: int, dtype: str, rows: int, columns: int, format: Integers,
    packed: int, scale: int, zero: int | None = None, threads: int | None = None,
) -> int:  # fmt: skip
    """Rounds a contiguous matrix [rows, columns] at address `weight` to a format of integers.

    Fills int32 [rows, words] at `packed`, the format's scales [rows, groups] at `scale` and, for
    formats with a zero point, int8 [rows, groups] at `zero`. Returns how many weights are not
    finite; unless that is 0, what was written is of no use. The caller owns all memory.
    """
    if not isinstance(format, Integers) or dtype not in CODES or (format.zero_point and not zero):
        raise BadRequest(f"{dtype} weights cannot be rounded and packed as {format.name}")
    group = columns // format.groups((rows, columns))
    found = library().oc_round_pack(
        weight, CODES[dtype], rows, columns, format.bits, group, CODES[format.scale],
        threads or usable_cores(), packed, scale, zero if format.zero_point else None,
    )  # fmt: skip
    if found < 0:
        raise BadRequest(f"a {dtype} matrix {rows} x {columns} cannot be packed as {format.name}")
    return int(found)


def pack(
    codes: int, rows: int, columns: int, bits: int, packed: int, threads: int | None = None
) -> None:
    """Packs int8 codes [rows, columns] into int32 [rows, words]."""
    threads = threads or usable_cores()
    _done(library().oc_pack(codes, rows, columns, bits, threads, packed), "oc_pack")


def to_dense(
    packed: int, scale: int, scale_dtype: str, zero: int | None, rows: int, columns: int,
    format: Integers, dense: int, dtype: str, threads: int | None = None,
) -> None:  # fmt: skip
    """Fills a matrix [rows, columns] of `dtype` with the values of packed words.

    Scales [rows, groups] are finite; `zero` is int8 [rows, groups], or None.
    """
    group = columns // format.groups((rows, columns))
    _done(library().oc_to_dense(
        packed, scale, CODES[scale_dtype], zero, rows, columns, format.bits, group, CODES[dtype],
        threads or usable_cores(), dense,
    ), "oc_to_dense")  # fmt: skip


def round_columns(
    target: int, carried: int, r: int, scale: int, zero: int, keep: int | None,
    block: int, rows: int, bits: int, errors: int, codes: int, loss: int,
    threads: int | None = None,
) -> None:  # fmt: skip
    """One block of GPTQ's columns, matrices [block, rows]; csrc/onecard.h has the formulas."""
    _done(library().oc_round_columns(
        target, carried, r, scale, zero, keep, block, rows, bits,
        threads or usable_cores(), errors, codes, loss,
    ), "oc_round_columns")  # fmt: skip


def search_grid(
    weight: int, importance: int, rows: int, columns: int, format: Integers, shrink: Sequence[float],
    scale: int, zero: int, threads: int | None = None,
) -> None:  # fmt: skip
    """Fills float32 scales and zero points [rows, groups]: the best of the ranges `shrink`."""
    group = columns // format.groups((rows, columns))
    candidates = (ctypes.c_float * len(shrink))(*shrink)
    _done(library().oc_search_grid(
        weight, importance, rows, columns, format.bits, group, CODES[format.scale],
        candidates, len(shrink), format.zero_point, threads or usable_cores(), scale, zero,
    ), "oc_search_grid")  # fmt: skip


def _done(result: int, name: str) -> None:
    if result == -2:
        raise FailedWork(f"{name}: out of memory")
    if result < 0:
        raise BadRequest(f"{name} has no kernel for these sizes")


# Measuring --------------------------------------------------------------------------------------


def probe(refresh: bool = False) -> Device:
    """This CPU with its measured speeds, from the cache file unless `refresh`.

    The first call takes a few seconds and reads at most a quarter of the free memory.
    """
    facts = cpu_facts()
    stored = {} if refresh else remembered(_FILE)
    with suppress(KeyError, TypeError, BadRequest):
        return with_memory_now(Device.from_dict(stored[machine_key(facts)]))
    library()
    device = _measured_elsewhere()
    remember(_FILE, machine_key(facts), device.to_dict())
    return device


def measure(facts: Device) -> Device:
    """`facts` with bandwidth and peaks measured here and now."""
    native = library()
    size = max(BUFFER, 4 * (facts.cache("L3") or 0))
    size = max(min(size, facts.memory_available // 4), 64 << 20)
    bandwidth = tuple(
        (threads, _speed(native.oc_read_bandwidth(size, threads, SECONDS), "read bandwidth"))
        for threads in thread_counts(facts.cores)
    )
    peaks = tuple(
        (dtype, _speed(native.oc_peak(CODES[dtype], facts.cores, SECONDS), f"peak {dtype}"))
        for dtype in PEAKS
    )
    units = tuple((dtype, native.oc_peak_unit(CODES[dtype]).decode()) for dtype in PEAKS)
    return replace(facts, read_bandwidth=bandwidth, peaks=peaks, units=units, measured=True)


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4 ... and all cores: at most six, and of the powers of two the largest."""
    powers = [1 << i for i in range(1, cores.bit_length()) if 1 << i < cores]
    return sorted({1, *powers[-4:], cores})


def _speed(value: float, what: str) -> float:
    if value <= 0:
        raise FailedWork(f"{what} could not be measured", seen=f"the native library said {value:g}")
    return value


def _measured_elsewhere() -> Device:
    """`measure` in a child process; see the top of this file."""
    try:
        return Device.from_dict(elsewhere("onecard.kernels.cpu", 300))
    except BadRequest as error:
        raise FailedWork("this CPU could not be measured", seen=str(error)) from error


def elsewhere(module: str, seconds: float, *arguments: str) -> Any:
    """The JSON that a module prints when it is run, in a process of its own. Raises FailedWork."""
    source = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    try:
        child = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True, text=True, timeout=seconds, check=True,
        )  # fmt: skip
        return json.loads(child.stdout)
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
        raise FailedWork("this CPU could not be measured", seen=last) from error
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise FailedWork("this CPU could not be measured", seen=str(error)) from error


# What was measured is kept in small files of the user's cache folder ------------------------------

_FILE = "device.json"


def _cache_file(name: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "onecard" / name


def machine_key(facts: Device) -> str:
    """What a measurement depends on; a home folder may be shared between machines."""
    try:
        version = metadata.version("onecard")
    except metadata.PackageNotFoundError:
        version = "source"
    return f"{facts.name}, {facts.cores} cores, {' '.join(facts.features)}, onecard {version}"


_unwritten: dict[str, dict[str, Any]] = {}
"""What no cache folder takes, file by file: it is kept for this process alone."""


def remembered(name: str) -> dict[str, Any]:
    """Everything in a file; nothing if there is none or it was damaged."""
    try:
        stored = json.loads(_cache_file(name).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, RecursionError):
        stored = None
    return (stored if isinstance(stored, dict) else {}) | _unwritten.get(_place(name), {})


def remember(name: str, key: str, value: Any) -> bool:
    """Keeps a value for the next time, where the cache folder lets us, else for this process; says which."""
    text = json.dumps(remembered(name) | {key: value}, indent=1)
    with suppress(OSError, RuntimeError):
        path = _cache_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        return True
    _unwritten.setdefault(_place(name), {})[key] = value
    return False


def _place(name: str) -> str:
    """Where a file would lie."""
    try:
        return str(_cache_file(name))
    except RuntimeError:  # there is no home
        return name


def forget(name: str) -> None:
    """What a file holds is measured anew when it is next asked for."""
    _unwritten.pop(_place(name), None)
    with suppress(OSError, RuntimeError):
        _cache_file(name).unlink(missing_ok=True)


# Cards, and the report of it all ----------------------------------------------------------------


def gpus() -> tuple[Device, ...]:
    """What nvidia-smi, where there is one, tells about the cards."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ()
    command = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(_gpus(told.stdout))


def _gpus(table: str) -> Iterator[Device]:
    for line in table.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 3:
            continue
        name, memory, driver = parts
        size = 0
        with suppress(BadRequest):  # cards that share the host's memory say [N/A]
            size = parse_size(memory)
        yield Device(name, kind="cuda", features=(f"driver {driver}",), memory_bytes=size)


def device_report(device: Device, where: str = "cpu") -> Report:
    """Every known fact and speed of a device as rows."""
    rows = [Row(where, "name", device.name)]
    if device.kind == "cpu":
        rows.append(Row(where, "cores", device.cores))
    rows.append(Row(where, "features", " ".join(device.features)))
    for what in ("memory_bytes", "memory_available"):
        if getattr(device, what):
            rows.append(Row(where, what, getattr(device, what), "B"))
    rows += [Row(where, f"cache_{level}", size, "B") for level, size in device.caches]
    for threads, rate in device.read_bandwidth:
        place = f"{where}, {threads} thread{'s' if threads > 1 else ''}"
        rows.append(Row(place, "read_bandwidth", rate, "B/s"))
    rows += [Row(where, f"peak_{dtype}", rate, "1/s") for dtype, rate in device.peaks]
    rows += [Row(where, f"unit_{dtype}", unit) for dtype, unit in device.units]
    return Report(tuple(rows), environment(), title=device.name)


def info(refresh: bool = False) -> Report:
    """This machine: the CPU, measured where the native library is there, and the cards."""
    notes: tuple[tuple[str, str], ...] = ()
    try:
        report = device_report(probe(refresh))
        report = report.with_rows(
            Row("cpu", "native_class", isa()), Row("cpu", "native_classes", " ".join(isas()))
        )
    except (BadRequest, FailedWork) as problem:
        report = device_report(cpu_facts())
        notes = (("not measured", str(problem)),)
    for index, gpu in enumerate(gpus()):
        report = report.with_rows(*device_report(gpu, f"gpu {index}").rows)
    return replace(report, notes=notes)


if __name__ == "__main__":
    print(json.dumps(measure(cpu_facts()).to_dict()))
