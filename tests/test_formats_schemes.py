"""Any tag scheme becomes IOB2; what a tag is."""

import pytest

from ner import formats
from ner.formats.schemes import is_tag


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


@pytest.mark.parametrize("scheme, tags, expected", [
    ("BIO", "B-A I-A O B-A B-A I-A O B-B", "B-A I-A O B-A B-A I-A O B-B"),
    ("BIO", "O O O", "O O O"),
    ("IOB1", "I-A I-A O I-A B-A I-A I-B O I-B", "B-A I-A O B-A B-A I-A B-B O B-B"),
    ("BIOES", "B-A I-A E-A O S-A S-A B-B E-B", "B-A I-A I-A O B-A B-A B-B I-B"),
    ("BIOES", "S-A O B-A I-A", "B-A O B-A I-A"),
    ("BMES", "B-A M-A E-A O S-A S-A B-B E-B", "B-A I-A I-A O B-A B-A B-B I-B"),
    ("BILOU", "B-A I-A L-A O U-A U-A B-B L-B", "B-A I-A I-A O B-A B-A B-B I-B"),
])  # fmt: skip
def test_schemes(tmp_path, scheme, tags, expected):
    corpus = formats.read(write(tmp_path, "".join(f"x {tag}\n" for tag in tags.split())))
    assert (corpus.scheme, corpus.repairs) == (scheme, 0)
    assert corpus.sentences[0].tags == expected.split() and f"scheme {scheme}" in corpus.describe()


@pytest.mark.parametrize("tags, expected, repairs, line", [
    ("B-A O I-A I-A", "B-A O B-A I-A", 1, 3), ("B-A I-B", "B-A B-B", 1, 2), ("S-A E-A", "B-A B-A", 1, 2),
    ("B-A M-A E-A M-A E-A O M-B", "B-A I-A I-A B-A I-A O B-B", 2, 4), ("U-A L-A I-A", "B-A B-A B-A", 2, 2),
    ("B-A I-A O E-B", "B-A I-A O B-B", 1, 4),
])  # fmt: skip
def test_orphans_start_an_entity_and_are_counted(tmp_path, tags, expected, repairs, line):
    path = write(tmp_path, "".join(f"x {tag}\n" for tag in tags.split()))
    corpus = formats.read(path)
    assert corpus.sentences[0].tags == expected.split() and corpus.repairs == repairs
    (warning,) = corpus.warnings()
    assert (
        warning.startswith(f"{path}:{line}: first of {repairs} orphan tags")
        and f"{repairs} repairs" in corpus.describe()
    )


def test_an_entity_ends_with_its_sentence(tmp_path):
    corpus = formats.read(write(tmp_path, "x B-A\nx I-A\n\nx I-A\nx O\nx B-A\n"))
    assert [sentence.tags[0] for sentence in corpus.sentences] == ["B-A", "B-A"] and corpus.repairs == 1


def test_a_type_with_hyphens_stays_whole(tmp_path):
    assert [s.tags for s in formats.read(write(tmp_path, "x B-PER-NOM\nx I-PER-NOM\nx I-PER\n")).sentences] == [
        ["B-PER-NOM", "I-PER-NOM", "B-PER"]
    ]


@pytest.mark.parametrize("tag", ["O", "B-PER", "S-人名", "U-A-B", "B--", "L-x"])
def test_tags(tag):
    assert is_tag(tag)


@pytest.mark.parametrize("text", ["XB-PERSON", "X-PER", "B-", "B", "-PER", "b-PER", "B_PER", "0", "", "OO", "PER"])
def test_what_is_no_tag(text):
    assert not is_tag(text)
