"""The words of a sharding plan: data beside a model, which `trainers.parallel` carries out."""

from typing import Literal

# column: the output dim is cut; kv_groups: the same between groups of heads that share a key and a value, or,
# on more ranks than groups, the weight is whole on every rank and each makes the heads that it needs; row: the
# input dim is cut and the results are summed; vocabulary: the table's rows are cut by word; sequence:
# activations are cut by position and the weight is whole on every rank.
Style = Literal["column", "kv_groups", "row", "vocabulary", "sequence", "replicate"]

# From module name to style; a `*` stands for one number, such as a layer's.
Plan = dict[str, Style]

# Groups of module names in the order of the forward pass, whose weights data-parallel ranks gather together.
Units = list[list[str]]
