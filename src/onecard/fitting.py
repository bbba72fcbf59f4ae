"""A fit with its page, from Python as from the command line: from budgets to a folder with everything in it.

from onecard import fit_model
result = fit_model("demo", "small", size="5MiB", quality=0.99)
print(result.answer, result.kept)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.calibrate.walk import Progress
from onecard.core.report import Report, write_text
from onecard.fit.fit import fit
from onecard.fit.goal import bytes_of, goal_of
from onecard.fit.job import Job, Quiet, Request, prepare
from onecard.fit.result import FitResult
from onecard.render import fit_to_html


def fit_model(
    model: str | Path, out: str | Path, *, memory: str | float | None = None,
    size: str | float | None = None, calibration: str | Path | None = None,
    held_out: str | Path | None = None, task: str | Path | None = None, cap: str | float | None = None,
    force: bool = False, progress: Progress = Quiet, **goal: Any,
) -> FitResult:  # fmt: skip
    """Fit `model` into the folder `out`. Sizes as people write them; `goal` as the fields of fit.goal.Goal.

    The result lies in `out` whatever the gates say: look at `kept`. Raises BadRequest where the budgets
    cannot be kept in any format, before anything is written.
    """
    wanted = goal_of(memory, size, **goal)
    data, judged, asked = (
        None if text is None else Path(text).expanduser() for text in (calibration, held_out, task)
    )
    most = bytes_of("cap", cap)
    request = Request(str(model), Path(out), wanted, data, judged, most, force, asked)
    return fitted(prepare(request), progress)


def fitted(
    job: Job, progress: Progress = Quiet, warn: Callable[[str], None] = lambda text: None
) -> FitResult:  # fmt: skip
    """Carry a prepared fit out; its page lies in the folder with it."""
    return fit(job, progress, _page, warn=warn)


def _page(folder: Path, report: Report, result: FitResult) -> None:
    write_text(folder / "report.html", fit_to_html(result))
