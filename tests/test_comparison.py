"""ner/comparison.py: several runs on one page; the numbers are theirs, the differences right, and all of it is safe."""

import json
import shutil
from pathlib import Path

import pytest
from pages import EVIL, Page, fill, scores, sentence

from ner import comparison, report
from ner.errors import UserError
from ner.run_files import Prediction

TEXT = "江泽民在北京会见张伟"
GOLD = [("PER", 0, 3), ("LOC", 4, 6), ("PER", 8, 10)]


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two runs: the second misses an entity of the second sentence, and took less time for it."""
    runs = []
    for name, f1, missed, rate in (("first", 0.9, 0, "0.001"), ("second", 0.8, 1, "0.002")):
        run = fill(tmp_path / name, [sentence(TEXT, GOLD, GOLD), sentence(TEXT, GOLD, GOLD[missed:])])
        (run / "test.json").write_text(json.dumps(scores(f1)))
        (run / "config.yaml").write_text(f"tuning: lora\nlearning_rate: {rate}\nrun: {name}\n")
        with (run / "train.log").open("a") as log:
            log.write(
                "2024-05-06 10:49:17,983 - __main__ - INFO - trainable params: 1,234 || all params: 56,789 || …\n"
            )
        runs.append(run)
    return runs


def test_scores_cost_settings_and_curves_stand_side_by_side(two):
    page = Page(comparison.write(two))
    for text in ("Comparison of 2 runs", "0.9000", "0.8000", "1,234", "56,789", "120", "8,000", "0.001", "0.002"):
        assert text in page.text, text
    assert "learning_rate" in page.text and "tuning" not in page.text, "only what differs is shown"
    assert page.tags.count("svg") == 3 and page.tags.count("polyline") == 6
    colours = [value for name, value in page.attributes if name == "class" and value in ("line0", "line1")]
    assert set(colours) == {"line0", "line1"}
    assert page.attributes.count(("class", "best")) == 5 + 3, "one run is better in each mean and in each type"


def test_the_sentence_on_which_they_differ_is_shown_with_both_answers(two):
    page = Page(comparison.write(two))
    assert page.tags.count("article") == 1
    assert "2 test sentences are in all runs" in page.text and "not scored on the same" not in page.text
    assert "the runs find different entities in 1 of them" in page.text
    assert "first: 0 errors" in page.text and "second: 1 error" in page.text
    assert "first 2, \nsecond 1" in page.text or "first 2, second 1" in page.text, "sentences without an error"


def found(text: str, gold: list, predicted: list, line: int = 1) -> Prediction:
    row = sentence(text, gold, predicted)
    return Prediction(line, row["chars"], row["gold"], row["predicted"])


def test_the_largest_difference_comes_first():
    texts = ("甲在北京", "乙在北京", "丙在北京")
    place, person = ("LOC", 2, 4), ("PER", 0, 1)
    right = {text: found(text, [place, person], [place, person], i) for i, text in enumerate(texts)}
    wrong = {
        "甲在北京": found("甲在北京", [place, person], [place]),
        "乙在北京": right["乙在北京"],
        "丙在北京": found("丙在北京", [place, person], []),
    }
    result = comparison.differing([right, wrong])
    assert (result["common"], result["count"], result["faultless"]) == (3, 2, [3, 1])
    assert [item["number"] for item in result["shown"]] == [2, 0]
    assert [errors for errors, _ in result["shown"][0]["runs"]] == [0, 2]


def test_runs_of_other_test_sets_share_no_sentence(two):
    (two[1] / "predictions.jsonl").write_text(json.dumps(sentence("上海", [], [])) + "\n")
    text = Page(comparison.write(two)).text
    assert "no test sentence in common" in text
    assert "not scored on the same test sentences" in text and "0 of 2 are in all runs" in text


def test_a_text_that_stands_twice_is_compared_place_by_place(two):
    sentences = [found(TEXT, GOLD, GOLD, 1), found(TEXT, GOLD, [], 2)]
    assert list(comparison._by_key(sentences).values()) == sentences


def test_runs_of_one_name_are_told_apart(two, tmp_path):
    other = tmp_path / "elsewhere" / "first"
    other.parent.mkdir()
    shutil.copytree(two[0], other)
    text = Page(comparison.write([two[0], other])).text
    assert str(two[0]) in text and str(other) in text


def test_unfinished_runs_are_compared_too(two):
    for name in ("test.json", "predictions.jsonl", "environment.json"):
        (two[1] / name).unlink()
    page = Page(comparison.write(two))
    assert "best so far" in page.text and "not scored on the same kind of set" in page.text
    for path in two[1].iterdir():
        path.write_bytes(b"\xff{]")
    Page(comparison.write(two))


def test_everything_is_escaped_and_nothing_is_loaded(two, tmp_path):
    evil = two[1].with_name("<b>" + EVIL.replace("/", ""))
    two[1].rename(evil)
    (evil / "config.yaml").write_text(f"train: {json.dumps(EVIL)}\n")
    (evil / "test.json").write_text(json.dumps(scores(types=(EVIL,))))
    (evil / "environment.json").write_text(json.dumps({"device": EVIL}))
    lines = [sentence(EVIL + "\x1b", [(EVIL, 0, 5)], []), sentence(TEXT, GOLD, [])]
    for run in (two[0], evil):
        (run / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        lines[0]["predicted"] = ["B-PER"] + ["O"] * len(EVIL)
    page = Page(comparison.write([two[0], evil]))
    assert not {"script", "img"} & set(page.tags) and page.text.count("<script>alert(1)") >= 3
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert [value for name, value in page.attributes if name in ("src", "href", "srcset", "data")] == ["data:,"]
    source = (tmp_path / "comparison.html").read_text("utf-8")
    assert "default-src 'none'" in source and "http:" not in source and "<b><" not in source


def test_the_command(two, tmp_path, capsys):
    report.main(["--compare", *map(str, two)])
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.html'}\n"
    report.main(["--compare", *map(str, two), "--output", str(tmp_path / "mine.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'mine.html'}\n"
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("count", "said"), [(1, "1 run(s) given; expected 2 to 8"), (9, "9 run(s) given; expected 2 to 8")]
)
def test_too_few_or_too_many_are_refused(two, count, said):
    with pytest.raises(UserError) as caught:
        comparison.write([two[0]] * count)
    assert said in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(two, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: not the folder of a run"):
        comparison.write([two[0], tmp_path / "empty"])
