"""Characters or words; overlapping entities."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ner import decoding, formats
from ner.formats.assembly import paint


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def test_words_are_recognised(tmp_path):
    corpus = formats.read(write(tmp_path, "John B-PER\nSmith I-PER\nlives O\nin O\nNew B-LOC\nYork I-LOC\n. O\n"))
    assert corpus.unit == "word" and "7 words" in corpus.describe()
    numbers = formats.read(write(tmp_path, "1998 O\n年 O\n北 O\n京 O\n人 O\n多 O\n"))
    assert numbers.unit == "character", "a number among characters does not make words"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 20), st.sampled_from("AB")), max_size=8))
def test_entities_are_accounted_for(places):
    entities = [(start, end, kind) for start, end, kind in places if start < end]
    tags, dropped = paint(20, entities)
    kept = [(start, end, kind) for kind, start, end in decoding.spans(tags)]
    assert len(kept) + dropped == len(entities) and set(kept) <= set(entities) and len(tags) == 20


SEGMENTED = "北京 B-LOC\n大学 I-LOC\n的 O\n江泽民 B-PER\n访问 O\nIBM B-ORG\n。 O\n\n天津 S-LOC\n"


def test_word_segmented_chinese_becomes_characters(tmp_path):
    path = write(tmp_path, SEGMENTED.replace("S-LOC", "B-LOC"))
    corpus = formats.read(path)
    first, second = corpus.sentences
    assert first.units == list("北京大学的江泽民访问IBM。") and second.units == ["天", "津"]
    assert [first.units[start:end] for _, start, end in decoding.spans(first.tags)] == [
        list("北京大学"),
        list("江泽民"),
        list("IBM"),
    ]
    assert (corpus.unit, corpus.scheme, second.line) == ("character", "BIO", 9)
    (warning,) = corpus.warnings()
    assert warning.startswith(f"{path}: word-segmented (6 of 8 tokens are words")


def test_segmented_chinese_of_another_scheme_is_spread_too(tmp_path):
    content = SEGMENTED.replace("I-LOC", "E-LOC").replace("B-PER", "S-PER").replace("B-ORG", "S-ORG")
    corpus = formats.read(write(tmp_path, content))
    assert corpus.scheme == "BIOES" and corpus.repairs == 0
    assert corpus.sentences[1].tags == ["B-LOC", "I-LOC"] and corpus.entities() == {"LOC": 2, "PER": 1, "ORG": 1}


def test_words_of_other_scripts_stay_words(tmp_path):
    for text in ("The B-X\nIL-2 O\ngene O\n北京 O\n", "서울 B-LOC\n에서 O\n만나다 O\n"):
        corpus = formats.read(write(tmp_path, text))
        assert corpus.unit == "word" and not corpus.notes


def test_characters_with_a_few_words_among_them_stay_as_they_are(tmp_path):
    corpus = formats.read(write(tmp_path, "北 O\n京 O\n" * 5 + "1998 O\nNBA B-ORG\n"))
    assert corpus.unit == "character" and "NBA" in corpus.sentences[0].units
