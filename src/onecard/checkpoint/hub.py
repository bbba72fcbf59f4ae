"""Where a model lies: a folder, or a hub id fetched (once) through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from onecard.core.errors import BadRequest

WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "README.md")
SHIPPED = Path(__file__).parent.parent / "shipped" / "model"


def find_model(name: str | Path) -> Path:
    """The folder of MODEL: a path, `demo` for the shipped model, or a hub id such as `org/name`."""
    path = Path(name).expanduser()
    if path.is_dir() and str(name):
        return path
    if path.is_file():
        raise BadRequest(f"{path} is a file", do="give the folder that holds config.json")
    if str(name) == "demo" and SHIPPED.is_dir():
        return SHIPPED
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith((".", "/")):
        raise BadRequest(
            f"there is no folder {str(name)!r}", do="give a folder or a hub id such as org/name"
        )
    return _fetch(str(name))


def shipped() -> Path:
    """The folder of the shipped model. Raises BadRequest where the installation has none."""
    if not (SHIPPED / "config.json").is_file():
        raise BadRequest(
            "the shipped model is missing from this installation", do="reinstall onecard"
        )
    return SHIPPED


def called(name: str | Path) -> str:
    """What people call MODEL: the folder's own name, or `demo` or the hub id as it was given."""
    path = Path(name).expanduser()
    text = path.resolve().name if path.is_dir() else str(name)
    return text.encode("utf-8", "replace").decode("utf-8")


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise BadRequest(
            f"there is no folder {name}, and the hub's {name} could not be fetched",
            seen=str(error).strip().splitlines()[0][:200] if str(error).strip() else "",
            do=f"offline: download its {', '.join(WANTED[:2])} elsewhere and give their folder",
        ) from error
