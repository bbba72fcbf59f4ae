"""What a long job says of its time, where there is no terminal."""

from __future__ import annotations

import pytest

from onecard import terminal
from onecard.terminal import Progress


def said(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[float, int, int]]) -> list[str]:
    """The lines of a progress that is called with (seconds, done, total)."""
    clock = [0.0]
    lines: list[str] = []
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(terminal, "say", lines.append)
    progress = Progress("work")
    for clock[0], done, total in calls:
        progress(done, total, "part")
    return lines


def test_time_left_goes_by_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, [(0, 0, 4), (20, 1, 4)]) == ["work: part, 1 of 4, about 60 s left"]


def test_another_count_has_a_time_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, [(0, 0, 4), (100, 4, 4), (100, 0, 10), (120, 2, 10)])
    assert lines == ["work: part, 2 of 10, about 80 s left"]


def test_what_a_former_run_did_is_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, [(0, 8, 10), (30, 8, 10), (40, 9, 10)])
    assert lines == ["work: part, 9 of 10, about 40 s left"]
