"""writers.py: what predict.py writes is what other programs, the loader and a terminal can read."""

import json
import re

import pytest
from hypothesis import given, settings
from trained import TEXT, TEXTS, random_predictor

from ner import decoding, formats, writers
from ner.predictor import LONE_SURROGATE, Entity, Result

TAGGED = Result(
    "😀王芳去北京\u3000。", [Entity("王芳", "PER", 1, 3, 0.9), Entity("北京", "LOC", 4, 6, 0.8123456789)], 0.25
)
TYPES = ["LOC", "PER"]


def written(name: str, *results: Result, **options) -> str:
    form = writers.writer(name, TYPES, "character", "msra", **options)
    return form.head + form.separator.join(map(form.record, results)) + form.tail


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_bio_of_any_text(text):
    result = random_predictor("wordpiece").results([text])[0]
    kept = [c for c in LONE_SURROGATE.sub("\ufffd", text) if not c.isspace() and c != "\ufeff"]
    rows = [line.rsplit(" ", 1) for line in writers.bio(result).split("\n") if line]
    assert [row[0] for row in rows] == kept
    begins = sum(tag.startswith("B-") for _, tag in rows)
    assert begins == len([e for e in result.entities if e.text.strip("\ufeff")])
    assert all(tag == "O" or tag[:2] in ("B-", "I-") for _, tag in rows)


@pytest.mark.parametrize("name, ending", [("jsonl", "jsonl"), ("doccano", "jsonl"), ("labelstudio", "json")])
def test_what_annotation_tools_get_comes_back_through_the_loader(tmp_path, name, ending):
    """Tagged, exported, read back: the same entities. Offsets count characters, beyond the first plane too."""
    file = tmp_path / f"out.{ending}"
    file.write_text(written(name, TAGGED, Result("没有", [], 1.0)), encoding="utf-8")
    corpus = formats.read(str(file))
    first = corpus.sentences[0]
    found = [("".join(first.units[start:end]), kind) for kind, start, end in decoding.spans(first.tags)]
    assert found == [("王芳", "PER"), ("北京", "LOC")]
    assert set(corpus.sentences[1].tags) == {"O"}


def test_label_studio_tasks():
    tasks = json.loads(written("labelstudio", TAGGED, Result("", [], 1.0)))
    assert [task["data"] for task in tasks] == [{"text": TAGGED.text}, {"text": ""}]
    prediction = tasks[0]["predictions"][0]
    assert prediction["model_version"] == "msra" and prediction["score"] == 0.25
    region = prediction["result"][1]
    assert (region["from_name"], region["to_name"], region["type"]) == ("label", "text", "labels")
    assert region["value"] == {"start": 4, "end": 6, "text": "北京", "labels": ["LOC"]}
    assert len({region["id"] for region in prediction["result"]}) == 2
    assert json.loads(written("labelstudio")) == []


def test_doccano_lines():
    lines = written("doccano", TAGGED, Result("a\ud800", [], 1.0)).splitlines()
    assert json.loads(lines[0]) == {"text": TAGGED.text, "label": [[1, 3, "PER"], [4, 6, "LOC"]]}
    assert json.loads(lines[1]) == {"text": "a\ud800", "label": []}


def test_html():
    attack = "<script>alert(1)</script>" + TEXT
    page = written("html", Result(attack, [Entity("王芳", "PER", 25, 27, 1.0)], 1.0), TAGGED)
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert "<script" not in page and re.sub("<b>[^<]*</b>|<[^>]*>", "", page).count("&lt;script&gt;") == 1
    assert re.findall(r"<mark[^>]*>([^<]+)<b>PER</b></mark>", page) == ["王芳", "王芳"]
    assert page.count('<p class="sentence"') == 2 and 'lang="zh-CN"' in page


def test_colours_and_control_characters():
    shown = written("text", TAGGED, colour=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", shown.splitlines()[0]) == "😀王芳PER去北京LOC\u3000。"
    assert len(set(re.findall(r"48;5;(\d+)", shown))) == 2  # one colour a type
    hostile = Result("a\x1b[2J\x07\n", [Entity("\x1b[2J", "PER", 1, 5, 1.0)], 1.0)
    assert "\x1b" not in written("text", hostile)
