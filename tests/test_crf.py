"""The CRF: loss and gradient against enumeration of all paths, windows of any shape, its file."""

import itertools
import json

import numpy as np
import pytest
import runs
import safetensors.torch
import torch

import evaluate
import main
from ner import crf as crfs
from ner import decoding, export
from ner.errors import UserError
from ner.meta import CRF_FILE, read_meta, write_meta
from ner.tagging import Tagger

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def random_crf(seed=0, labels=LABELS):
    crf = crfs.Crf(labels)
    with torch.no_grad():
        crf.transitions.copy_(torch.randn(crf.transitions.shape, generator=torch.Generator().manual_seed(seed)))
    return crf


def batch(*labels, seed=1):
    """Return random logits and these labels, padded with -100 to the longest."""
    longest = max(map(len, labels))
    rows = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in labels])
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*rows.shape, len(LABELS), generator=generator, requires_grad=True), rows


def enumerated_loss(crf, logits, labels):
    """Return the summed negative log likelihood over all paths without a forbidden step, one window at a time."""
    allowed, total = decoding.allowed_steps(LABELS), 0.0
    for rows, gold in zip(logits, labels, strict=True):
        rows, gold = rows[gold != -100], gold[gold != -100].tolist()
        if not gold:
            continue
        worths = {}
        for path in itertools.product(range(len(LABELS)), repeat=len(gold)):
            if all(allowed[a, b] for a, b in itertools.pairwise(path)):
                steps = sum(crf.transitions[a, b] for a, b in itertools.pairwise(path))
                worths[path] = sum(rows[t, label] for t, label in enumerate(path)) + steps
        total = total + torch.logsumexp(torch.stack(list(worths.values())), 0) - worths[tuple(gold)]
    return total


# Special tokens and later tokens of a word are -100, and a window may begin inside an entity.
WINDOWS = [
    [[0]],
    [[1, 2, 0, 3, 4]],
    [[-100, 1, 2, -100, 2, -100], [-100, 0, 3, 4], [-100, -100]],
    [[2, 2, 0], [0], [-100]],
]


@pytest.mark.parametrize("windows", WINDOWS)
def test_loss_and_gradients_equal_enumeration(windows):
    crf = random_crf()
    logits, labels = batch(*windows)
    gradients = []
    for loss in (crf(logits, labels), enumerated_loss(crf, logits, labels)):
        gradients.append((loss, *torch.autograd.grad(loss, [logits, crf.transitions], allow_unused=True)))
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, torch.zeros_like(ours) if theirs is None else theirs, atol=1e-5)


def test_a_window_costs_the_same_in_any_batch():
    crf = random_crf()
    logits, labels = batch([1, 2, 0, 0, 3, 4], [0, -100, 3], [-100, 1])
    alone = sum(crf(logits[i : i + 1, : (labels[i] != -100).nonzero().max() + 1],
                    labels[i : i + 1, : (labels[i] != -100).nonzero().max() + 1]) for i in range(3))  # fmt: skip
    assert float(crf(logits, labels).detach()) == pytest.approx(float(alone.detach()), abs=1e-5)


def test_a_batch_without_labels_costs_nothing():
    logits, labels = batch([-100, -100])
    loss = random_crf()(logits, labels)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_low_precision_logits_are_summed_in_float32():
    logits, labels = batch([1, 2, 0, 0, 3, 4] * 30)
    crf = random_crf()
    loss = crf(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(crf(logits.bfloat16().float(), labels).detach()))


def test_forbidden_steps_stay_forbidden_while_others_learn():
    crf, (logits, labels) = random_crf(), batch([1, 2, 0, 3, 4], [0, 0, 0])
    before = crf.steps().detach().clone()
    crf(logits, labels).backward()
    assert crf.transitions.grad.masked_select(crf.forbidden).abs().max() == 0
    assert crf.transitions.grad.masked_select(~crf.forbidden).abs().min() > 0
    torch.optim.SGD(crf.parameters(), lr=0.1).step()
    assert (crf.steps() != before)[~crf.forbidden].all() and (crf.steps() == before)[crf.forbidden].all()


def test_it_learns_what_follows_what():
    """The logits say nothing of the type of an entity after another; the transitions learn that LOC follows PER."""
    crf, labels = crfs.Crf(LABELS), torch.tensor([[3, 4, 1, 2, 0]])
    logits = torch.zeros(1, 5, len(LABELS))
    logits[0, range(5), labels[0]] = 2.0
    logits[0, 2] = logits[0, 2, 3] = 2.0  # position 2: anything
    optimizer = torch.optim.AdamW(crf.parameters(), lr=0.1)
    losses = []
    for _ in range(50):
        loss = crf(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    (path,) = decoding.decode([logits[0].numpy()], LABELS, "viterbi", crf.numpy())
    assert path.tolist() == [3, 4, 1, 2, 0]


@pytest.fixture
def folder(tmp_path):
    """A saved model's ner.json and crf.safetensors."""
    meta = {"labels": LABELS, "unit": "character", "special_tokens": True, "max_length": 64, "decode": "viterbi",
            "tuning": "lora", "pretrained": "encoder", "virtual_tokens": 0, "head": "crf"}  # fmt: skip
    write_meta(tmp_path, meta | {"transitions": random_crf().numpy()})
    assert (tmp_path / CRF_FILE).stat().st_mode == (tmp_path / "ner.json").stat().st_mode  # others may read it too
    return tmp_path


def test_it_is_saved_and_loaded_bit_for_bit(folder):
    assert np.array_equal(read_meta(folder)["transitions"], random_crf().numpy())
    assert torch.equal(crfs.Crf(LABELS, read_meta(folder)["transitions"]).transitions, random_crf().transitions)
    meta = read_meta(folder)
    write_meta(folder, meta | {"decode": "argmax"})  # as an export does
    assert np.array_equal(read_meta(folder)["transitions"], meta["transitions"])


@pytest.mark.parametrize(("break_it", "says"), [
    (lambda file: file.unlink(), "crf.safetensors is missing"),
    (lambda file: file.write_bytes(b"x" * 40), "damaged"),
    (lambda file: safetensors.torch.save_file({"other": torch.zeros(5, 5)}, file), "damaged"),
    (lambda file: safetensors.torch.save_file({"transitions": torch.zeros(7, 7)}, file), "found 7 x 7"),
    (lambda file: safetensors.torch.save_file({"transitions": torch.full((5, 5), torch.nan)}, file), "finite"),
    (lambda file: json_head(file, "sparse"), "head is 'sparse'"),
])  # fmt: skip
def test_a_damaged_file_is_named(folder, break_it, says):
    break_it(folder / CRF_FILE)
    with pytest.raises(UserError, match=says):
        read_meta(folder)


def json_head(file, head):
    meta = json.loads((file.parent / "ner.json").read_text("utf-8"))
    (file.parent / "ner.json").write_text(json.dumps(meta | {"head": head}), "utf-8")


def test_low_learning_rates_leave_it_behind_its_own_does_not(tmp_path):
    """The transitions have a learning rate of their own, whatever the model's is."""
    main.main(runs.argv(tmp_path, head="crf", learning_rate=1e-6, crf_learning_rate=0.1, epochs=1, averaging="false"))
    transitions = read_meta(tmp_path / "run" / "model")["transitions"]
    labels = read_meta(tmp_path / "run" / "model")["labels"]
    assert np.median(np.abs(transitions[decoding.allowed_steps(labels)])) > 0.1
    assert not transitions[~decoding.allowed_steps(labels)].any()


@pytest.mark.parametrize("keys", [
    {"tuning": "lora", "learning_rate": 2e-2, "precision": "bf16"},
    {"tuning": "full", "precision": "fp32", "kernels": "plain"},
])  # fmt: skip
def test_a_run_trains_saves_scores_and_tags_with_it(tmp_path, keys, capsys):
    main.main(runs.argv(tmp_path, head="crf", epochs=3, **keys))
    run = tmp_path / "run"
    scores = json.loads((run / "test.json").read_text("utf-8"))
    assert scores["micro"]["f1"] > 0.5
    losses = [line["train_loss"] for line in runs.metrics(run)]
    assert losses == sorted(losses, reverse=True)
    capsys.readouterr()
    evaluate.main(["--run", str(run), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == scores
    tagger = Tagger.of(run, precision=keys["precision"])
    log_probs = tagger.log_probs([list("张伟在北京会见了李娜。")])
    (path,) = decoding.crf_viterbi(log_probs, tagger.labels, read_meta(run / "model")["transitions"])
    assert tagger.decoded(log_probs)[0][0] == [tagger.labels[label] for label in path]

    folder = export.merge(run, tmp_path / "merged")  # what is made of the run decodes with it too
    assert np.array_equal(read_meta(folder)["transitions"], read_meta(run / "model")["transitions"])


def test_it_goes_on_bit_for_bit_after_a_kill(tmp_path):
    keys = {"head": "crf", "epochs": 3, "checkpoint_minutes": 0.0001, "dropout": 0.1}
    whole = runs.Process(runs.argv(tmp_path / "whole", **keys))
    broken = runs.Process(runs.argv(tmp_path / "broken", **keys))
    metrics = tmp_path / "broken" / "run" / "metrics.jsonl"
    runs.until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, broken)
    broken.kill()
    assert whole.wait() == 0, whole.output
    assert runs.Process(["--resume", str(tmp_path / "broken" / "run")]).wait() == 0
    for part in ("whole", "broken"):
        assert (tmp_path / part / "run" / "test.json").is_file()
    ends = [safetensors.torch.load_file(tmp_path / part / "run" / "checkpoint" / "state.safetensors")
            for part in ("whole", "broken")]  # fmt: skip
    assert "weight/crf.transitions" in ends[0] and "exp_avg/crf.transitions" in ends[0]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    models = [read_meta(tmp_path / part / "run" / "model")["transitions"] for part in ("whole", "broken")]
    assert np.array_equal(*models)


@pytest.mark.parametrize("other", [("--loss", "focal"), ("--label_smoothing", "0.1"), ("--decode", "argmax")])
def test_keys_that_it_has_no_use_for_are_refused(other, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["--head", "crf", *other])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: {other[0]}: ") and "head crf" in error


def test_the_onnx_file_of_a_run_is_decoded_with_it(tmp_path, capsys):
    main.main(runs.argv(tmp_path, head="crf", epochs=3, export="int8"))
    run = tmp_path / "run"
    tagger = Tagger.of(run, engine="onnx")
    assert np.array_equal(tagger.transitions, read_meta(run / "model")["transitions"])
    capsys.readouterr()
    evaluate.main(["--run", str(run), "--json", "-", "--engine", "onnx"])
    f1 = json.loads((run / "test.json").read_text("utf-8"))["micro"]["f1"]
    assert json.loads(capsys.readouterr().out)["micro"]["f1"] == pytest.approx(f1, abs=0.1)
