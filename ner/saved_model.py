"""A model's life on disk: saved, loaded, an adapter merged into its encoder.

A saved model is a folder that other libraries read too: a transformers folder where the encoder's own weights were
trained, else a peft adapter with the encoder it belongs to linked under encoder/. The tokenizer lies beside it, and
ner.json holds the rest. peft takes its time to import, so plain LoRA is merged without it. What is made of a finished
run (merged folders, ONNX files, the card) is in export.py and card.py.
"""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ner import encoder, files
from ner.errors import UserError, first_line
from ner.json_file import read_object
from ner.meta import model_folder, read_meta, write_meta
from ner.model import drop_virtual_logits
from ner.paths import ROOT
from ner.tunings import TUNINGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

log = logging.getLogger("__main__")  # the run's log
ADAPTER, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's names
NOT_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")  # of LoRA; peft merges these
PREFIX = "base_model.model."  # what peft puts before the names of the encoder's weights

Tensors = dict[str, torch.Tensor]


def save(model: Any, tokenizer: Any, meta: dict[str, Any], folder: str | Path) -> None:
    """Write the model to `folder`, whole or not at all; a model that was there is replaced.

    An adapter's config names the encoder by where it lies under `folder`, so save there rather than move it there.
    Raises OSError.
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


def load(
    folder: str | Path, device: str | torch.device = "cpu", merged: bool = True, attention: str | None = None
) -> "tuple[torch.nn.Module, PreTrainedTokenizerFast, dict[str, Any]]":
    """Return (model, tokenizer, meta) of a saved model, float32 and in eval mode, with the logits it was saved with.

    folder: a run folder or its model folder. merged: adapters that can be merged into the encoder are (faster, no peft
    needed); False keeps them apart. attention: as for model.build. Raises UserError naming the file that is missing,
    damaged or does not fit the others.
    """
    folder = model_folder(folder)
    meta = read_meta(folder)
    has_weights = encoder.weight_files(folder) or (folder / ADAPTER_SETTINGS).exists()
    if any(folder.glob("*.onnx")) and not has_weights:
        raise UserError(f"{folder} is an ONNX export, without weights for PyTorch; take --engine onnx, or name the run")
    model: torch.nn.Module
    if TUNINGS[meta["tuning"]].adapter is None:
        model = _load_whole(folder, meta, attention)
    else:
        model = _load_adapter(folder, meta, merged, attention)
    tokenizer = encoder.read_tokenizer(str(folder), str(folder), meta["unit"])
    return model.to(device).eval(), tokenizer, meta


@torch.no_grad()
def merge_lora(model: "PreTrainedModel", tensors: Tensors, adapter: dict[str, Any], folder: Path) -> "PreTrainedModel":
    """Put W + scale·B·A in place of each W of the encoder (LoRA, Hu et al. 2021, section 4.1), as peft merges it.

    tensors: of adapter_model.safetensors; lora_A is [r, inputs], lora_B [outputs, r]. adapter: adapter_config.json.
    folder: how errors name the model. Returns the same model. Raises UserError where they do not fit each other.
    """
    weights = dict(model.named_parameters())
    try:
        scale = adapter["lora_alpha"] / (adapter["r"] ** 0.5 if adapter.get("use_rslora") else adapter["r"])
        for saved_name, tensor in tensors.items():
            name = _encoder_name(saved_name)
            if ".original_module." in name or ".modules_to_save." in name:
                continue  # with bias: all, peft saves the biases of the head and of its copy a second time
            if name.endswith(".lora_A.weight"):
                other = tensors[saved_name.replace("lora_A", "lora_B")].float()
                weights[name.replace(".lora_A", "")].add_((other @ tensor.float()) * scale)
            elif not name.endswith(".lora_B.weight"):
                if weights[name].shape != tensor.shape:
                    raise ValueError(f"{name} is {list(tensor.shape)}, not {list(weights[name].shape)}")
                weights[name].copy_(tensor)
        heads = tuple(f"{head}." for head in encoder.heads(model))
        if any(name.startswith(heads) and PREFIX + name not in tensors for name in weights):
            raise KeyError("a weight of the head")
    except KeyError as error:
        raise UserError(f"{folder}: the adapter and its encoder do not fit: {error.args[0]} is missing") from None
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{folder}: the adapter and its encoder do not fit: {first_line(error)}") from None
    return model


def _encoder_name(name: str) -> str:
    """Return the encoder's name of a weight that peft saved under `name`."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _save_adapter(model: Any, meta: dict[str, Any], fresh: Path, folder: Path) -> None:
    """Write adapter and encoder to `fresh`, which will be renamed to `folder`."""
    settings = model.peft_config["default"]
    before = settings.base_model_name_or_path
    settings.base_model_name_or_path = str(folder / "encoder")
    try:
        model.save_pretrained(fresh, save_embedding_layers=False)
    finally:
        settings.base_model_name_or_path = before
    (fresh / "README.md").unlink(missing_ok=True)  # peft's template; card.py writes the card
    (fresh / "encoder").mkdir()
    model.get_base_model().config.save_pretrained(fresh / "encoder")  # with the labels, unlike the encoder's own
    with contextlib.suppress(UserError):  # an encoder that went away must not cost the run its adapter
        for file in encoder.weight_files(Path(encoder.find(meta["pretrained"])[0])):
            _link(file, fresh / "encoder" / file.name, folder / "encoder")


def _link(file: Path, target: Path, final_folder: Path) -> None:
    """Put a file into a saved model without a second copy of its bytes, where the disk allows that.

    final_folder: where `target` will lie once the model is in its place, from which a symbolic link is relative.
    """
    file = file.resolve()
    with contextlib.suppress(OSError):
        return os.link(file, target)
    with contextlib.suppress(OSError):
        return os.symlink(os.path.relpath(file, final_folder.resolve()), target)
    shutil.copyfile(file, target)


def _load_whole(folder: Path, meta: dict[str, Any], attention: str | None) -> "PreTrainedModel":
    """Return a model whose encoder was trained itself. Raises UserError."""
    encoder.check_weights(folder, str(folder))
    settings = encoder.read_settings(str(folder), str(folder))
    if settings.id2label != dict(enumerate(meta["labels"])):
        raise UserError(f"{folder}: the labels of config.json and ner.json differ; one of them is of another model")
    return encoder.read_model(str(folder), str(folder), settings, attention, new_head=False)


def _load_adapter(folder: Path, meta: dict[str, Any], merged: bool, attention: str | None) -> torch.nn.Module:
    """Return an adapter on its encoder, or merged into it where it can be. Raises UserError."""
    tensors = _read_adapter(folder, meta)
    _check_labels(folder, meta)
    source = _encoder_of(folder, meta)
    title = f"{folder} (encoder {source})"
    settings = encoder.read_settings(source, title, meta["labels"])
    model = encoder.read_model(source, title, settings, attention, new_head=True)
    _check_encoder(folder, source, meta)
    adapter, tuning = read_object(folder / ADAPTER_SETTINGS), TUNINGS[meta["tuning"]]
    on_embeddings = any("lora_embedding_" in name for name in tensors)
    is_plain = not on_embeddings and not any(adapter.get(key) for key in NOT_PLAIN)
    if merged and tuning.merges_plainly and is_plain:
        return merge_lora(model, tensors, adapter, folder)
    return _load_by_peft(model, folder, set(tensors), merged and tuning.merges)


def _load_by_peft(model: "PreTrainedModel", folder: Path, saved_names: set[str], merged: bool) -> torch.nn.Module:
    """Return the adapter on `model`, its encoder, as peft loads and merges it.

    saved_names: those of the adapter's tensors. Raises UserError where they are not what peft expects.
    """
    import peft

    with encoder.quiet():
        try:
            adapted = peft.PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
            expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        except Exception as error:  # whatever a wrong file makes peft raise
            raise UserError(f"{folder}: the adapter cannot be read: {first_line(error)}") from None
        if expected != saved_names:
            odd = min(expected ^ saved_names)
            raise UserError(f"{folder}: {ADAPTER} does not fit {ADAPTER_SETTINGS}, see {odd}")
        if merged:
            return adapted.merge_and_unload()
    return drop_virtual_logits(adapted)


def _read_adapter(folder: Path, meta: dict[str, Any]) -> Tensors:
    """Return the adapter's tensors. Raises UserError where a file is missing or the head is not of these labels."""
    for name in (ADAPTER, ADAPTER_SETTINGS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: {name} is missing, so the model is not whole; train again or restore it")
    tensors = encoder.read_tensors(folder / ADAPTER)
    heads = [t for name, t in tensors.items() if re.search(r"\.(classifier|score)\.(.*\.)?weight$", name)]
    if not heads or heads[-1].shape[0] != len(meta["labels"]):
        raise UserError(
            f"{folder}: ner.json has {len(meta['labels'])} labels, the head in {ADAPTER} "
            f"{heads[-1].shape[0] if heads else 'is missing'}; they are not of one model"
        )
    return tensors


def _check_encoder(folder: Path, source: str, meta: dict[str, Any]) -> None:
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


def _check_labels(folder: Path, meta: dict[str, Any]) -> None:
    """Compare the labels of ner.json with those in the encoder's config. Raises UserError where they differ."""
    file = folder / "encoder" / "config.json"
    if not file.is_file():  # an adapter that was uploaded alone
        return
    names = read_object(file).get("id2label")
    if names != {str(index): label for index, label in enumerate(meta["labels"])}:
        raise UserError(f"{folder}: the labels of {file} and ner.json differ; one of them is of another model")


def _encoder_of(folder: Path, meta: dict[str, Any]) -> str:
    """Return where the encoder of a saved adapter is: linked beside it, where it was, or at its place under ROOT.

    Raises UserError where it is gone.
    """
    linked = folder / "encoder"
    if linked.is_dir() and any(path.exists() for path in encoder.weight_files(linked)):
        encoder.check_weights(linked, str(linked))
        return str(linked)
    recorded = Path(meta["pretrained"])
    if not recorded.is_absolute():
        return encoder.on_hub(meta["pretrained"])  # never a folder that happens to have that name
    for place in [recorded, *(ROOT.joinpath(*recorded.parts[i:]) for i in range(1, len(recorded.parts)))]:
        if (place / "config.json").is_file():
            return encoder.find(str(place))[0]
    raise UserError(f"{folder}: its encoder {recorded} is gone; put it back, or its weights into {linked}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
