"""Lines of a token and its tag: columns, CoNLL, CSV and TSV with a header."""

import csv
import io

import pytest

from ner import formats
from ner.errors import UserError


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


PLAIN = "北 B-LOC\n京 I-LOC\n人 O\n\n江 B-PER\n泽 I-PER\n民 I-PER\n"


@pytest.mark.parametrize("content", [
    PLAIN, PLAIN.replace(" ", "\t"), PLAIN.replace("\n", "\r\n"), PLAIN.replace("\n", "\r"), PLAIN.rstrip("\n"),
    "\n \n\t\n" + PLAIN + "\n\n\n", PLAIN.replace("\n\n", "\n  \t \n\n"), PLAIN.replace(" ", " \t  "),
    PLAIN.replace("\n", "  \n"), PLAIN.replace("\n\n", "\n\u3000\n"), "\ufeff" + PLAIN, PLAIN.encode("gb18030"),
    PLAIN.encode("utf-16"), ("\r\n" + PLAIN).replace("\n", "\r\n").encode("gb18030"),
], ids=str)  # fmt: skip
def test_every_way_of_writing_the_same_file(tmp_path, content):
    corpus = formats.read(write(tmp_path, content))
    assert [(s.units, s.tags) for s in corpus.sentences] == [
        (["北", "京", "人"], ["B-LOC", "I-LOC", "O"]),
        (["江", "泽", "民"], ["B-PER", "I-PER", "I-PER"]),
    ]
    assert (corpus.scheme, corpus.unit, corpus.repairs, corpus.warnings()) == ("BIO", "character", 0, [])
    assert corpus.entities() == {"LOC": 1, "PER": 1} and corpus.unit_count == 6


def test_lines_are_remembered(tmp_path):
    corpus = formats.read(write(tmp_path, "\r\n\r\n北 O\r\n京 O\r\n \r\n\r\n人 O"))
    assert [sentence.line for sentence in corpus.sentences] == [3, 7]


def test_white_space_can_be_a_character(tmp_path):
    corpus = formats.read(write(tmp_path, "a O\n  O\n\t\tO\n\u3000 O\n\u00a0\tO\n \tB-X\n\u2028 O\n\u200b O\n\nb O\n"))
    assert [sentence.units for sentence in corpus.sentences] == [
        ["a", " ", "\t", "\u3000", "\u00a0", " ", "\u2028", "\u200b"],
        ["b"],
    ]


@pytest.mark.parametrize("content, line, what", [
    ("北 O\n京\n人 O\n", 2, "1 field where the file has 2: '京'"),
    ("北 O\n京 O x\n人 O\n", 2, "3 fields where the file has 2"),
    ("北 O x\n京 O\n", 1, "3 fields"),
    ("北 O\n京 PER\n", 2, "'PER' is no tag"),
    ("北 O\n京 B-\n", 2, "'B-' is no tag"),
    ("北 O\n京 B_PER\n", 2, "'B_PER' is no tag"),
    ("北 O\n京 X-PER\n", 2, "'X-PER' is no tag"),
    ("北 O\n京 b-PER\n", 2, "'b-PER' is no tag"),
    ("北 0\n", 1, "did you mean the letter O"),
    ("O 北\n", 1, "'北' is no tag"),
    ("北 B-A\n京 M-A\n\n人 I-A\n人 O\n国 U-A\n", 2, "'M-A' does not belong in BILOU"),
    ("", 1, "the file is empty"), ("\n\r\n \t\n\u3000\n", 1, "the file is empty"), ("\ufeff", 1, "the file is empty"),
    ("北 O\n\n京\x00 O\n", 3, "NUL"),
    ("北京是中国的首都。\n", 1, "1 field"),
    ("北,B-LOC\n京,I-LOC\n", 1, "of CSV the first line must name the columns, such as 'token,tag'"),
    ("字;实体\n北;B-LOC\n", 1, "of CSV the first line must name the columns"),
    ("This is a text.\nIt has no tags at all.\n", 1, "4 fields where the file has 2"),
    ("北 O\n京 O\n".encode() + b"\xff\xfe O\n", 3, "byte 0xff"),
    ("北 O\n京 O\n人 O\n".encode().replace("京".encode(), b"\xe4\xba"), 2, "fits neither UTF-8 nor GB18030"),
    ("北 O\n京 O\n".encode("gb18030") + b"\xff O\n", 3, "byte 0xff"),
    (("北京 B-LOC\n" * 50).encode() + "北京 B-LOC\n".encode("gb18030"), 51, "fits neither"),
    (b"\xff\xfe\x17", 1, "fits neither"),
], ids=str)  # fmt: skip
def test_errors_name_file_and_line(tmp_path, content, line, what):
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        formats.read(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and what in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(path) + 300


def test_two_million_characters_are_read_line_by_distinct_line(tmp_path, monkeypatch):
    from ner.formats import columns

    parsed = []
    monkeypatch.setattr(columns, "_parse", lambda *args, parse=columns._parse: parsed.append(args) or parse(*args))
    path = write(tmp_path, ("北 B-LOC\n京 I-LOC\n" + "的 O\n" * 40 + "\n") * 5000)
    assert formats.read(path).unit_count == 210_000 and len(parsed) == 5


CONLL = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\nGerman JJ B-NP B-MISC\n\n"
    "Peter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER\n"
)


@pytest.mark.parametrize(
    "content", [CONLL, CONLL.replace(" ", "\t"), CONLL.replace("\n\nPeter", "\n\n# id 5 domain=news\nPeter")]
)
def test_conll_columns(tmp_path, content):
    path = tmp_path / "train.conll"
    path.write_text(content, encoding="utf-8")
    corpus = formats.read(str(path))
    assert [(s.units, s.tags) for s in corpus.sentences] == [
        (["EU", "rejects", "German"], ["B-ORG", "O", "B-MISC"]),
        (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
    ]
    assert corpus.unit == "word" and corpus.sentences[0].line == 3


def test_conll_line_with_a_column_too_few(tmp_path):
    path = tmp_path / "train"
    path.write_text(CONLL.replace("German JJ B-NP B-MISC", "German B-NP B-MISC"), encoding="utf-8")
    with pytest.raises(UserError, match=r"train:5: 3 fields where the file has 4: 'German B-NP B-MISC'"):
        formats.read(str(path))


def test_a_brace_can_be_a_character(tmp_path):
    for first in ("{", "[", "[{"):
        assert formats.read(write(tmp_path, f"{first} O\n}} O\n")).sentences[0].units == [first, "}"]


ROWS = [("江", "B-PER"), ("，", "O"), (",", "O"), ('"', "O"), (" ", "O"), ("北", "B-LOC")]


def table(delimiter, quoting, header):
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(ROWS)
    return out.getvalue()


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("header", [("token", "tag"), ("Word", "NER_tags"), ("字", "标签")])
def test_csv_and_tsv_with_a_header(tmp_path, delimiter, quoting, header):
    corpus = formats.read(write(tmp_path, table(delimiter, quoting, header), "train.csv"))
    (sentence,) = corpus.sentences
    assert list(zip(sentence.units, sentence.tags, strict=True)) == ROWS and sentence.line == 2


def test_sentences_of_csv(tmp_path):
    rows = "Sentence #,Word,POS,Tag\nSentence: 1,江,NN,B-PER\n,泽,NN,I-PER\nSentence: 2,北,NN,B-LOC\n\n,京,NN,O\n"
    corpus = formats.read(write(tmp_path, rows))
    assert [(s.units, s.tags, s.line) for s in corpus.sentences] == [
        (["江", "泽"], ["B-PER", "I-PER"], 2),
        (["北"], ["B-LOC"], 4),
        (["京"], ["O"], 6),
    ]


@pytest.mark.parametrize("row, what", [
    ("江,B-PER,x", "3 fields where the header has 2"), ("江", "1 field where the header has 2"),
    ("江,PER", "'PER' is no tag"), (",O", "no token in ',O'"), ('",O', "no line of CSV"), ("江,", "'' is no tag"),
])  # fmt: skip
def test_errors_of_csv_name_file_and_line(tmp_path, row, what):
    path = write(tmp_path, f"token,tag\n北,O\n{row}\n")
    with pytest.raises(UserError) as caught:
        formats.read(path)
    assert str(caught.value).startswith(f"{path}:3: ") and what in str(caught.value)


def test_a_token_called_label_makes_no_header(tmp_path):
    corpus = formats.read(write(tmp_path, "text\tNN\tlabel\tO\nis\tV\tx\tO\n"))
    assert corpus.sentences[0].units == ["text", "is"]
