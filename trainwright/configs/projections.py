"""A layer's matrix products under the names of their modules: recipes name them, and the model makes them."""

COALESCED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

ADDED = ("o_proj", "down_proj", "w2")  # whose results are added to the residual stream


def projections(coalesce: bool) -> tuple[str, ...]:
    """Those of a layer, in the order in which it makes them."""
    return COALESCED if coalesce else SEPARATE
