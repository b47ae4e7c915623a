"""The last step of every reader: sentences as a file has them → a corpus with IOB2 tags and a known unit."""

import re
from collections.abc import Iterable

from ner.corpus import Corpus, Sentence
from ner.errors import UserError
from ner.formats.schemes import to_iob2
from ner.formats.source import EXPECTED, HELP

WORD_SHARE = 0.2  # of the tokens: with more words (tokens of several characters) than that, words are the unit
# Chinese and Japanese are written without spaces: a text to be tagged marks no words, so none may be trained on.
UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def corpus_of_tags(path: str, sentences: Iterable[Sentence], unit_per_line: bool) -> Corpus:
    """Return the corpus of sentences whose tags are of any one scheme.

    `unit_per_line`: whether a line of the file holds one unit, or a whole sentence. Word-segmented Chinese becomes
    characters. Raises UserError where there is no sentence, or tags of several schemes are mixed.
    """
    sentences = list(sentences)
    if not sentences:
        raise UserError(f"{path}:1: no sentence in it; {EXPECTED}")
    conversion = to_iob2(path, sentences, unit_per_line)
    corpus = Corpus(
        path=path,
        sentences=sentences,
        scheme=conversion.scheme,
        repairs=conversion.repairs,
        repair_line=conversion.repair_line,
        unit_per_line=unit_per_line,
    )
    words = list(_words(sentences))
    if len(words) > WORD_SHARE * corpus.unit_count:
        unspaced = sum(UNSPACED.search(word) is not None for word in words)
        if unspaced * 2 > len(words):
            _spread_over_characters(corpus, len(words))
        else:
            corpus.unit = "word"
    return corpus


def _words(sentences: list[Sentence]) -> Iterable[str]:
    """The tokens of more than one character."""
    for sentence in sentences:
        if sum(map(len, sentence.units)) > len(sentence.units):  # fast where there is none, as nearly always
            yield from (token for token in sentence.units if len(token) > 1)


def _spread_over_characters(corpus: Corpus, words: int) -> None:
    """Make every character of a word-segmented corpus a unit: the word's first has its tag, the others go on."""
    tokens = corpus.unit_count
    for sentence in corpus.sentences:
        chars: list[str] = []
        tags: list[str] = []
        for token, tag in zip(sentence.units, sentence.tags, strict=True):
            chars += token
            tags += [tag] + ["O" if tag == "O" else "I-" + tag[2:]] * (len(token) - 1)
        sentence.units, sentence.tags = chars, tags
    corpus.unit_per_line = False
    corpus.notes.append(
        f"{corpus.path}: word-segmented ({words:,} of {tokens:,} tokens are words of several characters): the tag of "
        "each word is spread over its characters, as texts to be tagged come without word boundaries"
    )


def corpus_of_offsets(path: str, sentences: list[Sentence], skipped: int, notes: Iterable[str] = ()) -> Corpus:
    """Return the corpus of texts whose entities were given by offsets, and have become IOB2 tags already.

    Raises UserError where there is no sentence.
    """
    if not sentences:
        raise UserError(f"{path}:1: no sentence in it; expected texts and the offsets of their entities ({HELP})")
    return Corpus(path, sentences, "offsets", skipped=skipped, unit_per_line=False, notes=list(notes))


def paint(length: int, entities: Iterable[tuple[int, int, str]]) -> tuple[list[str], int]:
    """Return the IOB2 tags of a text of `length` characters, and how many entities were left out.

    `entities` are (start, end, type), half-open and inside the text. Tags cannot say that entities overlap: the longest
    is kept, then the earliest.
    """
    tags, taken, skipped = ["O"] * length, bytearray(length), 0
    for start, end, type_ in sorted(entities, key=lambda entity: (entity[0] - entity[1], entity[0])):
        if taken.find(1, start, end) >= 0:
            skipped += 1
            continue
        taken[start:end] = b"\1" * (end - start)
        tags[start:end] = ["B-" + type_] + ["I-" + type_] * (end - start - 1)
    return tags, skipped
