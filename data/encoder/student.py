"""The encoder with the heads it is trained by, and the loss of each."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from lac import TAGS
from torch import nn
from transformers import BertModel


@dataclass
class Batch:
    """Tensors of a batch, on the student's device."""

    ids: torch.Tensor  # int64 [rows, length]
    mask: torch.Tensor  # int64 [rows, length]
    tags: torch.Tensor  # int64 [rows, length, TOP]: the likeliest tags of the lexical analyser
    shares: torch.Tensor  # float32 [rows, length, TOP]: their probabilities; 0 where no character is
    masked: torch.Tensor  # int64 [masked characters, filled up]: places in the flattened batch
    originals: torch.Tensor  # int64, the same shape: what stood there; -100 where only filled up
    gold: torch.Tensor | None = None  # int64 [rows, length]: gold tags; -100 where none is known
    silver: tuple[torch.Tensor, torch.Tensor] | None = None  # as tags and shares, by fine-tuned models, over gold tags
    vectors: torch.Tensor | None = None  # float32 [rows, length, width]: e5's; 0 where no character is


class MaskedHead(nn.Module):
    """Scores of all characters at masked places, by the word embeddings (BERT, Devlin et al. 2019)."""

    def __init__(self, hidden: int, words: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.bias = nn.Parameter(torch.zeros(words))

    def forward(self, states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """states [places, hidden], words [vocabulary, hidden] -> [places, vocabulary]"""
        return F.linear(self.norm(F.gelu(self.dense(states))), words, self.bias)


class Student(nn.Module):
    """A BertModel and one head for each objective: `tags`, `masked`, `gold`, `vectors`."""

    def __init__(self, encoder: BertModel, objectives: list[str], gold_tags: int, width: int):
        super().__init__()
        hidden, words = encoder.config.hidden_size, encoder.embeddings.word_embeddings.num_embeddings
        self.encoder, heads = encoder, nn.ModuleDict()
        if "tags" in objectives:
            heads["tags"] = nn.Linear(hidden, TAGS)
        if "masked" in objectives:
            heads["masked"] = MaskedHead(hidden, words)
        if "gold" in objectives:
            heads["gold"] = nn.Linear(hidden, gold_tags)
        if "vectors" in objectives:
            heads["vectors"] = nn.Linear(hidden, width)
        self.heads = heads

    def forward(self, batch: Batch, detached: bool = False) -> dict[str, torch.Tensor]:
        """Return the loss of each objective of which the batch has something.

        detached: the encoder gets no gradient; only the heads learn."""
        with torch.set_grad_enabled(not detached):
            states = self.encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        losses = {}
        if "tags" in self.heads:
            losses["tags"] = self._tags("tags", states, batch.tags, batch.shares)
        if "masked" in self.heads:
            losses["masked"] = self._masked(states, batch)
        if "gold" in self.heads and batch.gold is not None:
            scores = self.heads["gold"](states).float().flatten(0, 1)
            losses["gold"] = F.cross_entropy(scores, batch.gold.flatten())
        if "gold" in self.heads and batch.silver is not None:
            losses["silver"] = self._tags("gold", states, *batch.silver)
        if "vectors" in self.heads:
            losses["vectors"] = self._vectors(states, batch)
        return losses

    def _tags(self, head: str, states: torch.Tensor, tags: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Soft-label cross-entropy, mean over characters."""
        scores = F.log_softmax(self.heads[head](states).float(), -1)
        return -(shares * scores.gather(-1, tags)).sum() / shares.sum()

    def _masked(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Cross-entropy of the characters that were masked, mean over them."""
        words = self.encoder.embeddings.word_embeddings.weight
        scores = self.heads["masked"](states.flatten(0, 1)[batch.masked], words).float()
        return F.cross_entropy(scores, batch.originals, reduction="sum") / (batch.originals >= 0).sum().clamp(min=1)

    def _vectors(self, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Squared error of e5's vectors, mean over characters and dimensions."""
        real = (batch.shares[..., :1] > 0).float()
        error = (self.heads["vectors"](states).float() - batch.vectors) * real
        return error.square().sum() / (real.sum() * error.shape[-1])


def variance(vectors: torch.Tensor) -> torch.Tensor:
    """Variance of the vectors [rows, length, width] of a batch, mean over dimensions: the error of
    one who knows nothing."""
    return vectors[vectors.any(-1)].var(0, correction=0).mean()
