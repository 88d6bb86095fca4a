"""A Hugging Face `config.json` and our `ModelConfig`, each from the other.

Both spellings of the rotary embedding are read: Transformers 4's `rope_theta` with `rope_scaling`, and
Transformers 5's `rope_parameters`. Both are written, and each version finds its own.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainwright.configs.schema import ModelConfig, MoeConfig, RopeScaling
from trainwright.errors import BadRequest

FILE = "config.json"

# What the model computes whatever the file says; null and an absent key mean the same.
COMPUTED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "router_jitter_noise": 0.0,
}
LLAMA, MIXTRAL = "llama", "mixtral"
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# With Transformers' own defaults for a Llama, which are not all ours.
OPTIONAL: dict[str, tuple[type, Any]] = {
    "num_key_value_heads": (int, None),
    "head_dim": (int, None),
    "max_position_embeddings": (int, 2048),
    "rms_norm_eps": (float, 1e-6),
    "tie_word_embeddings": (bool, False),
    "initializer_range": (float, 0.02),
}
# Of a Mixtral besides, or instead.
SPARSE: dict[str, tuple[type, Any]] = {
    "num_key_value_heads": (int, 8),
    "max_position_embeddings": (int, 131072),
    "rms_norm_eps": (float, 1e-5),
    "sliding_window": (int, None),
}
EXPERTS: dict[str, tuple[type, Any]] = {"num_local_experts": (int, 8), "num_experts_per_tok": (int, 2)}
THETA = {LLAMA: 10000.0, MIXTRAL: 1000000.0}
SCALING: dict[str, type] = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}
NOUNS = {int: "a whole number", float: "a number", bool: "true or false"}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The fields of `ModelConfig` that the `config.json` in `folder` decides.

    Raises:
        BadRequest: the file is absent, isn't a JSON object, or describes what we can't compute.
    """
    path = folder / FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"{path} can't be read ({error.strerror}): a Hugging Face folder has one") from error
    except ValueError as error:
        raise BadRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadRequest(f"{path} must hold a JSON object, not a {type(config).__name__}")
    return from_hf(config, str(path))


def from_hf(config: Mapping[str, Any], source: str = FILE) -> dict[str, Any]:
    """The fields of `ModelConfig` that a Hugging Face `config` decides.

    `source` is the file's name in what is said of it.

    Raises:
        BadRequest: a key is missing or of the wrong type, or asks for what we can't compute.
    """
    kind = config.get("model_type")
    if kind not in THETA:
        raise BadRequest(f"{source}: model_type={kind!r} is not computed here; {LLAMA!r} and {MIXTRAL!r} are")
    for key, computed in COMPUTED.items():
        if config.get(key) is not None:
            _must_be(key, config[key], computed, source)
    fields = {key: _value(config, key, int, source) for key in REQUIRED}
    fields |= _optional(config, OPTIONAL | SPARSE if kind == MIXTRAL else OPTIONAL, source)
    if kind == MIXTRAL:
        fields["moe"] = MoeConfig(**_optional(config, EXPERTS, source))
    return {"family": "llama"} | fields | _rope(config, source, THETA[kind])


def _optional(config: Mapping[str, Any], keys: Mapping[str, tuple[type, Any]], source: str) -> dict[str, Any]:
    return {
        key: default if config.get(key) is None else _value(config, key, kind, source)
        for key, (kind, default) in keys.items()
    }


def to_hf(config: ModelConfig, *, eos: int | list[int] | None, bos: int | None, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model whose weights are stored as `dtype` (`float32`, `bfloat16`, ...).

    Raises:
        BadRequest: what Transformers' Llama or Mixtral refuses or doesn't compute.
    """
    heads = config.num_attention_heads
    if config.hidden_size % heads:
        raise BadRequest(
            f"model.hidden_size={config.hidden_size} is not a multiple of model.num_attention_heads={heads}, "
            "which Transformers' Llama asks for whatever the head dimension: it can't be exported"
        )
    scaling = None
    if config.rope_scaling.factor != 1.0:
        scaling = {"rope_type": "llama3"} | asdict(config.rope_scaling)
    sparse = config.moe.num_local_experts is not None
    if config.sliding_window is not None and not sparse:
        raise BadRequest(
            f"model.sliding_window={config.sliding_window}: Transformers' Llama has none: it can't be exported"
        )
    if sparse and not config.moe.norm_topk_prob:
        raise BadRequest(
            "model.moe.norm_topk_prob=false: Transformers' Mixtral scales gates to 1: it can't be exported"
        )
    return {
        "architectures": ["MixtralForCausalLM" if sparse else "LlamaForCausalLM"],
        "model_type": MIXTRAL if sparse else LLAMA,
        **({"sliding_window": config.sliding_window} if sparse else {}),
        **({key: getattr(config.moe, key) for key in (*EXPERTS, "router_aux_loss_coef")} if sparse else {}),
        **{key: getattr(config, key) for key in (*REQUIRED, *OPTIONAL)},
        "num_key_value_heads": config.num_key_value_heads or heads,
        "head_dim": config.head_dim or config.hidden_size // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "use_cache": True,
        # Transformers 4's names, then Transformers 5's.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "torch_dtype": dtype,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "dtype": dtype,
    }


def _rope(config: Mapping[str, Any], source: str, theta: float) -> dict[str, Any]:
    section = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(section) or {}
    if not isinstance(rope, dict):
        raise BadRequest(f"{source}: {section} must be an object, not {rope!r}")
    at = f"{section}."
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise BadRequest(f"{source}: {at}rope_type={kind!r} is not computed here; default and llama3 are")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for key in rope:
        if key not in known and not (kind == "llama3" and key in SCALING):
            raise BadRequest(f"{source}: {at}{key} is not computed here with rope_type={kind!r}")
    if rope.get("partial_rotary_factor") is not None:
        _must_be(at + "partial_rotary_factor", rope["partial_rotary_factor"], 1.0, source)
    # The section's own value goes before the one beside it, as in Transformers 5.
    theta = next((c["rope_theta"] for c in (rope, config) if c.get("rope_theta") is not None), theta)
    scaling = RopeScaling()
    if kind == "llama3":
        scaling = RopeScaling(**{key: _value(rope, key, kind, source, at) for key, kind in SCALING.items()})
    return {
        "rope_theta": _value({"rope_theta": theta}, "rope_theta", float, source),
        "rope_scaling": scaling,
    }


def _must_be(key: str, value: Any, computed: Any, source: str) -> None:
    if value != computed:
        raise BadRequest(f"{source}: {key}={value!r} is not computed here; {computed!r} is")


def _value(config: Mapping[str, Any], key: str, kind: type, source: str, at: str = "") -> Any:
    value = config.get(key)
    if value is None:
        raise BadRequest(f"{source} lacks {at}{key}")
    # Python takes true for 1, and 1 for a float.
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (kind, int)):
        raise BadRequest(f"{source}: {at}{key} must be {NOUNS[kind]}, not {value!r}")
    return kind(value)
