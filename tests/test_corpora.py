"""The sentences of a run: what is refused before any training, and what the log says of them."""

import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny

from ner import corpora
from ner.errors import UserError


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def read(train, dev=None, test=None, max_train_sentences=None):
    config = SimpleNamespace(train=train, dev=dev, test=test, max_train_sentences=max_train_sentences, seed=1)
    return corpora.read(config, SimpleNamespace())


@pytest.fixture
def train(tmp_path):
    return str(tiny.corpus(tmp_path / "train", 40))


def test_training_sentences_without_an_entity_are_refused(tmp_path, train):
    only_o = write(tmp_path, "only", "北 O\n京 O\n")
    with pytest.raises(UserError, match="only: no entity in the 1 sentences to train on"):
        read(only_o, train)
    assert read(train, only_o)[1][0].tags == ["O", "O"], "dev may be without"


@pytest.mark.parametrize("part", ["dev", "test"])
def test_parts_of_different_units_are_refused(tmp_path, train, part):
    words = write(tmp_path, "words", "John B-PER\nlives O\nhere O\n")
    with pytest.raises(UserError, match="words: its lines hold words, those of .*train characters"):
        read(train, **{part: words})


def test_word_segmented_chinese_goes_with_characters(tmp_path, train, caplog):
    caplog.set_level(logging.INFO, "__main__")
    segmented = write(tmp_path, "segmented", "北京 B-LOC\n欢迎 O\n张伟 B-PER\n")
    _, dev, _ = read(train, segmented)
    assert dev[0].units == list("北京欢迎张伟") and dev[0].tags[:2] == ["B-LOC", "I-LOC"]
    assert sum("word-segmented" in line for line in caplog.messages) == 1


def test_each_warning_is_given_once_and_the_sample_is_named(tmp_path, train, caplog):
    caplog.set_level(logging.INFO, "__main__")
    odd = write(tmp_path, "odd", Path(train).read_text(encoding="utf-8") + "\n甲 B-RARE\n\n乙 O\n\n乙 B-PER\n")
    others = [write(tmp_path, name, f"{name} B-RARE\n") for name in "丙丁"]
    read(odd, *others, max_train_sentences=2)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(set(warnings))
    named = [line for line in warnings if "type RARE" in line]
    assert len(named) == 2 and all("is in" in line and "but not in the 2 of its sentences" in line for line in named)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_train_may_be_a_pipe(tmp_path, train):
    os.mkfifo(tmp_path / "pipe")
    text = Path(train).read_text(encoding="utf-8")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,), kwargs={"encoding": "utf-8"})
    writer.start()
    corpus, dev, _ = read(str(tmp_path / "pipe"))
    writer.join()
    assert len(corpus.sentences) + len(dev) == 40
