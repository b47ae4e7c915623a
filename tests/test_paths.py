"""ner/paths.py: what a user names is found, and written down so that it means the same from anywhere."""

import os

import pytest

from ner.errors import UserError
from ner.paths import ROOT, expand_home, portable_path, resolve_path


def test_the_working_folder_comes_first_then_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_path("config.yaml") == ROOT / "config.yaml"
    (tmp_path / "config.yaml").write_text("")
    assert resolve_path("config.yaml") == tmp_path / "config.yaml"
    assert resolve_path("config.yaml", from_project=True) == ROOT / "config.yaml"


@pytest.mark.parametrize("odd", ["nosuch", "a\x00b", "x" * 5000, "~nobody-here/x", "hub:name"])
def test_what_does_not_exist_is_none(odd):
    assert resolve_path(odd) is None


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    assert resolve_path("~/file") == tmp_path / "file"
    assert expand_home("~/new") == str(tmp_path / "new")
    with pytest.raises(UserError, match="no home folder ~nobody-here"):
        expand_home("~nobody-here/x")


def test_a_pipe_keeps_its_name():
    """`--train <(command)` names a pipe under /dev/fd, whose target has no path of its own."""
    reading, writing = os.pipe()
    try:
        assert str(resolve_path(f"/dev/fd/{reading}")) == f"/dev/fd/{reading}"
    finally:
        os.close(reading)
        os.close(writing)


def test_a_path_is_written_down_from_the_project_where_it_lies_in_it(tmp_path):
    assert portable_path(str(ROOT / "data" / "encoder")) == "data/encoder"
    for path in (str(tmp_path), "google-bert/bert-base-chinese", "hub:name", "data/encoder"):
        assert portable_path(path) == path
    assert resolve_path(portable_path(str(ROOT / "ner")), from_project=True) == ROOT / "ner"
