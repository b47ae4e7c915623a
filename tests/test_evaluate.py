"""evaluate.py: test.json's numbers exactly, on any labelled data, with every error in one line."""

import json
import shutil
import subprocess
import sys

import datasets
import pytest
import runs
import tiny
import torch
import trained

import evaluate
import main
import model
import predict
from ner import files
from ner.tagging import Tagger

TYPES = ("PER", "LOC", "ORG")


def test_importing_does_nothing_and_hides_no_library():
    code = ("import importlib.util, sys; assert importlib.util.find_spec('evaluate').origin.startswith(sys.argv[1])\n"
            "import evaluate; heavy = {'torch', 'transformers', 'seqeval', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
            "import transformers, datasets, accelerate\n")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(runs.ROOT)], cwd=runs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


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


def test_a_run_killed_between_the_renames_of_its_model_is_read_as_it_was(run, tmp_path, capsys, monkeypatch):
    killed = shutil.copytree(run, tmp_path / "output" / "run")
    (killed / "model").rename(files.temporary_path(killed / "model", files.REPLACED))
    before = sorted(killed.rglob("*"))
    monkeypatch.chdir(tmp_path)
    scores = (run / "test.json").read_text("utf-8")
    for named in (["--run", str(killed)], []):
        evaluate.main([*named, "--json", "-"])
        assert json.loads(capsys.readouterr().out) == json.loads(scores)
    texts = ["张伟说"]
    expected = predict.load(run, engine="torch").predict(texts)
    for place in (None, killed, killed / "model"):
        assert predict.load(place, engine="torch").predict(texts) == expected
    assert sorted(killed.rglob("*")) == before, "a reader moves nothing"
    model.main(["merge", str(killed), str(tmp_path / "merged")])
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_other_data_is_scored_and_unknown_types_are_named(run, tmp_path, capsys):
    (tmp_path / "data").write_text("北 B-GPE\n京 I-GPE\n好 O\n", "utf-8")
    evaluate.main(["--run", str(run), "--data", str(tmp_path / "data"), "--json", str(tmp_path / "s.json")])
    scores = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert scores["types"]["GPE"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert "GPE" in capsys.readouterr().err


def test_data_of_another_unit_is_refused(run, tmp_path, capsys):
    (tmp_path / "words").write_text("John B-PER\nlives O\nhere O\n", "utf-8")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--run", str(run), "--data", str(tmp_path / "words")])
    assert stopped.value.code == 2 and "words: its lines hold words" in capsys.readouterr().err


def test_the_run_is_found_and_scored_from_another_folder(run, monkeypatch, capsys):
    monkeypatch.chdir("/")
    evaluate.main(["--run", str(run), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == json.loads((run / "test.json").read_text("utf-8"))


@pytest.mark.parametrize(("break_it", "names"), [
    (lambda run: (run / "model" / "ner.json").write_text("{"), "ner.json"),
    (lambda run: (run / "model" / "adapter_model.safetensors").write_bytes(b"x" * 50), "adapter_model.safetensors"),
    (lambda run: (run / "model" / "adapter_config.json").unlink(), "adapter_config.json"),
    (lambda run: shutil.rmtree(run / "model"), "model"),
    (lambda run: shutil.rmtree(run), "expected the folder of a run"),
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


def test_a_hub_data_set_is_scored_on_its_test_part(run, tmp_path, capsys):
    """The train part's tags are all wrong here: scores that aren't those of the test file would be of that part."""
    rows = {"train": {"tokens": [["北", "京"]], "tags": [["B-ORG", "I-ORG"]]}, "test": {"tokens": [], "tags": []}}
    for block in (runs.world() / "test").read_text("utf-8").strip().split("\n\n"):
        pairs = [line.split(" ") for line in block.split("\n")]
        rows["test"]["tokens"].append([char for char, _ in pairs])
        rows["test"]["tags"].append([tag for _, tag in pairs])
    parts = {part: datasets.Dataset.from_dict(columns) for part, columns in rows.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    expected = json.loads((run / "test.json").read_text("utf-8"))
    evaluate.main(["--run", str(run), "--data", f"hub:{tmp_path / 'set'}", "--json", "-"])
    assert json.loads(capsys.readouterr().out) == expected
    shutil.copytree(run, tmp_path / "run")
    config = (tmp_path / "run" / "config.yaml").read_text("utf-8").splitlines()
    config = [line for line in config if not line.startswith("test:")] + [f'test: "hub:{tmp_path / "set"}"']
    (tmp_path / "run" / "config.yaml").write_text("\n".join(config), "utf-8")
    evaluate.main(["--run", str(tmp_path / "run"), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == expected


def test_any_accelerator_that_training_takes_scores_too(run, monkeypatch):
    """`meta` stands for an accelerator that is not CUDA."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("meta"))
    devices = []

    def of(run, device, precision):
        devices.append(str(device))
        raise evaluate.UserError("far enough")

    monkeypatch.setattr("ner.tagging.Tagger.of", of)
    with pytest.raises(SystemExit):
        evaluate.main(["--run", str(run)])
    assert devices == ["meta"]


def test_orphans_that_argmax_leaves_are_counted(run, monkeypatch, capsys):
    monkeypatch.setattr("ner.decoding.decode", lambda scores, *_, **__: [[2] * len(rows) for rows in scores])
    evaluate.main(["--run", str(run)])
    captured = capsys.readouterr()
    count = sum(len(line) > 0 for line in (runs.world() / "test").read_text("utf-8").split("\n"))
    assert f"warning: {count:,} predicted I- tags follow no beginning" in captured.err
    assert "  0.000000  0.000000  0.000000" in captured.out


def test_a_test_file_of_the_project_is_found_from_any_folder(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "project" / "data").mkdir(parents=True)
    shutil.copy(runs.world() / "test", tmp_path / "project" / "data" / "some-test")
    (tmp_path / "run" / "config.yaml").write_text("test: data/some-test\nprecision: auto\n", "utf-8")
    monkeypatch.setattr("ner.paths.ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    for named in ([], ["--data", "data/some-test"]):
        evaluate.main(["--run", str(tmp_path / "run"), "--json", "-", *named])
        assert json.loads(capsys.readouterr().out) == json.loads((run / "test.json").read_text("utf-8"))


def test_either_engine_is_scored(tmp_path, capsys):
    run, data = trained.exported(), tiny.corpus(tmp_path / "data", 60, seed=9)
    f1 = {}
    for engine in ("torch", "onnx"):
        evaluate.main(["--run", str(run), "--data", str(data), "--json", "-", "--engine", engine])
        f1[engine] = json.loads(capsys.readouterr().out)["micro"]["f1"]
    assert f1["torch"] > 0.9 and abs(f1["onnx"] - f1["torch"]) < 0.05
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--run", str(trained.run()), "--data", str(data), "--json", "-", "--engine", "onnx"])
    text = capsys.readouterr().err
    assert end.value.code == 2 and text.count("\n") == 1 and "model_int8.onnx" in text


def test_without_an_engine_the_model_is_scored_as_it_was_trained_and_not_its_onnx_file(tmp_path, monkeypatch, capsys):
    run, data = trained.exported(), tiny.corpus(tmp_path / "data", 20, seed=9)
    monkeypatch.setattr("ner.engines.OnnxEngine.logits", lambda *_: pytest.fail("the ONNX file was scored"))
    evaluate.main(["--run", str(run), "--data", str(data), "--json", "-"])
    assert json.loads(capsys.readouterr().out)["micro"]["f1"] > 0.9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_test_is_scored_in_the_precision_of_the_run_by_both_commands(tmp_path, monkeypatch, precision):
    used = []

    def watched(folder, device="cpu", precision="auto", *rest, real=Tagger.of, **keys):
        used.append((precision, rest, keys))
        return real(folder, device, precision, *rest, **keys)

    monkeypatch.setattr(Tagger, "of", watched)
    main.main(runs.argv(tmp_path, precision=precision, epochs=1))
    evaluate.main(["--run", str(tmp_path / "run")])
    assert used == [(precision, (), {})] * 2


def test_the_onnx_file_is_what_is_scored(tmp_path, monkeypatch, capsys):
    engines = []
    monkeypatch.setattr("ner.engines.TorchEngine.logits", lambda *_: engines.append("torch"))
    evaluate.main(["--run", str(trained.exported()), "--data", str(tiny.corpus(tmp_path / "data", 20, seed=9)),
                   "--json", "-", "--engine", "onnx"])  # fmt: skip
    assert not engines and json.loads(capsys.readouterr().out)["micro"]["f1"] > 0.9


@pytest.mark.parametrize("name", ["lora", "full"])
def test_runs_of_earlier_versions_are_scored(name, tmp_path, capsys):
    run = runs.ROOT / "tests" / "saved_runs" / name
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text("utf-8").splitlines()]
    blocks = [
        "".join(f"{char} {tag}\n" for char, tag in zip(row["chars"], row["gold"], strict=True)) + "\n" for row in rows
    ]
    (tmp_path / "test").write_text("".join(blocks), "utf-8")
    evaluate.main(["--run", str(run), "--data", str(tmp_path / "test"), "--json", "-"])
    scores, saved = json.loads(capsys.readouterr().out), json.loads((run / "test.json").read_text("utf-8"))
    assert scores["micro"]["support"] == saved["micro"]["support"] > 0
    assert scores["micro"]["f1"] == pytest.approx(saved["micro"]["f1"], abs=0.03)  # of other engines, then


def test_a_run_is_named_as_in_every_command_and_a_name_too_long_is_one_line(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "project" / "output").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "project" / "output" / "some-run")
    monkeypatch.setattr("ner.paths.ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--run", "output/some-run", "--json", "-"])
    assert json.loads(capsys.readouterr().out) == json.loads((run / "test.json").read_text("utf-8"))
    for command, arguments in ((evaluate, []), (predict, ["北京"])):
        with pytest.raises(SystemExit) as end:
            command.main(["--run", "x" * 5000, *arguments])
        text = capsys.readouterr().err
        assert end.value.code == 2 and text.count("\n") == 1 and "x: " in text
