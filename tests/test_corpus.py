"""A corpus in memory: a sample, the labels, what can be trained on."""

import pytest
import tiny

from ner import formats
from ner.corpus import Corpus, Sentence, check_trainable, check_unit, label_list, sample
from ner.errors import UserError


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def test_labels_are_in_a_fixed_order(tmp_path):
    corpus = formats.read(write(tmp_path, "x B-PER\nx B-LOC\nx I-LOC\n"))
    assert label_list(corpus) == label_list(corpus.sentences) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    other = [Sentence(["x"], ["B-ORG"], 1)]
    assert label_list(corpus, other)[-4:] == ["B-ORG", "I-ORG", "B-PER", "I-PER"] and label_list([]) == ["O"]


def test_a_sample_is_drawn_from_the_seed(tmp_path):
    sentences = formats.read(str(tiny.corpus(tmp_path / "all", 200))).sentences
    drawn = sample(sentences, 50, 1)
    lines = [sentence.line for sentence in drawn]
    assert drawn == sample(sentences, 50, 1) != sample(sentences, 50, 2)
    assert len(set(lines)) == 50 and lines == sorted(lines) and lines[-1] > sentences[100].line
    assert sample(sentences, None, 1) == sample(sentences, 500, 1) == sentences


def test_no_entity_at_all_is_worth_a_warning(tmp_path):
    (warning,) = formats.read(write(tmp_path, "a O\n")).warnings()
    assert "no entity in the whole file" in warning


def corpus_of(unit="character", tags=("B-A",), path="x"):
    return Corpus(path, [Sentence(["x"], list(tags), 1)], "BIO", unit=unit)


def test_training_needs_an_entity():
    check_trainable(corpus_of(), corpus_of(tags=["O"]))
    with pytest.raises(UserError, match="^x: no entity in the 1 sentences to train on"):
        check_trainable(corpus_of(tags=["O"]))


def test_training_and_scoring_need_one_unit(tmp_path):
    words = formats.read(write(tmp_path, "John B-PER\nlives O\nhere O\n", "words"))
    characters = formats.read(write(tmp_path, "江 B-PER\n在 O\n", "characters"))
    for train, other in ((words, characters), (characters, words)):
        with pytest.raises(UserError) as caught:
            check_trainable(train, train, other)
        assert str(caught.value).startswith(
            f"{other.path}: its lines hold {other.unit}s, those of {train.path} {train.unit}s"
        )
    check_unit(words, "word", "the model")


def test_a_part_knows_the_types_of_its_file():
    whole = Corpus("x", [Sentence(["x"], [f"B-{kind}"], 1) for kind in "ABC"], "BIO", repairs=2, notes=["odd"])
    part = whole.part(whole.sentences[:2]).part(whole.sentences[:1], path="held out")
    assert part.file_types == {"A", "B", "C"} and part.entities() == {"A": 1}
    assert (part.path, part.warnings()) == ("held out", []) and len(whole.part(whole.sentences[:2]).warnings()) == 2


def test_places():
    sentence = Sentence(["x", "y"], ["O", "O"], 7)
    assert Corpus("f", [sentence], "BIO").place(sentence, 1) == "f:8"
    assert Corpus("f", [sentence], "offsets", unit_per_line=False).place(sentence, 1) == "f:7"
