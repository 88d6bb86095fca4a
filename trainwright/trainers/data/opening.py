"""From a recipe to its sources: the table of formats."""

from collections.abc import Callable

from trainwright.configs.schema import Recipe, SourceConfig
from trainwright.errors import BadRequest
from trainwright.trainers.data.holdout import Part, holdout
from trainwright.trainers.data.indexed import IndexedSource
from trainwright.trainers.data.pieces import SMALLEST_LIMIT
from trainwright.trainers.data.source import Source
from trainwright.trainers.data.sources.arrow import open_arrow
from trainwright.trainers.data.sources.documents import Documents, Place
from trainwright.trainers.data.sources.hub import open_hub
from trainwright.trainers.data.sources.jsonl import open_jsonl
from trainwright.trainers.data.sources.parquet import open_parquet
from trainwright.trainers.data.sources.stdlib import open_stdlib
from trainwright.trainers.data.sources.text import open_text
from trainwright.trainers.data.streamed import open_streamed

OPENERS: dict[str, Callable[[SourceConfig, Place], Documents]] = {
    "text": open_text,
    "stdlib": open_stdlib,
    "jsonl": open_jsonl,
    "arrow": open_arrow,
    "parquet": open_parquet,
    "hub": open_hub,
}


def open_sources(recipe: Recipe, part: Part = "train", lanes: int | None = None) -> list[Source]:
    """The recipe's sources, or what they hold out for validation.

    `lanes` is the stream's number of lanes where that isn't the recipe's; only streaming depends on it.

    Raises:
        BadRequest: a source without text.
    """
    data = recipe.data
    if data.max_piece_bytes < SMALLEST_LIMIT:
        raise BadRequest(f"data.max_piece_bytes={data.max_piece_bytes} must be at least {SMALLEST_LIMIT}")
    lanes = lanes or data.lanes or recipe.train.global_batch_size
    named: dict[str, SourceConfig] = dict(data.mix) or {"data": data}
    return [_open(recipe, name, source, part, lanes) for name, source in named.items()]


def open_source(recipe: Recipe, name: str, source: SourceConfig) -> Source:
    """All of one source, nothing held out."""
    return _open(recipe, name, source, "all", lanes=1)


def _open(recipe: Recipe, name: str, config: SourceConfig, part: Part, lanes: int) -> Source:
    data = recipe.data
    place = Place(f"data.mix.{name}" if data.mix else "data", data.cache_dir, lanes)
    if config.streaming:
        if recipe.train.epochs is not None:
            raise BadRequest(
                f"{place.key}.streaming=true has no known length, so train.epochs has no meaning: "
                "give train.steps and train.epochs=null"
            )
        return open_streamed(config, place, name, seed=recipe.seed, limit=data.max_piece_bytes)
    source = IndexedSource(
        name,
        config.weight,
        OPENERS[config.format](config, place),
        seed=recipe.seed,
        limit=data.max_piece_bytes,
        keep=holdout(name, data.validation.fraction, part),
    )
    if not source.pieces:
        raise BadRequest(_nothing(data.validation.fraction, place.key, config, source, part))
    return source


def _nothing(fraction: float, key: str, config: SourceConfig, source: Source, part: Part) -> str:
    if fraction and part != "all":
        left, change = ("held out", "raise") if part == "validation" else ("left to train on", "lower")
        return f"data.validation.fraction={fraction} has no document of {key} {left}: {change} it or add data"
    skipped = f" ({source.skipped} skipped as broken)" if source.skipped else ""
    return f"{key}.paths={config.paths} holds no text{skipped}: name files with documents in them"
