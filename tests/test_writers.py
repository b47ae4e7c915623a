"""writers.py: what predict.py writes is what other programs, the loader and a terminal can read."""

import csv
import json
import re

import pytest
import trained
from hypothesis import given, settings
from trained import TEXT, TEXTS, random_predictor

import loader
import predict
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


AWKWARD = [
    TEXT, "", "😀" + TEXT + "👩\u200d👩\u200d👧", "𠮷野王芳\r\n住在北京\n", "\u00a0王芳\u00a0去\u3000北京 ",
    '{"a": {"王芳": ["北京"]}}',
    "\t王芳,\"北京\";'武汉'", "e\u0301王芳\u2028北京\u0085武汉", "[王芳]{北京}}{{", "\ufeff王芳", "\\n王芳\\u5317",
]  # fmt: skip


@pytest.mark.parametrize("form, ending", [("jsonl", "jsonl"), ("doccano", "jsonl"), ("labelstudio", "json")])
def test_awkward_texts_come_back_with_the_same_tags_through_the_commands(tmp_path, form, ending, capsys):
    """Tagged by predict.py, exported, read by the loader's readers: the same characters, the same tags."""
    file = tmp_path / f"out.{ending}"
    command = ["--run", str(trained.exported()), "--engine", "onnx", "--format", form]
    predict.main([*command, "--output", str(file), *AWKWARD])
    found = predict.load(trained.exported(), engine="onnx").predict(AWKWARD)
    assert sum(map(len, found)) >= len(AWKWARD) - 1
    corpus = formats.read(str(file))
    expected = [(list(text), tags_of(text, entities)) for text, entities in zip(AWKWARD, found, strict=True) if text]
    assert [(sentence.units, sentence.tags) for sentence in corpus.sentences] == expected
    assert corpus.skipped == corpus.repairs == 0
    loader.main([str(file)])
    assert "王芳" in capsys.readouterr().out


def tags_of(text, entities):
    tags = ["O"] * len(text)
    for entity in entities:
        tags[entity.start : entity.end] = [f"B-{entity.type}"] + [f"I-{entity.type}"] * (len(entity.text) - 1)
    return tags


@pytest.mark.parametrize(
    "form, ending", [("jsonl", "jsonl"), ("doccano", "jsonl"), ("labelstudio", "json"), ("bio", "txt")]
)
def test_the_least_certain_texts_in_every_format(tmp_path, form, ending):
    texts = ["王芳去北京。", "没有。", "王芳去北京。", "他在武汉", "a b"]
    (tmp_path / "in.txt").write_text("\n".join(texts), "utf-8")
    command = [
        "--run",
        str(trained.exported()),
        "--input",
        str(tmp_path / "in.txt"),
        "--uncertain",
        "2",
        "--format",
        form,
    ]
    predict.main([*command, "--output", str(tmp_path / f"out.{ending}")])
    results = {result.text: result.margin for result in predict.load(trained.exported()).results(texts)}
    expected = ["".join(text.split()) for text in sorted(results, key=results.__getitem__)[:2]]
    sentences = formats.read(str(tmp_path / f"out.{ending}")).sentences
    assert ["".join("".join(sentence.units).split()) for sentence in sentences] == expected


def test_brat_and_csv_of_what_was_tagged_come_back(tmp_path):
    """Neither is written by predict.py; these files are as brat and a spreadsheet write them."""
    text = "".join(line + "\n" for line in AWKWARD if line and "\n" not in line and "\u2028" not in line)
    (result,) = predict.load(trained.exported(), engine="onnx").results([text])
    lines = [f"T{n}\t{e.type} {e.start} {e.end}\t{e.text}\n" for n, e in enumerate(result.entities, 1)]
    (tmp_path / "a.ann").write_text("".join(lines), "utf-8")
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    tags = tags_of(text, result.entities)
    corpus = formats.read(str(tmp_path / "a.ann"))
    assert len(result.entities) > 5 and corpus.skipped == 0
    assert "\n".join("".join(s.units) for s in corpus.sentences) + "\n" == text
    assert [tag for s in corpus.sentences for tag in s.tags] == [
        t for c, t in zip(text, tags, strict=True) if c != "\n"
    ]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["token", "tag"])
        for char, tag in zip(text, tags, strict=True):
            table.writerow([char, tag] if char != "\n" else [])
    again = formats.read(str(tmp_path / "a.csv")).sentences
    assert [(s.units, s.tags) for s in again] == [(s.units, s.tags) for s in corpus.sentences]


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
