"""Config and labels → a token-classification model, tuned as TUNINGS says. Its life on disk is in saved_model.py.

peft takes its time to import, so it is imported only where a tuning needs it.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ner import encoder
from ner.config import Config
from ner.errors import UserError, first_line
from ner.meta import FORMAT_VERSION
from ner.tunings import TUNINGS

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("__main__")  # the run's log
SHORTEST_WINDOW = 8  # tokens that virtual tokens must leave of the encoder's positions


def build(
    config: Config, labels: list[str], unit: str, attention: str | None = None
) -> "tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerFast, dict[str, Any]]":
    """Return (model, tokenizer, meta) for training: the config's encoder in float32 with a new head for `labels`.

    labels: tags in the order of the logits. unit: "character" or "word". attention: transformers' name of an attention
    implementation, its own choice where None. model(input_ids=, attention_mask=).logits is float [batch, length,
    labels] for every tuning. meta is what ner.json holds. New weights are drawn from torch's random state. Raises
    UserError where the encoder cannot be had or used.
    """
    source, pretrained = encoder.find(config.pretrained)
    title = f"pretrained {config.pretrained}"
    settings = encoder.read_settings(source, title, labels)
    encoder.set_dropout(settings, config.dropout)
    model = encoder.read_model(source, title, settings, attention, new_head=True)
    tokenizer = encoder.read_tokenizer(source, title, unit)
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise UserError(f"{title}: its tokenizer has {len(tokenizer)} tokens, its weights {rows}: they do not fit")
    tuning = TUNINGS[config.tuning]
    meta = {
        "labels": list(labels),
        "unit": unit,
        "special_tokens": config.special_tokens,
        "max_length": _max_length(model, config),
        "decode": config.decode,
        "tuning": config.tuning,
        "pretrained": pretrained,
        "virtual_tokens": config.virtual_tokens if tuning.virtual_tokens else 0,
        "head": config.head,
        "format_version": FORMAT_VERSION,
        "encoder_sha256": {},
        "epoch": 0,  # until it is saved
    }
    if tuning.adapter is not None:  # an adapter is right with this very encoder alone
        meta["encoder_sha256"] = encoder.digests(Path(encoder.find(config.pretrained)[0]))  # downloaded by now
    return _tuned(model, config), tokenizer, meta


def drop_virtual_logits(model: "PeftModel") -> "PeftModel":
    """Have peft's model drop the logits of virtual positions, so that logits and labels are of one length again.

    Returns the same model; nothing is changed for tunings without virtual tokens.
    """
    if not model.peft_config["default"].is_prompt_learning:
        return model

    def drop(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        output.logits = output.logits[:, output.logits.shape[1] - ids.shape[1] :]
        return output

    model.register_forward_hook(drop, with_kwargs=True)
    return model


def head_weights(model: Any) -> set[str]:
    """Return the names of the trained weights that turn hidden states into logits, as named_parameters() has them."""
    heads = set(encoder.heads(model.get_base_model() if hasattr(model, "peft_config") else model))
    return {name for name, weight in model.named_parameters() if weight.requires_grad and heads & set(name.split("."))}


def trainable_line(model: torch.nn.Module) -> str:
    """Return the trained share of the weights, in the words of peft's print_trainable_parameters()."""
    total = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"


def _tuned(model: "PreTrainedModel", config: Config) -> "PreTrainedModel | PeftModel":
    """Return the model with gradients for the weights that its tuning trains, and no others; in peft's wrapper."""
    tuning, heads = TUNINGS[config.tuning], encoder.heads(model)
    if tuning.adapter is None:
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.split(".")[0] in heads or tuning.trains_weight(name))
        return model
    import peft

    try:
        with encoder.quiet():
            adapted = peft.get_peft_model(model, tuning.peft_config(config, heads), autocast_adapter_dtype=False)
    except (ValueError, KeyError) as error:
        kind = model.config.model_type
        raise UserError(f"tuning {config.tuning} does not fit {kind} encoders: {first_line(error)}") from None
    return drop_virtual_logits(adapted)


def _max_length(model: "PreTrainedModel", config: Config) -> int:
    """Return the config's max_length, or what the encoder's positions allow where that is less.

    Virtual tokens take positions too. Raises UserError where they leave fewer than SHORTEST_WINDOW.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        padding_index = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(padding_index, int):
            positions -= padding_index + 1  # RoBERTa counts from after its padding index
    if positions <= 0:
        return config.max_length  # relative positions: no limit
    free = positions - (config.virtual_tokens if TUNINGS[config.tuning].virtual_tokens else 0)
    if free < SHORTEST_WINDOW:
        raise UserError(
            f"virtual_tokens {config.virtual_tokens} is too many for {positions} positions; "
            f"give at most {positions - SHORTEST_WINDOW}"
        )
    if free < config.max_length:
        log.warning("max_length %d is more than the encoder has positions for; using %d", config.max_length, free)
    return min(config.max_length, free)
