"""Device: the facts about what computes, as plain numbers that can be probed, typed in, or faked.

Facts are read here from what the system says (/proc, /sys; `root` may be a folder that imitates
them); speeds are measured elsewhere and filled in (kernels/cpu.py). A device that was not measured
has `measured = False` and no speeds. Limits that a container sets (cgroups of both versions, CPU
affinity) are respected: memory and cores are what this process may use, not what the board carries.

Sizes are bytes, speeds bytes or operations per second; a multiply-add is two operations.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onecard.core.errors import BadRequest, nearest
from onecard.core.settings import parse_size

ROOT = Path("/")

# What the kernel calls it -> the name used here: x86 `flags`, then Arm `Features`.
FEATURES = {
    "avx2": "avx2", "fma": "fma", "f16c": "f16c", "avx_vnni": "avx_vnni", "avx512f": "avx512f",
    "avx512bw": "avx512bw", "avx512_vnni": "avx512_vnni", "avx512vbmi": "avx512_vbmi",
    "avx512_vbmi2": "avx512_vbmi2", "avx512_bf16": "avx512_bf16", "avx512_fp16": "avx512_fp16",
    "amx_tile": "amx_tile", "amx_int8": "amx_int8", "amx_bf16": "amx_bf16",
    "asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16",
    "sve": "sve", "sve2": "sve2",
}  # fmt: skip


KINDS = ("cpu", "cuda", "rocm", "unified", "npu", "tpu", "fpga")


@dataclass(frozen=True)
class Device:
    """One processor or card.

    Pairs: `caches` (level, bytes of one data cache), `read_bandwidth` (threads, bytes/s), `peaks`
    (dtype, operations/s), `units` (dtype, what computes it).
    """

    name: str
    kind: str = "cpu"
    cores: int = 1
    features: tuple[str, ...] = ()
    memory_bytes: int = 0
    memory_available: int = 0
    caches: tuple[tuple[str, int], ...] = ()
    read_bandwidth: tuple[tuple[int, float], ...] = ()
    peaks: tuple[tuple[str, float], ...] = ()
    units: tuple[tuple[str, str], ...] = ()
    measured: bool = False

    def bandwidth(self, threads: int | None = None) -> float | None:
        """Best bytes/s with at most `threads` threads (None: any number); None if not measured."""
        known = [rate for count, rate in self.read_bandwidth if threads is None or count <= threads]
        return max(known, default=None)

    def peak(self, dtype: str) -> float | None:
        """Operations/s for 'int8', 'int4' (that of int8 where no other is known), 'bf16' or 'fp32'; None if
        not known."""
        known = dict(self.peaks)
        return known.get(dtype, known.get("int8") if dtype == "int4" else None)

    def cache(self, level: str) -> int | None:
        """Bytes of one 'L1d', 'L2' or 'L3' cache; None if there is none or it is not known."""
        return dict(self.caches).get(level)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; pairs become mappings."""
        values = dataclasses.asdict(self)
        for name in _PAIRS:
            values[name] = {str(key): value for key, value in values[name]}
        return values | {"features": list(self.features)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Device:
        """The device that `to_dict` wrote or a person typed (sizes may be '16GiB').

        Raises BadRequest that names the first field that is unknown or makes no sense.
        """
        fields = [field.name for field in dataclasses.fields(Device)]
        for key in values:
            if key not in fields:
                raise BadRequest(f"a device has no field {key!r}", do=nearest(str(key), fields))
        if "name" not in values:
            raise BadRequest("a device needs a name", do="name: ...")
        return Device(**{key: _read(key, value) for key, value in values.items()})


def cpu_facts(root: Path = ROOT) -> Device:
    """What the system tells about this machine's processor; nothing is measured."""
    info = _cpuinfo(root)
    flags = (info.get("flags") or info.get("Features") or "").split()
    return Device(
        name=_cpu_name(info, root),
        cores=usable_cores(root),
        features=tuple(name for flag, name in FEATURES.items() if flag in flags),
        memory_bytes=total_memory(root),
        memory_available=available_memory(root),
        caches=tuple(_caches(root)),
    )


def with_memory_now(device: Device) -> Device:
    """The same CPU with this moment's memory; the rest of a stored device does not age."""
    return replace(device, memory_bytes=total_memory(), memory_available=available_memory())


def usable_cores(root: Path = ROOT) -> int:
    """Logical processors this process may keep busy: affinity, then the cgroup's quota."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for folder in _cgroups(root, "cpu"):
        quota = _text(folder / "cpu.max").split()
        if not quota:
            quota = [_text(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period")]
        if len(quota) == 2 and all(part.isdigit() and int(part) for part in quota):
            count = min(count, math.ceil(int(quota[0]) / int(quota[1])))
    return max(count, 1)


def total_memory(root: Path = ROOT) -> int:
    """Bytes of memory, or the smallest cgroup limit above this process."""
    limits = [limit for limit, _ in _memory_limits(root)]
    return min([_meminfo(root).get("MemTotal") or _pages("SC_PHYS_PAGES"), *limits])


def available_memory(root: Path = ROOT) -> int:
    """Bytes that can still be taken without swapping, within every cgroup limit."""
    free = [max(limit - used, 0) for limit, used in _memory_limits(root)]
    return min([_meminfo(root).get("MemAvailable") or _pages("SC_AVPHYS_PAGES"), *free])


def resident_peak(root: Path = ROOT) -> int:
    """The most bytes of memory this process ever held at once."""
    match = re.search(r"VmHWM:\s*(\d+) kB", _text(root / "proc/self/status"))
    if match:
        return int(match[1]) * 1024
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Reading ---------------------------------------------------------------------------------------


def resident(root: Path = ROOT) -> int:
    """Resident memory of this process now, in bytes (its peak where the system does not tell)."""
    match = re.search(r"VmRSS:\s*(\d+) kB", _text(root / "proc/self/status"))
    return int(match[1]) * 1024 if match else resident_peak(root)


def _text(path: Path) -> str:
    """A file's text, empty where it cannot be read: half of these exist on any one machine."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    block = _text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_name(info: Mapping[str, str], root: Path) -> str:
    board = _text(root / "proc/device-tree/model").strip("\0 \n")
    part = " ".join(filter(None, (info.get("CPU implementer"), info.get("CPU part"))))
    return info.get("model name") or board or part or platform.processor() or platform.machine()


def _caches(root: Path) -> Iterator[tuple[str, int]]:
    for folder in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind, level = _text(folder / "type").strip(), _text(folder / "level").strip()
        size = re.fullmatch(r"(\d+)([KMG])", _text(folder / "size").strip())
        if size and kind in ("Data", "Unified"):
            yield f"L{level}d" if kind == "Data" else f"L{level}", parse_size(size[0])


def _meminfo(root: Path) -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}


def _pages(name: str) -> int:
    """For systems without /proc: all memory where the free part is not told."""
    names = os.sysconf_names if hasattr(os, "sysconf_names") else {}
    known = next((n for n in (name, "SC_PHYS_PAGES") if n in names), None)
    return os.sysconf(known) * os.sysconf("SC_PAGE_SIZE") if known else 0


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's cgroup folders and their ancestors: version 2, a version 1 controller."""
    top = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = top / controllers if controllers else top
        folder = base / path.strip("/")
        yield folder
        yield from (above for above in folder.parents if above.is_relative_to(base))


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of every cgroup that has a limit."""
    for folder in _cgroups(root, "memory"):
        for limit, used, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            bound, taken = _text(folder / limit).strip(), _text(folder / used).strip()
            if bound.isdigit() and int(bound) < 2**60:  # version 1 says "none" with 2**63
                stat = re.search(rf"^{cache} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
                dropped = int(stat[1]) if stat else 0
                yield int(bound), (int(taken) if taken.isdigit() else 0) - dropped


# From plain values -----------------------------------------------------------------------------


def _positive(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise ValueError("a positive number is needed")
    return number


def _one_of(*options: Any) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in options:
            raise ValueError(f"it is one of {', '.join(map(repr, options))}")
        return value

    return check


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError("a whole number above zero is needed")
    return value


def _size(value: Any) -> int:
    return 0 if value == 0 else parse_size(value)


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise ValueError("a list of names is needed")
    return tuple(value)


_PAIRS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "caches": (str, parse_size), "read_bandwidth": (int, _positive), "peaks": (str, _positive),
    "units": (str, str),
}  # fmt: skip
_FIELDS: dict[str, Callable[[Any], Any]] = {
    "name": str, "kind": _one_of(*KINDS), "cores": _count, "features": _names,
    "memory_bytes": _size, "memory_available": _size, "measured": _one_of(True, False),
}  # fmt: skip


def _read(key: str, value: Any) -> Any:
    """One field's value; the tables above say what each accepts."""
    try:
        if key in _PAIRS:
            name, number = _PAIRS[key]
            return tuple((name(k), number(v)) for k, v in dict(value).items())
        return _FIELDS[key](value)
    except (TypeError, ValueError, BadRequest) as error:
        raise BadRequest(f"a device's {key} cannot be {value!r}", str(error),
                         "write it as Device.to_dict does") from error  # fmt: skip
