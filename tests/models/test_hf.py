import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainwright.configs.hf_config import read_hf_config
from trainwright.configs.schema import ModelConfig
from trainwright.errors import BadRequest
from trainwright.models import hf
from trainwright.models.hf import load_hf, save_hf, write_to
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces

transformers = pytest.importorskip("transformers")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def reference(config: ModelConfig, folder, max_shard_size: str = "5GB") -> torch.nn.Module:
    """Transformers' model of the same shape, described without our own conversion, and saved."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters=LLAMA3 if config.rope_scaling.factor != 1 else rope,
            initializer_range=0.2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.eval()


def loaded(folder, coalesce: bool, dtype: torch.dtype = torch.float32) -> Llama:
    config = ModelConfig(**read_hf_config(folder), coalesce=coalesce)
    model = Llama(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_hf(folder, config, write_to(whole_pieces(model)))
    return model


def some_tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 200), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shards", ["single", "sharded"])
@torch.no_grad()
def test_their_weights_give_their_logits(config, shards, tmp_path, close):
    theirs = reference(config, tmp_path, "60KB" if shards == "sharded" else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "sharded")
    ours = loaded(tmp_path, config.coalesce)
    assert vars(ours.config) == vars(config) | {"initializer_range": 0.2}
    tokens = some_tokens(config)
    close(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("max_file_bytes", [5 * 10**9, 60_000])
@torch.no_grad()
def test_our_weights_give_our_logits_in_transformers(config, max_file_bytes, tmp_path, filled, close):
    ours = filled(config)
    folder = tmp_path / "exported"
    save_hf(folder, config, ours.state_dict(), dtype=torch.float32, max_file_bytes=max_file_bytes)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    tokens = some_tokens(config)
    close(theirs(tokens).logits, ours(tokens))


@pytest.mark.parametrize("max_file_bytes", [5 * 10**9, 60_000])
def test_a_roundtrip_changes_no_bit(config, max_file_bytes, tmp_path, filled):
    before = filled(config)
    save_hf(tmp_path / "out", config, before.state_dict(), dtype=torch.float32, max_file_bytes=max_file_bytes)
    after = loaded(tmp_path / "out", config.coalesce)
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    # And the other way of storing gives the same files.
    other = loaded(tmp_path / "out", not config.coalesce)
    save_hf(
        tmp_path / "other",
        other.config,
        other.state_dict(),
        dtype=torch.float32,
        max_file_bytes=max_file_bytes,
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "other").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_cast_once(config, dtype, tmp_path, filled):
    before = filled(config)
    save_hf(tmp_path / "out", config, before.state_dict(), dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
    after = loaded(tmp_path / "out", config.coalesce).state_dict()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor.to(dtype).float(), after[name]), name


def test_files_hold_what_they_may(config, tmp_path, filled):
    model = filled(config)
    limit = 60_000
    save_hf(tmp_path / "out", config, model.state_dict(), dtype=torch.float32, max_file_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in files}
    for tensors in held.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    assert {name: file for file, tensors in held.items() for name in tensors} == index["weight_map"]
    total = sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert index["metadata"]["total_size"] == total == sum(p.numel() * 4 for p in model.parameters())
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"


def test_writing_holds_one_file_of_tensors(config, tmp_path, filled, monkeypatch):
    """The state is asked for a file's tensors only when the file before is written."""
    state = filled(config).state_dict()
    asked: list[str] = []

    class Asked(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    written: list[tuple[int, int]] = []

    def save(tensors, path, metadata):
        written.append((len(asked), len(tensors)))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(hf, "save_file", save)
    save_hf(tmp_path / "out", config, Asked(state), dtype=torch.float32, max_file_bytes=60_000)
    assert len(written) > 2
    total = 0
    for seen, tensors in written:
        total += tensors
        assert seen == total


def test_reading_holds_one_tensor(config, tmp_path, filled):
    save_hf(
        tmp_path / "out",
        config,
        filled(config).state_dict(),
        dtype=torch.float32,
        max_file_bytes=60_000,
    )
    held: list[weakref.ref] = []

    def write(_stored, _rows, values):
        assert not any(tensor() is not None for tensor in held)
        held.append(weakref.ref(values))

    load_hf(tmp_path / "out", config, write)
    assert len(held) == 2 * 9 + (2 if config.tie_word_embeddings else 3)


def test_a_model_is_written_whole_or_not_at_all(config, tmp_path, filled, monkeypatch):
    state = filled(config).state_dict()
    out = tmp_path / "out"

    def fail(*_args, **_keywords):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save_file", fail)
        with pytest.raises(OSError, match="no space"):
            save_hf(out, config, state, dtype=torch.float32)
    assert not out.exists()
    save_hf(out, config, state, dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(BadRequest, match="out is not empty"):
        save_hf(out, config, state, dtype=torch.float32)


def edited(folder, change) -> None:
    """Rewrite the single file of `folder` after `change` has had its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def exported(config, tmp_path, filled):
    folder = tmp_path / "exported"
    save_hf(folder, config, filled(config).state_dict(), dtype=torch.float32)
    return folder


@pytest.mark.parametrize(
    ("change", "tensor", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight", "lacks the tensor"),
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"),
            "model.layers.1.self_attn.k_proj.weight",
            "lacks the tensor",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}),
            "model.layers.2.mlp.up_proj.weight",
            "doesn't have",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(2)}),
            "model.layers.0.self_attn.q_proj.bias",
            "doesn't have",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": torch.zeros(97, 64)}),
            "model.embed_tokens.weight",
            "has the shape (97, 64)",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}),
            "model.norm.weight",
            "is I8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_any_is_written(exported, config, change, tensor, words):
    edited(exported, change)
    with pytest.raises(BadRequest) as refused:
        load_hf(exported, config, lambda *_: pytest.fail("written"))
    assert f"tensor {tensor}" in str(refused.value)
    assert words in str(refused.value)
    assert str(exported / "model.safetensors") in str(refused.value)


def test_buffers_of_rotary_angles_are_ignored(exported, config):
    edited(exported, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    loaded(exported, config.coalesce)


def test_only_a_tied_model_may_lack_or_repeat_its_head(exported, config):
    if not config.tie_word_embeddings:
        edited(exported, lambda t: t.pop("lm_head.weight"))
        with pytest.raises(BadRequest, match=r"lacks the tensor lm_head\.weight"):
            loaded(exported, config.coalesce)
        return
    assert "lm_head.weight" not in load_file(exported / "model.safetensors")
    edited(exported, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded(exported, config.coalesce)
    edited(exported, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(BadRequest, match=r"lm_head\.weight isn't model\.embed_tokens\.weight"):
        loaded(exported, config.coalesce)


def test_files_that_are_not_whole_are_named(exported, config, tmp_path):
    whole = (exported / "model.safetensors").read_bytes()
    (exported / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadRequest, match=r"exported/model\.safetensors is not a whole safetensors file"):
        loaded(exported, config.coalesce)
    (exported / "model.safetensors").unlink()
    with pytest.raises(BadRequest, match=r"exported has neither"):
        loaded(exported, config.coalesce)
    (exported / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"index\.json is not an index"):
        loaded(exported, config.coalesce)


def test_shards_that_are_missing_or_lack_a_tensor_are_named(config, tmp_path, filled):
    folder = tmp_path / "out"
    save_hf(folder, config, filled(config).state_dict(), dtype=torch.float32, max_file_bytes=60_000)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    kept = tmp_path / "kept"
    shutil.copy(second, kept)
    second.unlink()
    with pytest.raises(BadRequest, match=rf"{second.name} is missing"):
        loaded(folder, config.coalesce)
    shutil.copy(kept, second)
    shutil.copy(second, first)  # the first's tensors are nowhere now
    with pytest.raises(BadRequest, match=r"lacks the tensor"):
        loaded(folder, config.coalesce)
