"""benchmarks/scores.py: it reads the runs that it trained, and no others."""

import contextlib
import io
import json
import subprocess
import sys
import types

import pytest
import runs

import main
from ner import scores as scoring

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
benchmark = __import__("scores")
sys.path.pop(0)
REST = ["--pretrained", str(runs.world() / "encoder"), "--epochs", "1", "--max_length", "64", "--learning_rate", "5e-3"]


@pytest.fixture
def trained(monkeypatch):
    """Run main.py in this process, and list how often."""
    commands = []

    def run(command, **_):
        commands.append(command)
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            main.main(command[2:])
        return subprocess.CompletedProcess(command, 0, log.getvalue(), "")

    monkeypatch.setattr(benchmark, "subprocess", types.SimpleNamespace(run=run))
    return commands


def test_it_reads_the_folder_that_main_wrote_whatever_lies_there(tmp_path, trained, monkeypatch, capsys):
    train = benchmark.train
    run = train(runs.world(), "full", 1, REST, tmp_path / "one")
    assert run.parent == tmp_path / "one" and (run / "test.json").is_file()
    broken_off = tmp_path / "two" / run.name  # as an interrupted run leaves it: a folder, and no test.json
    (broken_off / "model").mkdir(parents=True)
    again = train(runs.world(), "full", 1, REST, tmp_path / "two")
    assert again == tmp_path / "two" / f"{run.name}-2" and (again / "test.json").is_file()
    assert len(trained) == 2
    assert train(runs.world(), "full", 1, REST, tmp_path / "two") == again and len(trained) == 2
    other = tmp_path / "two" / f"{run.name}-extra"  # of somebody else, whose name begins alike
    (other / "model").mkdir(parents=True)
    (other / "test.json").write_text("{}")
    assert train(runs.world(), "full", 1, REST, tmp_path / "two") == again

    found = benchmark.results(again)
    rows = benchmark.read_lines(again / "predictions.jsonl")
    assert found["strict"] == json.loads((again / "test.json").read_text("utf-8"))
    assert found["first49"] == scoring.score(
        [scoring.clip(row["gold"]) for row in rows], [scoring.clip(row["predicted"]) for row in rows]
    )
    monkeypatch.setattr(sys, "argv", ["scores.py", "--data", str(runs.world()), "--tuning", "full", "--seeds", "1",
                                      "--output", str(tmp_path / "two"), "--json", str(tmp_path / "all.json"),
                                      "--", *REST])  # fmt: skip
    benchmark.main()
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and f"| full | strict | {found['strict']['micro']['f1']:.4f} |" in table[2]
    assert json.loads((tmp_path / "all.json").read_text("utf-8"))["full"][0]["run"] == again.name


def test_a_run_that_fails_ends_it_with_the_log(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "error: no")
    monkeypatch.setattr(benchmark, "subprocess", types.SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(SystemExit, match="error: no"):
        benchmark.train(runs.world(), "full", 1, [], tmp_path)


def test_several_seeds_are_a_mean_and_a_deviation():
    assert benchmark.spread([0.5]) == "0.5000"
    assert benchmark.spread([0.5, 0.7]) == "0.6000 ± 0.1414 (0.5000, 0.7000)"
