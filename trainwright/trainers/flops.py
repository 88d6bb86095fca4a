"""How many floating-point operations training takes, for `mfu`."""

from trainwright.configs.schema import ModelConfig
from trainwright.models.storage import head_dim, kv_heads


def training_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs of a forward and backward pass, per token (PaLM, arXiv 2204.02311, appendix B).

    Six for each weight that multiplies (the embedding's lookup doesn't, nor an expert that isn't chosen), and
    twelve for each head dim and position attended to, without a discount for causality.
    """
    width = model.num_attention_heads * head_dim(model)
    attention = model.hidden_size * (2 * width + 2 * kv_heads(model) * head_dim(model))
    feed_forward = 3 * model.hidden_size * model.intermediate_size
    if model.moe.num_local_experts is not None:
        router = model.hidden_size * model.moe.num_local_experts
        feed_forward = model.moe.num_experts_per_tok * feed_forward + router
    weights = model.num_hidden_layers * (attention + feed_forward) + model.vocab_size * model.hidden_size
    return 6.0 * weights + 12.0 * model.num_hidden_layers * width * attended(model, seq_len)


def attended(model: ModelConfig, seq_len: int) -> int:
    """The positions that each attends to, as they are counted: without a discount for causality."""
    return min(seq_len, model.sliding_window or seq_len)
