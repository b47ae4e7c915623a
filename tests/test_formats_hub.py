"""Data sets of the hub, saved in a local folder."""

import json
import sys
import time

import pytest

from ner import formats
from ner.errors import UserError
from ner.formats import hub

WORDS = [["The", "IL-2", "gene"], ["Epo", "."]]


NUMBERS = [[0, 1, 2], [3, 0]]


NAMES = ["O", "B-DNA", "I-DNA", "B-protein", "I-protein"]


def hub_folder(folder, form):
    """A data set as the hub has them, in the forms that tags come in."""
    datasets = pytest.importorskip("datasets", reason="the datasets library is optional")
    datasets.disable_progress_bars()
    if form == "json with label.json":
        (folder / "dataset").mkdir(parents=True)
        for part in ("train", "validation", "test"):
            lines = [json.dumps({"tokens": words, "tags": tags}) for words, tags in zip(WORDS, NUMBERS, strict=True)]
            (folder / f"{part}.json").write_text("\n".join(lines), encoding="utf-8")
        (folder / "dataset" / "label.json").write_text(
            json.dumps({tag: i for i, tag in enumerate(NAMES)}), encoding="utf-8"
        )
        return folder
    column, tags, kind = {
        "class labels": ("ner_tags", NUMBERS, datasets.ClassLabel(names=NAMES)),
        "tags as texts": ("tags", [[NAMES[tag] for tag in tags] for tags in NUMBERS], datasets.Value("string")),
        "numbers alone": ("tags", NUMBERS, datasets.Value("int64")),
    }[form]
    features = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), column: datasets.Sequence(kind)}
    )
    parts = {
        part: datasets.Dataset.from_dict({"tokens": WORDS[:n], column: tags[:n]}, features=features)
        for part, n in (("train", 2), ("validation", 1), ("test", 2))
    }
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "datasets" in sys.modules:
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("form", ["class labels", "tags as texts", "json with label.json"])
def test_hub_data_sets(tmp_path, form):
    folder = hub_folder(tmp_path / "bio", form)
    corpus = formats.read(f"hub:{folder}")
    assert [(s.units, s.tags, s.line) for s in corpus.sentences] == [
        (WORDS[0], ["O", "B-DNA", "I-DNA"], 1),
        (WORDS[1], ["B-protein", "O"], 2),
    ]
    assert corpus.unit == "word" and corpus.path == f"hub:{folder}"
    for split, name in (("dev", f"hub:{folder}"), ("train", f"hub:{folder}@validation")):
        assert len(formats.read(name, split=split).sentences) == (2 if form.startswith("json") else 1)


def test_hub_errors_are_one_line(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "bio", "numbers alone")
    for name, what in (
        (f"hub:{folder}", "numbers without names"),
        (f"hub:{folder}@dev", "has no split dev, but train, validation, test"),
        (f"hub:{tmp_path / 'none'}", "cannot load"),
    ):
        with pytest.raises(UserError, match=what) as caught:
            formats.read(name)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        formats.read(f"hub:{folder}")


def test_a_hub_that_does_not_answer_is_one_line_at_once(monkeypatch, capfd):
    from datasets import config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before, begun = (constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE), time.monotonic()
    with pytest.raises(UserError, match="hub:nobody/none: the hub does not answer") as caught:
        formats.read("hub:nobody/none")
    assert "\n" not in str(caught.value) and time.monotonic() - begun < 15
    assert before == (constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE)
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_hub_rows_that_do_not_fit():
    names = dict(enumerate(NAMES))
    for row, what in (
        (([], [0]), "0 tokens and 1 tags"),
        ((["a"], [7]), "'7' is no tag"),
        ((["a"], [-1]), "'-1' is no tag"),
        (([None], [0]), "1 tokens"),
        ((None, [0]), "0 tokens"),
    ):
        with pytest.raises(UserError, match=f"hub:x:2: {what}"):
            list(hub._sentences("hub:x", [(["a"], [0]), row], names))


def test_a_data_set_that_is_a_program_is_not_run():
    asked = []

    def load(name, subset, revision=None):
        asked.append((name, subset, revision))
        if not revision:
            raise RuntimeError("Dataset scripts are no longer supported, but found bionlp2004.py")
        return "converted"

    assert hub._download(load, "tner/bionlp2004", None) == "converted"
    assert asked[1] == ("tner/bionlp2004", None, "refs/convert/parquet")
    with pytest.raises(RuntimeError, match="other"):
        hub._download(lambda name, subset: (_ for _ in ()).throw(RuntimeError("other")), "x", None)


def test_the_bionlp2004_config_names_its_splits():
    from ner import config

    read, _ = config.load(["--config", str(config.ROOT / "configs" / "bionlp2004.yaml")])
    assert [read.train, read.dev, read.test] == [
        f"hub:tner/bionlp2004@{part}" for part in ("train", "validation", "test")
    ]
    assert (read.pretrained, read.lora.r, read.lora.alpha, read.lora.bias) == ("roberta-large", 16, 16, "all")
