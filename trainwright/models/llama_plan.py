"""How a Llama is cut by tensor and sequence parallelism (Megatron-LM, arXiv 1909.08053, 2205.05198).

column: the output dim is cut; row: the input dim is cut and the results summed; vocabulary: rows of the
table are cut by word; sequence: activations are cut by position and the weight is whole on every rank.
"""

from trainwright.configs.schema import ModelConfig

PLAN = {
    "embed_tokens": "vocabulary",
    "layers.*.input_layernorm": "sequence",
    "layers.*.self_attn.o_proj": "row",
    "layers.*.post_attention_layernorm": "sequence",
    "layers.*.mlp.down_proj": "row",
    "norm": "sequence",
    "lm_head": "vocabulary",
}
COALESCED = {"layers.*.self_attn.qkv_proj": "column", "layers.*.mlp.gate_up_proj": "column"}
SEPARATE = {
    "layers.*.self_attn.q_proj": "column",
    "layers.*.self_attn.k_proj": "column",
    "layers.*.self_attn.v_proj": "column",
    "layers.*.mlp.gate_proj": "column",
    "layers.*.mlp.up_proj": "column",
}


def llama_plan(config: ModelConfig) -> dict[str, str]:
    """The plan of a Llama of this configuration."""
    return PLAN | (COALESCED if config.coalesce else SEPARATE)
