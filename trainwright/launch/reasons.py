"""Where a platform looks for the reason of a failed run."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Place(NamedTuple):
    """A file that a platform reads.

    moved_by: the variable that names another file. only_with: a variable that only this platform sets.
    made: whether the platform makes the file, not just its folder. limit: how many bytes of it are read.
    """

    path: str
    moved_by: str
    only_with: str | None
    made: bool
    limit: int


PLACES = (
    Place("/opt/ml/output/failure", "SM_OUTPUT_FAILURE", None, False, 1024),  # SageMaker: FailureReason
    # Kubernetes: the pod's terminationMessagePath, which it doesn't tell the container
    Place("/dev/termination-log", "TERMINATION_MESSAGE_PATH", "KUBERNETES_SERVICE_HOST", True, 4096),
)


def tell_platforms(reason: str, environment: Mapping[str, str] = os.environ) -> None:
    """Write `reason` wherever a platform that is there reads it."""
    for place in PLACES:
        path = Path(environment.get(place.moved_by, place.path))
        there = path if place.made else path.parent
        if there.exists() and (place.only_with is None or place.only_with in environment):
            with suppress(OSError):  # the exit status still tells
                path.write_text(reason.encode()[: place.limit].decode(errors="ignore"))
