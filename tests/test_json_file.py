"""A JSON file → its object, or one line with the whole path."""

from pathlib import Path

import pytest

from ner.errors import UserError
from ner.json_file import read_object


def test_an_object_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"字": [1, null]}', "utf-8")
    assert read_object(tmp_path / "a.json") == {"字": [1, None]}


@pytest.mark.parametrize("data", [b"[1]", b"null", b'{"a": ', b"", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_called_damaged_by_its_whole_path(tmp_path, monkeypatch, data):
    (tmp_path / "a.json").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read_object(Path("a.json"))
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ") and "the file is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_not_called_damaged(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file") as caught:
        read_object(tmp_path / "a.json")
    assert "damaged" not in str(caught.value)
