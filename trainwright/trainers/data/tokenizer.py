"""The tokenizer: one that the recipe names, or a byte-level BPE trained on the run's own data."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainwright.configs.schema import Recipe
from trainwright.errors import BadRequest
from trainwright.trainers.data.opening import open_sources
from trainwright.trainers.data.source import Piece, Source

END = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of text
READ_AT_A_TIME = 64  # pieces


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    vocab_size: one more than the largest id.
    eos: the id that ends a document.
    bos: the id that begins a piece, where the tokenizer has one.
    """

    inner: tokenizers.Tokenizer
    vocab_size: int
    eos: int
    bos: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _wrap, (self.inner, self.eos, self.bos)  # pickling `inner` loses its encode_special_tokens

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The narrowest integers that hold an id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of texts, without BOS or EOS, in parallel and without the GIL."""
        encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """The ids of pieces: each after BOS, where there is one, and EOS where a document ends."""
        encodings = self.inner.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        first = [] if self.bos is None else [self.bos]
        out = []
        for encoding, piece in zip(encodings, pieces, strict=True):
            ids = encoding.ids  # a new list at each look
            if piece.ends:
                ids.append(self.eos)
            out.append(np.array(first + ids if first else ids, dtype=self.dtype))
        return out

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens included."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write `folder`/tokenizer.json and the tokenizer_config.json that names EOS and BOS."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "tokenizer.json", self.inner.to_str(pretty=True))
        special = {"eos_token": self.inner.id_to_token(self.eos)}
        if self.bos is not None:
            special["bos_token"] = self.inner.id_to_token(self.bos)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))


def load_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer, trained and kept in data.cache_dir where data.tokenizer.path is null.

    Raises:
        BadRequest: no tokenizer there, none of its tokens ends a text, or a vocabulary above the model's.
    """
    path = recipe.data.tokenizer.path
    tokenizer = read_tokenizer(Path(path).expanduser()) if path else _trained(recipe)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise BadRequest(
            f"the tokenizer has {tokenizer.vocab_size} tokens and model.vocab_size={recipe.model.vocab_size}: "
            f"raise model.vocab_size to {tokenizer.vocab_size} or choose another data.tokenizer.path"
        )
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json or a folder with one and, beside it, what names EOS and BOS."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise BadRequest(f"data.tokenizer.path: {file} doesn't exist; name a tokenizer.json or its folder")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise BadRequest(f"data.tokenizer.path: {file} isn't a tokenizer.json ({error})") from None
    inner.no_padding()
    inner.no_truncation()
    eos = _special(inner, file.parent, "eos")
    if eos is None:
        raise BadRequest(
            f"data.tokenizer.path: nothing beside {file} names an end-of-text token: "
            f'write {{"eos_token": "..."}} into {file.parent / "tokenizer_config.json"}'
        )
    return _wrap(inner, eos, _special(inner, file.parent, "bos"))


def _wrap(inner: tokenizers.Tokenizer, eos: int, bos: int | None) -> Tokenizer:
    inner.encode_special_tokens = True  # a document that spells <|endoftext|> doesn't end there
    largest = max(inner.get_vocab(with_added_tokens=True).values())
    return Tokenizer(inner, largest + 1, eos, bos)


def _special(inner: tokenizers.Tokenizer, folder: Path, which: str) -> int | None:
    """The id of the `which` token that the files beside a tokenizer.json give, by text or by id."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json"):
        if not (folder / name).is_file():
            continue
        known = json.loads((folder / name).read_text())
        token = known.get(f"{which}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and (number := inner.token_to_id(token)) is not None:
            return int(number)
        number = known.get(f"{which}_token_id")
        if number is not None:
            return int(number[0] if isinstance(number, list) else number)
    return inner.token_to_id(END) if which == "eos" else None


def _trained(recipe: Recipe) -> Tokenizer:
    sources = open_sources(recipe)
    wanted = recipe.data.tokenizer
    assert wanted.vocab_size is not None  # else the recipe names a tokenizer or is refused
    if wanted.vocab_size < SMALLEST_VOCABULARY:
        raise BadRequest(
            f"data.tokenizer.vocab_size={wanted.vocab_size} can't hold every byte and the end of text: "
            f"give at least {SMALLEST_VOCABULARY}"
        )
    folder = Path(recipe.data.cache_dir).expanduser() / "tokenizers" / _fingerprint(recipe, sources)
    if not (folder / "tokenizer.json").is_file():
        inner = train_bpe(_sample(sources, wanted.train_bytes), wanted.vocab_size)
        _wrap(inner, eos=0, bos=None).save(folder)  # special tokens come first
    return read_tokenizer(folder)


def train_bpe(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE (GPT-2's: any bytes, nothing unknown) of at most `vocab_size` tokens."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = cast(Any, pre_tokenizers.ByteLevel(add_prefix_space=False))
    inner.decoder = cast(Any, decoders.ByteLevel())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def _sample(sources: list[Source], total: int) -> Iterator[str]:
    """The first pieces of epoch 0 of each source, `total` bytes in all, shared by weight."""
    weights = sum(source.weight for source in sources)
    for source in sources:
        budget = total * source.weight / weights
        for piece in first_pieces(source, budget):
            yield piece.text


def first_pieces(source: Source, total: float) -> Iterator[Piece]:
    """The pieces that begin epoch 0, up to about `total` bytes (one at least)."""
    taken = start = 0
    while taken < total and (source.pieces is None or start < source.pieces):
        end = start + READ_AT_A_TIME
        for piece in source.read(np.arange(start, end if source.pieces is None else min(end, source.pieces))):
            yield piece
            taken += len(piece.text.encode())
            if taken >= total:
                return
        start = end


def _fingerprint(recipe: Recipe, sources: list[Source]) -> str:
    data = recipe.data
    configs: dict[str, Any] = {name: asdict(source) for name, source in data.mix.items()} or {
        "data": [data.format, data.paths, data.pattern, data.document, data.text_key, data.subset, data.split]
    }
    sizes = [(source.pieces, source.total_bytes) for source in sources]
    wanted = [data.tokenizer.vocab_size, data.tokenizer.train_bytes, recipe.seed, data.max_piece_bytes]
    return hashlib.sha256(json.dumps([configs, sizes, wanted]).encode()).hexdigest()[:24]


def _write(file: Path, text: str) -> None:
    """Write whole or not at all."""
    aside = file.with_name(f".{file.name}-{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, file)
