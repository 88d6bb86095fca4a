"""Holding a sharding plan against its model."""

import re

from torch import nn

from trainwright.models.plan import Plan, Style


def styles_of(model: nn.Module, plan: Plan) -> dict[str, Style]:
    """The style of every module of `model` that has weights of its own, by its full name.

    Raises:
        ValueError: the plan misses a module with weights, or names one that isn't there.
    """
    patterns = {name: re.compile(re.escape(name).replace(r"\*", r"\d+") + r"\Z") for name in plan}
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
        if not any(regex.match(name) for name in named):
            raise ValueError(f"the sharding plan names {pattern}, which the model doesn't have")
    return styles
