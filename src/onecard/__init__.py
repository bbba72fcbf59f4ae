"""onecard makes a large model fit and run fast on the one card, or the one CPU, that a person has.

The public names, loaded when they are first used so that `import onecard` costs nothing. Evaluation is
in `onecard.evaluate`: `evaluate`, `choose`, `Reading`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Recipe": "onecard.passes.base",
    "Report": "onecard.core.report",
    "apply": "onecard.passes.walked",
    "compress": "onecard.passes.job",
    "find_recipe": "onecard.passes",
    "fit_model": "onecard.fitting",
    "load_model": "onecard.checkpoint.load",
    "prepare": "onecard.passes.job",
    "save_model": "onecard.checkpoint.save",
}
__all__ = [*_WHERE, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"onecard has no {name!r}; it has {', '.join(sorted(_WHERE))}")
    return getattr(importlib.import_module(_WHERE[name]), name)
