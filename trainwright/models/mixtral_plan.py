"""How a Mixtral lies on ranks: a Llama's plan, but for the sparse feed-forward."""

from trainwright.configs.schema import ModelConfig
from trainwright.models.llama_plan import llama_plan
from trainwright.models.plan import Plan

ROUTER: Plan = {"layers.*.mlp.gate": "replicate"}
DOWN: Plan = {"layers.*.mlp.experts.down_proj": "row"}
COALESCED: Plan = {"layers.*.mlp.experts.gate_up_proj": "column"}
SEPARATE: Plan = {"layers.*.mlp.experts.gate_proj": "column", "layers.*.mlp.experts.up_proj": "column"}


def mixtral_plan(config: ModelConfig) -> Plan:
    """The plan of a Mixtral of this configuration; its units are a Llama's."""
    dense = {name: style for name, style in llama_plan(config).items() if ".mlp." not in name}
    return dense | ROUTER | (COALESCED if config.coalesce else SEPARATE) | DOWN
