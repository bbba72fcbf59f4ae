"""Devices: fakes, facts read from imitated /proc and /sys, the cache of measurements."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from onecard.core.device import (
    Device,
    available_memory,
    cpu_facts,
    resident_peak,
    total_memory,
    usable_cores,
)
from onecard.core.errors import BadRequest
from onecard.kernels import cpu

FAKE = Device(
    name="imagined", cores=4, features=("avx2", "fma"),
    memory_bytes=8 << 30, memory_available=6 << 30, caches=(("L1d", 32768), ("L2", 1 << 20)),
    read_bandwidth=((1, 10e9), (4, 31.5e9)), peaks=(("int8", 2e12), ("fp32", 3e11)),
    units=(("int8", "magic"),), measured=True,
)  # fmt: skip

XEON = """processor\t: 0
model name\t: A Xeon
flags\t\t: fpu sse2 avx2 fma avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Another
"""
ARM = """processor\t: 0
Features\t: fp asimd asimddp i8mm bf16 sve
CPU implementer\t: 0x41
CPU part\t: 0xd40
"""


def imitate(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


# Facts ------------------------------------------------------------------------------------------


def test_a_fake_survives_json() -> None:
    assert Device.from_dict(json.loads(json.dumps(FAKE.to_dict()))) == FAKE
    assert Device.from_dict(Device("bare").to_dict()) == Device("bare")


def test_a_device_can_be_typed_in() -> None:
    device = Device.from_dict({"name": "board", "memory_bytes": "8GiB", "peaks": {"int8": 1e12}})
    assert device.peak("int4") == device.peak("int8") == 1e12 and device.peak("bf16") is None
    assert device.memory_bytes == 8 << 30 and device.peak("int8") == 1e12


@pytest.mark.parametrize(
    "values",
    [
        {}, {"name": "x", "core": 2}, {"name": "x", "cores": 0}, {"name": "x", "cores": True},
        {"name": "x", "kind": "abacus"}, {"name": "x", "memory_bytes": "lots"},
        {"name": "x", "peaks": {"int8": "fast"}}, {"name": "x", "peaks": {"int8": -1}},
        {"name": "x", "peaks": 7}, {"name": "x", "read_bandwidth": {"one": 1e9}},
        {"name": "x", "features": "avx2"}, {"name": "x", "caches": {"L2": []}},
        {"name": "x", "peaks": {"int8": float("inf")}}, {"name": "x", "features": [1]},
    ],
)  # fmt: skip
def test_nonsense_is_refused(values: dict) -> None:
    with pytest.raises(BadRequest, match="device"):
        Device.from_dict(values)


def test_questions() -> None:
    assert FAKE.bandwidth() == 31.5e9 and FAKE.bandwidth(3) == 10e9
    assert FAKE.peak("bf16") is None and FAKE.cache("L3") is None
    assert Device("bare").bandwidth() is None


def test_facts_of_an_imitated_xeon(tmp_path: Path) -> None:
    cache = "sys/devices/system/cpu/cpu0/cache/index"
    root = imitate(
        tmp_path,
        {
            "proc/cpuinfo": XEON,
            "proc/meminfo": "MemTotal:  16000 kB\nMemAvailable:  9000 kB\n",
            f"{cache}0/level": "1\n", f"{cache}0/type": "Data\n", f"{cache}0/size": "48K\n",
            f"{cache}1/level": "1\n", f"{cache}1/type": "Instruction\n", f"{cache}1/size": "32K\n",
            f"{cache}2/level": "2\n", f"{cache}2/type": "Unified\n", f"{cache}2/size": "2M\n",
        },
    )  # fmt: skip
    facts = cpu_facts(root)
    assert facts.name == "A Xeon" and not facts.measured
    assert facts.features == ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8")
    assert facts.caches == (("L1d", 48 << 10), ("L2", 2 << 20))
    assert (facts.memory_bytes, facts.memory_available) == (16000 << 10, 9000 << 10)


def test_facts_of_an_imitated_arm_board(tmp_path: Path) -> None:
    facts = cpu_facts(imitate(tmp_path, {"proc/cpuinfo": ARM}))
    assert facts.name == "0x41 0xd40"
    assert facts.features == ("neon", "dotprod", "i8mm", "bf16", "sve")
    imitate(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5\0"})
    assert cpu_facts(tmp_path).name == "Raspberry Pi 5"


def test_nothing_to_read_is_not_an_error(tmp_path: Path) -> None:
    facts = cpu_facts(tmp_path)
    assert facts.cores >= 1 and facts.features == () and facts.caches == ()


MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\n"


def test_limits_of_cgroup_version_2(tmp_path: Path) -> None:
    root = imitate(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/user/job\n",
            "sys/fs/cgroup/user/memory.max": "1000000\n",
            "sys/fs/cgroup/user/memory.current": "800000\n",
            "sys/fs/cgroup/user/memory.stat": "anon 5\ninactive_file 300000\n",
            "sys/fs/cgroup/user/job/memory.max": "max\n",
            "sys/fs/cgroup/user/cpu.max": "max 100000\n",
            "sys/fs/cgroup/user/job/cpu.max": "50000 100000\n",
        },
    )
    assert total_memory(root) == 1_000_000
    assert available_memory(root) == 500_000
    assert usable_cores(root) == 1


def test_limits_of_cgroup_version_1(tmp_path: Path) -> None:
    memory, cores = "sys/fs/cgroup/memory", "sys/fs/cgroup/cpu,cpuacct"
    root = imitate(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/elsewhere\n4:cpu,cpuacct:/elsewhere\n",
            f"{memory}/memory.limit_in_bytes": "2000000\n",
            f"{memory}/memory.usage_in_bytes": "2500000\n",
            f"{cores}/cpu.cfs_quota_us": "-1\n",
            f"{cores}/cpu.cfs_period_us": "100000\n",
        },
    )
    assert total_memory(root) == 2_000_000
    assert available_memory(root) == 0
    assert usable_cores(root) == usable_cores(tmp_path / "nothing")
    imitate(root, {f"{memory}/memory.limit_in_bytes": "9223372036854771712\n"})
    assert total_memory(root) == 8_000_000 << 10


def test_memory_of_this_process(tmp_path: Path) -> None:
    assert resident_peak() > 1 << 20
    assert resident_peak(tmp_path) > 1 << 20  # without /proc
    root = imitate(tmp_path, {"proc/self/status": "VmPeak:\t9 kB\nVmHWM:\t  2048 kB\n"})
    assert resident_peak(root) == 2048 << 10
    assert 0 < available_memory() <= total_memory()


# The cache of measurements ----------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Device]:
    """A cache folder of its own and a measurement that is quick and counted."""
    done: list[Device] = []

    def measure() -> Device:
        done.append(FAKE)
        return FAKE

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_measured_elsewhere", measure)
    monkeypatch.setattr(cpu, "library", lambda: None)
    return done


def test_a_measurement_is_kept(tmp_path: Path, measured: list[Device]) -> None:
    first, second = cpu.probe(), cpu.probe()
    assert len(measured) == 1
    assert first.peaks == second.peaks == FAKE.peaks and second.measured
    assert second.memory_bytes == total_memory(), "memory is read anew"
    assert [path.name for path in (tmp_path / "onecard").iterdir()] == ["device.json"]
    cpu.probe(refresh=True)
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0\xff", '{"KEY": 3}', '{"KEY": {}}'])
def test_a_damaged_cache_is_ignored(tmp_path: Path, measured: list[Device], text: str) -> None:
    file = tmp_path / "onecard" / "device.json"
    key = cpu.machine_key(cpu_facts())
    imitate(tmp_path, {"onecard/device.json": text.replace('"KEY"', json.dumps(key))})
    assert cpu.probe().peaks == FAKE.peaks and len(measured) == 1
    assert json.loads(file.read_text())[key]["name"] == "imagined"


def test_another_machine_keeps_its_entry(tmp_path: Path, measured: list[Device]) -> None:
    imitate(tmp_path, {"onecard/device.json": '{"another": {"name": "a"}}'})
    cpu.probe()
    assert len(json.loads((tmp_path / "onecard" / "device.json").read_text())) == 2


def test_no_place_for_the_cache(
    tmp_path: Path, measured: list[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cpu.probe().measured


def test_thread_counts() -> None:
    assert cpu.thread_counts(1) == [1]
    assert cpu.thread_counts(2) == [1, 2]
    assert cpu.thread_counts(6) == [1, 2, 4, 6]
    assert cpu.thread_counts(32) == [1, 2, 4, 8, 16, 32]
    assert cpu.thread_counts(96) == [1, 8, 16, 32, 64, 96]


# Cards and reports ------------------------------------------------------------------------------


def test_cards_from_the_tools_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = "Some Card, 81559 MiB, 550.54\nShared, [N/A], 580.1\nodd line\n"
    monkeypatch.setattr(cpu.shutil, "which", lambda name: f"/bin/{name}")
    answer = subprocess.CompletedProcess([], 0, stdout=table)
    monkeypatch.setattr(cpu.subprocess, "run", lambda *_, **__: answer)
    first, second = cpu.gpus()
    assert first == Device("Some Card", "cuda", 1, ("driver 550.54",), memory_bytes=81559 << 20)
    assert second.memory_bytes == 0

    def fails(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(cpu.subprocess, "run", fails)
    assert cpu.gpus() == ()


def test_report_names_every_speed() -> None:
    report = cpu.device_report(FAKE)
    assert report.value("read_bandwidth", "cpu, 1 thread") == 10e9
    assert report.value("read_bandwidth", "cpu, 4 threads") == 31.5e9
    assert report.value("peak_int8") == 2e12 and report.value("unit_int8") == "magic"


def test_info_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ONECARD_NATIVE", str(tmp_path / "absent.so"))
    monkeypatch.setattr(cpu, "library", cpu.library.__wrapped__)
    assert not cpu.available()
    report = cpu.info()
    assert report.value("cores") == usable_cores()
    assert "ONECARD_NATIVE names it" in report.notes[0][1]


@pytest.mark.skipif(not cpu.available(), reason="the native library is not built")
def test_a_real_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "SECONDS", 0.01)
    monkeypatch.setattr(cpu, "BUFFER", 1 << 22)
    facts = Device("here", cores=2, memory_available=1 << 28)
    device = cpu.measure(facts)
    assert device.measured and [dtype for dtype, _ in device.peaks] == list(cpu.PEAKS)
    assert [threads for threads, _ in device.read_bandwidth] == [1, 2]
    assert all(rate > 0 for _, rate in device.peaks + device.read_bandwidth)
