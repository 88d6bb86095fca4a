import pytest
import torch
from safetensors.torch import load_file

from trainwright.configs.hf_config import read_hf_config, to_hf
from trainwright.configs.schema import ModelConfig, MoeConfig
from trainwright.errors import BadRequest
from trainwright.models.decoder import decoder
from trainwright.models.hf import load_hf, save_hf, write_to
from trainwright.models.init import init_weights
from trainwright.models.mixtral import Mixtral
from trainwright.models.storage import whole_pieces

transformers = pytest.importorskip("transformers")


def shape(**changes) -> ModelConfig:
    """Two query heads a KV head, two blocks of gate and up, four experts."""
    usual = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "rope_theta": 1e6,
        "moe": MoeConfig(num_local_experts=4),
    }
    return ModelConfig(**usual | changes)


def reference(config: ModelConfig, folder, fused: bool) -> torch.nn.Module:
    """Transformers' model, described without our own conversion, and saved in one of its layouts."""
    torch.manual_seed(0)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += (
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "initializer_range",
        "sliding_window",
    )
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **{key: getattr(config, key) for key in same},
            num_local_experts=config.moe.num_local_experts,
            num_experts_per_tok=config.moe.num_experts_per_tok,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.5) if parameter.dim() == 1 else parameter.normal_(std=0.2)
    model.save_pretrained(folder, save_original_format=not fused)
    return model.eval()


def loaded(folder, coalesce: bool) -> Mixtral:
    config = ModelConfig(**read_hf_config(folder), coalesce=coalesce)
    model = decoder(config)
    assert isinstance(model, Mixtral)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_hf(folder, config, write_to(whole_pieces(model)))
    return model


def some_tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("coalesce", [True, False])
@torch.no_grad()
def test_their_weights_give_their_logits(coalesce, fused, tmp_path, close):
    config = shape()
    theirs = reference(config, tmp_path, fused)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert any("mlp.experts.gate_up_proj" in name for name in names) == fused
    tokens = some_tokens(config)
    close(loaded(tmp_path, coalesce)(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("window", [1, 7, 200])
@torch.no_grad()
def test_a_window_is_theirs(window, tmp_path, close):
    config = shape(sliding_window=window)
    theirs = reference(config, tmp_path, fused=False)
    ours = loaded(tmp_path, coalesce=True)
    assert ours.config.sliding_window == window
    tokens = some_tokens(config)
    close(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("coalesce", [True, False])
@torch.no_grad()
def test_our_weights_give_our_logits_in_transformers(coalesce, fused, tmp_path, close):
    config = shape(coalesce=coalesce)
    ours = decoder(config)
    init_weights(whole_pieces(ours), config, 0)
    folder = tmp_path / "exported"
    save_hf(folder, config, ours.state_dict(), dtype=torch.float32, fused=fused, max_file_bytes=400_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    theirs, info = transformers.MixtralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = some_tokens(config)
    close(ours(tokens), theirs.eval()(tokens).logits)


@pytest.mark.parametrize("fused", [False, True])
def test_a_roundtrip_changes_no_bit_whatever_the_storage(fused, tmp_path):
    config = shape(coalesce=False)
    ours = decoder(config)
    init_weights(whole_pieces(ours), config, 3)
    save_hf(tmp_path / "one", config, ours.state_dict(), dtype=torch.float32, fused=fused)
    again = loaded(tmp_path / "one", coalesce=True)
    save_hf(tmp_path / "two", again.config, again.state_dict(), dtype=torch.float32)
    back = loaded(tmp_path / "two", coalesce=False)
    for name, parameter in ours.named_parameters():
        assert torch.equal(back.get_parameter(name), parameter), name


def test_a_matrix_of_an_expert_that_is_missing_or_unknown_is_named(tmp_path):
    reference(shape(), tmp_path, fused=False)
    config = ModelConfig(**read_hf_config(tmp_path))
    config.moe.num_local_experts = 5
    with pytest.raises(
        BadRequest, match=r"lacks the tensor model\.layers\.0\.block_sparse_moe\.experts\.4\.w1"
    ):
        load_hf(tmp_path, config, lambda *_: pytest.fail("written"))
    config.moe.num_local_experts = 3
    with pytest.raises(
        BadRequest, match=r"holds the tensor model\.layers\.0\.block_sparse_moe\.experts\.3\.w1"
    ):
        load_hf(tmp_path, config, lambda *_: pytest.fail("written"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (shape(moe=MoeConfig(num_local_experts=4, norm_topk_prob=False)), "norm_topk_prob=false"),
        (shape(moe=MoeConfig(), sliding_window=8), "sliding_window=8"),
    ],
)
def test_what_transformers_does_not_compute_is_not_exported(config, words):
    with pytest.raises(BadRequest, match=words):
        to_hf(config, eos=None, bos=None, dtype="float32")
