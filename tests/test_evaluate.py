"""Scores: strict, in one shape, the same from the loop, the command and by hand."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from ner import scores as scoring
from ner import decoding
import main

TYPES = ("PER", "LOC", "ORG")


def tags(*spans, length=10):
    """IOB2 tags of (type, start, end) spans."""
    made = ["O"] * length
    for kind, start, end in spans:
        made[start:end] = ["B-" + kind] + ["I-" + kind] * (end - start - 1)
    return made


def test_an_entity_counts_when_type_start_and_end_are_right():
    gold = [tags(("PER", 0, 3), ("LOC", 5, 7)), tags(("PER", 2, 4))]
    scores = scoring.score(gold, [tags(("PER", 0, 3), ("LOC", 5, 8)), tags(("LOC", 2, 4))])
    assert scores["types"]["PER"] == {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2}
    assert scores["types"]["LOC"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["micro"] == {
        "precision": pytest.approx(1 / 3),
        "recall": pytest.approx(1 / 3),
        "f1": pytest.approx(1 / 3),
        "support": 3,
    }
    assert scores["macro"]["f1"] == pytest.approx(1 / 3)
    assert scores["weighted"]["f1"] == pytest.approx(4 / 9)
    assert scores["accuracy"] == pytest.approx(17 / 20)


def test_a_single_character_entity_counts():
    scores = scoring.score([tags(("LOC", 0, 1), ("LOC", 9, 10))], [tags(("LOC", 0, 1), ("LOC", 9, 10))])
    assert scores["micro"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2}


def test_an_orphan_is_no_entity():
    scores = scoring.score([["B-PER", "I-PER"], ["O", "O"]], [["I-PER", "I-PER"], ["O", "I-LOC"]])
    assert scores["micro"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert list(scores["types"]) == ["PER"]


@pytest.mark.parametrize("gold", [[], [[]], [["O", "O"]]])
def test_without_entities_all_is_zero_and_the_shape_stays(gold):
    scores = scoring.score(gold, gold)
    none = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert (scores["micro"], scores["macro"], scores["weighted"], scores["types"]) == (none, none, none, {})


def test_other_lengths_are_refused():
    with pytest.raises(ValueError):
        scoring.score([["O", "O"]], [["O"]])


SPANS = st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 3), st.integers(1, 4)), max_size=5)


@st.composite
def corpora(draw):
    """Pairs of gold and predicted well-formed tags."""

    def one():
        made, place = [], 0
        for kind, gap, length in draw(SPANS):
            made.append((kind, place + gap, place + gap + length))
            place += gap + length
        return made

    return [(tags(*one(), length=35), tags(*one(), length=35)) for _ in range(draw(st.integers(1, 4)))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(corpora())
def test_scores_equal_a_count_by_hand(pairs):
    scores = scoring.score([gold for gold, _ in pairs], [predicted for _, predicted in pairs])
    counts = {}
    for gold, predicted in pairs:
        gold, predicted = set(decoding.spans(gold)), set(decoding.spans(predicted))
        for span in gold | predicted:
            row = counts.setdefault(span[0], [0, 0, 0])
            row[0] += span in gold and span in predicted
            row[1] += span in predicted
            row[2] += span in gold

    def f1(right, found, true):
        precision, recall = right / found if found else 0, right / true if true else 0
        return precision, recall, 2 * precision * recall / (precision + recall) if right else 0, true

    by_type = {kind: f1(*row) for kind, row in sorted(counts.items())}
    assert {kind: tuple(row.values()) for kind, row in scores["types"].items()} == {
        kind: pytest.approx(row) for kind, row in by_type.items()
    }
    assert list(scores["types"]) == sorted(counts)
    assert tuple(scores["micro"].values()) == pytest.approx(
        f1(*map(sum, zip(*counts.values()))) if counts else (0, 0, 0, 0)
    )
    if counts:
        assert scores["macro"]["f1"] == pytest.approx(sum(row[2] for row in by_type.values()) / len(by_type))
        supports = max(1, sum(row[3] for row in by_type.values()))
        assert scores["weighted"]["f1"] == pytest.approx(sum(row[2] * row[3] for row in by_type.values()) / supports)


def test_importing_does_nothing_and_hides_no_library():
    code = ("import importlib.util, sys; assert importlib.util.find_spec('evaluate').origin.startswith(sys.argv[1])\n"
            "import evaluate; heavy = {'torch', 'transformers', 'seqeval', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "import transformers, datasets, accelerate\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(runs.ROOT)], cwd=runs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def finished(output, name, marks, when):
    run = output / name
    (run / "model").mkdir(parents=True)
    for mark in marks:
        (run / mark).write_text("{}")
        os.utime(run / mark, (when, when))
    return run


def test_the_newest_finished_run_is_found_by_its_scores_not_its_name(tmp_path):
    with pytest.raises(evaluate.UserError, match="no finished run"):
        scoring.newest_run(tmp_path)
    only = finished(tmp_path, "only-a-model", ["model/ner.json"], 5000)
    assert scoring.newest_run(tmp_path) == only
    finished(tmp_path, "z", ["test.json"], 1000)
    newest = finished(tmp_path, "a", ["test.json", "finished.json"], 2000)
    finished(tmp_path, "without-a-model", ["test.json"], 9000)
    shutil.rmtree(tmp_path / "without-a-model" / "model")
    assert scoring.newest_run(tmp_path) == newest
    untested = finished(tmp_path, "b", ["finished.json"], 3000)
    assert scoring.newest_run(tmp_path) == untested


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluate")
    main.main(runs.argv(output, tuning="lora", learning_rate=2e-2, precision="auto", epochs=3))
    return output / "run"


def test_the_command_gives_the_numbers_of_test_json_exactly(run, tmp_path, capsys):
    evaluate.main(["--run", str(run), "--json", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text("utf-8")) == json.loads(
        (run / "test.json").read_text("utf-8")
    )
    table = capsys.readouterr().out
    assert all(name in table for name in (*TYPES, "micro", "macro", "weighted", "accuracy"))
    evaluate.main(["--run", str(run), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == json.loads((run / "test.json").read_text("utf-8"))


def test_other_data_is_scored_and_unknown_types_are_named(run, tmp_path, capsys):
    (tmp_path / "data").write_text("北 B-GPE\n京 I-GPE\n好 O\n", "utf-8")
    evaluate.main(["--run", str(run), "--data", str(tmp_path / "data"), "--json", str(tmp_path / "s.json")])
    scores = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert scores["types"]["GPE"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert "GPE" in capsys.readouterr().err


def test_the_run_is_found_and_scored_from_another_folder(run):
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / "evaluate.py"), "--run", run, "--json", "-"],
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((run / "test.json").read_text("utf-8"))


@pytest.mark.parametrize(("break_it", "names"), [
    (lambda run: (run / "model" / "ner.json").write_text("{"), "ner.json"),
    (lambda run: (run / "model" / "adapter_model.safetensors").write_bytes(b"x" * 50), "adapter_model.safetensors"),
    (lambda run: (run / "model" / "adapter_config.json").unlink(), "adapter_config.json"),
    (lambda run: shutil.rmtree(run / "model"), "model"),
    (lambda run: (run / "config.yaml").write_text("test: [1, {}]"), "config.yaml:1"),
    (lambda run: (run / "config.yaml").write_text("test: null"), "--data"),
    (lambda run: (run / "config.yaml").write_text("test: /nowhere/test"), "/nowhere/test"),
])  # fmt: skip
def test_what_is_wrong_with_a_run_is_named_in_one_line(run, tmp_path, capsys, break_it, names):
    shutil.copytree(run, tmp_path / "run")
    break_it(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--run", str(tmp_path / "run")])
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.startswith("error: ") and names in text and text.count("\n") == 1
