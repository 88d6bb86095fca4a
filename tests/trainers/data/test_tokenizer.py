import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainers.data.corpora import recipe, tokenizer, write_text
from trainwright.errors import BadRequest
from trainwright.trainers.data import tokenizer as module
from trainwright.trainers.data.source import Piece
from trainwright.trainers.data.tokenizer import END, load_tokenizer, read_tokenizer

DOCUMENTS = ["the cat sat on the mat\n" * 20, "another hat, another day\n" * 20, "é😀 " * 30]


@pytest.fixture
def folder(tmp_path):
    """A folder with tokenizer.json alone."""
    tokenizer().save(tmp_path / "tok")
    (tmp_path / "tok" / "tokenizer_config.json").unlink()
    return tmp_path / "tok"


@given(text=st.text(max_size=200))
def test_any_text_comes_back(text):
    assert tokenizer().decode(tokenizer().encode(text)) == text


@pytest.mark.parametrize("travel", [lambda tok: tok, lambda tok: pickle.loads(pickle.dumps(tok))])
def test_a_document_that_spells_the_end_of_text_does_not_end(travel):
    """Nor where the tokenizer came from another rank."""
    tok = travel(tokenizer())
    ids = tok.encode(f"one{END}two")
    assert tok.eos not in ids.tolist()
    assert tok.decode(ids) == f"one{END}two"


def test_pieces_get_bos_first_and_eos_where_a_document_ends():
    tok = module.Tokenizer(tokenizer().inner, tokenizer().vocab_size, eos=0, bos=5)
    body = tok.encode("cat").tolist()
    whole, part = tok.encode_pieces([Piece("cat", True), Piece("cat", False)])
    assert whole.tolist() == [5, *body, 0]
    assert part.tolist() == [5, *body]
    assert whole.dtype == np.uint16


def test_training_is_deterministic_and_kept(tmp_path, monkeypatch):
    write_text(tmp_path, DOCUMENTS)
    first = load_tokenizer(recipe(tmp_path)).inner.to_str()
    again = load_tokenizer(recipe(tmp_path, f"data.cache_dir={tmp_path}/other")).inner.to_str()
    assert first == again
    monkeypatch.setattr(module, "train_bpe", None)  # can't be called any more
    assert load_tokenizer(recipe(tmp_path)).inner.to_str() == first


@pytest.mark.parametrize(
    "change",
    ["seed=1", "data.tokenizer.vocab_size=290", "data.tokenizer.train_bytes=500", "data.document=line"],
)
def test_what_a_trained_tokenizer_depends_on(tmp_path, change):
    write_text(tmp_path, DOCUMENTS)
    load_tokenizer(recipe(tmp_path))
    load_tokenizer(recipe(tmp_path, change))
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 2


def test_nothing_of_the_corpus_is_kept_tokenized(tmp_path):
    write_text(tmp_path, DOCUMENTS * 50)
    load_tokenizer(recipe(tmp_path))
    kept = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert kept == {
        "tokenizer.json", "tokenizer_config.json", "start.npy", "length.npy", "file.npy", "skipped.npy"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "t", "bos_token": {"content": "h"}}),
        ("special_tokens_map.json", {"eos_token": {"content": "t"}, "bos_token": "h"}),
        ("config.json", {"eos_token_id": "t", "bos_token_id": "h"}),
        ("generation_config.json", {"eos_token_id": ["t", 1], "bos_token_id": "h"}),
    ],
)
def test_where_eos_and_bos_come_from(folder, name, content):
    ids = {token: tokenizer().inner.token_to_id(token) for token in "th"}
    if "config.json" in name and "tokenizer" not in name:
        content = {k: [ids["t"], 1] if isinstance(v, list) else ids[v] for k, v in content.items()}
    (folder / name).write_text(json.dumps(content))
    for path in (folder, folder / "tokenizer.json"):
        loaded = read_tokenizer(path)
        assert (loaded.eos, loaded.bos) == (ids["t"], ids["h"])


def test_the_end_of_text_token_is_the_eos_where_nothing_names_one(folder):
    assert read_tokenizer(folder).eos == tokenizer().eos
    assert read_tokenizer(folder).bos is None


def test_saved_and_loaded_is_the_same(tmp_path):
    tok = module.Tokenizer(tokenizer().inner, tokenizer().vocab_size, eos=0, bos=5)
    tok.save(tmp_path / "out")
    loaded = read_tokenizer(tmp_path / "out")
    assert (loaded.eos, loaded.bos, loaded.vocab_size) == (0, 5, tok.vocab_size)
    assert loaded.encode("the cat").tolist() == tok.encode("the cat").tolist()


def test_a_vocabulary_above_the_model_s(tmp_path, folder):
    write_text(tmp_path, DOCUMENTS)
    made = recipe(tmp_path, f"data.tokenizer.path={folder}", "model.vocab_size=100")
    size = tokenizer().vocab_size
    with pytest.raises(BadRequest, match=rf"{size} tokens and model\.vocab_size=100"):
        load_tokenizer(made)


def test_tokenizers_that_will_not_do(tmp_path, folder):
    write_text(tmp_path, DOCUMENTS)
    with pytest.raises(BadRequest, match="at least 257"):
        load_tokenizer(recipe(tmp_path, "data.tokenizer.vocab_size=100"))
    with pytest.raises(BadRequest, match="doesn't exist"):
        read_tokenizer(tmp_path)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace(END, "<|other|>"))
    with pytest.raises(BadRequest, match="end-of-text token"):
        read_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"isn't a tokenizer\.json"):
        read_tokenizer(folder)
