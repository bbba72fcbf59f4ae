"""What `onecard demo` fits: the shipped model, into a third of its weight files, at 99 % of its likelihood.

An ordinary fit (onecard.fit) with nothing special about it but that model, texts and budgets are at hand.
"""

from __future__ import annotations

from pathlib import Path

from onecard.checkpoint.hub import SHIPPED
from onecard.checkpoint.source import Source
from onecard.core.errors import BadRequest
from onecard.fit.goal import Goal
from onecard.fit.job import Request

PART, QUALITY, CONTEXT = 3, 0.99, 512


def shipped(out: Path, force: bool = False) -> Request:
    """The request of the demo. Raises BadRequest where the installation has no shipped model."""
    if not (SHIPPED / "config.json").is_file():
        raise BadRequest(
            "the shipped model is missing from this installation", do="reinstall onecard"
        )
    size = sum(path.stat().st_size for path in Source(SHIPPED).checkpoint.files) // PART
    return Request(
        "demo", out, Goal(size=size, quality=QUALITY, context=CONTEXT, effort="quick"), force=force
    )
