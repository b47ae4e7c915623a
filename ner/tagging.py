"""Sentences in, tags out: windows through the model and back, in batches that suit tagging."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ner import bert
from ner import kernels as fast
from ner import batches, decoding, windows

TOKENS, LEAST = 2048, 256  # of a batch on a CPU: at most; at least, unless all of them are fewer
LEAD = 2  # times the error of an 8-bit model: by less than that a tag may lead the next best by chance
SENTENCES_AT_ONCE = 64  # batches' worth of sentences whose scores are held in memory together


def load(run: Path, device="cpu", precision: str = "auto") -> tuple:
    """(model, tokenizer, meta) of a run or model folder, on `device` and ready to tag. Raises UserError.

    precision: as config.yaml calls it, or "int8". With "int8" the model has 8-bit products where the CPU and bert.py have
    them, and so it does with "auto", but there `model.exact` computes in the type that auto is elsewhere: by that are
    tagged again the windows of which the 8-bit model is not sure.
    """
    dtype = fast.choose("auto" if precision == "int8" else precision, device)[0]
    found = bert.load(run) if torch.device(device).type == "cpu" else None
    if found is None:
        from ner import model as models

        model, tokenizer, meta = models.load(run, device, attention=fast.attention(device))
        fast.prepare(model, dtype, device)
        return model, tokenizer, meta
    model, tokenizer, meta = found
    fast.hold_memory()  # clearing new memory took a third of the time
    if precision not in {"auto", "int8"} or not bert.int8_is_native():
        return model.to_type(dtype), tokenizer, meta
    if precision == "auto":
        model.exact = copy.deepcopy(model).to_type(dtype)
    model.to_int8(tokenizer(bert.SENTENCES, add_special_tokens=meta["special_tokens"])["input_ids"])
    return model, tokenizer, meta


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
        self.units = windows.Units(tokenizer, meta["unit"], meta["special_tokens"], meta["max_length"])
        self.pad_id, self.unit = tokenizer.pad_token_id or 0, meta["unit"]
        self.exact = getattr(model, "exact", None)

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
            unsure = self.units.windows(sentences)
            with workers(device) as each:
                for model in filter(None, (self.model, self.exact)):
                    scored = each(lambda batch: self._scores(model, batch, device), self._batches(unsure, device))
                    unsure = []
                    for batch, scores, rows in scored:
                        windows.stitch(batch, scores, out)
                        unsure += [batch[row] for row in rows]
        finally:
            self.model.train(was_training)
        empty = np.zeros((0, len(self.labels)), np.float32)
        return [out.get(index, empty) for index in range(len(sentences))]

    @torch.no_grad()
    def _scores(self, model, batch: list[windows.Window], device: torch.device) -> tuple:
        """(batch, log-probabilities of it, float32 [B, L, labels], rows of it of which the model is not sure)."""
        inputs = batches.collate(batch, self.pad_id, None)
        logits = model(input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device)).logits
        scores, unsure = torch.log_softmax(logits.float(), dim=-1).cpu().numpy(), []
        if self.exact and model is self.model:
            best = np.partition(scores, -2, axis=-1)
            sure = best[..., -1] - best[..., -2] > LEAD * model.error
            unsure = [row for row, window in enumerate(batch) if not sure[row, window.first].all()]
        return batch, scores, unsure

    def _batches(self, windows: list[windows.Window], device: torch.device):
        """Windows of like length together, longest first; on a CPU two batches or more for each thread, where that does
        not make them too small, and none much larger than its caches."""
        if device.type != "cpu":
            return batches.batches(windows, self.batch_size, None)
        share = sum(len(window.ids) for window in windows) // (2 * torch.get_num_threads())
        return batches.batches(windows, self.batch_size, None, min(TOKENS, max(LEAST, share)))

    def decoded(self, log_probs: list[np.ndarray]) -> list[tuple[list[str], np.ndarray]]:
        """Tags and the probability of each, float32 [n], by the run's way of decoding."""
        chosen = decoding.decode(log_probs, self.labels, self.decode)
        return [([self.labels[label] for label in path], np.exp(scores[np.arange(len(path)), path]))
                for scores, path in zip(log_probs, chosen)]  # fmt: skip

    def tag(self, sentences: list[list[str]]) -> list[tuple[list[str], np.ndarray]]:
        """For each sentence of n units: n IOB2 tags, and float32 [n], the probability of the chosen tag."""
        tagged, step = [], self.batch_size * SENTENCES_AT_ONCE
        for start in range(0, len(sentences), step):
            tagged += self.decoded(self.log_probs(sentences[start : start + step]))
        return tagged
