"""Any tag scheme (BIO, IOB1, BIOES, BMES, BILOU) → IOB2, and what a tag is."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

from ner.corpus import Sentence
from ner.errors import UserError
from ner.formats.source import quote

SCHEMES = {"BIO": "BI", "BIOES": "BIES", "BMES": "BMES", "BILOU": "BILU"}  # the prefixes beside O
PREFIXES = frozenset("".join(SCHEMES.values()))
BEGINNINGS = frozenset("BSU")  # an entity always begins with these
ENDINGS = frozenset("SUEL")  # no entity is open after these


def is_tag(tag: str) -> bool:
    """Whether this is O, or a prefix of a known scheme, a hyphen and a type, such as B-PER."""
    return tag == "O" or (len(tag) > 2 and tag[0] in PREFIXES and tag[1] == "-")


def no_tag(place: str, tag: str) -> UserError:
    """Return the error for something that stands where a tag is expected; `place` is file:line."""
    hint = "did you mean the letter O? " if tag in ("0", "o") else ""
    return UserError(
        f"{place}: {quote(tag)} is no tag; {hint}expected O, or a prefix of BIO, BIOES, BMES or BILOU, a hyphen and a "
        "type, such as B-PER"
    )


@dataclass
class Conversion:
    """The scheme of a file's tags, and the repairs that made them IOB2."""

    scheme: str  # "BIO", "IOB1", "BIOES", "BMES" or "BILOU"
    repairs: int = 0  # orphan tags that were made to start an entity
    repair_line: int = 0  # the line of the first of them


class Iob2Step(NamedTuple):
    """What one tag becomes after those before it."""

    tag: str  # in IOB2
    open_type: str | None  # the type of the entity that may go on after this tag
    is_orphan: bool  # a tag inside an entity, without the beginning of one
    is_free_b: bool  # a B that does not follow an entity of its type


def to_iob2(path: str, sentences: list[Sentence], unit_per_line: bool) -> Conversion:
    """Turn the tags of all sentences into IOB2, in place, after recognising the scheme.

    Raises UserError, with the line of the first tag that does not fit, where tags of several schemes are mixed.
    """
    conversion = Conversion(_recognise(path, sentences, unit_per_line))
    free_bs = 0
    for sentence in sentences:
        if sentence.tags.count("O") == len(sentence.tags):
            continue
        open_type: str | None = None
        converted = []
        for index, tag in enumerate(sentence.tags):
            iob2, open_type, is_orphan, is_free_b = _step(tag, open_type)
            converted.append(iob2)
            free_bs += is_free_b
            if is_orphan:
                conversion.repairs += 1
                conversion.repair_line = conversion.repair_line or sentence.line + index * unit_per_line
        sentence.tags = converted
    # In IOB1 an entity starts with I; B only parts it from a neighbour of its type, so hardly any B stands by itself.
    if conversion.scheme == "BIO" and conversion.repairs > 20 * free_bs:
        return Conversion("IOB1")
    return conversion


@lru_cache(maxsize=100_000)  # a corpus holds few distinct pairs
def _step(tag: str, open_type: str | None) -> Iob2Step:
    """Return the step for a tag while an entity of `open_type` may go on (None: no entity is open)."""
    if tag == "O":
        return Iob2Step("O", None, False, False)
    prefix, type_ = tag[0], tag[2:]
    continues = type_ == open_type and prefix not in BEGINNINGS
    return Iob2Step(
        tag=("I-" if continues else "B-") + type_,
        open_type=None if prefix in ENDINGS else type_,
        is_orphan=not continues and prefix not in BEGINNINGS,
        is_free_b=prefix == "B" and type_ != open_type,
    )


def _recognise(path: str, sentences: Iterable[Sentence], unit_per_line: bool) -> str:
    """Return the first scheme that has all prefixes of these tags."""
    counts: Counter[str] = Counter()
    for tag, count in Counter(chain.from_iterable(sentence.tags for sentence in sentences)).items():
        counts[tag[0]] += count
    del counts["O"]
    fitting = [scheme for scheme, prefixes in SCHEMES.items() if counts.keys() <= set(prefixes)]
    if fitting:
        return fitting[0]
    scheme = max(SCHEMES, key=lambda name: sum(counts[prefix] for prefix in SCHEMES[name]))
    line, tag = next(
        (sentence.line + index * unit_per_line, tag)
        for sentence in sentences
        for index, tag in enumerate(sentence.tags)
        if tag[0] not in SCHEMES[scheme] + "O"
    )
    raise UserError(
        f"{path}:{line}: {quote(tag)} does not belong in {scheme}, the scheme of most tags here; expected the tags of "
        "one scheme: BIO, BIOES, BMES or BILOU"
    )
