"""Data sets of the Hugging Face hub, or saved in a local folder, through the datasets library."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ner.corpus import Corpus, Sentence
from ner.errors import UserError, first_line
from ner.formats.assembly import corpus_of_tags
from ner.formats.schemes import is_tag, no_tag
from ner.formats.source import Source

PREFIX = "hub:"
ANSWER_SECONDS = 5  # timeout of the hub's answer
TOKEN_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("ner_tags", "tags", "labels")
SPLITS = {"dev": ("validation", "dev", "valid")}  # what data sets call the part that picks the best epoch


class HubName(NamedTuple):
    """The parts of hub:NAME[:CONFIG][@SPLIT]."""

    name: str
    config: str | None
    split: str | None


def fits(source: Source) -> bool:
    """Whether the path names a data set of the hub."""
    return source.path.startswith(PREFIX)


def read(source: Source) -> Corpus:
    """Read tokens beside tags, as texts or as numbers with names. Raises UserError where something is missing."""
    path = source.path
    hub_name = _parse_name(path)
    parts = _load(path, hub_name)
    splits = (hub_name.split,) if hub_name.split else SPLITS.get(source.split, (source.split,))
    split = next((name for name in splits if name in parts), None)
    if split is None:
        raise UserError(f"{path}: has no split {' or '.join(splits)}, but {', '.join(parts)}; name one after @")
    rows = parts[split]
    tokens, tags = (
        next((name for name in names if name in rows.column_names), None) for names in (TOKEN_COLUMNS, TAG_COLUMNS)
    )
    if not tokens or not tags:
        raise UserError(f"{path}: has the columns {', '.join(rows.column_names)}; expected tokens and ner_tags or tags")
    feature = getattr(rows.features[tags], "feature", None)
    names = {} if getattr(feature, "dtype", "") == "string" else _tag_names(hub_name.name, feature)
    sentences = _sentences(path, zip(rows[tokens], rows[tags], strict=True), names)
    return corpus_of_tags(path, sentences, unit_per_line=False)


def _parse_name(path: str) -> HubName:
    name, _, split = path.removeprefix(PREFIX).partition("@")
    name, _, config = name.partition(":")
    return HubName(name, config or None, split or None)


def _load(path: str, hub_name: HubName) -> Any:
    """Return the data set as {split: rows}."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: hub data sets need the datasets library: pip install datasets") from None
    try:
        if os.path.exists(f"{hub_name.name}/dataset_dict.json"):
            return datasets.load_from_disk(hub_name.name)
        if os.path.exists(hub_name.name):
            return _download(datasets.load_dataset, hub_name.name, hub_name.config)
        with _cache_alone_where_the_hub_is_silent():
            return _download(datasets.load_dataset, hub_name.name, hub_name.config)
    except Exception as error:  # the library raises whatever lies below it: network, parser, disk
        if "OfflineModeIsEnabled" in str(error):
            raise UserError(
                f"{path}: the hub does not answer, and {hub_name.name!r} is not in the datasets library's cache; set "
                "HF_ENDPOINT to a mirror, or give a local folder after hub:"
            ) from None
        raise UserError(
            f"{path}: the datasets library cannot load {hub_name.name!r} ({first_line(error)}); check the name, set "
            "HF_ENDPOINT to a mirror, or give a local folder after hub:"
        ) from None


@contextlib.contextmanager
def _cache_alone_where_the_hub_is_silent() -> Iterator[None]:
    """Have the datasets library look in its cache alone where the hub does not answer.

    Left to itself it tries for half a minute, and says so in a dozen lines.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.get_session().head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception:  # refused, timed out, no name server: all the same here
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _download(load_dataset: Callable, name: str, config: str | None) -> Any:
    """Load a data set, or, where it is a program, the copy that the hub has converted: no program is run."""
    try:
        return load_dataset(name, config)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
    return load_dataset(name, config, revision="refs/convert/parquet")


def _sentences(path: str, rows: Iterable[tuple], names: dict[int, str]) -> Iterator[Sentence]:
    for row_number, (row_tokens, row_tags) in enumerate(rows, 1):
        place = f"{path}:{row_number}"
        tokens, tags = row_tokens or [], [names.get(tag, str(tag)) for tag in row_tags or []]
        if len(tokens) != len(tags) or not all(isinstance(token, str) for token in tokens):
            raise UserError(f"{place}: {len(tokens)} tokens and {len(tags)} tags; expected a text and a tag for each")
        bad = next((tag for tag in tags if not is_tag(tag)), None)
        if bad is not None:
            raise no_tag(place, bad)
        if tokens:
            yield Sentence(tokens, tags, row_number)


def _tag_names(name: str, feature: Any) -> dict[int, str]:
    """Return the names of numbered tags: from the column itself, or from the label.json that some data sets hold."""
    if getattr(feature, "names", None):
        return dict(enumerate(feature.names))
    for file_name in ("label.json", "dataset/label.json"):
        try:
            with open(_file_of(name, file_name), encoding="utf-8") as file:
                return {number: str(tag) for tag, number in json.load(file).items()}
        except Exception:  # missing, or something else: try the next one
            continue
    raise UserError(
        f"hub:{name}: its tags are numbers without names; expected a ClassLabel column or a label.json beside the data"
    )


def _file_of(name: str, file_name: str) -> str:
    """Return the path of a file of a data set, downloaded where the data set is no local folder."""
    if os.path.isdir(name):
        return f"{name}/{file_name}"
    from huggingface_hub import hf_hub_download

    return hf_hub_download(name, file_name, repo_type="dataset")
