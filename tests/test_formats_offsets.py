"""JSON with a text and its entities: doccano, CLUENER, Label Studio, our own; a line each, or one array."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ner import decoding, formats
from ner.errors import UserError

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
    assert [(s.units, s.tags, s.line) for s in corpus.sentences] == [
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
    assert corpus.sentences[0].units == list(text) and corpus.sentences[0].tags[0] == "B-two_words"
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


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("way", WAYS)
def test_an_array_of_records(tmp_path, way, indent):
    text = json.dumps([WAYS[way], {"text": "没有", "label": []}], ensure_ascii=False, indent=indent)
    (tmp_path / "export").write_text(text, encoding="utf-8")
    first, second = formats.read(str(tmp_path / "export")).sentences
    assert (first.units, first.tags) == (list(TEXT), TAGS) and second.tags == ["O", "O"]
    if indent:
        assert (first.line, second.line) == (2, text[: text.rindex("{")].count("\n") + 1)


@pytest.mark.parametrize("content, line, what", [
    ('[\n{"text": "a", "label": []},\n]', 3, "not JSON"),
    ('[\n{"text": "a", "label": []}\n{"text"', 3, "expected a comma"),
    ('[{"text": "a", "label": []}', 1, "expected a comma or the end"),
    ('[{"text": "a", "label": []}]\n\nx', 3, "'x' after the end"),
    ('[\n\n{"text": "a", "label": 5}]', 3, 'no "label"'),
    ("[]", 1, "no sentence"), ("[" * 100_000, 1, "not JSON"), ("[5]", 1, 'no "text"'),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_errors_of_an_array_name_file_and_line(tmp_path, content, line, what):
    path = tmp_path / "export.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        formats.read(str(path))
    assert str(caught.value).startswith(f"{path}:{line}: ") and what in str(caught.value)


def test_data_is_another_name_for_text(tmp_path):
    corpus = formats.read(write(tmp_path, {"data": TEXT, "label": SPANS}, {"data": {"text": "没有"}, "label": []}))
    assert corpus.sentences[0].tags == TAGS and corpus.sentences[1].units == ["没", "有"]


def result(text=TEXT, spans=SPANS):
    """The result of an annotation in Label Studio's export, with offsets in UTF-16 as its older releases have them."""

    def units(place):
        return len(text[:place].encode("utf-16-le")) // 2

    return [
        {
            "id": f"x{start}", "from_name": "label", "to_name": "text", "type": "labels", "origin": "manual",
            "value": {"start": units(start), "end": units(end), "text": text[start:end], "labels": [kind]},
        }
        for start, end, kind in spans
    ] + [
        {"type": "relation", "from_id": "x0", "to_id": "x4"},
        {"type": "choices", "value": {"choices": ["news"]}},
    ]  # fmt: skip


def read_tasks(folder, *tasks):
    path = folder / "project-1.json"
    path.write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    return formats.read(str(path))


def test_the_export_of_label_studio(tmp_path):
    emoji = "😀" + TEXT
    shifted = [[start + 1, end + 1, kind] for start, end, kind in SPANS]
    corpus = read_tasks(
        tmp_path,
        {"id": 1, "data": {"text": TEXT}, "annotations": [{"result": result()}], "predictions": []},
        {"id": 2, "data": {"sentence": emoji, "id": 7}, "annotations": [{"result": result(emoji, shifted)}]},
        {"id": 3, "data": {"text": "没有"}, "annotations": [{"result": []}]},
        {"id": 4, "data": {"text": "未标"}, "annotations": [], "predictions": [{"result": result("未标", [])}]},
        {"id": 5, "data": {"text": "取消"}, "annotations": [{"result": [], "was_cancelled": True}]},
        {"id": 6, "data": {"text": TEXT}, "annotations": [{"result": []}, {"result": result(), "ground_truth": True}]},
    )
    assert [("".join(s.units), s.tags) for s in corpus.sentences] == [
        (TEXT, TAGS),
        (emoji, ["O", *TAGS]),
        ("没有", ["O", "O"]),
        (TEXT, TAGS),
    ]
    unlabelled, several = corpus.warnings()
    assert unlabelled.endswith("tasks without an annotation, left out: 2") and several.endswith("the first is taken: 1")


def test_what_predict_writes_for_label_studio_is_read_back(tmp_path):
    task = {"data": {"text": TEXT}, "predictions": [{"model_version": "x", "score": 0.9, "result": result()}]}
    for path in (write(tmp_path, task), None):
        corpus = formats.read(path) if path else read_tasks(tmp_path, task)
        assert corpus.sentences[0].tags == TAGS
        (warning,) = corpus.warnings()
        assert warning.endswith("tasks with predictions and no annotations; the predictions are taken for the truth: 1")


def test_offsets_that_may_count_utf16_code_units_are_warned_of(tmp_path):
    """As doccano's do; nothing in the file tells, unless entities come with a copy of their text."""
    records = [
        {"text": "😀" + TEXT, "label": [[1, 4, "PER"]]},
        {"text": TEXT + "😀", "label": [[0, 3, "PER"]]},  # nothing is shifted
        {"text": "𠮷" + TEXT, "entities": [{"start": 1, "end": 4, "type": "PER", "text": "江泽民"}]},  # checked
    ]
    corpus = formats.read(write(tmp_path, *records))
    assert [sentence.tags.index("B-PER") for sentence in corpus.sentences] == [1, 0, 1]
    (warning,) = corpus.warnings()
    assert "has no copy of its text: 1; " in warning and "doccano" in warning
    assert formats.read(write(tmp_path, *records[1:])).warnings() == []


def labelled(content, **value):
    return {"data": {"text": content}, "annotations": [{"result": [{"value": value}]}]}


@pytest.mark.parametrize("task, what", [
    (labelled("abc", start=0, end=2, text="bc", labels=["X"]), "the text from 0 to 2 is 'ab', not 'bc'"),
    (labelled("abc", labels=["X"]), "is no entity"),
    (labelled("abc", start="/p[1]", end="/p[1]", labels=["X"]), "is no entity"),
    (labelled("abc", start=0, end=4, labels=["X"]), "outside its text"),
    ({"data": {"text": "abc"}, "annotations": [{}]}, 'no "result"'),
    ({"data": {"text": "abc"}, "annotations": {}}, "is no list of annotations"),
    ({"data": {"a": "x", "b": "y"}, "annotations": []}, 'no "text"'),
    (labelled("abc", start=0, end=2, labels=""), "is no entity"),
    ({"data": {"text": "abc"}, "annotations": [], "predictions": []}, "none of its 1 tasks has an annotation"),
    ({"data": {"text": "abc"}, "annotations": [{"was_cancelled": True, "result": []}]}, "none of its 1 tasks"),
    ({"data": {"text": ""}, "annotations": [{"result": []}]}, "no sentence in it; expected texts"),
])  # fmt: skip
def test_errors_of_tasks(tmp_path, task, what):
    with pytest.raises(UserError, match=r"project-1.json:1: ") as caught:
        read_tasks(tmp_path, task)
    assert what in str(caught.value)


def test_html_has_its_offsets_beside_the_paths(tmp_path):
    value = {"start": "/p[1]", "end": "/p[1]", "globalOffsets": {"start": 0, "end": 3}, "hypertextlabels": ["PER"]}
    corpus = read_tasks(tmp_path, {"data": {"text": TEXT}, "annotations": [{"result": [{"value": value}]}]})
    assert corpus.sentences[0].tags[:4] == TAGS[:4]


@pytest.mark.parametrize("labels", [{}, {"labels": []}])
def test_a_span_that_was_given_no_label_is_counted(tmp_path, labels):
    items = [*result(), {"type": "labels", "value": {"start": 0, "end": 2, "text": TEXT[:2]} | labels}]
    corpus = read_tasks(tmp_path, {"data": {"text": TEXT}, "annotations": [{"result": items}]})
    assert corpus.sentences[0].tags == TAGS and corpus.notes == [f"{corpus.path}: spans without a label, left out: 1"]


def test_a_span_of_two_types_counts_as_an_overlap(tmp_path):
    item = {"value": {"start": 0, "end": 3, "labels": ["PER", "ORG"]}}
    corpus = read_tasks(tmp_path, {"data": {"text": TEXT}, "annotations": [{"result": [item]}]})
    assert corpus.entities().total() == 1 and corpus.skipped == 1


@pytest.mark.parametrize(
    "label", ['[[0, 1, "\\ud83d"]]', '{"\\ud83d": {"a": [[0, 0]]}}', '[{"start": 0, "end": 1, "label": "A\\udc00"}]']
)
def test_half_a_surrogate_pair_in_a_type_is_refused(tmp_path, label):
    path = write(tmp_path, WAYS["doccano"], '{"text": "abc", "label": ' + label + "}")
    with pytest.raises(UserError, match="half a surrogate pair in the type") as caught:
        formats.read(path)
    assert str(caught.value).startswith(f"{path}:2: ") and str(caught.value).encode()


texts = st.text(st.sampled_from("aab😀𠮷北 "), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=texts, cuts=st.lists(st.integers(0, 12), max_size=6), in_utf16=st.booleans())
def test_any_text_comes_back_from_label_studio(tmp_path_factory, text, cuts, in_utf16):
    edges = sorted({min(cut, len(text)) for cut in cuts})
    spans = [[start, end, "AB"[n % 2]] for n, (start, end) in enumerate(itertools.pairwise(edges))]
    items = result(text, spans)
    if not in_utf16:
        for item, (start, end, _) in zip(items, spans, strict=False):
            item["value"] |= {"start": start, "end": end}
    folder = tmp_path_factory.getbasetemp()
    corpus = read_tasks(folder, {"data": {"text": text}, "annotations": [{"result": items}]})
    tags = corpus.sentences[0].tags
    found = [[start, end, kind] for kind, start, end in decoding.spans(tags)]
    if in_utf16:  # where all copies of the entities are found by characters too, nothing tells the two apart
        expected = [text[start:end].split() for start, end, _ in spans]
        assert [text[start:end].split() for start, end, _ in found] == expected
    else:
        assert found == spans
