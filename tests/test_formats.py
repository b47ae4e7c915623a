"""JSON lines (CLUENER, doccano, Label Studio, our own), CoNLL columns, and hub data sets saved in a local folder."""

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ner import decoding, formats
from ner.errors import UserError
from ner.formats import hub
from ner.formats.assembly import paint

TEXT = "江泽民在北京会见了比尔·盖茨"
TAGS = ["B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC", "O", "O", "O"] + ["B-PER"] + ["I-PER"] * 4
SPANS = [[0, 3, "PER"], [4, 6, "LOC"], [9, 14, "PER"]]
WAYS = {
    "cluener": {
        "text": TEXT,
        "label": {"PER": {"江泽民": [[0, 2]], "比尔·盖茨": [[9, 13]]}, "LOC": {"北京": [[4, 5]]}},
    },
    "doccano": {"id": 7, "text": TEXT, "label": SPANS},
    "doccano, newer": {"text": TEXT, "labels": SPANS[::-1], "Comments": []},
    "doccano, relations": {
        "text": TEXT,
        "entities": [{"id": 1, "label": kind, "start_offset": start, "end_offset": end} for start, end, kind in SPANS],
    },
    "label studio": {
        "text": TEXT,
        "label": [
            {"start": start, "end": end, "text": TEXT[start:end], "labels": [kind]} for start, end, kind in SPANS
        ],
    },
    "predict.py": {
        "text": TEXT,
        "entities": [{"text": TEXT[s:e], "type": kind, "start": s, "end": e, "score": 0.9} for s, e, kind in SPANS],
    },
}


def write(folder, *records, name="train.jsonl", ascii=False):
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=ascii) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train", "train.txt"])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_write_entities(tmp_path, way, name):
    corpus = formats.read(write(tmp_path, "", WAYS[way], "  ", {"text": "没有", "label": []}, name=name))
    assert [(s.chars, s.tags, s.line) for s in corpus.sentences] == [
        (list(TEXT), TAGS, 2),
        (["没", "有"], ["O", "O"], 4),
    ]
    assert (corpus.scheme, corpus.unit, corpus.skipped, corpus.repairs) == ("offsets", "character", 0, 0)


def test_overlapping_entities_are_dropped_and_counted(tmp_path):
    path = write(tmp_path, {"text": TEXT, "label": [[4, 5, "LOC"], *SPANS, [2, 5, "X"], [0, 3, "ORG"]]})
    corpus = formats.read(path)
    assert corpus.sentences[0].tags == TAGS and corpus.skipped == 3
    (warning,) = corpus.warnings()
    assert warning.startswith(f"{path}: 3 entities dropped")


def test_text_is_kept_character_by_character(tmp_path):
    text = 'a\n b\u3000\u200b👨‍👩‍👧\x01\\"'
    corpus = formats.read(
        write(tmp_path, {"text": text, "label": [[0, 1, "two words"]]}, {"text": "", "label": []}, ascii=True)
    )
    assert corpus.sentences[0].chars == list(text) and corpus.sentences[0].tags[0] == "B-two_words"
    assert len(corpus.sentences) == 1, "an empty text is no sentence"


@pytest.mark.parametrize("bad, what", [
    ("not json", "not a JSON object"), ('{"text": "x"', "not a JSON object"), ("[1, 2]", 'no "text"'),
    ({"label": []}, 'no "text"'), ({"text": 5, "label": []}, 'no "text"'),
    ({"text": "abc"}, 'no "label"'), ({"text": "abc", "label": None}, 'no "label"'),
    ({"text": "abc", "label": "PER"}, 'no "label"'),
    ({"text": "abc", "label": [[0, 4, "X"]]}, "outside its text of 3"),
    ({"text": "abc", "label": [[-1, 2, "X"]]}, "outside"),
    ({"text": "abc", "label": [[1, 1, "X"]]}, "is empty"), ({"text": "abc", "label": [[2, 1, "X"]]}, "is empty"),
    ({"text": "abc", "label": [[0, 1]]}, "is no entity"), ({"text": "abc", "label": [[0.0, 1, "X"]]}, "is no entity"),
    ({"text": "abc", "label": [[True, 2, "X"]]}, "is no entity"),
    ({"text": "abc", "label": [[0, 1, " "]]}, "is no entity"),
    ({"text": "abc", "label": [[0, 1, 5]]}, "is no entity"), ({"text": "abc", "label": [7]}, "is no entity"),
    ({"text": "abc", "label": [{"start": 0}]}, "is no entity"),
    ({"text": "abc", "label": [{"start": 0, "end": 1, "labels": []}]}, "is no entity"),
    ({"text": "abc", "label": {"X": {"bc": [[0, 1]]}}}, "the text from 0 to 2 is 'ab', not 'bc'"),
    ({"text": "abc", "label": {"X": [[0, 1]]}}, "is not CLUENER"),
    ({"text": "abc", "label": {"X": {"a": [0]}}}, "is not CLUENER"),
    ({"text": "abc", "label": {"X": {"a": [["0", "1"]]}}}, "is not CLUENER"),
    ('{"text": "\\ud83d", "label": []}', "half a surrogate pair"),
    ("[" * 100_000, "not a JSON object"),
    ('{"text": "a", "label": [[0, ' + "9" * 5000 + ', "X"]]}', "not a JSON object"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_errors_name_file_and_line(tmp_path, bad, what):
    path = write(tmp_path, WAYS["doccano"], "", bad)
    with pytest.raises(UserError) as caught:
        formats.read(path)
    assert str(caught.value).startswith(f"{path}:3: ") and what in str(caught.value) and "\n" not in str(caught.value)


def test_json_that_is_not_one_object_a_line(tmp_path):
    with pytest.raises(UserError, match="train.json:1: not a JSON object"):
        formats.read(write(tmp_path, json.dumps(WAYS["doccano"], indent=1), name="train.json"))
    with pytest.raises(UserError, match="no sentence"):
        formats.read(write(tmp_path, {"text": "", "label": []}))


def test_a_brace_can_be_a_character(tmp_path):
    assert formats.read(write(tmp_path, "{ O", "} O", name="train")).sentences[0].chars == ["{", "}"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 20), st.sampled_from("AB")), max_size=8))
def test_entities_are_accounted_for(places):
    entities = [(start, end, kind) for start, end, kind in places if start < end]
    tags, dropped = paint(20, entities)
    kept = [(start, end, kind) for kind, start, end in decoding.spans(tags)]
    assert len(kept) + dropped == len(entities) and set(kept) <= set(entities) and len(tags) == 20


CONLL = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\nGerman JJ B-NP B-MISC\n\n"
    "Peter NNP B-NP B-PER\nBlackburn NNP I-NP I-PER\n"
)


@pytest.mark.parametrize(
    "content", [CONLL, CONLL.replace(" ", "\t"), CONLL.replace("\n\nPeter", "\n\n# id 5 domain=news\nPeter")]
)
def test_conll_columns(tmp_path, content):
    path = tmp_path / "train.conll"
    path.write_text(content, encoding="utf-8")
    corpus = formats.read(str(path))
    assert [(s.chars, s.tags) for s in corpus.sentences] == [
        (["EU", "rejects", "German"], ["B-ORG", "O", "B-MISC"]),
        (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
    ]
    assert corpus.unit == "word" and corpus.sentences[0].line == 3


def test_conll_line_with_a_column_too_few(tmp_path):
    path = tmp_path / "train"
    path.write_text(CONLL.replace("German JJ B-NP B-MISC", "German B-NP B-MISC"), encoding="utf-8")
    with pytest.raises(UserError, match=r"train:5: 3 fields where the file has 4: 'German B-NP B-MISC'"):
        formats.read(str(path))


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
            lines = [json.dumps({"tokens": words, "tags": tags}) for words, tags in zip(WORDS, NUMBERS)]
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
    assert [(s.chars, s.tags, s.line) for s in corpus.sentences] == [
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
