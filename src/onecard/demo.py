"""What `onecard demo` fits: the shipped model, into a third of its weight files, at 99 % of its likelihood.

An ordinary fit (onecard.fit) with nothing special about it but that model, texts and budgets are at hand.
"""

from __future__ import annotations

from pathlib import Path

from onecard.checkpoint.hub import shipped
from onecard.checkpoint.source import Source
from onecard.fit.goal import Goal
from onecard.fit.job import Request
from onecard.passes.job import file_bytes

PART, QUALITY, CONTEXT = 3, 0.99, 512


def request(out: Path, force: bool = False) -> Request:
    """What the demo asks for. Raises BadRequest where the installation has no shipped model."""
    size = file_bytes(Source(shipped()).checkpoint) // PART
    return Request(
        "demo", out, Goal(size=size, quality=QUALITY, context=CONTEXT, effort="quick"), force=force
    )
