"""predictor.py: offsets on any text, scores, margins, the same entities from either engine."""

import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trained import ENTITIES, KINDS, ODD, TEXT, TEXTS, exported, plain, random_predictor, run

from ner import predictor as module
from ner.config import ROOT
from ner.errors import UserError


@pytest.fixture(scope="module")
def predictor():
    return module.load(run(), engine="torch")


def check(text, entities):
    """What holds for every text."""
    at = 0
    for entity in entities:
        assert text[entity.start : entity.end] == entity.text
        assert at <= entity.start < entity.end <= len(text)
        assert entity.type in ("LOC", "ORG", "PER") and 0 < entity.score <= 1
        assert entity.text == entity.text.strip()
        at = entity.end


def test_finds_what_it_learned(predictor):
    assert predictor.types == ["LOC", "ORG", "PER"]
    found = predictor.predict([TEXT, "", "她没有回答。", "据新华社报道，李娜今天访问了上海"])
    assert plain(found[0]) == ENTITIES and found[1] == []
    assert plain(found[3]) == [("新华社", "ORG", 1, 4), ("李娜", "PER", 7, 9), ("上海", "LOC", 14, 16)]
    assert all(entity.score > 0.5 for entities in found for entity in entities)


def test_score_is_the_mean_probability_of_the_tags(predictor):
    tags, scores, _ = predictor.tagger.tag([list(TEXT)])[0]
    entity = predictor.predict([TEXT])[0][1]
    assert tags[5:7] == ["B-LOC", "I-LOC"]
    assert entity.score == pytest.approx(float(np.mean(scores[5:7])), abs=1e-4)


def test_many_at_once_are_the_same_as_one_by_one(predictor):
    texts = ["".join(chars) for chars, _ in tiny.sentences(80, seed=3)] + ["", " ", TEXT * 30]
    together = predictor.predict(texts)
    for text, entities in zip(texts, together, strict=True):
        alone = predictor.predict([text])[0]
        assert plain(alone) == plain(entities)
        assert [e.score for e in alone] == pytest.approx([e.score for e in entities], abs=0.02)  # bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_of_any_text(kind):
    entities = []

    @settings(max_examples=60, deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    @example(["".join(ODD)])
    @example(["".join(ODD) * 40])
    @example(["\ud800", " ", "", "\ufeff\ufeff"])
    def fuzz(given_texts):
        found = random_predictor(kind).predict(given_texts)
        assert len(found) == len(given_texts)
        for text, of_text in zip(given_texts, found, strict=True):
            check(text, of_text)
            entities.extend(of_text)

    fuzz()
    assert len(entities) > 50  # else nothing was tested


def test_margin_is_the_least_lead_of_the_best_tag(predictor):
    certain, garbled = predictor.results([TEXT, "王北出。京京生芳"])
    tagger = predictor.tagger
    probs = np.sort(np.exp(tagger.log_probs([list(certain.text)])[0]), axis=1)
    assert certain.margin == pytest.approx(float((probs[:, -1] - probs[:, -2]).min()), abs=1e-5)
    assert 0 <= garbled.margin < certain.margin <= 1
    assert [result.margin for result in predictor.results(["", " "])][0] == 1.0


def test_either_engine_finds_the_same(predictor, caplog):
    """auto takes the exported file on a CPU without a word; without one it says how to export."""
    texts = ["".join(chars) for chars, _ in tiny.sentences(40, seed=3)] + [TEXT * 20, ""]
    quick = module.load(exported())
    assert type(quick.tagger.engine).__name__ == "OnnxEngine" and not caplog.text
    for one, other in zip(predictor.predict(texts), quick.predict(texts), strict=True):
        assert plain(one) == plain(other)
    slow = module.load(run())
    assert type(slow.tagger.engine).__name__ == "TorchEngine"
    assert caplog.text.count("\n") == 1 and f"python model.py export {run()}/model" in caplog.text


def test_loading_changes_no_setting_of_the_process():
    """malloc options and hooks of a training process are none of a host program's that loads a model."""
    import subprocess
    import sys

    code = (
        "import ctypes, sys\n"
        "calls = []\n"
        "class Watched(ctypes.CDLL):\n"
        "    def __getattr__(self, name):\n"
        "        calls.extend([name] if name == 'mallopt' else [])\n"
        "        return super().__getattr__(name)\n"
        "ctypes.CDLL = Watched\n"
        "from ner import predictor\n"
        "for engine in ('torch', 'onnx'):\n"
        "    predictor.load(sys.argv[1], engine=engine).predict(['北京'])\n"
        "sys.exit(len(calls))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(exported())], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_takes_the_accelerator_that_training_takes(monkeypatch):
    import torch

    from ner import engines

    assert engines.best_device() == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    devices = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("meta"))
    monkeypatch.setattr(module.Tagger, "of", lambda folder, device, *rest: devices.append(device) or stub())
    module.load(run(), engine="torch")
    assert devices == [torch.device("meta")]


def stub():
    from types import SimpleNamespace

    return SimpleNamespace(unit="character", labels=["O"])


def test_what_a_wrong_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        module.load(tmp_path / "none")
    with pytest.raises(UserError, match="no ner.json"):
        module.load(tmp_path)
