"""`trainwright data ...`: fetch and index a recipe's data, and show what the stream looks like."""

from collections.abc import Iterator

from trainwright.configs.schema import Recipe
from trainwright.trainers.data.horizon import tokens_per_byte
from trainwright.trainers.data.opening import open_sources
from trainwright.trainers.data.source import Source
from trainwright.trainers.data.stream import horizon, open_stream, open_validation
from trainwright.trainers.data.tokenizer import Tokenizer, load_tokenizer

SEQUENCES, LINES, COLUMNS = 2, 4, 100  # of the sequences that are shown


def describe(recipe: Recipe) -> None:
    """Print what the recipe's data comes to and how the first sequences read."""
    print("\n".join(description(recipe)))


def description(recipe: Recipe) -> Iterator[str]:
    """What `describe` prints, line by line."""
    sources = open_sources(recipe)
    tokenizer = load_tokenizer(recipe)
    yield from (_source_line(source, tokenizer) for source in sources)
    yield _tokenizer_line(tokenizer, recipe.data.tokenizer.path)
    validation = open_validation(recipe, tokenizer)
    if validation is not None:
        rows = sum(len(batch.tokens) for batch in validation)
        yield f"validation: {rows} sequences of {recipe.train.seq_len} tokens in {len(validation)} batches"
    if (steps := horizon(recipe, tokenizer)) is not None:
        yield f"steps: about {steps} in {recipe.train.epochs} epochs"
    with open_stream(recipe, tokenizer) as stream:
        batch = next(stream)
    yield f"lanes: {len(stream.cursor)}, for {recipe.train.global_batch_size} sequences in a batch"
    for number, tokens in enumerate(batch.tokens[:SEQUENCES]):
        yield f"sequence {number} begins:"
        for line in tokenizer.decode(tokens.numpy()).splitlines()[:LINES]:
            yield f"  {line[:COLUMNS]}"


def _tokenizer_line(tokenizer: Tokenizer, path: str | None) -> str:
    special = {"end": tokenizer.eos, "begin": tokenizer.bos}
    names = [f"{which} {tokenizer.inner.id_to_token(i)}" for which, i in special.items() if i is not None]
    return f"tokenizer: {path or 'trained on this data'}, {tokenizer.vocab_size} tokens, {', '.join(names)}"


def _source_line(source: Source, tokenizer: Tokenizer) -> str:
    rate = f"{tokens_per_byte(source, tokenizer):.4f} tokens per byte"
    if source.pieces is None:
        return f"{source.name}: streamed, of unknown length, {rate}"
    return (
        f"{source.name}: {source.documents} documents in {source.pieces} pieces, {source.total_bytes} bytes, "
        f"{source.skipped} skipped, {rate}"
    )
