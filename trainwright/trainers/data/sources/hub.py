"""Data sets of the Hugging Face hub, fetched once to Arrow by the library `datasets`."""

from typing import Any

from trainwright.configs.schema import SourceConfig
from trainwright.errors import BadRequest
from trainwright.trainers.data.sources.arrow import ArrowDocuments, dataset_column
from trainwright.trainers.data.sources.documents import Place


def open_hub(source: SourceConfig, place: Place) -> ArrowDocuments:
    """The rows of data sets by their names on the hub, or of folders that `load_dataset` reads.

    Raises:
        BadRequest: a data set, subset or split that can't be had, or one without the text column.
    """
    return ArrowDocuments(
        [
            dataset_column(load(path, source, place.key), source.text_key, path, place.key)
            for path in source.paths
        ]
    )


def load(name: str, source: SourceConfig, key: str, *, streaming: bool = False) -> Any:
    """The data set `name`, fetched, or as an `IterableDataset` with `streaming`."""
    import datasets  # takes a second to import

    try:
        return datasets.load_dataset(name, source.subset, split=source.split, streaming=streaming)
    except Exception as error:  # the library and those below it raise their own, all for want of the data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadRequest(
            f"{key}.paths: the data set {name} (subset {source.subset}, split {source.split}) can't be loaded "
            f"({reason}): correct the name, {key}.subset or {key}.split, or the connection"
        ) from error
