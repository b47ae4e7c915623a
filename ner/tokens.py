"""A saved model's tokenizer through the tokenizers library alone: transformers takes a second to import.

It answers what ner.windows.Windower asks of a transformers tokenizer, with the same ids.
"""

import json
from pathlib import Path
from typing import Any

from ner.errors import UserError

NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class FastTokenizer:
    """tokenizer.json of a model folder, with the special tokens that tokenizer_config.json names.

    Raises UserError where one of the two files is missing or damaged.
    """

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        file, settings_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
        for path in (file, settings_file):
            if not path.is_file():
                raise UserError(f"{folder}: there is no tokenizer in it; expected {path.name} beside ner.json")
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{file}: the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        special_ids = _special_ids(self.tokenizer, settings_file)
        self.all_special_ids = list(dict.fromkeys(special_ids.values()))
        self.unk_token_id, self.pad_token_id = special_ids.get("unk"), special_ids.get("pad")

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """Return the id of a token, that of the unknown token where there is no such token."""
        token_id = self.tokenizer.token_to_id(token)
        return self.unk_token_id if token_id is None else token_id

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        """Return {"input_ids": token ids of a text, or of each text of a list}."""
        if isinstance(texts, str):
            return {"input_ids": self.tokenizer.encode(texts, add_special_tokens=add_special_tokens).ids}
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {"input_ids": [encoding.ids for encoding in encodings]}


def _special_ids(tokenizer: Any, file: Path) -> dict[str, int]:
    """Return the id of each special token that the settings name, by what it is for."""
    try:
        settings = json.loads(file.read_text("utf-8"))
        named = {name: settings[f"{name}_token"] for name in NAMES if settings.get(f"{name}_token")}
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        named |= extra if isinstance(extra, dict) else {f"extra {index}": token for index, token in enumerate(extra)}
        texts = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items()}
        ids = {name: tokenizer.token_to_id(text) for name, text in texts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be used ({type(error).__name__}); the file is damaged") from None
    return {name: token_id for name, token_id in ids.items() if token_id is not None}
