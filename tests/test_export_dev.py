"""ONNX files and the dev sentences: what is calibrated on, what is scored, and which engine tags by default."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import trained
from onnx import numpy_helper

import model as model_command
from ner import config, engines, export, onnx_writer, saved_model
from ner.corpus import Sentence
from ner.predictor import load


@pytest.fixture
def learned(tmp_path):
    """A copy of a run that has learned the names of tiny.py, without an ONNX file."""
    return Path(shutil.copytree(trained.run(), tmp_path / "run"))


def sentences(count: int, seed: int = 3) -> list[Sentence]:
    return [Sentence(chars, tags, line) for line, (chars, tags) in enumerate(tiny.sentences(count, seed), 1)]


def quantize_badly(source: Path, target: Path, samples: list) -> None:
    """Write a file whose head gives every token the same scores."""
    graph = onnx.load(str(source))
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "model.classifier.bias")
    weight.CopyFrom(numpy_helper.from_array(np.array([100, 0, 0, 0, 0, 0, 0], np.float32), weight.name))
    onnx.save(graph, str(target))


@pytest.mark.parametrize("count", [12, 60, 200])
def test_no_sentence_is_both_calibrated_on_and_scored(learned, monkeypatch, count):
    calibrated, scored = set(), []
    quantize, compare = onnx_writer.quantize, export._compare_on_dev
    tokenizer = saved_model.load(learned)[1]

    def watched_quantize(source, target, samples):
        rows = [row for inputs in samples for row in inputs["input_ids"]]
        calibrated.update(tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in rows)
        quantize(source, target, samples)

    def watched_compare(written, tags, torch_tags, dev):
        ids = [tokenizer(sentence.units, is_split_into_words=True).input_ids for sentence in dev]
        scored.extend(tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in ids)
        compare(written, tags, torch_tags, dev)

    monkeypatch.setattr(onnx_writer, "quantize", watched_quantize)
    monkeypatch.setattr(export, "_compare_on_dev", watched_compare)
    dev = sentences(count)
    written = export.write_onnx(learned, "int8", dev)
    assert calibrated and scored and not calibrated & set(scored)
    assert written.sentences == len(scored) <= count - min(32, count // 4)


def test_a_file_that_scores_worse_does_not_tag_by_default(learned, monkeypatch, caplog):
    monkeypatch.setattr(onnx_writer, "quantize", quantize_badly)
    with caplog.at_level(logging.INFO):
        export.export_finished(learned, "int8", sentences(60))
    record = json.loads((learned / "model" / "onnx.json").read_text())
    assert record["default"] is False and record["f1"] < record["torch_f1"] - export.LARGEST_LOSS
    messages = [entry.getMessage() for entry in caplog.records]
    assert any(text.startswith("onnx: model_int8.onnx") and "strict F1 on" in text for text in messages)
    assert any("scores more than 0.3 points under PyTorch, so PyTorch tags by default" in text for text in messages)
    monkeypatch.setattr(engines, "may_have_accelerator", lambda: False)
    predictor = load(learned)
    assert isinstance(predictor.tagger.engine, engines.TorchEngine)
    assert trained.plain(predictor.predict([trained.TEXT])[0]) == trained.ENTITIES
    assert load(learned, engine="onnx").predict([trained.TEXT]) == [[]], "the file is taken where it is asked for"


@pytest.mark.parametrize("loss, default", [(0.003, True), (0.0031, False)])
def test_a_file_may_lose_three_tenths_of_a_point(monkeypatch, loss, default):
    f1 = iter([0.9 - loss, 0.9])
    monkeypatch.setattr(export, "score", lambda gold, tags: {"micro": {"f1": next(f1)}})
    written = onnx_writer.OnnxFile("model_int8.onnx", 1, 0.0, 1.0)
    dev = sentences(3)
    tags = [["O"] * len(sentence.units) for sentence in dev]
    export._compare_on_dev(written, tags, tags, dev)
    assert written.default is default


def test_the_command_says_that_pytorch_keeps_tagging(learned, monkeypatch, capsys):
    monkeypatch.setattr(onnx_writer, "quantize", quantize_badly)
    tiny.corpus(learned / "dev", 40)
    (learned / "config.yaml").write_text(config.dump(config.load(["--dev", str(learned / "dev")])[0]), "utf-8")
    model_command.main(["export", str(learned)])
    assert "PyTorch keeps tagging by default: 0.3 points less F1 are not accepted" in capsys.readouterr().out


def test_an_export_for_other_programs_uses_dev_as_a_finished_run_does(learned, monkeypatch, tmp_path, caplog):
    calibrated = []
    quantize = onnx_writer.quantize

    def watched_quantize(source, target, samples):
        calibrated.extend(samples)
        quantize(source, target, samples)

    monkeypatch.setattr(onnx_writer, "quantize", watched_quantize)
    dev = tiny.corpus(learned / "dev", 60, seed=3)
    (learned / "config.yaml").write_text(config.dump(config.load(["--dev", str(dev)])[0]), "utf-8")
    (learned / "predictions.jsonl").write_text(json.dumps({"chars": ["北"]}) + "\n", "utf-8")
    inside = export.write_onnx(learned, "int8", sentences(60))
    of_finished, calibrated = calibrated, []
    taggers, tags = [], export._tags
    monkeypatch.setattr(export, "_tags", lambda tagger, dev: taggers.append(tagger) or tags(tagger, dev))
    exact, int8 = export.export(learned, tmp_path / "onnx", int8=True)
    assert (int8.sentences, int8.f1, int8.torch_f1) == (inside.sentences, inside.f1, inside.torch_f1)
    assert exact.f1 == exact.torch_f1 and not caplog.records
    kinds = [type(tagger.engine) for tagger in taggers]
    assert kinds == [engines.TorchEngine, engines.OnnxEngine, engines.OnnxEngine], "PyTorch tags dev once for both"
    for one, other in zip(of_finished, calibrated, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize(
    ("dev", "reason"),
    [
        (None, "config.yaml names no dev file"),
        ("hub:people_daily", "hub:people_daily is not on this disk"),
        ("/gone/dev", "/gone/dev"),
        ("no config", "has no config.yaml that names a dev file"),
    ],
)
def test_an_export_without_dev_sentences_says_why(learned, tmp_path, caplog, dev, reason):
    if dev != "no config":
        made = config.Config().model_copy(update={"dev": dev})
        (learned / "config.yaml").write_text(config.dump(made), "utf-8")
    (written,) = export.export(learned, tmp_path / "onnx")
    (entry,) = caplog.records
    assert entry.getMessage().startswith("scores are not compared on dev sentences: ") and reason in entry.getMessage()
    assert written.f1 is None and (tmp_path / "onnx" / "model.onnx").is_file()


def test_a_finished_run_is_exported(learned, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        export.export_finished(learned, "none", sentences(40))
    assert not list((learned / "model").glob("*onnx*")) and not caplog.records
    with caplog.at_level(logging.INFO):
        export.export_finished(learned, "fp32", sentences(40))
    record = json.loads((learned / "model" / "onnx.json").read_text())
    assert record["file"] == "model.onnx" and record["f1"] == record["torch_f1"] and record["default"] is True
    assert [entry.levelname for entry in caplog.records] == ["INFO"]
    monkeypatch.setattr(engines, "may_have_accelerator", lambda: False)
    assert isinstance(load(learned).tagger.engine, engines.OnnxEngine)


def test_texts_that_it_is_calibrated_on_may_hold_any_character(tmp_path):
    texts = [["江", "\u2028", "\x85", "\x1c", "\f", "泽"], ["民"]]
    rows = "".join(json.dumps({"chars": chars}, ensure_ascii=False) + "\n" for chars in texts)
    (tmp_path / "predictions.jsonl").write_text(rows, "utf-8")
    assert export._tagged_texts(tmp_path) == texts


def test_a_run_is_whole_without_an_onnx_file(learned, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no such operator\nand a page about it")

    monkeypatch.setattr(onnx_writer, "_trace", fail)
    export.export_finished(learned, "int8", sentences(40))
    (entry,) = caplog.records
    assert entry.levelname == "WARNING" and entry.getMessage().startswith("no ONNX file was written, PyTorch will tag")
    assert "no such operator" in entry.getMessage() and "\n" not in entry.getMessage()
    assert not list((learned / "model").glob("*onnx*"))
