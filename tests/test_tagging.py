"""tagging.py: batches that are small and whole, the same scores on any number of threads, torch's own precision."""

import numpy as np
import pytest
import tiny
import torch

from ner import config, model, saved_model
from ner.tagging import Tagger, least_margin

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
TEXTS = ["1998年3月，江泽民在北京会见了比尔·盖茨。", "上海", "\u3000 \u200b😀e\u0301[SEP]"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """tuning -> a model folder whose adapter and head are not zero."""
    root = tmp_path_factory.mktemp("tagging")
    source = tiny.encoder(root / "encoder", tiny.wordpiece(root / "tokenizer"))
    folders = {}
    for tuning in ("lora", "full", "dora", "prompt"):
        torch.manual_seed(0)
        settings = config.Config(
            pretrained=str(source), tuning=tuning, max_length=64, lora=config.Lora(r=4), head="softmax"
        )
        network, tokenizer, meta = model.build(settings, LABELS, "character")
        with torch.no_grad():
            for weight in network.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.1)
        folders[tuning] = root / tuning / "model"
        saved_model.save(network, tokenizer, meta, folders[tuning])
    return folders


def test_torch_tags_in_the_precision_asked_for(saved):
    """What a run's scores are computed in is what config.yaml says, never 8 bits."""
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        tagger = Tagger.of(saved["lora"], precision=precision)
        assert {weight.dtype for weight in tagger.engine.model.parameters()} == {dtype}


def test_log_probs_are_those_of_transformers(saved):
    network, tokenizer, meta = saved_model.load(saved["full"])
    tagger = Tagger.of(saved["full"], precision="fp32")
    text = TEXTS[0]
    ids = [tokenizer.cls_token_id, *tokenizer.convert_tokens_to_ids(list(text)), tokenizer.sep_token_id]
    with torch.no_grad():
        expected = network(input_ids=torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1)
    assert np.allclose(tagger.log_probs([list(text)])[0], expected.numpy(), atol=1e-5)


def test_batches_on_a_cpu_are_small_and_whole(saved):
    tagger = Tagger.of(saved["full"], precision="fp32")
    cut = tagger.windower.windows([["北"] * n for n in range(120)])
    made = tagger._batches(cut)
    assert sorted(id(w) for batch in made for w in batch) == sorted(map(id, cut))
    assert max(len(batch) for batch in made) <= tagger.batch_size
    assert max(len(batch) * len(batch[0].ids) for batch in made) <= tagger.engine.most_tokens
    assert len(tagger._batches(cut[-10:])) > 1  # one for each thread of a small machine


@pytest.mark.parametrize("tuning", ["full", "dora", "prompt"])
def test_batches_on_several_threads_give_what_one_gives(saved, tuning):
    before = torch.get_num_threads()
    texts, scores = [list(TEXTS[0] * (1 + n % 3)) for n in range(90)], []
    tagger = Tagger.of(saved[tuning], precision="fp32")
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            scores.append(tagger.log_probs(texts))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(one, several) for one, several in zip(*scores, strict=True))


def test_a_margin_needs_two_labels():
    assert least_margin(np.zeros((3, 1), np.float32)) == least_margin(np.zeros((0, 5), np.float32)) == 1.0
    assert least_margin(np.log(np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]))) == pytest.approx(0.2)
