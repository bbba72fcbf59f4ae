"""What a machine likes best is measured once, remembered, and never trusted blindly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from onecard.core.errors import BadRequest, FailedWork
from onecard.kernels import cpu, tune
from onecard.kernels.tune import Tuning

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native library is not built")


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ONECARD_TUNE", raising=False)
    monkeypatch.delenv("ONECARD_ISA", raising=False)
    before = cpu.isa()
    yield
    cpu.prefer_isa(before)
    cpu.library().oc_reach(*tune.REACHES[0])


def other() -> Tuning:
    return Tuning(tune.candidates()[-1], *tune.REACHES[-1])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts measurements, which all say the same."""
    calls: list[str] = []

    def elsewhere(module: str, seconds: float) -> Any:
        calls.append(module)
        return asdict(other())

    monkeypatch.setattr(cpu, "elsewhere", elsewhere)
    return calls


def test_measured_once(measured: list[str], tmp_path: Path) -> None:
    for _ in range(3):
        tune.apply()
    assert len(measured) == 1 and cpu.isa() == other().isa
    (kept,) = json.loads((tmp_path / "onecard" / tune.FILE).read_text()).values()
    assert kept == asdict(other())
    tune.apply(refresh=True)
    assert len(measured) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"KEY": 1}', '{"KEY": {"isa": "amx", "near": 1}}',
     '{"KEY": {"isa": "no", "near": 8192, "far": 12288}}',
     '{"KEY": {"isa": ["avx2"], "near": 8192, "far": 12288}}',
     '{"KEY": {"isa": "avx2", "near": -5, "far": 1e99}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(text: str, measured: list[str], tmp_path: Path) -> None:
    tune.apply()
    path = tmp_path / "onecard" / tune.FILE
    (key,) = json.loads(path.read_text())
    path.write_text(text.replace("KEY", key))
    tune.apply()
    assert len(measured) == 2
    assert json.loads(path.read_text())[key] == asdict(other())


def test_nothing_is_measured_that_cannot_be_kept(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = cpu.isa()
    tune.apply()
    assert not measured and cpu.isa() == before


def test_a_measurement_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: str, seconds: float) -> Any:
        raise FailedWork("this CPU could not be measured")

    monkeypatch.setattr(cpu, "elsewhere", fails)
    before = cpu.isa()
    tune.apply()
    assert cpu.isa() == before


def test_a_class_is_named(measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONECARD_ISA", "plain")
    tune.apply()
    assert cpu.isa() == "plain"
    monkeypatch.setenv("ONECARD_ISA", "avx3")
    with pytest.raises(BadRequest, match="ONECARD_ISA"):
        tune.apply()
    monkeypatch.delenv("ONECARD_ISA")
    monkeypatch.setenv("ONECARD_TUNE", "off")
    count = len(measured)
    tune.apply()
    assert len(measured) == count


def test_a_forced_class_stays(measured: list[str]) -> None:
    cpu.force_isa("plain")
    tune.apply()
    assert cpu.isa() == "plain"
    cpu.force_isa(None)
    assert cpu.isa() == other().isa


def test_the_first_wins_unless_another_is_clearly_faster() -> None:
    times = {"a": 1.0, "b": 1.0 - tune.MARGIN / 2, "c": 1.1}
    assert tune.fastest("abc", times.__getitem__) == "a"
    times["c"] = 1.0 - 2 * tune.MARGIN
    assert tune.fastest("abc", times.__getitem__) == "c"


def test_several_processes_at_once(tmp_path: Path) -> None:
    code = "from onecard.kernels import tune; tune.apply(); print('done')"
    source = str(Path(tune.__file__).parents[2])
    at_once = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                         env=os.environ | {"PYTHONPATH": source})
        for _ in range(3)
    ]  # fmt: skip
    assert [process.communicate(timeout=60)[0].strip() for process in at_once] == ["done"] * 3
    (kept,) = json.loads((tmp_path / "onecard" / tune.FILE).read_text()).values()
    assert Tuning.read(kept)
