"""brat: FILE.ann beside FILE.txt, either of them, or a folder."""

import pytest

from ner import decoding, formats
from ner.errors import UserError

TEXT = "江泽民在北京。\n\n  他会见了比尔·\n盖茨。\n没有"
ANN = (
    "T1\tPER 0 3\t江泽民\nT2\tLOC 4 6\t北京\nR1\tlives Arg1:T1 Arg2:T2\n#1\tNote T1\ta note\nA1\tGood T1\n"
    "T3\tPER 15 21\t比尔· 盖茨\nT4\tPER 0 1;2 3\t江 民\nT5\tORG 0 2\t江泽\n"
)


def pair(folder, text=TEXT, ann=ANN, name="a"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    (folder / f"{name}.ann").write_text(ann, encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["a.ann", "a.txt", ""])
def test_either_file_or_the_folder(tmp_path, name):
    corpus = formats.read(str(pair(tmp_path) / name))
    assert [("".join(s.units), s.line) for s in corpus.sentences] == [
        ("江泽民在北京。", 1),
        ("  他会见了比尔·\n盖茨。", 3),
        ("没有", 5),
    ]
    found = [["".join(s.units[a:b]) for _, a, b in decoding.spans(s.tags)] for s in corpus.sentences]
    assert found == [["江泽民", "北京"], ["比尔·\n盖茨"], []]
    assert (corpus.scheme, corpus.unit, corpus.skipped) == ("offsets", "character", 2)


def test_lines_may_end_as_on_windows(tmp_path):
    corpus = formats.read(str(pair(tmp_path, "北京\r\n天津\r\n", "T1\tLOC 4 6\t天津\n") / "a.ann"))
    assert [(s.units, s.tags) for s in corpus.sentences] == [
        (["北", "京"], ["O", "O"]),
        (["天", "津"], ["B-LOC", "I-LOC"]),
    ]


@pytest.mark.parametrize("character", ["\f", "\v", "\x1c", "\x85", "\u2028"])
def test_only_line_ends_end_a_line(tmp_path, character):
    entity = f"江{character}泽民"
    corpus = formats.read(str(pair(tmp_path, f"{entity}在北京\n", f"T1\tPER 0 4\t{entity}\r\n") / "a.ann"))
    assert [decoding.spans(s.tags) for s in corpus.sentences] == [[("PER", 0, 4)]]


def test_a_folder_names_the_file_of_each_sentence(tmp_path):
    pair(tmp_path, name="a"), pair(tmp_path, "北京", "T1\tLOC 0 2\t北京\n", "b")
    (tmp_path / "c.txt").write_text("没有")
    corpus = formats.read(str(tmp_path))
    assert len(corpus.sentences) == 4 and corpus.place(corpus.sentences[3]) == f"{tmp_path / 'b.txt'}:1"
    assert f"{tmp_path}: 1 .txt files without an .ann file left out" in corpus.warnings()


def test_a_text_without_annotations_beside_it_is_read_as_columns(tmp_path):
    (tmp_path / "a.txt").write_text("北 B-LOC\n", encoding="utf-8")
    assert formats.read(str(tmp_path / "a.txt")).scheme == "BIO"


@pytest.mark.parametrize("ann, what", [
    ("T1\tPER 0 99\t江泽民", "outside its text"), ("T1\tPER 3 3\t", "is empty"),
    ("T1\tPER 1 4\t江泽民", "the text there is '泽民在', not '江泽民'"), ("T1 PER 0 3 江泽民", "is no entity"),
    ("T1\tPER x 3\t江", "is no entity"), ("江 B-PER", "'江 B-PER' is no entity"), ("PER 0 3 江泽民", "is no entity"),
    (f"T1\tPER 0 {'9' * 5000}\t江泽民", "is no entity"),
])  # fmt: skip
def test_errors_name_file_and_line(tmp_path, ann, what):
    path = pair(tmp_path, ann=f"#1\tNote\n{ann}\n") / "a.ann"
    with pytest.raises(UserError) as caught:
        formats.read(str(path))
    assert str(caught.value).startswith(f"{path}:2: ") and what in str(caught.value)


def test_a_missing_text_is_named(tmp_path):
    (tmp_path / "a.ann").write_text("T1\tPER 0 3\t江泽民\n", encoding="utf-8")
    with pytest.raises(UserError, match="the text it annotates is missing; expected a.txt beside it"):
        formats.read(str(tmp_path / "a.ann"))
