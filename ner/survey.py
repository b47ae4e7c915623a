"""Look before you train: what a corpus holds, and what two of them have in common that they should not.

`python loader.py FILE...` prints it; main.py logs the warnings.
"""

from collections import Counter, defaultdict
from itertools import combinations
from typing import Any

from ner.corpus import Corpus, Sentence
from ner.decoding import spans
from ner.windows import Windower

RARE = 10  # a type with fewer entities is neither learned nor measured well
EXAMPLES = 3  # of a warning
CLIP = 12  # units of a sentence shown in a warning


def warnings_of(train: Corpus, *others: Corpus) -> list[str]:
    """Return all that is odd about the training file and about dev and test beside it, each warning once."""
    warnings = train.warnings() + check(train)
    for other in others:
        warnings += other.warnings() + check(other) + compare(train, other)
    return list(dict.fromkeys(warnings))


def check(corpus: Corpus) -> list[str]:
    """Return warnings about one corpus: the same text with different tags, types with few entities."""
    return _conflict_warnings(_conflicts_within(corpus)) + _rare_type_warnings(corpus)


def compare(train: Corpus, other: Corpus) -> list[str]:
    """Return warnings about `other` (dev or test) beside `train`.

    Sentences that both hold, the same text with different tags in the two, types that `train` lacks.
    """
    first_in_train: dict[str, Sentence] = {}
    for sentence in train.sentences:
        first_in_train.setdefault(_text(sentence), sentence)
    shared = [
        (sentence, first_in_train[text]) for sentence in other.sentences if (text := _text(sentence)) in first_in_train
    ]
    conflicts = [
        (train.place(twin), other.place(sentence))
        for sentence, twin in _first_of_each_text(shared)
        if sentence.tags != twin.tags
    ]
    return _shared_warnings(train, other, shared) + _conflict_warnings(conflicts) + _missing_type_warnings(train, other)


def _shared_warnings(train: Corpus, other: Corpus, shared: list[tuple[Sentence, Sentence]]) -> list[str]:
    if not shared:
        return []
    examples = [
        f"line {sentence.line} = line {twin.line} ({_clip(sentence.units)})" for sentence, twin in shared[:EXAMPLES]
    ]
    return [
        f"{len(shared):,} of {len(other.sentences):,} sentences of {other.path} are in {train.path} too: "
        f"{_listed(examples, len(shared))}; scores on them are too good"
    ]


def _first_of_each_text(shared: list[tuple[Sentence, Sentence]]) -> list[tuple[Sentence, Sentence]]:
    first: dict[str, tuple[Sentence, Sentence]] = {}
    for sentence, twin in shared:
        first.setdefault(_text(sentence), (sentence, twin))
    return list(first.values())


def _conflicts_within(corpus: Corpus) -> list[tuple[str, str]]:
    """The places of the first two sentences of the same text whose tags differ, for each such text."""
    first: dict[str, Sentence] = {}
    conflicts: dict[str, tuple[str, str]] = {}
    for sentence in corpus.sentences:
        text = _text(sentence)
        twin = first.setdefault(text, sentence)
        if twin.tags != sentence.tags:
            conflicts.setdefault(text, (corpus.place(twin), corpus.place(sentence)))
    return list(conflicts.values())


def _conflict_warnings(conflicts: list[tuple[str, str]]) -> list[str]:
    if not conflicts:
        return []
    examples = [" and ".join(places) for places in conflicts[:EXAMPLES]]
    texts = "1 text has" if len(conflicts) == 1 else f"{len(conflicts):,} texts have"
    return [f"{texts} different tags in different places: {_listed(examples, len(conflicts))}"]


def _missing_type_warnings(train: Corpus, other: Corpus) -> list[str]:
    trained, counts = train.entities(), other.entities()
    warnings = []
    for type_ in sorted(counts.keys() - trained.keys()):
        tag = "B-" + type_
        sentence = next(sentence for sentence in other.sentences if tag in sentence.tags)
        where = f"is not in {train.path}"
        if type_ in (train.file_types or ()):
            where = f"is in {train.path}, but not in the {len(train.sentences):,} of its sentences that are trained on"
        warnings.append(
            f"{other.place(sentence, sentence.tags.index(tag))}: type {type_} {where}; its {counts[type_]:,} entities "
            "cannot be found"
        )
    return warnings


def _rare_type_warnings(corpus: Corpus) -> list[str]:
    rare = [(type_, count) for type_, count in sorted(corpus.entities().items()) if count < RARE]
    if not rare:
        return []
    counts = ", ".join(f"{type_} has {count} entit{'y' if count == 1 else 'ies'}" for type_, count in rare)
    return [f"{corpus.path}: {counts}; do not trust the scores of types with fewer than {RARE}"]


def survey(corpora: list[Corpus], windower: Windower | None = None, max_length: int = 256) -> dict[str, Any]:
    """Return all that `python loader.py` tells, as one dict for JSON; with a windower, lengths are in tokens."""
    types_of_form: dict[str, Counter[str]] = defaultdict(Counter)  # an entity's text -> counts of its types
    files = [_describe(corpus, types_of_form, windower, max_length) for corpus in corpora]
    ambiguous = [(form, types) for form, types in types_of_form.items() if len(types) > 1]
    ambiguous.sort(key=lambda item: max(item[1].values()) - item[1].total())  # most often of a minority type first
    pairs = [warning for train, other in combinations(corpora, 2) for warning in compare(train, other)]
    return {
        "files": files,
        "several_types": {form: dict(types.most_common()) for form, types in ambiguous[:20]},
        "several_types_count": len(ambiguous),
        "warnings": list(dict.fromkeys(pairs)),
    }


def _describe(
    corpus: Corpus, types_of_form: dict[str, Counter[str]], windower: Windower | None, max_length: int
) -> dict[str, Any]:
    """Return what is told of one file; its entities are counted into `types_of_form` too."""
    types: dict[str, Counter[str]] = defaultdict(Counter)
    adjacent: Counter[str] = Counter()  # type -> entities with nothing between them and the one before
    separator = " " if corpus.unit == "word" else ""
    for sentence in corpus.sentences:
        end_before = None
        for type_, start, end in spans(sentence.tags):
            form = separator.join(sentence.units[start:end])
            types[type_][form] += 1
            types_of_form[form][type_] += 1
            adjacent[type_] += start == end_before
            end_before = end
    report = {
        "path": corpus.path,
        "sentences": len(corpus.sentences),
        "characters": corpus.unit_count,
        "unit": corpus.unit,
        "scheme": corpus.scheme,
        "repairs": corpus.repairs,
        "skipped": corpus.skipped,
        "types": {
            type_: {
                "count": forms.total(),
                "forms": len(forms),
                "adjacent": adjacent[type_],
                "examples": dict(forms.most_common(5)),
            }
            for type_, forms in sorted(types.items())
        },
        "lengths": _lengths(corpus, windower, max_length),
        "rare": [type_ for type_, forms in sorted(types.items()) if forms.total() < RARE],
        "warnings": corpus.warnings() + check(corpus),
    }
    if windower:
        report["tokenizer"] = _tokenizer_fit(corpus, windower)
    return report


def _lengths(corpus: Corpus, windower: Windower | None, max_length: int) -> dict[str, Any]:
    """The lengths of the sentences, in tokens where there is a tokenizer, and how many of them need several windows."""
    if windower:
        lengths = sorted(len(windower.encode(sentence.units)[0]) for sentence in corpus.sentences)
    else:
        lengths = sorted(len(sentence.units) for sentence in corpus.sentences)
    room = windower.room if windower else max_length - 2
    too_long = sum(length > room for length in lengths)
    return {
        "of": "tokens" if windower else corpus.unit + "s",
        "min": lengths[0],
        "max": lengths[-1],
        "mean": sum(lengths) / len(lengths),
        "median": lengths[len(lengths) // 2],
        "p95": lengths[len(lengths) * 95 // 100],
        "room": room,
        "need_windows": too_long,
        "need_windows_share": too_long / len(lengths),
    }


def _tokenizer_fit(corpus: Corpus, windower: Windower) -> dict[str, Any]:
    """How many tokens the units have, and which of them the tokenizer does not know or leaves nothing of."""
    units = Counter(unit for sentence in corpus.sentences for unit in sentence.units)
    tokens = sum(len(windower.encode([unit])[0]) * count for unit, count in units.items())
    vanished = Counter({unit: count for unit, count in units.items() if unit in windower.dropped})
    unknown = Counter(
        {unit: count for unit, count in units.items() if unit not in vanished and windower.is_unknown(unit)}
    )
    return {
        "tokens": tokens,
        "tokens_a_unit": tokens / units.total(),
        "unknown": unknown.total(),
        "unknown_share": unknown.total() / units.total(),
        "unknown_examples": dict(unknown.most_common(10)),
        "vanished": vanished.total(),
        "vanished_examples": dict(vanished.most_common(10)),
    }


def _listed(examples: list[str], count: int) -> str:
    return ", ".join(examples) + (", …" if count > len(examples) else "")


def _text(sentence: Sentence) -> str:
    return "\x1f".join(sentence.units)


def _clip(units: list[str]) -> str:
    return printable("".join(units[:CLIP])) + ("…" if len(units) > CLIP else "")


def printable(text: str) -> str:
    """Return a text, shortened to 30 characters, that is visible on a terminal and does it no harm."""
    text = text if len(text) <= 30 else text[:30] + "…"
    return "".join(
        char if char.isprintable() and (char != " " or len(text) > 1) else f"U+{ord(char):04X}" for char in text
    )
