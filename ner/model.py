"""Config and labels → a token-classification model, tuned by one of TUNINGS; its life on disk (save, load).

A saved model is a folder that other libraries read too: a transformers folder where the encoder's own weights were
trained, else a peft adapter with the encoder it belongs to linked under encoder/. The tokenizer lies beside it, and
ner.json holds the rest. peft takes its time to import, so it is imported only where it is needed; merging plain LoRA
is not such a place. What is made of a finished run (merge, export, card) is in export.py.
"""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path

import torch

from ner import encoder, files
from ner.config import ROOT
from ner.errors import UserError
from ner.meta import FORMAT_VERSION, model_folder, read_meta, write_meta
from ner.tunings import TUNINGS

log = logging.getLogger("__main__")  # the run's log
SHORTEST = 8  # tokens a window needs
UNUSUAL = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")  # left to peft to merge


def build(config, labels: list[str], unit: str, attention: str | None = None):
    """(model, tokenizer, meta) for training: the encoder of `config` in float32 with a new head for `labels`.

    labels: tags in the order of the logits. unit: "character" or "word". attention: transformers' name of an attention
    implementation, its own choice where None. model(input_ids=, attention_mask=).logits is float [B, L, labels] for
    every tuning. meta is what ner.json holds. Draws the new weights from torch's random state. Raises UserError where
    the encoder cannot be had or used.
    """
    source, name = encoder.find(config.pretrained)
    what = f"pretrained {config.pretrained}"
    settings = encoder.read_settings(source, what, labels)
    encoder.set_dropout(settings, config.dropout)
    model = encoder.read_model(source, what, settings, attention, new_head=True)
    tokenizer = encoder.read_tokenizer(source, what, unit)
    rows = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise UserError(f"{what}: its tokenizer has {len(tokenizer)} tokens, its weights {rows}: they do not fit")
    meta = {
        "labels": list(labels), "unit": unit, "special_tokens": config.special_tokens,
        "max_length": _longest(model, config), "decode": config.decode, "tuning": config.tuning, "pretrained": name,
        "virtual_tokens": config.virtual_tokens if TUNINGS[config.tuning].virtual_tokens else 0,
        "head": config.head, "format_version": FORMAT_VERSION, "encoder_sha256": {},
    }  # fmt: skip
    if TUNINGS[config.tuning].adapter is not None:  # what is saved is then right with this very encoder alone
        meta["encoder_sha256"] = encoder.digests(Path(encoder.find(config.pretrained)[0]))
    return _tune(model, config), tokenizer, meta


def head_weights(model) -> set[str]:
    """Names of the trained weights that turn hidden states into logits, as model.named_parameters() has them."""
    heads = set(encoder.heads(model.get_base_model() if hasattr(model, "peft_config") else model))
    return {name for name, weight in model.named_parameters() if weight.requires_grad and heads & set(name.split("."))}


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Cross-entropy summed over the positions whose label is not -100 (a float32 scalar), and their number.

    logits: float [B, L, labels]; labels: int64 [B, L].
    """
    keep = labels != -100
    chosen = labels[keep]
    return torch.nn.functional.cross_entropy(logits[keep].float(), chosen, reduction="sum"), chosen.numel()


def trainable_line(model) -> str:
    """The trained share, in the words of peft's print_trainable_parameters()."""
    every = sum(weight.numel() for weight in model.parameters())
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return f"trainable params: {trained:,d} || all params: {every:,d} || trainable%: {100 * trained / every:.4f}"


def save(model, tokenizer, meta: dict, folder) -> None:
    """Writes the model to `folder`, whole or not at all; a model that was there is replaced.

    An adapter's config names the encoder by where it lies under `folder`, so save there rather than move it there.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(folder)
    fresh = files.temporary_path(folder)
    fresh.mkdir()
    try:
        with encoder.quiet():
            if hasattr(model, "peft_config"):
                _save_adapter(model, meta, fresh, folder)
            else:
                model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
        write_meta(fresh, meta)
        for path in fresh.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:
                path.chmod(0o666 & ~_umask())  # safetensors' are for their owner alone
        files.replace_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load(folder, device="cpu", merged: bool = True, attention: str | None = None):
    """(model, tokenizer, meta) of a saved model, in float32 and eval mode, the same logits as when it was saved.

    merged: adapters that can be merged into the encoder are (faster, no peft needed); False keeps them apart.
    Raises UserError naming the file that is missing, damaged or does not fit the others.
    """
    folder = model_folder(folder)
    meta = read_meta(folder)
    has_weights = encoder.weight_files(folder) or (folder / "adapter_config.json").exists()
    if any(folder.glob("*.onnx")) and not has_weights:
        raise UserError(f"{folder} is an ONNX export, without weights for PyTorch; take --engine onnx, or name the run")
    if TUNINGS[meta["tuning"]].adapter is None:
        encoder.check_weights(folder, str(folder))
        settings = encoder.read_settings(str(folder), str(folder))
        if [settings.id2label.get(i) for i in range(len(settings.id2label))] != meta["labels"]:
            raise UserError(f"{folder}: the labels of config.json and ner.json differ; one of them is of another model")
        model = encoder.read_model(str(folder), str(folder), settings, attention, new_head=False)
    else:
        model = _load_adapter(folder, meta, merged, attention)
    tokenizer = encoder.read_tokenizer(str(folder), str(folder), meta["unit"])
    return model.to(device).eval(), tokenizer, meta


def _tune(model, config):
    """The model with the weights that its tuning trains, and no others, requiring gradients; wrapped where by peft."""
    tuning, heads = TUNINGS[config.tuning], encoder.heads(model)
    if tuning.adapter is None:
        for name, weight in model.named_parameters():
            weight.requires_grad_(name.split(".")[0] in heads or tuning.trains_weight(name))
        return model
    import peft

    try:
        with encoder.quiet():
            model = peft.get_peft_model(model, tuning.peft_config(config, heads), autocast_adapter_dtype=False)
    except (ValueError, KeyError) as error:
        kind = model.config.model_type
        raise UserError(f"tuning {config.tuning} does not fit {kind} encoders: {encoder.first_line(error)}") from None
    return _cut_virtual(model)


def _cut_virtual(model):
    """Has the model drop the logits of the virtual positions, so that logits and labels have one length again."""
    settings = model.peft_config["default"]
    if not settings.is_prompt_learning:
        return model

    def cut(module, args, kwargs, output):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        output.logits = output.logits[:, output.logits.shape[1] - ids.shape[1] :]
        return output

    model.register_forward_hook(cut, with_kwargs=True)
    return model


def _save_adapter(model, meta: dict, fresh: Path, folder: Path) -> None:
    settings = model.peft_config["default"]
    before = settings.base_model_name_or_path
    settings.base_model_name_or_path = str(folder / "encoder")
    try:
        model.save_pretrained(fresh, save_embedding_layers=False)
    finally:
        settings.base_model_name_or_path = before
    (fresh / "README.md").unlink(missing_ok=True)  # peft's template; export.py writes the card
    (fresh / "encoder").mkdir()
    model.get_base_model().config.save_pretrained(fresh / "encoder")  # with the labels, unlike the encoder's own
    with contextlib.suppress(UserError):  # an encoder that went away must not cost the run its adapter
        for file in encoder.weight_files(Path(encoder.find(meta["pretrained"])[0])):
            _link(file, fresh / "encoder" / file.name, folder / "encoder")


def _link(file: Path, target: Path, final: Path) -> None:
    """Puts a file into a saved model without a second copy of its bytes, where the disk allows that."""
    file = file.resolve()
    for way in (os.link, os.symlink):
        with contextlib.suppress(OSError):
            return way(os.path.relpath(file, final.resolve()) if way is os.symlink else file, target)
    shutil.copyfile(file, target)


def _load_adapter(folder: Path, meta: dict, merged: bool, attention: str | None):
    file, settings_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for path in (file, settings_file):
        if not path.is_file():
            raise UserError(f"{folder}: {path.name} is missing, so the model is not whole; train again or restore it")
    tensors = encoder.read_tensors(file)
    heads = [t for name, t in tensors.items() if re.search(r"\.(classifier|score)\.(.*\.)?weight$", name)]
    if not heads or heads[-1].shape[0] != len(meta["labels"]):
        raise UserError(f"{folder}: ner.json has {len(meta['labels'])} labels, the head in {file.name} "
                        f"{heads[-1].shape[0] if heads else 'is missing'}; they are not of one model")  # fmt: skip
    _check_labels(folder, meta)
    source = _encoder_of(folder, meta)
    what = f"{folder} (encoder {source})"
    settings = encoder.read_settings(source, what, meta["labels"])
    model = encoder.read_model(source, what, settings, attention, new_head=True)
    _check_encoder(folder, source, meta)
    adapter = encoder.read_json(settings_file)
    is_plain = not any(adapter.get(key) for key in UNUSUAL) and not any("lora_embedding_" in name for name in tensors)
    if merged and TUNINGS[meta["tuning"]].merges_plainly and is_plain:
        return merge_lora(model, tensors, adapter, folder)
    import peft

    with encoder.quiet():
        try:
            model = peft.PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
            wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        except Exception as error:  # whatever a wrong file makes peft raise
            raise UserError(f"{folder}: the adapter cannot be read: {encoder.first_line(error)}") from None
        if wanted != set(tensors):
            odd = sorted(wanted ^ set(tensors))
            raise UserError(f"{folder}: {file.name} does not fit adapter_config.json, see {odd[0]}")
        if merged and TUNINGS[meta["tuning"]].merges:
            return model.merge_and_unload()
    return _cut_virtual(model)


@torch.no_grad()
def merge_lora(model, tensors: dict, adapter: dict, folder: Path):
    """The encoder with W + scale·B·A in place of each W (LoRA, Hu et al. 2021, section 4.1), as peft merges it."""
    weights = dict(model.named_parameters())
    try:
        scale = adapter["lora_alpha"] / (adapter["r"] ** 0.5 if adapter.get("use_rslora") else adapter["r"])
        for name, tensor in tensors.items():
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if ".original_module." in name or ".modules_to_save." in name:
                continue  # with bias: all, peft saves the biases of the head and of its copy a second time
            if name.endswith(".lora_A.weight"):
                other = tensors[f"base_model.model.{name.replace('lora_A', 'lora_B')}"].float()
                weights[name.replace(".lora_A", "")].add_((other @ tensor.float()) * scale)
            elif not name.endswith(".lora_B.weight"):
                if weights[name].shape != tensor.shape:
                    raise ValueError(f"{name} is {list(tensor.shape)}, not {list(weights[name].shape)}")
                weights[name].copy_(tensor)
        if any(name.startswith(head) and f"base_model.model.{name}" not in tensors
               for head in encoder.heads(model) for name in weights):  # fmt: skip
            raise KeyError("a weight of the head")
    except KeyError as error:
        raise UserError(f"{folder}: the adapter and its encoder do not fit: {error.args[0]} is missing") from None
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{folder}: the adapter and its encoder do not fit: {encoder.first_line(error)}") from None
    return model


def _check_encoder(folder: Path, source: str, meta: dict) -> None:
    """Compare the encoder's weights with those that the adapter was trained on. Raises UserError where they differ."""
    if not meta["encoder_sha256"]:
        log.warning("%s was saved without a digest of its encoder: a change of %s would go unnoticed", folder, source)
        return
    place = Path(source) if Path(source).is_dir() else Path(encoder.find(source)[0])  # a hub name, downloaded by now
    for name, digest in meta["encoder_sha256"].items():
        if not (place / name).is_file() or encoder.sha256(place / name) != digest:
            raise UserError(
                f"{place / name}: changed since {folder} was trained on it (its sha256 is another), so the adapter and "
                "its encoder do not fit; put the old file back, or train again"
            )


def _check_labels(folder: Path, meta: dict) -> None:
    """Compare the labels of ner.json with those in the encoder's config. Raises UserError where they differ."""
    file = folder / "encoder" / "config.json"
    if not file.is_file():  # an adapter that was uploaded alone
        return
    names = encoder.read_json(file).get("id2label")
    if names != {str(index): label for index, label in enumerate(meta["labels"])}:
        raise UserError(f"{folder}: the labels of {file} and ner.json differ; one of them is of another model")


def _encoder_of(folder: Path, meta: dict) -> str:
    """Where the encoder of a saved adapter lies: linked beside it, else where it was, else at its place under ROOT."""
    linked = folder / "encoder"
    if linked.is_dir() and any(path.exists() for path in encoder.weight_files(linked)):
        encoder.check_weights(linked, str(linked))
        return str(linked)
    was = Path(meta["pretrained"])
    if not was.is_absolute():
        return encoder.on_hub(meta["pretrained"])  # never a folder that happens to have that name
    for place in [was, *(ROOT.joinpath(*was.parts[i:]) for i in range(1, len(was.parts)))]:
        if (place / "config.json").is_file():
            return encoder.find(str(place))[0]
    raise UserError(f"{folder}: its encoder {was} is gone; put it back, or its weights into {linked}")


def _longest(model, config) -> int:
    """max_length, or fewer tokens where the encoder has not as many positions; virtual tokens take some of them."""
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa counts from after its padding index
    if positions <= 0:
        return config.max_length  # relative positions: no limit
    room = positions - (config.virtual_tokens if TUNINGS[config.tuning].virtual_tokens else 0)
    if room < SHORTEST:
        raise UserError(f"virtual_tokens {config.virtual_tokens} is too many for {positions} positions; "
                        f"give at most {positions - SHORTEST}")  # fmt: skip
    if room < config.max_length:
        log.warning("max_length %d is more than the encoder has positions for; using %d", config.max_length, room)
    return min(config.max_length, room)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

