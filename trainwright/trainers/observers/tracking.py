"""What the experiment trackers share: an optional package, a run's id, a recipe as flat parameters."""

import hashlib
import importlib
import re
from collections.abc import Mapping
from typing import Any

from trainwright.errors import BadRequest


def tracker(package: str) -> Any:
    """The module `package`, imported only where monitor.`package` asks for it.

    Raises:
        BadRequest: it isn't installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise BadRequest(
            f"monitor.{package}=true needs the package {error.name}: pip install 'trainwright[track]'"
        ) from error


def run_id(name: str) -> str:
    """The id that a run of this name always has: within W&B's 64 characters of a narrow alphabet."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', name)[:48]}-{digest}"


def flat(section: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested sections as dotted keys, as on the command line: `optim.lr`."""
    pairs: dict[str, object] = {}
    for key, value in section.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return pairs
