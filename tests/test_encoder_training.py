"""The student of data/encoder: its schedule, texts, batches, masks and losses."""

import random

import numpy as np
import pytest
import torch
from encoder_parts import CHARS, HIDDEN, batches, build, e5, lac, student, texts, training, wheels


def recipe(**changes):
    settings = {"objectives": {"tags": 1.0, "vectors": 1.0, "gold": 1.0}, "cycles": [100, 200], "learning_rate": 1.0}
    settings |= {"warm_up": 0.02, "decay": 0.7, "masking": "spans", "masked": 0.13, "gold_every": 8}
    return training.Recipe(**settings | changes)


def test_the_rate_falls_in_each_cycle():
    rates = [recipe().rate(done) for done in range(301)]
    assert rates[1] == pytest.approx(0.5) and rates[20] == 1 and rates[99] < 0.02
    assert rates[102] == pytest.approx(0.5) and rates[120] == 1 and rates[299] < 0.01 and rates[300] == 0


def test_a_shorter_schedule_brings_the_decay_forward():
    longer, shorter = recipe(cycles=[1000]), recipe(cycles=[500])
    assert longer.rate(250) == 1 and shorter.rate(250) == pytest.approx(250 / 350) and shorter.rate(500) == 0


def test_gold_batches_come_in_the_last_cycle():
    streams = [recipe().stream(training.Progress(step, 101 if step > 8 else 0)) for step in range(24)]
    assert [step for step, stream in enumerate(streams) if stream == "gold"] == [15, 23]


def test_spans_of_two_cover_the_share_asked_for():
    rng = np.random.default_rng(0)
    masked = np.stack([batches.mask_spans(50, 0.13, rng) for _ in range(4000)])
    assert masked.mean(0) == pytest.approx(0.13, abs=0.03), "the ends of a text as often as its middle"
    assert masked.mean() == pytest.approx(0.13, abs=0.005)
    lone = masked[:, 1:-1] & ~masked[:, :-2] & ~masked[:, 2:]
    assert not lone.any()


@pytest.fixture
def small(build_parts):
    """(student with all heads, a batch of four sentences that has everything)."""
    folder = build_parts[0] / "wheels"
    file, analyser = e5.read_e5(folder / wheels.E5_FILE), lac.Lac(folder / wheels.LAC_FOLDER)
    words = file.tensors["emb.word"].view(-1, HIDDEN)
    encoder = e5.bert_of(file, [0, 2], words, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    learner = student.Student(encoder, ["tags", "masked", "gold", "vectors"], 3, HIDDEN)
    lines = [CHARS[:9], CHARS[9:20], "中国在中国", CHARS[5:30]]
    labels = analyser.label(lines)
    pieces = [batches.Piece(line, label, [1] * len(line)) for line, label in zip(lines, labels, strict=True)]
    vocab = {character: i for i, character in enumerate(file.pieces)}
    maker = batches.Maker(vocab, analyser, e5.E5(file, 8, "cpu", torch.float32), "spans", 0.13, "cpu")
    return learner, maker.make(pieces, 0)


def test_new_heads_learn_without_touching_the_encoder(small):
    learner, batch = small
    sum(learner(batch, detached=True).values()).backward()
    # the masked characters' head ends in the word embeddings, so these learn with it
    others = [w for name, w in learner.encoder.named_parameters() if "word_embeddings" not in name]
    assert all(weight.grad is None for weight in others)
    assert all(weight.grad.any() for weight in learner.heads.parameters())
    sum(learner(batch).values()).backward()
    assert all(weight.grad is not None for weight in others)


def test_the_vectors_are_those_of_the_text_before_masking(small):
    learner, batch = small
    masked = batch.ids == batches.MASK
    assert masked.any() and batch.vectors[masked].any(-1).all()
    known = batch.shares.sum(-1) > 0
    assert torch.equal(batch.vectors.any(-1), known)
    predicted = learner.heads["vectors"](learner.encoder(batch.ids, batch.mask).last_hidden_state)
    expected = (predicted - batch.vectors)[known].square().mean()
    assert learner(batch)["vectors"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.variance(batch.vectors).item() == pytest.approx(
        batch.vectors[known].var(0, correction=0).mean().item()
    )


@pytest.mark.parametrize("plain_share", [1.0, 0.3])
def test_a_stream_goes_on_anywhere(build_parts, tmp_path, monkeypatch, plain_share):
    monkeypatch.setattr(batches, "SHARD", 300)
    analyser = lac.Lac(build_parts[0] / "wheels" / wheels.LAC_FOLDER)
    rng = random.Random(3)
    lines = ["".join(rng.choices(CHARS, k=rng.randint(8, 40))) for _ in range(60)]

    def take(count, skip):
        stream = batches.Pieces(lines, analyser, tmp_path / "labels/text", 128, plain_share).batches(skip)
        return [[piece.text for piece in next(stream)] for _ in range(count)]

    whole = take(60, 0)
    assert take(20, 40) == whole[40:] and take(1, 0) == whole[:1]
    if plain_share == 1.0:
        first = [text for batch in whole for text in batch][: len(lines)]
        assert sorted(first) == sorted(lines), "an epoch holds every piece once"


def test_the_seed_decides_the_order_and_nothing_is_lost(build_parts, tmp_path):
    _, text, held, _ = build_parts
    orders = []
    for name, seed in ("first", 0), ("again", 0), ("other", 1):
        (tmp_path / name).mkdir()
        orders.append(texts.collect(tmp_path / name, [text], texts.HeldOut([held]), None, seed))
    first, again, other = orders
    assert first == again != other and sorted(first) == sorted(other)


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_used_only_where_it_is_native(monkeypatch, native, dtype):
    monkeypatch.setattr("ner.precision.cpu_has_bfloat16", lambda: native)
    assert build.compute_type("cpu") is dtype


def test_lines_are_cut_after_punctuation():
    line = "的一是在，" * 60
    pieces = list(texts.cut(line, texts.SHORT))
    assert "".join(pieces) == line and all(len(piece) <= texts.SHORT and piece.endswith("，") for piece in pieces)
    assert [len(piece) for piece in texts.cut("的" * 300, texts.SHORT)] == [126, 126, 48]


def test_batches_hold_every_piece_once_in_few_shapes():
    lengths = [1 + i % 250 for i in range(3000)]
    planned = batches.plan(lengths, 1024, "0")
    assert sorted(i for batch in planned for i in batch) == list(range(3000))
    shapes = {(len(batch), -(-(max(lengths[i] for i in batch) + 2) // batches.STEP)) for batch in planned}
    assert len(shapes) <= 2 * 252 // batches.STEP, "a full and a last batch for each length"
    assert all(rows * width * batches.STEP <= 1024 for rows, width in shapes)
