"""What two files have in common that they should not, and what a file holds."""

from pathlib import Path

import pytest

from ner import formats, survey
from ner.corpus import Corpus, Sentence

ROOT = Path(__file__).resolve().parents[1]


NER_DATA = ROOT.parent / "shared" / "ner_data"


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def test_what_two_files_share_is_named(tmp_path):
    train = formats.read(write(tmp_path, "北 B-LOC\n京 I-LOC\n\n天 O\n津 O\n\n人 O\n", "train"))
    test = formats.read(write(tmp_path, "新 O\n\n北 B-LOC\n京 I-LOC\n\n天 B-LOC\n津 I-LOC\n\n周 B-PER\n", "test"))
    few_train, few_test, shared, torn, lacks = survey.warnings_of(train, test)
    assert shared.startswith(
        f"2 of 4 sentences of {test.path} are in {train.path} too: line 3 = line 1 (北京), line 6 = line 4"
    )
    assert torn == f"1 text has different tags in different places: {train.path}:4 and {test.path}:6"
    assert lacks.startswith(f"{test.path}:9: type PER is not in {train.path}")
    rest = "; do not trust the scores of types with fewer than 10"
    assert few_train == f"{train.path}: LOC has 1 entity{rest}"
    assert few_test == f"{test.path}: LOC has 2 entities, PER has 1 entity{rest}"


def test_nothing_to_warn_of(tmp_path):
    train, test = (
        formats.read(write(tmp_path, "".join(f"{char} B-LOC\n\n" for char in part), part))
        for part in ("甲乙丙丁戊己庚辛壬癸", "子丑寅卯辰巳午未申酉")
    )
    assert survey.warnings_of(train, test) == []


def test_real_files():
    if not NER_DATA.is_dir():
        pytest.skip("no real corpus beside the project")
    corpora = [formats.read(str(NER_DATA / part)) for part in ("train", "dev", "test")]
    assert [(len(c.sentences), c.unit_count) for c in corpora] == [(1412, 70054), (209, 10001), (408, 20011)]
    assert corpora[2].entities().total() == 722 and corpora[0].scheme == "BIO"
    assert survey.compare(corpora[0], corpora[2]) == []


def test_a_type_that_only_the_sample_lacks_is_told_so():
    train = Corpus("train", [Sentence(["x"], [f"B-{kind}"], 1) for kind in "AB"], "BIO")
    test = Corpus("test", [Sentence(["y"], ["B-B"], 4)], "BIO")
    assert survey.compare(train, test) == []
    (warning,) = survey.compare(train.part(train.sentences[:1]), test)
    assert warning.startswith("test:4: type B is in train, but not in the 1 of its sentences that are trained on")


def test_nothing_is_said_twice(tmp_path):
    train = formats.read(write(tmp_path, "北 B-LOC\n\n北 O\n\n京 I-LOC\n", "train"))
    others = [formats.read(write(tmp_path, f"{char} B-LOC\n", char)) for char in "甲乙"]
    warnings = survey.warnings_of(train, *others)
    assert len(warnings) == len(set(warnings))
    for words in ("orphan tags", "different tags in different places", f"{train.path}: LOC has"):
        assert sum(words in warning for warning in warnings) == 1
    warnings = survey.warnings_of(train, train)
    assert len(warnings) == len(set(warnings)), "dev may be train's own file"


def test_the_survey_counts_entities_forms_and_lengths():
    corpus = Corpus(
        "x", [Sentence(list("北京北京"), ["B-A", "I-A", "B-A", "I-A"], 1), Sentence(["x"], ["B-B"], 9)], "BIO"
    )
    (file,) = survey.survey([corpus], max_length=5)["files"]
    assert file["types"] == {
        "A": {"count": 2, "forms": 1, "adjacent": 1, "examples": {"北京": 2}},
        "B": {"count": 1, "forms": 1, "adjacent": 0, "examples": {"x": 1}},
    }
    lengths = file["lengths"]
    assert (lengths["min"], lengths["max"], lengths["mean"], lengths["need_windows"]) == (1, 4, 2.5, 1)
