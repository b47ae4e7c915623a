"""Tiny models of every tuning, built and trained for a few steps, and their logits on one batch."""

import functools
from pathlib import Path

import folders
import tiny
import torch

from ner import adalora, config, model
from ner.losses import token_loss

LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


@functools.cache
def encoders() -> dict[str, Path]:
    """Return the folders of a tiny BERT (WordPiece, 128 positions) and a tiny RoBERTa (byte-level, 64 positions)."""
    from transformers import RobertaConfig, RobertaModel

    folder = folders.until_exit("ner-built-")
    bert = tiny.encoder(folder / "bert")
    roberta = folder / "roberta"
    tokenizer = tiny.bytelevel(roberta)
    torch.manual_seed(0)
    RobertaModel(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=66,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(roberta)
    return {"bert": bert, "roberta": roberta}


def settings(pretrained, *argv):
    return config.load(["--pretrained", str(pretrained), "--lora.r", "4", "--head", "softmax", *argv])[0]


def built(pretrained, *argv, unit="character"):
    """A model whose trained weights have been moved off their initial values, as training moves them."""
    torch.manual_seed(0)
    network, tokenizer, meta = model.build(settings(pretrained, *argv), LABELS, unit)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return network.eval(), tokenizer, meta


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 70, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(network, inputs=None):
    inputs = inputs or batch()
    return network(**inputs).logits[inputs["attention_mask"].bool()]


def train(network, steps=6):
    """A few steps as the loop takes them; the losses."""
    inputs, losses = batch(), []
    labels = torch.randint(0, len(LABELS), inputs["input_ids"].shape, generator=torch.Generator().manual_seed(2))
    labels[inputs["attention_mask"] == 0] = -100
    count = (labels != -100).sum()
    optimizer = torch.optim.AdamW([weight for weight in network.parameters() if weight.requires_grad], 5e-3)
    for step in range(1, steps + 1):
        loss = token_loss(network(**inputs).logits, labels) / count
        loss.backward()
        gradients = adalora.gradients(network)
        optimizer.step()
        optimizer.zero_grad()
        adalora.after_step(network, step, steps, gradients)
        losses.append(loss.item())
    return losses
