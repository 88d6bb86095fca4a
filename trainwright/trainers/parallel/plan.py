"""Sharding plans: a table from module name to style that stands beside a model, and its check.

A plan is data. What carries it out reads it; the model never does.
"""

import re
from collections.abc import Mapping
from typing import Literal

from torch import nn

Style = Literal["column", "row", "vocabulary", "sequence", "replicate"]
Plan = Mapping[str, Style]


def styles_of(model: nn.Module, plan: Plan) -> dict[str, Style]:
    """The style of every module of `model` that has weights of its own, by its full name.

    A `*` in a plan stands for one number, such as a layer's.

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
