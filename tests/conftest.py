"""Where the tests find real data, and small models made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("ONECARD_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def data() -> Path:
    """The folder of real data; tests that need it are skipped, with a message, where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}: set ONECARD_DATA to its folder")
    return DATA


@pytest.fixture
def stories(data: Path) -> Path:
    """A trained Llama of 264 k parameters."""
    return data / "stories260K"
