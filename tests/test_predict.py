"""predict.py, the command and the module: files of any size and kind, formats, options, the prompt."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import tiny
import trained
from trained import ENTITIES, TEXT, plain

import predict
from ner import decoding, formats

ROOT = Path(predict.__file__).parent


@pytest.fixture(scope="module")
def run():
    return trained.exported()


@pytest.fixture(scope="module")
def predictor(run):
    return predict.load(run)


def test_module_functions(predictor, run):
    assert plain(predict.predict([TEXT])[0]) == ENTITIES
    assert plain(predict.load(run / "model").predict([TEXT])[0]) == ENTITIES
    with pytest.raises(TypeError, match="list of texts"):
        predict.predict(TEXT)
    with pytest.raises(AttributeError):
        predict.predict([TEXT])[0][0].start = 3


def test_newest_run_where_none_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "_last", None)
    (tmp_path / "output" / "only").symlink_to(run)
    assert plain(predict.predict([TEXT])[0]) == ENTITIES


def test_book_in_one_line(predictor, run, tmp_path, capsys):
    book = (TEXT + "她没有回答。") * 48_000
    assert len(book) > 1_000_000
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    predict.main(["--run", str(run), "--input", str(tmp_path / "book.txt"), "--output", str(tmp_path / "book.jsonl")])
    record = json.loads((tmp_path / "book.jsonl").read_text(encoding="utf-8"))
    assert record["text"] == book and len(record["entities"]) > 100_000
    assert all(book[e["start"] : e["end"]] == e["text"] for e in record["entities"])


def call(*arguments, capsys):
    predict.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_one_text(run, capsys):
    lines = [line.split("\t") for line in call("--run", run, TEXT, capsys=capsys).splitlines()]
    assert [(text, kind, int(start), int(end)) for text, kind, start, end, _ in lines] == ENTITIES
    assert all(re.fullmatch(r"[01]\.\d{4}", line[4]) for line in lines)


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_every_precision_finds_the_same(run, precision, capsys):
    lines = call("--run", run, "--precision", precision, TEXT, capsys=capsys).splitlines()
    assert [tuple(line.split("\t")[:2]) for line in lines] == [entity[:2] for entity in ENTITIES]


def test_several_texts(run, capsys):
    blocks = call("--run", run, TEXT, "她没有回答。", TEXT, capsys=capsys).split("\n\n")
    assert [block.splitlines()[0] for block in blocks if block] == [TEXT, "她没有回答。", TEXT]
    assert len(blocks[0].splitlines()) == 4


def test_json(run, capsys):
    out = call("--run", run, "--json", TEXT, "a\udcffb", "", capsys=capsys)
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["text"] for record in records] == [TEXT, "a\udcffb", ""]
    assert set(records[0]) == {"text", "entities"} and "王芳" in out
    assert set(records[0]["entities"][0]) == {"text", "type", "start", "end", "score"}
    assert [(e["text"], e["type"], e["start"], e["end"]) for e in records[0]["entities"]] == ENTITIES
    same = [call("--run", run, *form, TEXT, capsys=capsys) for form in (["--json"], ["--format", "jsonl"])]
    assert same[0] == same[1]


def test_files_come_back_through_the_loader(run, tmp_path, capsys):
    lines = ["".join(chars) for chars, _ in tiny.sentences(50, seed=9)] + [f" {TEXT}\u3000{TEXT}\ufeff"]
    (tmp_path / "in.txt").write_text("\n".join(lines), encoding="utf-8")
    for form in ("bio", "jsonl"):
        out = tmp_path / f"out.{form}"
        said = call("--run", run, "--input", tmp_path / "in.txt", "--output", out, "--format", form, capsys=capsys)
        assert said == ""
        found = [plain(entities) for entities in predict.predict(lines)]
        corpus = formats.read(str(out))
        assert len(corpus.sentences) == len(lines)
        for sentence, entities in zip(corpus.sentences, found, strict=True):
            read = [("".join(sentence.units[s:e]), kind) for kind, s, e in decoding.spans(sentence.tags)]
            assert read == [("".join(text.split()), kind) for text, kind, _, _ in entities]


def test_standard_input_and_encodings(run, tmp_path, capsys, monkeypatch):
    three = f"{TEXT}\n\n{TEXT}"
    for data in (three.replace("\n", "\r\n").encode(), f"\ufeff{three}\n".encode(), three.encode("gb18030")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        out = call("--run", run, "--input", "-", "--json", capsys=capsys)
        records = [json.loads(line) for line in out.splitlines()]
        assert [record["text"] for record in records] == [TEXT, "", TEXT]
        assert len(records[2]["entities"]) == 3


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, run):
    monkeypatch.setattr(predict, "load", lambda *_: trained.Stub())
    peaks = []
    for lines in (10_000, 40_000):
        (tmp_path / "in").write_text(("记者从有关部门获悉，" * 8 + "\n") * lines, encoding="utf-8")
        tracemalloc.start()
        predict.main(["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with open(tmp_path / "out", encoding="utf-8") as file:
            assert sum(1 for _ in file) == lines
    assert peaks[1] < 1.1 * peaks[0] + 100_000 < (tmp_path / "in").stat().st_size / 4


def test_prompt_on_a_terminal(run):
    """A real terminal: two sentences typed in, coloured entities out, Ctrl-D ends it with code 0."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "predict.py", "--run", str(run)],
        cwd=ROOT,
        env=environment,
        stdin=child,
        stdout=child,
        stderr=child,
        close_fds=True,
    )
    os.close(child)
    seen = b""

    def until(mark, count):
        nonlocal seen
        while seen.count(mark) < count:
            assert select.select([parent], [], [], 90)[0], seen
            seen += os.read(parent, 4096)

    try:
        until(b"> ", 1)
        for count, line in enumerate((TEXT, "她没有回答。"), 2):
            os.write(parent, line.encode() + b"\n")
            until(b"\n> ", count)
        os.write(parent, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    text = seen.decode()
    assert "LOC, ORG, PER" in text and re.search("\x1b\\[38;5;16;48;5;\\d+m北京\x1b\\[0m", text)
    assert re.search(r"王芳\s+PER\s+0\s+2\s+0\.\d{4}", text)
    assert text.count("她没有回答。") == 2  # typed and shown, without an entity


def test_the_onnx_engine_imports_neither_torch_nor_transformers(run):
    code = (
        "import sys, predict; predict.main(sys.argv[1:]); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft', 'jinja2', 'onnx')))"
    )
    command = [sys.executable, "-c", code, "--run", str(run), "--json", TEXT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and [e["text"] for e in json.loads(done.stdout)["entities"]] == ["王芳", "北京", "武汉"]


def test_uncertain_texts_come_first_and_once(tmp_path, monkeypatch, run):
    """The margin of the stub's texts falls with their length; equal ones stand in the order of the file."""
    monkeypatch.setattr(predict, "load", lambda *_: trained.Stub())
    lines = ["中" * 3, "国" * 9, "", "人" * 3, "国" * 9, "民" * 7, "中" * 3] * 900
    (tmp_path / "in").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    for form in ("doccano", "labelstudio"):
        predict.main([*arguments, "--uncertain", "3", "--format", form])
        text = (tmp_path / "out").read_text("utf-8")
        if form == "doccano":
            texts = [json.loads(line)["text"] for line in text.splitlines()]
        else:
            texts = [task["data"]["text"] for task in json.loads(text)]
        assert texts == ["国" * 9, "民" * 7, "中" * 3]


def test_uncertain_texts_are_those_of_least_margin(run, predictor, tmp_path, capsys):
    texts = ["".join(chars)[:length] for length in (4, 9, 30) for chars, _ in tiny.sentences(20, seed=length)]
    margins = {result.text: result.margin for result in predictor.results(texts)}
    (tmp_path / "in").write_text("\n".join(texts), encoding="utf-8")
    out = call("--run", run, "--input", tmp_path / "in", "--uncertain", 5, "--json", capsys=capsys)
    shown = [margins[json.loads(line)["text"]] for line in out.splitlines()]
    assert shown == pytest.approx(sorted(margins.values())[:5], abs=1e-3) and len(set(margins.values())) > 5


def test_import_from_a_project_with_modules_of_the_same_names(run, tmp_path):
    """As a library: a host project's config.py, model.py, errors.py and so on are its own, and stay so."""
    for name in ("config", "model", "errors", "evaluate", "loader", "report", "formats", "files"):
        (tmp_path / f"{name}.py").write_text("WHOSE = 'host'\n")
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "import config, model, errors, predict\n"
        "for engine in ('onnx', 'torch'):\n"
        "    assert predict.load(sys.argv[2], engine=engine).predict(['北京'])\n"
        "import evaluate, loader, report, formats, files\n"
        "assert {m.WHOSE for m in (config, model, errors, evaluate, loader, report, formats, files)} == {'host'}\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
