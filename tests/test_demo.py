"""`onecard demo`: the shipped model in a third of its bytes at 99 %, and a page about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.load import load_model
from onecard.checkpoint.source import Source
from onecard.cli import main
from onecard.demo import PART, QUALITY, request
from onecard.fit.result import read_fit


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in Source(folder).checkpoint.files)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves, run as a user would, with nothing remembered from before."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        with pytest.raises(SystemExit) as ended:
            main(["demo", str(folder / "out")])
    assert ended.value.code == 0
    return folder / "out"


def test_it_is_a_third_and_keeps_99_percent(out: Path) -> None:
    """Measured after the fact, in the files and by the gates, not as planned."""
    assert weights(out) <= weights(SHIPPED) // PART
    result = read_fit(out)
    assert result.kept and all(promise.kept is not False for promise in result.promises)
    (kept,) = (p.measured for p in result.promises if p.what == "likelihood")
    assert kept is not None and QUALITY <= kept <= 1
    assert load_model(out).parameters > 7e6


def test_it_leaves_a_page(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    assert (
        "likelihood" in page
        and "<svg" in page
        and "http://" not in page.replace("http://www.w3.org", "")
    )


def test_it_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(SystemExit) as ended:
        main(["demo", str(tmp_path), "--force"])
    assert ended.value.code == 2 and "not empty" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_the_budget_is_of_the_model_itself() -> None:
    goal = request(Path("x")).goal
    assert goal.size == weights(SHIPPED) // PART and goal.quality == QUALITY
