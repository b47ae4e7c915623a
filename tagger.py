"""Sentences in, tags out: windows through the model and back, in batches that suit tagging."""

from pathlib import Path

import numpy as np
import torch

import fast
import loader

SENTENCES_AT_ONCE = 64  # batches' worth of sentences whose scores are held in memory together


class Tagger:
    """A model with its tokenizer, ready to tag. `meta` is what model.build and model.load return with them."""

    def __init__(self, model, tokenizer, meta: dict, batch_size: int = 32):
        self.model, self.labels, self.decode, self.batch_size = model, meta["labels"], meta["decode"], batch_size
        self.units = loader.Units(tokenizer, meta["unit"], meta["special_tokens"], meta["max_length"])
        self.pad_id, self.unit = tokenizer.pad_token_id or 0, meta["unit"]

    @classmethod
    def of(cls, run: Path, device="cpu", precision: str = "auto", batch_size: int = 32) -> "Tagger":
        """The tagger of a run folder, on `device`, in the precision that config.yaml calls it. Raises UserError."""
        import model as models

        model, tokenizer, meta = models.load(Path(run) / "model", device, attention=fast.attention(device))
        fast.prepare(model, fast.choose(precision, device)[0], device)
        return cls(model, tokenizer, meta, batch_size)

    @torch.no_grad()
    def log_probs(self, sentences: list[list[str]]) -> list[np.ndarray]:
        """For each sentence of n units the log-probabilities of its tags, float32 [n, labels]."""
        out, device = {}, next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            for batch in loader.batches(self.units.windows(sentences), self.batch_size, seed=None):
                inputs = loader.collate(batch, self.pad_id, None)
                logits = self.model(input_ids=inputs["input_ids"].to(device),
                                    attention_mask=inputs["attention_mask"].to(device)).logits  # fmt: skip
                loader.stitch(batch, torch.log_softmax(logits.float(), dim=-1).cpu().numpy(), out)
        finally:
            self.model.train(was_training)
        empty = np.zeros((0, len(self.labels)), np.float32)
        return [out.get(index, empty) for index in range(len(sentences))]

    def decoded(self, log_probs: list[np.ndarray]) -> list[tuple[list[str], np.ndarray]]:
        """Tags and the probability of each, float32 [n], by the run's way of decoding."""
        chosen = loader.decode(log_probs, self.labels, self.decode)
        return [([self.labels[label] for label in path], np.exp(scores[np.arange(len(path)), path]))
                for scores, path in zip(log_probs, chosen)]  # fmt: skip

    def tag(self, sentences: list[list[str]]) -> list[tuple[list[str], np.ndarray]]:
        """For each sentence of n units: n IOB2 tags, and float32 [n], the probability of the chosen tag."""
        tagged, step = [], self.batch_size * SENTENCES_AT_ONCE
        for start in range(0, len(sentences), step):
            tagged += self.decoded(self.log_probs(sentences[start : start + step]))
        return tagged
