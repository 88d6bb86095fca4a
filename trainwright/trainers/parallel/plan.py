"""Holding a sharding plan against its model."""

import re

from torch import nn

from trainwright.models.plan import Plan, Style, Units


def styles_of(model: nn.Module, plan: Plan, *, part: bool = False) -> dict[str, Style]:
    """The style of every module of `model` that has weights of its own, by its full name.

    part: `model` is a part of what the plan is for, which also names modules of other parts.

    Raises:
        ValueError: the plan misses a module with weights, or names one that isn't there.
    """
    patterns = {name: _regex(name) for name in plan}
    named = {
        name: module
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }
    styles: dict[str, Style] = {}
    for name in named:
        matching = [pattern for pattern, regex in patterns.items() if regex.match(name)]
        if not matching:
            raise ValueError(f"the sharding plan misses the module {name}")
        styles[name] = plan[matching[0]]
    for pattern, regex in patterns.items():
        if not part and not any(regex.match(name) for name in named):
            raise ValueError(f"the sharding plan names {pattern}, which the model doesn't have")
    return styles


def units_of(model: nn.Module, units: Units, *, part: bool = False) -> list[list[nn.Module]]:
    """The modules of each unit; a `*` makes a unit of each number.

    part: as in `styles_of`.

    Raises:
        ValueError: a unit names a module that isn't there.
    """
    found: list[list[nn.Module]] = []
    for names in units:
        by_number: dict[str, list[nn.Module]] = {}
        for pattern in names:
            matching = [(name, module) for name, module in model.named_modules() if _regex(pattern).match(name)]
            if not (matching or part):
                raise ValueError(f"the model has no module {pattern}, which its units name")
            for name, module in matching:
                by_number.setdefault(name if "*" in pattern else "", []).append(module)
        found += by_number.values()
    return found


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"\d+") + r"\Z")
