"""Writing what a plan leaves."""

import os
from collections.abc import Mapping
from pathlib import Path

from trainwright.errors import BadRequest


def write(folder: str, texts: Mapping[str, str]) -> Path:
    """Write each text under its name into `plan.dir`, whole or not at all, and return that folder.

    Raises:
        BadRequest: it can't be written to.
    """
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            fresh = place / f"{name}.new"
            fresh.write_text(text, encoding="utf-8")
            os.replace(fresh, place / name)
    except OSError as error:
        raise BadRequest(f"plan.dir={place} can't be written to ({error}): name another folder") from error
    return place
