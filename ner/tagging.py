"""Sentences → tags with a model, through one of the engines of ner/engines.py.

Windows, stitching and decoding are the same whatever the engine: a sentence is cut into windows that fit the model, the
windows are padded into batches of like length, and each character's logits come from the window that owns it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ner import batches, decoding, windows
from ner.engines import Engine, OnnxEngine, TorchEngine, how_to_export
from ner.errors import UserError
from ner.meta import model_folder, read_meta
from ner.onnx_file import FILES, exported_file
from ner.tokens import FastTokenizer

if TYPE_CHECKING:
    import torch

LEAST_TOKENS = 256  # of a batch on a CPU: what is worth a call
BATCHES_AT_ONCE = 64  # batches' worth of sentences whose scores are held in memory together


class Tagger:
    """A model with its tokenizer, ready to tag. `meta` is what ner.json holds."""

    def __init__(self, model: "torch.nn.Module | OnnxEngine", tokenizer: Any, meta: dict, batch_size: int = 32):
        self.engine: Engine = model if isinstance(model, OnnxEngine) else TorchEngine(model)
        self.labels, self.decode, self.unit = meta["labels"], meta["decode"], meta["unit"]
        self.transitions: np.ndarray | None = meta.get("transitions")  # a CRF's, float32 [labels, labels]
        self.windower = windows.Windower(tokenizer, meta["unit"], meta["special_tokens"], meta["max_length"])
        self.pad_id = tokenizer.pad_token_id or 0
        self.batch_size = batch_size

    @classmethod
    def of(
        cls,
        run: str | Path,
        device: "str | torch.device" = "cpu",
        precision: str = "auto",
        batch_size: int = 32,
        engine: str = "torch",
        threads: int | None = None,
    ) -> "Tagger":
        """Return the tagger of a run or model folder.

        engine: "torch" computes on `device` in `precision`, which config.yaml explains, as training does; "onnx"
        computes the exported file of the folder on the CPU. threads: all cores, or what torch has, where None.
        Raises UserError where the model or the file is missing, damaged, or does not fit ner.json.
        """
        folder = model_folder(run)
        if engine == "onnx":
            file, meta = exported_file(folder), read_meta(folder)
            if file is None:
                raise UserError(f"{folder}: there is no {' or '.join(FILES)}; {how_to_export(folder)}")
            return cls(OnnxEngine(file, meta["labels"], threads), FastTokenizer(folder), meta, batch_size)
        import torch

        from ner import kernels, saved_model
        from ner.precision import choose_dtype

        if threads:
            torch.set_num_threads(threads)
        model, tokenizer, meta = saved_model.load(folder, device, attention=kernels.attention_implementation(device))
        kernels.prepare(model, choose_dtype(precision, device)[0], device)
        return cls(model, tokenizer, meta, batch_size)

    def log_probs(self, sentences: list[list[str]]) -> list[np.ndarray]:
        """Return for each sentence of n units the log-probabilities of its tags, float32 [n, labels]."""
        logits: dict[int, np.ndarray] = {}
        with self.engine.workers() as each:
            for batch, scores in each(self._scored, self._batches(self.windower.windows(sentences))):
                windows.stitch(batch, scores, logits)
        empty = np.zeros((0, len(self.labels)), np.float32)
        return [log_softmax(logits.get(index, empty)) for index in range(len(sentences))]

    def _scored(self, batch: list[windows.Window]) -> tuple[list[windows.Window], np.ndarray]:
        """Return the batch and its logits, float32 [batch, length, labels]."""
        return batch, self.engine.logits(*batches.padded(batch, self.pad_id))

    def _batches(self, cut: list[windows.Window]) -> list[list[windows.Window]]:
        """Group windows of like length, longest first.

        On a CPU there are two batches or more for each thread, where that does not make them too small.
        """
        if not self.engine.on_cpu:
            return batches.by_length(cut, self.batch_size)
        share = sum(len(window.ids) for window in cut) // (2 * self.engine.threads)
        return batches.by_length(cut, self.batch_size, min(self.engine.most_tokens, max(LEAST_TOKENS, share)))

    def decoded(self, log_probs: list[np.ndarray]) -> list[tuple[list[str], np.ndarray]]:
        """Return tags and the probability of each, float32 [n], by the run's way of decoding."""
        paths = decoding.decode(log_probs, self.labels, self.decode, self.transitions)
        return [
            ([self.labels[label] for label in path], np.exp(rows[np.arange(len(path)), path]))
            for rows, path in zip(log_probs, paths, strict=True)
        ]

    def tag(self, sentences: list[list[str]]) -> list[tuple[list[str], np.ndarray, float]]:
        """Return for each sentence of n units: n IOB2 tags, the probability of each, float32 [n], and the margin."""
        tagged: list[tuple[list[str], np.ndarray, float]] = []
        step = self.batch_size * BATCHES_AT_ONCE
        for start in range(0, len(sentences), step):
            log_probs = self.log_probs(sentences[start : start + step])
            for (tags, probs), rows in zip(self.decoded(log_probs), log_probs, strict=True):
                tagged.append((tags, probs, least_margin(rows)))
        return tagged


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float32 [n, labels], of logits [n, labels]."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def least_margin(log_probs: np.ndarray) -> float:
    """Return the least lead of the best tag over the next, as probabilities, of log-probabilities [n, labels]."""
    if not len(log_probs) or log_probs.shape[-1] < 2:
        return 1.0
    best_two = np.exp(np.partition(log_probs, -2, axis=-1)[:, -2:])
    return float((best_two[:, 1] - best_two[:, 0]).min())
