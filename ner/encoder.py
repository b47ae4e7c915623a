"""An encoder's folder or hub name → its config, weights and tokenizer, or one line that says what is wrong with it.

transformers says the same in pages and after minutes of retries, so what a user gets wrong is looked at before it is
called, and whatever it raises over files of strangers becomes a UserError here.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ner.errors import UserError, first_line
from ner.paths import resolve_path

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

ANSWER_SECONDS = 5  # how long the hub may take to answer
DROPOUT_KEYS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),  # of BERT and its kin
    *("dropout", "attention_dropout"),  # of DistilBERT
)


def find(name: str) -> tuple[str, str]:
    """Return (what transformers loads, what ner.json remembers) of an encoder that config.yaml names.

    For a folder both are its absolute path. For one on the hub the second is its name, the first its folder in the
    hub's cache, or the name while it is not there. Raises UserError where there is no such encoder.
    """
    folder, title = resolve_path(name), f"pretrained {name}"
    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{title} is a file; expected a folder with config.json, weights and tokenizer")
        if not (folder / "config.json").is_file():
            raise UserError(f"{title}: no config.json in {folder}; expected an encoder as transformers saves it")
        check_weights(folder, title)
        return str(folder), str(folder)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "-")):
        raise UserError(f"{title}: there is no such folder; give one, or a hub name like google-bert/bert-base-chinese")
    return on_hub(name), name


def on_hub(name: str) -> str:
    """Return the folder of an encoder in the hub's local cache, else its name once the hub has answered for it.

    Raises UserError where the hub does not answer, does not have it or does not give it away.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    cached = hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(path.exists() for path in weight_files(Path(cached).parent)):
        return str(Path(cached).parent)
    title, endpoint = f"pretrained {name}", constants.ENDPOINT
    try:
        url = hub.hf_hub_url(name, "config.json", endpoint=endpoint)
        hub.get_hf_file_metadata(url, timeout=ANSWER_SECONDS, endpoint=endpoint)
    except errors.GatedRepoError:
        raise UserError(f"{title}: the hub asks for a login; run `hf auth login` or give a local folder") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{title}: neither a folder here nor a model on {endpoint}") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{title}: no config.json on {endpoint}, so it is no transformers model") from None
    except Exception as error:  # refused, timed out, no name server, a proxy's page: all the same to the user
        raise UserError(
            f"{title}: no such folder here, and the hub at {endpoint} does not answer ({type(error).__name__}); set "
            "HF_ENDPOINT to a mirror, as in HF_ENDPOINT=https://MIRROR, or give a local folder"
        ) from None
    return name


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a saved model, safetensors where there are some; [] where there are none."""
    patterns = ("model*.safetensors", "model.safetensors.index.json")
    safe = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return safe or sorted(folder.glob("pytorch_model*.bin*"))


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


def check_weights(folder: Path, title: str) -> None:
    """Raise UserError where a folder has no weights, or safetensors that cannot be read."""
    files = weight_files(folder)
    if not files:
        raise UserError(f"{title}: there are no weights in {folder}; expected model.safetensors")
    for file in files:
        if file.suffix == ".safetensors":
            with _opened(file):
                pass


def read_settings(source: str, title: str, labels: list[str] | None = None) -> "PretrainedConfig":
    """Return the encoder's transformers config, with the labels in it where they are given.

    source: what `find` gives. title: how errors name the encoder. Raises UserError where the config cannot be read or
    its kind of model has no head for token classification.
    """
    from transformers import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, AutoConfig

    extra = {}
    if labels is not None:
        extra = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with quiet():
        try:
            settings = AutoConfig.from_pretrained(source, trust_remote_code=False, **extra)
        except Exception as error:  # transformers raises half a dozen kinds for a wrong config.json
            raise UserError(f"{title}: config.json cannot be used: {first_line(error)}") from None
    if type(settings) not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING:
        raise UserError(
            f"{title}: {settings.model_type} has no token-classification head in transformers; take an encoder such as "
            "BERT, RoBERTa, ELECTRA or DeBERTa"
        )
    return settings


def read_model(
    source: str, title: str, settings: "PretrainedConfig", attention: str | None, new_head: bool
) -> "PreTrainedModel":
    """Return the model in float32. Every weight comes from the files, but for those of a new head.

    attention: transformers' name of an attention implementation, its own choice where None. new_head: the head is
    initialised anew where the files have none, or one for other labels. Raises UserError where a weight is missing.
    """
    from transformers import AutoModelForTokenClassification

    extra = {"attn_implementation": attention} if attention else {}
    with quiet():
        try:
            model, info = AutoModelForTokenClassification.from_pretrained(
                source,
                config=settings,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=new_head,
                **extra,
            )
        except Exception as error:  # truncated files, wrong shapes, a hub that went away: as many exception types
            raise UserError(f"{title}: the weights cannot be loaded: {first_line(error)}") from None
    new_modules = heads(model) if new_head else []
    names = list(info["missing_keys"]) + [key[0] for key in info["mismatched_keys"]]
    missing = sorted(name for name in names if name.split(".")[0] not in new_modules)
    if missing:
        raise UserError(
            f"{title}: the weights do not fit config.json: {len(missing)} are missing or of another shape, "
            f"the first is {missing[0]}"
        )
    return model


def read_tokenizer(source: str, title: str, unit: str) -> "PreTrainedTokenizerFast":
    """Return the fast tokenizer; for words, a byte-level one takes each as if a space came before it.

    Raises UserError where there is none, or only a slow one.
    """
    from transformers import AutoTokenizer

    tokenizer: Any
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:
            raise UserError(f"{title}: the tokenizer cannot be loaded: {first_line(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{title}: it has no fast tokenizer (tokenizer.json); save one with transformers")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"{title}: there is no tokenizer in it; expected tokenizer.json or vocab.txt beside the weights"
        )
    if unit == "word" and '"ByteLevel"' in tokenizer.backend_tokenizer.to_str():
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        _add_prefix_space(state["pre_tokenizer"])
        tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _add_prefix_space(pre_tokenizer: dict[str, Any] | None) -> None:
    """Set add_prefix_space in a pre-tokenizer, as tokenizer.json has it, or in the parts of a sequence of them."""
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []:
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = True


def heads(model: "PreTrainedModel") -> list[str]:
    """Return the names of the modules that turn hidden states into logits: all beside the encoder that have weights."""
    children = [(name, module) for name, module in model.named_children() if name != model.base_model_prefix]
    return [name for name, module in children if next(module.parameters(), None) is not None]


def set_dropout(settings: "PretrainedConfig", dropout: float | None) -> None:
    """Set every dropout rate of the encoder; None leaves it its own."""
    if dropout is None:
        return
    for key in DROPOUT_KEYS:
        if hasattr(settings, key):
            setattr(settings, key, dropout)


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of a safetensors file. Raises UserError where it cannot be read."""
    with _opened(file) as tensors:
        names = tensors.keys()
        return {name: tensors.get_tensor(name) for name in names}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file, whose header is checked. Raises UserError for what opening and reading raise."""
    import safetensors

    try:
        with safetensors.safe_open(file, "pt") as tensors:
            yield tensors
    except PermissionError as error:
        raise UserError(f"{Path(file).absolute()}: cannot be read: {error.strerror or error}") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{file}: truncated or not safetensors ({reason}); fetch it or train again") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' load reports and bars and peft's hints from the user; what matters is checked and raised."""
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
