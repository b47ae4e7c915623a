"""report.py: the page of a run, whole or unfinished; what is on it, that it is safe, and how a browser takes it."""

import html.parser
import http.server
import json
import random
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ner import chart, markup, mistakes, report, run_files
from ner.errors import UserError

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close."""

    VOID = {"meta", "link", "br", "img"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def numbers(f1, support=10):
    return {"precision": f1 + 0.01, "recall": f1 - 0.01, "f1": f1, "support": support}


def scores(f1=0.85, types=("LOC", "ORG", "PER")):
    return {
        "micro": numbers(f1, 30),
        "macro": numbers(f1 - 0.02),
        "weighted": numbers(f1 - 0.01),
        "accuracy": 0.97,
        "types": {name: numbers(f1 - 0.03 * i) for i, name in enumerate(types)},
    }


def sentence(text, gold, predicted):
    """A line of predictions.jsonl from entities (type, start, end)."""
    lists = []
    for entities in (gold, predicted):
        tags = ["O"] * len(text)
        for name, start, end in entities:
            tags[start:end] = [f"B-{name}"] + [f"I-{name}"] * (end - start - 1)
        lists.append(tags)
    return {"chars": list(text), "gold": lists[0], "predicted": lists[1]}


def fill(run: Path, sentences=None) -> Path:
    """A finished run's files."""
    run.mkdir(parents=True)
    draw = random.Random(3)
    if sentences is None:
        sentences = [
            sentence(
                "江泽民在北京会见比尔·盖茨",
                [("PER", 0, 3), ("LOC", 4, 6), ("PER", 8, 13)],
                [("PER", 0, 3), ("LOC", 4, 7), ("ORG", 8, 13)],
            )
            for _ in range(60)
        ]
        sentences.append(sentence("新华社北京电", [("ORG", 0, 3), ("LOC", 3, 5)], [("ORG", 0, 3), ("LOC", 3, 5)]))
    (run / "predictions.jsonl").write_text("".join(json.dumps(s) + "\n" for s in sentences))
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "epoch": e,
                    "train_loss": 0.5 / e,
                    "dev_loss": 0.4 / e,
                    "dev": scores(0.8 + draw.random() / 10),
                    "seconds": 30.0,
                    "tokens_per_second": 8000,
                    "learning_rate": 1e-3,
                }
            )
            + "\n"
            for e in range(1, 5)
        )
    )
    (run / "test.json").write_text(json.dumps(scores(0.8765)))
    (run / "config.yaml").write_text("tuning: lora  # 调优\nlearning_rate: 0.001\n", encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"device": "cpu", "versions": {"torch": "2.13.0"}}))
    (run / "train.log").write_text(
        "2024-05-06 10:49:17,983 - __main__ - WARNING - 12 sentences of train are in test\n"
        "2024-05-06 10:49:17,983 - __main__ - INFO - epoch 1 begin\n"
    )
    return run


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


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_enclose(low, width):
    ticks = chart.ticks(low, low + width, 5)
    assert 2 <= len(ticks) <= 12
    slack = 1e-6 * max(1, abs(low), width)
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack


def test_counts_on_the_page_are_right(run):
    errors = mistakes.summary(run_files.predictions(run))
    assert errors["types"] == ["LOC", "ORG", "PER"] and errors["count"] == 61 and errors["wrong"] == 120
    assert dict(zip(mistakes.KINDS, errors["totals"], strict=True)) == {
        "correct": 62,
        "wrong boundary": 60,
        "wrong type": 60,
        "wrong both": 0,
        "missed": 0,
        "spurious": 0,
    }
    cells = {
        (row["type"], guess): cell[2]
        for row in errors["rows"]
        for guess, cell in zip([*errors["types"], None], row["cells"], strict=True)
        if cell[0]
    }
    assert cells == {
        ("LOC", "LOC"): {"correct": 1, "wrong boundary": 60},
        ("ORG", "ORG"): {"correct": 1},
        ("PER", "PER"): {"correct": 60},
        ("PER", "ORG"): {"wrong type": 60},
    }


@pytest.mark.parametrize(
    "gold, predicted, kinds",
    [
        ([("PER", 0, 3)], [("PER", 0, 3)], ["correct"]),
        ([("PER", 0, 3)], [("PER", 0, 2)], ["wrong boundary"]),
        ([("PER", 0, 3)], [("LOC", 0, 3)], ["wrong type"]),
        ([("PER", 0, 3)], [("LOC", 1, 5)], ["wrong both"]),
        ([("PER", 0, 3)], [], ["missed"]),
        ([], [("PER", 0, 3)], ["spurious"]),
        ([("PER", 0, 3)], [("PER", 3, 5)], ["missed", "spurious"]),  # they touch, they do not overlap
        (
            [("PER", 0, 6)],
            [("PER", 0, 2), ("PER", 2, 6)],
            ["spurious", "wrong boundary"],
        ),  # the longer overlap is its pair
        ([("PER", 0, 2), ("PER", 2, 6)], [("PER", 0, 6)], ["missed", "wrong boundary"]),
        ([("PER", 0, 4)], [("LOC", 0, 3), ("PER", 3, 4)], ["spurious", "wrong boundary"]),  # the right type goes first
    ],
)
def test_kinds_of_error(gold, predicted, kinds):
    assert sorted(kind for kind, _, _ in mistakes.pairs(gold, predicted)) == kinds


@st.composite
def entities(draw):
    at, found = 0, []
    for gap, length, name in draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4), st.sampled_from("XYZ")))):
        found.append((name, at + gap, at + gap + length))
        at += gap + length
    return found


@given(entities(), entities())
def test_every_entity_has_one_pair(gold, predicted):
    matched = mistakes.pairs(gold, predicted)
    assert sorted(g for _, g, _ in matched if g) == sorted(gold)
    assert sorted(p for _, _, p in matched if p) == sorted(predicted)
    assert sum(kind == "correct" for kind, _, _ in matched) == len(set(gold) & set(predicted))
    for kind, g, p in matched:
        assert (kind == "missed") == (p is None) and (kind == "spurious") == (g is None)
        if g and p:
            same = (g[0] == p[0], g[1:] == p[1:])
            assert (
                kind
                == {
                    (True, True): "correct",
                    (True, False): "wrong boundary",
                    (False, True): "wrong type",
                    (False, False): "wrong both",
                }[same]
            )
            assert max(g[1], p[1]) < min(g[2], p[2])


@given(st.text(min_size=60, max_size=60), entities())
def test_segments_keep_the_text(text, found):
    found = [(*entity, None) for entity in found if entity[2] <= len(text)]
    parts = markup.segments(text, found, whole=True)
    assert "".join(part for part, _, _ in parts) == markup.visible(text)
    assert [name for _, name, _ in parts if name] == [entity[0] for entity in found]


def test_long_sentences_are_shortened(tmp_path):
    text = "长" * 5000 + "北京" * 300
    gold = [("LOC", 5000 + 2 * i, 5002 + 2 * i) for i in range(300)]
    run = fill(tmp_path / "run", [sentence(text, gold, [])])
    page = Page(report.write(run))
    assert page.text.count("长") < 2 * 5000 and f"and {300 - markup.MOST_ENTITIES} more entities" in page.text


def test_words_are_joined_by_spaces(tmp_path):
    words = {"chars": ["IL-2", "binds", "NF-kappa", "B"], "gold": ["B-DNA", "O", "O", "O"], "predicted": ["O"] * 4}
    assert "IL-2DNAmissed binds NF-kappa B" in Page(report.write(fill(tmp_path / "run", [words]))).text


def test_hues_differ():
    assert len(set(markup.hues("ABCDEFGHIJ").values())) == 10
    assert markup.hues(["B", "A"]) == markup.hues(["A", "B", "A"])
    assert all(0 <= hue < 360 for hue in markup.hues(map(str, range(40))).values())


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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!DOCTYPE html><title>?</title><iframe src="report.html" style="width:360px;height:700px"></iframe><script>
onload = () => { const root = document.querySelector("iframe").contentDocument.documentElement;
  document.title = [root.scrollWidth, root.clientWidth].join("/"); }</script>"""
CONTROL = """<!DOCTYPE html><link rel="icon" href="data:,"><img src="http://elsewhere.test/picture.png">
<script>console.error("control"); nothing.here()</script>"""


@pytest.fixture
def site(run):
    """The run folder served on a local port: (port, paths asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(run))

        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(run, site, tmp_path):
    port, asked = site
    evil = sentence(f"{EVIL}江泽民在北京" * 2, [("LOC", 2, 9), ("PERSON", 70, 73)], [("PERSON", 71, 74)])
    (run / "predictions.jsonl").write_text("".join(json.dumps(evil) + "\n" for _ in range(9)))
    report.write(run)
    (run / "measure.html").write_text(MEASURE)
    (run / "control.html").write_text(CONTROL)

    def browse(page, *options):
        """Opens a page with every host name leading to the local server; returns the finished process, paths asked."""
        asked.clear()
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--host-resolver-rules=MAP *.test 127.0.0.1:{port}",
                *options,
                f"http://127.0.0.1:{port}/{page}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, list(asked)

    done, paths = browse("control.html", "--dump-dom")
    assert "CONSOLE" in done.stderr and "/picture.png" in paths, "the test does not see errors or requests"

    for name, size in (("desktop", "1280,2400"), ("phone", "390,2400")):
        picture = tmp_path / f"{name}.png"
        done, paths = browse("report.html", f"--screenshot={picture}", f"--window-size={size}")
        assert paths == ["/report.html"]
        assert "CONSOLE" not in done.stderr, done.stderr
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000

    done, _ = browse("measure.html", "--dump-dom", "--virtual-time-budget=5000")
    needed, given_width = map(int, re.search(r"<title>(\d+)/(\d+)</title>", done.stdout).groups())
    assert 300 < needed <= given_width, "the page scrolls sideways on a phone"
