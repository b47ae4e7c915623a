"""A finished run → a model on the Hugging Face hub, which loads by its name alone."""

import json
import shutil
import tempfile
from pathlib import Path

from ner import encoder
from ner.card import card_text, write_card
from ner.errors import UserError, first_line
from ner.export import merge
from ner.json_file import read_object
from ner.meta import read_meta
from ner.tunings import TUNINGS

PATH_KEYS = (("ner.json", "pretrained"), ("adapter_config.json", "base_model_name_or_path"))


def push(run: str | Path, name: str) -> str:
    """Upload the run's model and card to the hub as `name`; return where it is.

    What is uploaded loads by itself: an adapter whose encoder is on the hub goes alone, one whose encoder is a local
    folder goes merged, or with its encoder where it cannot be merged. Raises UserError.
    """
    run = Path(run)
    write_card(run)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        _lay_out(run, folder)
        return _upload(run, folder, name)


def _lay_out(run: Path, folder: Path) -> None:
    """Write what is uploaded to `folder`."""
    meta = read_meta(run / "model")
    tuning, is_local = TUNINGS[meta["tuning"]], Path(meta["pretrained"]).is_absolute()
    if tuning.merges and is_local:
        merge(run, folder)
        (folder / "README.md").write_text(card_text(run, merged=True), "utf-8")
        for file in [*(run / "model").glob("*.onnx"), *(run / "model").glob("onnx.json")]:
            shutil.copyfile(file, folder / file.name)
    else:
        shutil.copytree(run / "model", folder, ignore=None if is_local else shutil.ignore_patterns("encoder"))
    for file_name, key in PATH_KEYS:  # a path of this machine means nothing elsewhere
        file = folder / file_name
        if file.exists():
            values = read_object(file) | {key: "encoder" if is_local else meta["pretrained"]}
            file.write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _upload(run: Path, folder: Path, name: str) -> str:
    import huggingface_hub
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    api = huggingface_hub.HfApi(endpoint=endpoint)
    try:
        with encoder.quiet():
            url = api.create_repo(name, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="A tagger and its card")
    except Exception as error:  # no network, no rights, a wrong name, a full quota
        reason = first_line(error)
        if isinstance(error, errors.LocalTokenNotFoundError) or "401" in reason or "403" in reason:
            reason += "; run `hf auth login` or set HF_TOKEN to a token that may write there"
        raise UserError(
            f"--push_to_hub {name}: {endpoint} did not take it: {reason}; the run is whole, and {run / 'model'} can be "
            "uploaded later by `hf upload`"
        ) from None
    return str(url)
