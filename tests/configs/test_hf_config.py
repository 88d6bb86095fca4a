import json
from pathlib import Path

import pytest

from trainwright.configs.compose import load_recipe
from trainwright.configs.hf_config import from_hf, read_hf_config, to_hf
from trainwright.configs.schema import ModelConfig, RopeScaling
from trainwright.errors import BadRequest

SIZES = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALED = ModelConfig(
    vocab_size=320,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=131072,
    rms_norm_eps=1e-6,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(**LLAMA3),
    tie_word_embeddings=True,
)
PLAIN = ModelConfig(
    vocab_size=320, hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=6
)


def test_what_a_file_leaves_out_has_transformers_defaults():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(**SIZES)
    ours = ModelConfig(**from_hf(SIZES))
    for key in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
    ],
)
def test_both_spellings_of_the_rotary_embedding_are_read(spelling):
    ours = from_hf(SIZES | spelling)
    assert ours["rope_theta"] == 500000.0
    assert ours["rope_scaling"] == RopeScaling(**LLAMA3)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": None},
    ],
)
def test_an_unscaled_rotary_embedding_is_read(spelling):
    ours = from_hf(SIZES | spelling)
    assert ours["rope_theta"] == 5e5
    assert ours["rope_scaling"] == RopeScaling()


@pytest.mark.parametrize("config", [SCALED, PLAIN], ids=["scaled", "plain"])
def test_there_and_back(config):
    there = json.loads(json.dumps(to_hf(config, eos=2, bos=1, dtype="float32")))
    expected = vars(config) | {"num_key_value_heads": config.num_key_value_heads or 6, "head_dim": 16}
    assert vars(ModelConfig(**from_hf(there))) == expected
    for spelling in (("rope_parameters", "dtype"), ("rope_theta", "rope_scaling", "torch_dtype")):
        one = {key: value for key, value in there.items() if key not in spelling}
        assert vars(ModelConfig(**from_hf(one))) == expected, f"without {spelling}"


@pytest.mark.parametrize("config", [SCALED, PLAIN], ids=["scaled", "plain"])
def test_transformers_reads_what_we_write_and_we_what_it_writes(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config, eos=[5, 7], bos=None, dtype="bfloat16")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.LlamaConfig)
    for key, value in vars(config).items():
        if value is not None and hasattr(theirs, key) and not key.startswith("rope"):
            assert getattr(theirs, key) == value, key
    rope = dict(theirs.rope_parameters)
    assert rope.pop("rope_theta") == config.rope_theta
    assert rope.pop("rope_type") == ("llama3" if config.rope_scaling.factor != 1 else "default")
    assert rope == (LLAMA3 if config.rope_scaling.factor != 1 else {})
    assert theirs.eos_token_id == [5, 7]
    assert theirs.bos_token_id is None
    assert str(theirs.dtype) == "torch.bfloat16"

    theirs.save_pretrained(tmp_path / "theirs")
    expected = vars(config) | {"num_key_value_heads": config.num_key_value_heads or 6, "head_dim": 16}
    assert vars(ModelConfig(**read_hf_config(tmp_path / "theirs"))) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'"),
        ({"model_type": None}, "model_type=None"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type='yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": 8}, "rope_scaling must be an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks rope_scaling.low_freq_factor"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "96"}, "hidden_size must be a whole number, not '96'"),
        ({"hidden_size": 96.5}, "hidden_size must be a whole number, not 96.5"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number, not True"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rope_theta": "1e4"}, "rope_theta must be a number"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_file_and_key(change, words):
    with pytest.raises(BadRequest) as refused:
        from_hf(SIZES | change, "some/config.json")
    assert str(refused.value).startswith("some/config.json")
    assert words in str(refused.value)


def test_a_head_dimension_beside_an_undivided_width_cannot_be_exported():
    with pytest.raises(BadRequest, match=r"model\.hidden_size=96 .* model\.num_attention_heads=5"):
        to_hf(ModelConfig(hidden_size=96, num_attention_heads=5, head_dim=16), eos=0, bos=0, dtype="float32")


@pytest.mark.parametrize("content", [None, "{", "[]", "\xff"])
def test_a_missing_or_broken_file_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(BadRequest) as refused:
        load_recipe([f"model.pretrained={tmp_path}"])
    assert str(tmp_path / "config.json") in str(refused.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    config = to_hf(SCALED, eos=2, bos=1, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_pretrained_decides_the_shape(folder):
    # The default recipe trains a tokenizer of 4096 words, which this small model couldn't take.
    recipe = load_recipe(
        [f"model.pretrained={folder}", "model.coalesce=false", "data.tokenizer.vocab_size=320"]
    )
    assert recipe.model == ModelConfig(**vars(SCALED) | {"coalesce": False, "pretrained": str(folder)})
    assert recipe.data.tokenizer.path is None


def test_pretrained_brings_its_tokenizer_unless_one_is_given(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    assert load_recipe([f"model.pretrained={folder}"]).data.tokenizer.path == str(folder)
    own = tmp_path / "own.json"
    own.write_text("{}")
    recipe = load_recipe([f"model.pretrained={folder}", f"data.tokenizer.path={own}"])
    assert recipe.data.tokenizer.path == str(own)


def test_a_shape_that_breaks_a_rule_is_refused_as_any_other(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequest, match=r"model\.num_key_value_heads=4 doesn't divide"):
        load_recipe([f"model.pretrained={folder}", "data.tokenizer.vocab_size=320"])


def test_no_folder_is_refused():
    with pytest.raises(BadRequest, match=r"model\.pretrained=nowhere is not a folder"):
        load_recipe(["model.pretrained=nowhere"])
