"""Variants of the encoder's distillation that can be compared: entity swaps, whole words, replaced characters."""

import random

import numpy as np
import pytest
import torch
from encoder_parts import HIDDEN, batches, e5, lac, student, wheels
from swaps import Swaps
from test_encoder_training import small  # noqa: F401

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def piece(text, gold, soft=False):
    """A piece whose analyser's tags are its characters' places, so that what belongs together can be told."""
    label = np.zeros((len(text), lac.TOP, 2), np.uint8)
    label[:, 0] = np.stack([[ord(c) % 49 for c in text], np.full(len(text), 255)], -1)
    silver = np.zeros((len(text), lac.TOP, 2), np.uint8)
    silver[:, 0] = np.stack([gold, np.full(len(text), 255)], -1)
    return batches.Piece(text, label, None, silver) if soft else batches.Piece(text, label, gold)


@pytest.mark.parametrize("soft", [False, True])
def test_entities_are_exchanged_with_their_labels(soft):
    first = piece("王小明去北京。", [1, 2, 2, 0, 3, 4, 0], soft)
    second = piece("李四在石家庄", [1, 2, 0, 3, 4, 4], soft)
    swaps = Swaps(TAGS, share=1.0)
    assert swaps.spans(first) == [(0, 3, "PER"), (4, 6, "LOC")]
    pool = swaps.pool([first, second])
    seen = set()
    for seed in range(30):
        result = swaps.exchange(first, pool, random.Random(seed))
        seen.add(result.text)
        assert [ord(c) % 49 for c in result.text] == result.label[:, 0, 0].tolist()
        tags = result.silver[:, 0, 0].tolist() if soft else result.gold
        expected = ["O" if c in "去。" else "B" if c in "王李北石" else "I" for c in result.text]
        assert [TAGS[tag][0] for tag in tags] == expected
    assert seen == {person + "去" + place + "。" for person in ("王小明", "李四") for place in ("北京", "石家庄")}
    assert Swaps(TAGS, share=0.0).exchange(first, pool, random.Random(0)) is first


def test_an_unsure_entity_stays():
    unsure = piece("王小明去", [1, 2, 2, 0], soft=True)
    unsure.silver[2, 0, 1] = 100
    assert Swaps(TAGS, 1.0).spans(unsure) == []


def test_replaced_characters_are_told_from_others(small):  # noqa: F811
    learner, batch = small
    torch.manual_seed(0)
    model = student.Student(learner.encoder, ["masked", "replaced", "tags"], 3, HIDDEN)
    guesses = model.generator(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    _, ids, replaced = model._replace(guesses, batch)
    true = batch.ids.flatten().clone()
    true[batch.masked[batch.originals >= 0]] = batch.originals[batch.originals >= 0]
    assert torch.equal(replaced.flatten(), ids.flatten() != true) and replaced.any()
    losses = model(batch)
    assert {"masked", "replaced", "tags"} <= losses.keys() and all(torch.isfinite(loss) for loss in losses.values())


def test_vectors_of_two_layers_stand_side_by_side(build_parts):
    file = e5.read_e5(build_parts[0] / "wheels" / wheels.E5_FILE)
    text = ["我们在中国的人。", "是的"]
    alone = [e5.E5(file, layers, "cpu", torch.float32).vectors(text, 16) for layers in (6, 8)]
    torch.testing.assert_close(e5.E5(file, 8, "cpu", torch.float32, also=6).vectors(text, 16), torch.cat(alone, -1))
