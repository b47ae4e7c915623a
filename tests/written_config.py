"""Reads a config.yaml that a test writes."""

import re
import tempfile
from pathlib import Path

import pytest

from ner import config
from ner.errors import UserError

YAML = (config.ROOT / "config.yaml").read_text("utf-8")


def load(folder, text, *argv):
    file = folder / "my.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.load(["--config", str(file), *argv])[0]


def fails(folder, text, *argv):
    with pytest.raises(UserError) as caught:
        load(folder, text, *argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_or_error(text):
    """A Config, or the message of the UserError: nothing else may come of any file."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = load(Path(folder), text)
        except UserError as error:
            assert re.match(r".*my\.yaml(:\d+)?: \S", str(error)) and "\n" not in str(error)
            return str(error)
        assert isinstance(made, config.Config)
        return made
