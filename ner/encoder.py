"""An encoder's folder or hub name → its config, weights and tokenizer, or one line that says what is wrong with it.

transformers says the same in pages and after minutes of retries, so what a user gets wrong is looked at before it is
called, and whatever it raises over files of strangers becomes a UserError here.
"""

import contextlib
import hashlib
import json
import re
import warnings
from pathlib import Path

import torch

from ner.config import resolve_path
from ner.errors import UserError

ANSWER_SECONDS = 5  # that the hub is given


def find(name: str) -> tuple[str, str]:
    """(what transformers loads, what ner.json remembers): twice an absolute path for a folder, a name for the hub's."""
    folder, what = resolve_path(name), f"pretrained {name}"
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{what} is a file; expected a folder with config.json, weights and tokenizer")
        if not (folder / "config.json").is_file():
            raise UserError(f"{what}: no config.json in {folder}; expected an encoder as transformers saves it")
        check_weights(folder, what)
        return str(folder), str(folder)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "-")):
        raise UserError(f"{what}: there is no such folder; give one, or a hub name like google-bert/bert-base-chinese")
    return on_hub(name), name


def on_hub(name: str) -> str:
    """The folder of an encoder in the hub's local cache, else its name once the hub has answered for it."""
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    cached = hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(path.exists() for path in weight_files(Path(cached).parent)):
        return str(Path(cached).parent)
    what, endpoint = f"pretrained {name}", constants.ENDPOINT
    try:
        url = hub.hf_hub_url(name, "config.json", endpoint=endpoint)
        hub.get_hf_file_metadata(url, timeout=ANSWER_SECONDS, endpoint=endpoint)
    except errors.GatedRepoError:
        raise UserError(f"{what}: the hub asks for a login; run `hf auth login` or give a local folder") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what}: neither a folder here nor a model on {endpoint}") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{what}: no config.json on {endpoint}, so it is no transformers model") from None
    except Exception as error:  # refused, timed out, no name server, a proxy's page: all the same to the user
        raise UserError(
            f"{what}: no such folder here, and the hub at {endpoint} does not answer ({type(error).__name__}); set "
            "HF_ENDPOINT to a mirror, as in HF_ENDPOINT=https://MIRROR, or give a local folder"
        ) from None
    return name


def weight_files(folder: Path) -> list[Path]:
    patterns = ("model*.safetensors", "model.safetensors.index.json")
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return found or sorted(folder.glob("pytorch_model*.bin*"))


def digests(folder: Path) -> dict[str, str]:
    """Return {file name: sha256 in hexadecimal} of an encoder's weight files."""
    return {file.name: sha256(file) for file in weight_files(folder)}


def sha256(file: Path) -> str:
    """Return the sha256 of a file, in hexadecimal. Raises UserError where it cannot be read."""
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def check_weights(folder: Path, what: str) -> None:
    files = weight_files(folder)
    if not files:
        raise UserError(f"{what}: there are no weights in {folder}; expected model.safetensors")
    for file in files:
        if file.suffix == ".safetensors":
            read_tensors(file, names_only=True)


def read_settings(source: str, what: str, labels: list[str] | None = None):
    """The encoder's transformers config, with the labels in it where they are given."""
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoConfig

    extra = {}
    if labels is not None:
        extra = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with quiet():
        try:
            settings = AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)
        except Exception as error:  # transformers raises half a dozen kinds for a wrong config.json
            raise UserError(f"{what}: config.json cannot be used: {first_line(error)}") from None
    if type(settings) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise UserError(f"{what}: {settings.model_type} has no token-classification head in transformers; "
                        "take an encoder such as BERT, RoBERTa, ELECTRA or DeBERTa")  # fmt: skip
    return settings


def read_model(source: str, what: str, settings, attention: str | None, new_head: bool):
    """The model in float32. Every weight must come from the files, but for those of a new head."""
    from transformers import AutoModelForTokenClassification

    extra = {"attn_implementation": attention} if attention else {}
    with quiet():
        try:
            model, info = AutoModelForTokenClassification.from_pretrained(
                source, config=settings, dtype=torch.float32, trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=new_head, **extra,
            )  # fmt: skip
        except Exception as error:  # truncated files, wrong shapes, a hub that went away: as many exception types
            raise UserError(f"{what}: the weights cannot be loaded: {first_line(error)}") from None
    fresh = heads(model) if new_head else []
    names = list(info["missing_keys"]) + [key[0] for key in info["mismatched_keys"]]
    lost = sorted(name for name in names if name.split(".")[0] not in fresh)
    if lost:
        raise UserError(f"{what}: the weights do not fit config.json: {len(lost)} are missing or of another shape, "
                        f"the first is {lost[0]}")  # fmt: skip
    return model


def read_tokenizer(source: str, what: str, unit: str):
    """The fast tokenizer; for words, a byte-level one takes each as if a space came before it."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            raise UserError(f"{what}: the tokenizer cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{what}: it has no fast tokenizer (tokenizer.json); save one with transformers")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{what}: there is no tokenizer in it; expected tokenizer.json or vocab.txt beside the weights")
    if unit == "word" and '"ByteLevel"' in tokenizer.backend_tokenizer.to_str():
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        _prefix_space(state["pre_tokenizer"])
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _prefix_space(node) -> None:
    for inner in node.get("pretokenizers", [node]) if node else []:
        if inner.get("type") == "ByteLevel":
            inner["add_prefix_space"] = True


def heads(model) -> list[str]:
    """Names of the modules that turn hidden states into logits: all that is not the encoder and has weights."""
    return [name for name, module in model.named_children()
            if name != model.base_model_prefix and any(True for _ in module.parameters())]  # fmt: skip


def set_dropout(settings, dropout: float | None) -> None:
    if dropout is None:
        return
    for part in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):  # BERT and its kin
        if hasattr(settings, part):
            setattr(settings, part, dropout)
    for part in ("dropout", "attention_dropout"):  # DistilBERT
        if hasattr(settings, part):
            setattr(settings, part, dropout)


def read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file.absolute()}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not readable as JSON ({first_line(error)}); the file is damaged") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object; the file is damaged")
    return value


def read_tensors(file: Path, names_only: bool = False) -> dict:
    import safetensors

    try:
        with safetensors.safe_open(file, "pt") as handle:
            return {name: None if names_only else handle.get_tensor(name) for name in handle.keys()}
    except PermissionError as error:
        raise UserError(f"{Path(file).absolute()}: cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{file}: truncated or not safetensors ({reason}); fetch it or train again") from None


@contextlib.contextmanager
def quiet():
    """Keeps transformers' load reports and bars and peft's hints from the user; what matters is checked and raised."""
    from transformers.utils import logging as reports

    level, bar = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reports.set_verbosity(level)
        if bar:
            reports.enable_progress_bar()


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "…"
