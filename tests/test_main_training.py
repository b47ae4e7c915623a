"""How a run trains and chooses: best epoch, averaged weights, accumulation, learning rate, odd data."""

import json

import pytest
import runs
from runs import log, losses, metrics
from safetensors.torch import load_file

import main
from ner import config as settings
from ner import scores as scoring

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_best_epoch_is_chosen_on_dev_and_saved(tmp_path, monkeypatch):
    grades, weights = iter([0.2, 0.9, 0.5, 0.7]), {}

    def score_sentences(tagger, sentences, devices=None, real=scoring.score_sentences):
        scores, predicted, loss = real(tagger, sentences, devices)
        scores["micro"]["f1"] = next(grades)
        weights[len(weights)] = {
            name: weight.detach().clone() for name, weight in tagger.engine.model.named_parameters()
        }
        return scores, predicted, loss

    monkeypatch.setattr(scoring, "score_sentences", score_sentences)
    main.main(runs.argv(tmp_path, epochs=3))
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(saved[name].equal(weight) for name, weight in weights[1].items())
    assert any(not saved[name].equal(weight) for name, weight in weights[2].items())
    assert json.loads((tmp_path / "run" / "finished.json").read_text("utf-8")) == {"best_epoch": 2, "epochs": 3}
    assert "开始测试第2轮模型在测试集上的效果" in log(tmp_path / "run")


def test_the_run_says_how_many_epochs_suit_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "SENTENCES_OF_A_RUN", 0)
    main.main(runs.argv(tmp_path, epochs="auto"))
    assert len(metrics(tmp_path / "run")) == settings.load_run(tmp_path / "run").epochs == 3
    assert "13 steps an epoch, 3 epochs; full" in log(tmp_path / "run")


def test_averaged_weights_are_scored_and_saved_and_training_is_the_same(tmp_path):
    saved = {}
    for averaging in (True, False):
        main.main(runs.argv(tmp_path, run=str(averaging), epochs=2, averaging=averaging))
        saved[averaging] = load_file(tmp_path / str(averaging) / "model" / "model.safetensors")
    mine, theirs = (metrics(tmp_path / str(averaging)) for averaging in (True, False))
    assert [line["train_loss"] for line in mine] == [line["train_loss"] for line in theirs]
    assert [line["dev_loss"] for line in mine] != [line["dev_loss"] for line in theirs]
    assert any(not weight.equal(saved[False][name]) for name, weight in saved[True].items())


def test_without_dev_a_share_of_train_is_held_out_by_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main.main(runs.argv(tmp_path, run=name, dev=None, epochs=1, seed=seed))
    assert "5% of train, 10 sentences, are held out" in log(tmp_path / "a") and "190 windows" in log(tmp_path / "a")
    supports = [metrics(tmp_path / name)[0]["dev"]["micro"]["support"] for name in "abc"]
    assert supports[0] == supports[1] > 0 and losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_without_test_the_run_ends_and_is_found(tmp_path):
    main.main(runs.argv(tmp_path, test=None, epochs=1))
    assert not (tmp_path / "run" / "test.json").exists() and scoring.newest_run(tmp_path) == tmp_path / "run"
    assert "finished: " in log(tmp_path / "run") and "在测试集上" not in log(tmp_path / "run")


def test_an_epoch_that_finds_nothing_says_so_and_why(tmp_path, monkeypatch):
    def score_sentences(tagger, sentences, devices=None):
        predicted = [["O"] * len(sentence.tags) for sentence in sentences]
        return scoring.score([sentence.tags for sentence in sentences], predicted), predicted, 1.0

    monkeypatch.setattr(scoring, "score_sentences", score_sentences)
    main.main(runs.argv(tmp_path, tuning="lora", learning_rate=1e-5, epochs=1))
    said = [line for line in log(tmp_path / "run").splitlines() if "WARNING" in line]
    assert sum("learning_rate 1e-05 is too low for lora" in line for line in said) == 2, (
        "before training, and as the cause"
    )
    assert any("no entity at all was predicted" in line and "too low" in line for line in said)
    main.main(runs.argv(tmp_path, learning_rate=2e-4, epochs=1))
    assert "the likely cause: 13 steps at learning rate 0.0002 were too few" in log(tmp_path / "run-2")


def test_odd_data_is_warned_about(tmp_path):
    (tmp_path / "dev").write_text((runs.world() / "dev").read_text("utf-8") + "\n北 I-GPE\n京 I-GPE\n", "utf-8")
    main.main(runs.argv(tmp_path, dev=tmp_path / "dev", epochs=1))
    said = " ".join(line for line in log(tmp_path / "run").splitlines() if "WARNING" in line)
    assert "GPE" in said and "orphan" in said and "are in" in said
    assert metrics(tmp_path / "run")[0]["dev"]["types"]["GPE"]["support"] == 1


def test_one_sentence_is_enough_to_run(tmp_path):
    (tmp_path / "one").write_text("北 B-LOC\n京 I-LOC\n好 O\n", "utf-8")
    main.main(runs.argv(tmp_path, train=tmp_path / "one", dev=None, test=tmp_path / "one", epochs=1))
    assert log(tmp_path / "run").count("batch loss") == 1


def test_long_sentences_are_trained_and_scored_whole(tmp_path):
    text = (runs.world() / "train").read_text("utf-8").replace("\n\n", "\n")
    (tmp_path / "long").write_text(text, "utf-8")
    main.main(
        runs.argv(
            tmp_path, train=tmp_path / "long", dev=tmp_path / "long", test=tmp_path / "long", max_length=32, epochs=2
        )
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 1 and len(rows[0]["predicted"]) == len(rows[0]["chars"]) == 2777
    assert metrics(tmp_path / "run")[0]["dev"]["micro"]["support"] == 409


def test_accumulation_computes_what_a_larger_batch_does(tmp_path):
    main.main(runs.argv(tmp_path, run="large", batch_size=16, dropout=0))
    main.main(runs.argv(tmp_path, run="small", batch_size=4, accumulation=4, dropout=0))
    for ours, theirs in zip(losses(tmp_path / "large"), losses(tmp_path / "small"), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-4) and ours[1] == pytest.approx(theirs[1], rel=1e-3)


def test_the_log_warns_of_keys_without_effect(tmp_path):
    main.main(runs.argv(tmp_path, lora_r=8, epochs=1))
    assert "WARNING - lora.r has no effect with tuning full, only with lora, dora, rslora" in log(tmp_path / "run")


def test_the_learning_rate_rises_and_falls_in_straight_lines(tmp_path, monkeypatch):
    from ner.optimizer import Optimizer

    rates = []

    def step(self, rate, max_norm, real=Optimizer.step):
        rates.append(rate)
        return real(self, rate, max_norm)

    monkeypatch.setattr(Optimizer, "step", step)
    main.main(runs.argv(tmp_path, warmup_ratio=0.25, learning_rate=1e-3))  # 26 steps, 6 of them warm-up
    assert rates == pytest.approx(
        [1e-3 * step / 6 for step in range(1, 7)] + [1e-3 * step / 20 for step in range(20, 0, -1)]
    )
