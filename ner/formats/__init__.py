"""Files and hub data sets → corpora: sentences with IOB2 tags.

The format is recognised from the file, never declared. A new format is a module with two functions of a Source, one
that recognises it and one that reads it, and one line in FORMATS.
"""

from collections.abc import Callable
from typing import NamedTuple

from ner.corpus import Corpus
from ner.formats import brat, columns, hub, offsets
from ner.formats.source import Source


class Format(NamedTuple):
    """How a format is recognised and read. `fits` is asked in the order of FORMATS."""

    name: str
    fits: Callable[[Source], bool]
    read: Callable[[Source], Corpus]


FORMATS = (
    Format("data set of the hub", hub.fits, hub.read),
    Format("brat: .ann beside .txt", brat.fits, brat.read),
    Format("JSON: entities by offsets", offsets.fits, offsets.read),
    Format("CSV or TSV with a header", columns.has_header, columns.read_with_header),
    Format("columns: a token and its tag a line", lambda source: True, columns.read),
)


def read(path: str, split: str = "train") -> Corpus:
    """Return the corpus of any known format in a file, a folder of brat, or `hub:NAME[:CONFIG][@SPLIT]`.

    `split` (train, dev or test) picks the part of a hub data set whose name gives none; a file has no parts.
    Raises UserError with file and line where the content cannot be used.
    """
    source = Source(str(path), split)
    return next(format_ for format_ in FORMATS if format_.fits(source)).read(source)
