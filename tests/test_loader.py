"""`python loader.py FILE...`: looks at tagged files before training on them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import loader
from ner import formats
from ner.corpus import Corpus, Sentence
from ner.survey import survey

ROOT = Path(__file__).resolve().parents[1]


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


PLAIN = "北 B-LOC\n京 I-LOC\n人 O\n\n江 B-PER\n泽 I-PER\n民 I-PER\n"


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
    assert first["characters"] == corpus.unit_count and first["scheme"] == "BIO" and first["lengths"]["room"] == 28
    assert second["lengths"]["need_windows"] == 1 and second["rare"] == ["PER"]
    assert (
        second["tokenizer"]["vanished_examples"] == {"\u3000": 1} and second["tokenizer"]["unknown_examples"]["龘"] == 1
    )
    assert report["several_types"]["北京"] == {"LOC": first["types"]["LOC"]["examples"]["北京"], "PER": 1}


def test_the_survey_shows_colours_and_hides_control_characters():
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


def test_the_default_encoders_tokenizer_is_tried_when_none_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader.main([write(tmp_path, PLAIN), "--json"])
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["lengths"]["of"] == "tokens" and file["tokenizer"]["tokens"] == 6 and file["tokenizer"]["unknown"] == 0


def test_files_of_different_units_are_not_looked_at_together(tmp_path, capsys):
    files = [write(tmp_path, PLAIN), write(tmp_path, "John B-PER\nlives O\nhere O\n", "words")]
    with pytest.raises(SystemExit):
        loader.main(files)
    assert "its lines hold words" in capsys.readouterr().err


def test_files_and_tokenizer_of_the_project_are_found_from_any_folder(tmp_path, capsys, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    write(project, PLAIN, "mine")
    tiny.wordpiece(project / "encoder")
    monkeypatch.setattr("ner.paths.ROOT", project)
    monkeypatch.chdir(tmp_path)
    loader.main(["mine", "--tokenizer", "encoder", "--json"])
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["path"] == str(project / "mine")
