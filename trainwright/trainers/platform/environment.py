"""The environment that a run gets before torch is imported, which is when libraries read it. No torch here."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.platform.graph_cache import make_own_folder, own_folder, sharing
from trainwright.trainers.platform.presets import PRESETS, ROUNDS, STALE

DEVICE_FILES = {
    "neuron": "neuron[0-9]*",
    "cuda": "nvidia[0-9]*",
}  # below /dev, in the order that they are looked for
DEV = Path("/dev")

_given: dict[str, str] = {}  # by this process, to the last run of a --multirun


class Applied(NamedTuple):
    """What became of a device's preset, by name: given; kept: what the user had set otherwise."""

    device: str
    given: dict[str, str]
    kept: dict[str, str]


def device_of(platform: str) -> str:
    """The device of a recipe's `platform`; for `auto` the one whose files are here."""
    if platform != "auto":
        return platform
    return next((name for name, files in DEVICE_FILES.items() if any(DEV.glob(files))), "cpu")


@contextmanager
def environment_of(recipe: Recipe) -> Iterator[None]:
    """Give this process the environment of its device, let rank 0 say so, and share what it compiles.

    Raises:
        BadRequest: environment and recipe contradict each other, or a folder can't be used.
    """
    applied = apply(recipe)
    if os.environ.get("RANK", "0") == "0":
        for line in said(applied):
            print(line, flush=True)
        for warning in stale(applied.device):
            print(f"trainwright: {warning}", file=sys.stderr, flush=True)
    folders = {v.shared: applied.given.get(v.name) for v in PRESETS[applied.device] if v.shared}
    with sharing(recipe, {name: own for name, own in folders.items() if own}):
        yield


def apply(recipe: Recipe) -> Applied:
    """Set each variable of the preset that isn't set; what an earlier run of this process got is taken back.

    Raises:
        BadRequest: the device would round as the recipe doesn't say, or an earlier run's variable was read for
            good, or the folder for what is compiled is another user's.
    """
    device = device_of(recipe.platform)
    applied, earlier = Applied(device, {}, {}), _take_back()
    for variable in PRESETS[device]:
        name, value = variable.name, variable.value(recipe)
        if variable.lasts and name in earlier and value != earlier[name]:
            raise BadRequest(
                f"{name}={earlier[name]} of an earlier run stays in this process: give each run of the sweep a "
                "process of its own"
            )
        if value is None:
            continue
        if name not in os.environ:
            os.environ[name] = _given[name] = value
        there = os.environ[name]
        if _given.get(name) == there:
            applied.given[name] = there
        elif there != value:
            applied.kept[name] = there
    if device == "neuron" and recipe.precision.rounding != "hardware" and os.environ.get(ROUNDS) == "1":
        raise BadRequest(
            f"{ROUNDS}=1 in the environment rounds by chance wherever the device rounds: unset it, or use "
            "precision=bf16_sr precision.rounding=hardware"
        )
    if any(Path(value).is_relative_to(own_folder()) for value in applied.given.values()):
        make_own_folder()
    return applied


def _take_back() -> dict[str, str]:
    """Unset what an earlier run of this process was given, unless somebody has changed it since."""
    earlier = {name: value for name, value in _given.items() if os.environ.get(name) == value}
    for name in earlier:
        del os.environ[name]
    _given.clear()
    return earlier


def said(applied: Applied) -> Iterator[str]:
    """A line of what was given and what was kept; none where nothing was."""
    parts = {"given": applied.given, "kept": applied.kept}
    texts = [
        f'{key}="{" ".join(f"{name}={value}" for name, value in pairs.items())}"'
        for key, pairs in parts.items()
        if pairs
    ]
    if texts:
        yield f"environment={applied.device} {' '.join(texts)}"


def stale(device: str) -> Iterator[str]:
    """A warning for each variable of the environment that does nothing on the device."""
    for name, since, why, word in STALE[device]:
        if name in os.environ and (word is None or word in os.environ[name]):
            of_it = "" if word is None else f"{word} of "
            yield f"{of_it}{name} in the environment does nothing since Neuron {since}: {why}"


def in_force(platform: str) -> dict[str, str]:
    """What the environment says now under the names of the device's preset, for config.yaml."""
    names = [variable.name for variable in PRESETS[device_of(platform)]]
    return {name: os.environ[name] for name in names if name in os.environ}
