"""`onecard fit` from Python: one call from budgets to a model that keeps them, with its proof.

from onecard import fit_model
result = fit_model("demo", "small", size="5MiB", quality=0.99)
print(result.answer, result.kept)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onecard.calibrate.walk import Progress
from onecard.fit.fit import fit
from onecard.fit.goal import goal_of
from onecard.fit.job import Quiet, Request, prepare
from onecard.fit.result import FitResult


def fit_model(
    model: str, out: str | Path, *, memory: str | int | None = None, size: str | int | None = None,
    calibration: Path | None = None, held_out: Path | None = None, task: Path | None = None,
    cap: int | None = None, force: bool = False, progress: Progress = Quiet, **goal: Any,
) -> FitResult:  # fmt: skip
    """Fit `model` into the folder `out`. Sizes as people write them; `goal` as the fields of fit.goal.Goal.

    The result lies in `out` whatever the gates say: look at `kept`. Raises BadRequest where the budgets
    cannot be kept in any format, before anything is written.
    """
    wanted = goal_of(memory, size, **goal)
    request = Request(model, Path(out), wanted, calibration, held_out, cap, force, task)
    return fit(prepare(request), progress)
