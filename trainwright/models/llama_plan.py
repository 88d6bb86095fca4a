"""How a Llama is cut by tensor and sequence parallelism (Megatron-LM, arXiv 1909.08053, 2205.05198)."""

from trainwright.configs.schema import ModelConfig
from trainwright.models.plan import Plan, Units

PLAN: Plan = {
    "embed_tokens": "vocabulary",
    "layers.*.input_layernorm": "sequence",
    "layers.*.self_attn.o_proj": "row",
    "layers.*.post_attention_layernorm": "sequence",
    "layers.*.mlp.down_proj": "row",
    "norm": "sequence",
    "lm_head": "vocabulary",
}
COALESCED: Plan = {"layers.*.self_attn.qkv_proj": "kv_groups", "layers.*.mlp.gate_up_proj": "column"}
SEPARATE: Plan = {
    "layers.*.self_attn.q_proj": "column",
    "layers.*.self_attn.k_proj": "kv_groups",
    "layers.*.self_attn.v_proj": "kv_groups",
    "layers.*.mlp.gate_proj": "column",
    "layers.*.mlp.up_proj": "column",
}

UNITS: Units = [["embed_tokens"], ["layers.*"], ["norm", "lm_head"]]
TIED: Units = [["layers.*"], ["embed_tokens", "norm", "lm_head"]]  # one weight can't be in two units


def llama_plan(config: ModelConfig) -> Plan:
    """The plan of a Llama of this configuration."""
    return PLAN | (COALESCED if config.coalesce else SEPARATE)


def llama_units(config: ModelConfig) -> Units:
    """What data-parallel ranks gather at a time of a Llama of this configuration."""
    return TIED if config.tie_word_embeddings else UNITS
