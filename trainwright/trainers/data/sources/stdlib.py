"""The source files of the running interpreter's standard library: real text on every machine."""

import sysconfig
from dataclasses import replace
from pathlib import Path

from trainwright.configs.schema import SourceConfig
from trainwright.trainers.data.sources.documents import Place
from trainwright.trainers.data.sources.files import list_files
from trainwright.trainers.data.sources.text import TextDocuments, index_text

INSTALLED = {"site-packages", "dist-packages"}  # what pip put there isn't the library's


def open_stdlib(source: SourceConfig, place: Place) -> TextDocuments:
    """Each *.py file of the standard library is a document, in the order of their relative paths.

    A few files of its own tests are deliberately not UTF-8, and are skipped whatever on_error says.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = list_files([str(root)], "*.py", place.key)
    own = [file for file in files if INSTALLED.isdisjoint(file.parts[len(root.parts) :])]
    return index_text(own, replace(source, document="file", on_error="skip"), place)
