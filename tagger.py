"""Sentences in, tags out: windows through the model and back, in batches that suit tagging."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import bert
import fast
import loader

TOKENS, LEAST = 2048, 256  # of a batch on a CPU: at most; at least, unless all of them are fewer
SENTENCES_AT_ONCE = 64  # batches' worth of sentences whose scores are held in memory together


def load(run: Path, device="cpu", precision: str = "auto") -> tuple:
    """(model, tokenizer, meta) of a run or model folder, on `device` and ready to tag. Raises UserError.

    precision: as config.yaml calls it, or "int8": 8-bit products where the CPU and bert.py have them, else "auto".
    """
    dtype = fast.choose("auto" if precision == "int8" else precision, device)[0]
    found = bert.load(run) if torch.device(device).type == "cpu" else None
    if found and precision == "int8" and bert.int8_is_native():
        model, tokenizer, meta = found
        model.to_int8(tokenizer(bert.SENTENCES, add_special_tokens=meta["special_tokens"])["input_ids"])
    elif found and dtype == torch.bfloat16 and bert.bfloat16_is_native():
        found[0].to_bfloat16()
    else:
        if found is None:
            import model as models

            found = models.load(run, device, attention=fast.attention(device))
        fast.prepare(found[0], dtype, device)
    return found


@contextlib.contextmanager
def workers(device):
    """A map that, on a CPU, gives whole batches to as many threads as torch has: less waiting than in each product."""
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


class Tagger:
    """A model with its tokenizer, ready to tag. `meta` is what model.build and model.load return with them."""

    def __init__(self, model, tokenizer, meta: dict, batch_size: int = 32):
        self.model, self.labels, self.decode, self.batch_size = model, meta["labels"], meta["decode"], batch_size
        self.units = loader.Units(tokenizer, meta["unit"], meta["special_tokens"], meta["max_length"])
        self.pad_id, self.unit = tokenizer.pad_token_id or 0, meta["unit"]

    @classmethod
    def of(cls, run: Path, device="cpu", precision: str = "auto", batch_size: int = 32) -> "Tagger":
        """The tagger of a run folder; see load."""
        return cls(*load(run, device, precision), batch_size)

    @torch.no_grad()
    def log_probs(self, sentences: list[list[str]]) -> list[np.ndarray]:
        """For each sentence of n units the log-probabilities of its tags, float32 [n, labels]."""
        out, device = {}, next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        try:
            batches = self._batches(self.units.windows(sentences), device)
            with workers(device) as each:
                for batch, scores in each(lambda batch: (batch, self._scores(batch, device)), batches):
                    loader.stitch(batch, scores, out)
        finally:
            self.model.train(was_training)
        empty = np.zeros((0, len(self.labels)), np.float32)
        return [out.get(index, empty) for index in range(len(sentences))]

    @torch.no_grad()
    def _scores(self, batch: list[loader.Window], device: torch.device) -> np.ndarray:
        """Log-probabilities, float32 [B, L, labels], of a batch."""
        inputs = loader.collate(batch, self.pad_id, None)
        logits = self.model(input_ids=inputs["input_ids"].to(device),
                            attention_mask=inputs["attention_mask"].to(device)).logits  # fmt: skip
        return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    def _batches(self, windows: list[loader.Window], device: torch.device):
        """Windows of like length together, longest first; on a CPU two batches or more for each thread, where that does
        not make them too small, and none much larger than its caches."""
        if device.type != "cpu":
            return loader.batches(windows, self.batch_size, None)
        share = sum(len(window.ids) for window in windows) // (2 * torch.get_num_threads())
        return loader.batches(windows, self.batch_size, None, min(TOKENS, max(LEAST, share)))

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
