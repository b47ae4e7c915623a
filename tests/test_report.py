"""The page of a run, whole or unfinished: what is on it, and that it is safe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import EVIL, Page, fill, scores, sentence

from ner import markup, mistakes, report
from ner.errors import UserError


@pytest.fixture
def run(tmp_path):
    return fill(tmp_path / "20240506-104917")


def test_whole_run(run):
    path = report.write(run)
    page = Page(path)
    assert path == run / "report.html"
    assert page.tags.count("svg") == 2 and page.tags.count("polyline") == 4 and page.tags.count("circle") == 16
    for text in (
        "20240506-104917",
        "0.8765",
        "0.9700",
        "12 sentences of train are in test",
        "tuning: lora  # 调优",
        "versions.torch",
        "2.13.0",
        "江泽民",
        "wrong boundary",
        "wrong type",
    ):
        assert text in page.text, text
    assert "epoch 1 begin" not in page.text
    assert page.tags.count("article") == mistakes.WORST  # of 60 sentences with errors
    assert ("name", "viewport") in page.attributes
    assert list(run.glob(".*")) == []


def test_nothing_from_elsewhere(run):
    page = Page(report.write(run))
    assert "script" not in page.tags
    links = [value for name, value in page.attributes if name in ("src", "href", "action", "srcset", "data")]
    assert links == ["data:,"]
    source = (run / "report.html").read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source and "@import" not in source
    assert "url(" not in source and "default-src 'none'" in source


def test_escaped(tmp_path):
    evil = sentence(EVIL + "\x00\x1b[31m\u202e张三", [(EVIL, 0, 5)], [("PER", 3, 9)])
    run = fill(tmp_path / "<b>run", [evil])
    (run / "config.yaml").write_text(f"train: {EVIL}\n</pre>\n")
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    (run / "test.json").write_text(json.dumps(scores(types=(EVIL,))))
    (run / "train.log").write_text(f"2024-05-06 10:49:17,983 - __main__ - WARNING - {EVIL}\n")
    page = Page(report.write(run))
    assert not {"script", "img", "b>run"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 7
    assert "\x00" not in page.text and "\x1b" not in page.text


def test_lone_surrogates_and_an_unknown_alphabet_of_types(tmp_path):
    run = fill(tmp_path / "run", [sentence("a\ud800b", [("类型", 1, 2)], []), sentence("ab", [], [("\udfff", 0, 1)])])
    assert "类型" in Page(report.write(run)).text


FILES = ("predictions.jsonl", "metrics.jsonl", "test.json", "config.yaml", "environment.json", "train.log")


@pytest.mark.parametrize("missing", [*((name,) for name in FILES), FILES[:-1], ("test.json", "predictions.jsonl")])
def test_unfinished_run(run, missing):
    for name in missing:
        (run / name).unlink()
    page = Page(report.write(run))
    assert "svg" in page.tags or "metrics.jsonl" in missing
    if "test.json" in missing:
        assert "no test scores yet" in page.text
        (run / "finished.json").write_text("{}")  # a run that was not given a test file
        assert "no test scores yet" not in Page(report.write(run)).text
        assert "best so far" in page.text or "metrics.jsonl" in missing


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"{tmp_path}: not the folder of a run" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_half_written_lines_and_numbers_that_are_none(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "train_loss": NaN, "dev_loss": Infinity, "dev": null}\n{"epoch": 6, "train_l')
    with (run / "predictions.jsonl").open("a") as file:
        file.write('{"chars": ["a"], "gold": ["O", "O"], "predicted": ["O"]}\n[]\n{"chars": ["北", "京"], "go')
    page = Page(report.write(run))
    assert page.tags.count("circle") == 16
    assert "nan" not in (run / "report.html").read_text(encoding="utf-8").lower().replace("finance", "")


short = st.text(max_size=5)
plain = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | short,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(short, inner, max_size=3),
)
shaped = st.dictionaries(
    st.sampled_from(
        [
            "micro",
            "macro",
            "weighted",
            "types",
            "accuracy",
            "epoch",
            "train_loss",
            "dev_loss",
            "dev",
            "f1",
            "chars",
            "gold",
            "predicted",
        ]
    ),
    plain,
)


@settings(max_examples=120, deadline=None)
@given(test=shaped | plain, lines=st.lists(shaped | plain, max_size=4), data=st.data())
def test_whatever_the_files_hold(tmp_path_factory, test, lines, data):
    run = tmp_path_factory.mktemp("run")
    (run / "test.json").write_text(json.dumps(test))
    for name in ("metrics.jsonl", "predictions.jsonl"):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "environment.json").write_text(json.dumps(data.draw(plain)))
    (run / "config.yaml").write_bytes(data.draw(st.binary(max_size=20)))
    Page(report.write(run))


def test_one_epoch_and_equal_values(run):
    line = json.dumps({"epoch": 1, "train_loss": 0.0, "dev_loss": 0.0, "dev": scores(0.5)})
    (run / "metrics.jsonl").write_text(line + "\n")
    assert Page(report.write(run)).tags.count("circle") == 4


def test_long_sentences_are_shortened(tmp_path):
    text = "长" * 5000 + "北京" * 300
    gold = [("LOC", 5000 + 2 * i, 5002 + 2 * i) for i in range(300)]
    run = fill(tmp_path / "run", [sentence(text, gold, [])])
    page = Page(report.write(run))
    assert page.text.count("长") < 2 * 5000 and f"and {300 - markup.MOST_ENTITIES} more entities" in page.text


def test_words_are_joined_by_spaces(tmp_path):
    words = {"chars": ["IL-2", "binds", "NF-kappa", "B"], "gold": ["B-DNA", "O", "O", "O"], "predicted": ["O"] * 4}
    assert "IL-2DNAmissed binds NF-kappa B" in Page(report.write(fill(tmp_path / "run", [words]))).text


def test_not_a_folder(tmp_path, capsys):
    with pytest.raises(UserError, match="not a folder"):
        report.write(tmp_path / "none")
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "none")])
    assert stop.value.code == 2 and "none: not a folder" in capsys.readouterr().err


def test_command_prints_the_path(run, capsys):
    report.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


def test_page_that_cannot_be_written(run):
    (run / "report.html").mkdir()
    (run / "report.html" / "file").touch()
    with pytest.raises(UserError, match="report.html: cannot be written"):
        report.write(run)
    assert not list(run.glob(".report*"))


def test_without_torch(run):
    code = f"import sys; from ner import report; report.write({str(run)!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parents[1], timeout=60)
