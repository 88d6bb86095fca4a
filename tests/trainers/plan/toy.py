"""Recipes and a cluster whose numbers can be worked out by hand."""

from trainwright.configs.compose import load_recipe
from trainwright.configs.planned import planned_worlds
from trainwright.configs.schema import Recipe

# 7,248 parameters: 1,024 of the embedding, 2,592 of each layer, 1,040 of the norm and the head.
TINY = [
    "model.vocab_size=64",
    "data.tokenizer.vocab_size=64",
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=null",
    "model.tie_word_embeddings=false",
    "train.seq_len=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
]
# Two nodes of four ranks; nothing is lost on links, and no message waits.
CLUSTER = [
    "cluster.instance=toy",
    "cluster.platform=cuda",
    "cluster.nodes=2",
    "cluster.ranks_per_node=4",
    "cluster.memory_gib=1",
    "cluster.reserved_gib=0",
    "cluster.peak_tflops=100",
    "cluster.attainable=0.5",
    "cluster.overlap=1",
    "cluster.node_gb_s=100",
    "cluster.network_gb_s=10",
    "cluster.reached=1",
    "cluster.node_latency_us=0",
    "cluster.network_latency_us=0",
    "cluster.usd_per_hour=36",
]


def planned(*words: str) -> Recipe:
    """A recipe that is checked for its cluster, or for the ranks that its degrees make."""
    return load_recipe([word for several in words for word in several.split()], planned_worlds, planned=True)
