"""Which model a configuration is of, and its plan."""

from trainwright.configs.schema import ModelConfig
from trainwright.models.attention import AttentionKernel
from trainwright.models.llama import Llama
from trainwright.models.llama_plan import llama_plan
from trainwright.models.mixtral import Mixtral
from trainwright.models.mixtral_plan import mixtral_plan
from trainwright.models.plan import Plan


def decoder(config: ModelConfig, kernel: AttentionKernel | None = None, layers: range | None = None) -> Llama:
    """A Llama, or with experts a Mixtral; see `Llama`."""
    kind = Llama if config.moe.num_local_experts is None else Mixtral
    return kind(config, kernel, layers)


def decoder_plan(config: ModelConfig) -> Plan:
    """The plan of `decoder`."""
    return llama_plan(config) if config.moe.num_local_experts is None else mixtral_plan(config)
