"""ner/files.py: a file or folder is whole or the old one, on Linux and as Windows would have it."""

import errno
import os
import shutil
import stat
from pathlib import Path

import pytest

from ner import files


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def folder_with(path: Path, text: str) -> Path:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(text)
    return path


@pytest.fixture
def windows(monkeypatch):
    """os.open and os.fsync as Windows has them: no folder can be opened, nothing read-only can be synced."""
    real_open, read_only = os.open, set()

    def opened(path, flags, *rest, **keys):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = real_open(path, flags, *rest, **keys)
        if flags & (os.O_RDWR | os.O_WRONLY) == 0:
            read_only.add(descriptor)
        return descriptor

    def fsync(descriptor):
        if descriptor in read_only:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # rmtree opens no folders there either


def test_a_text_is_replaced_with_its_line_ends(tmp_path):
    for text in ("first\n", "北京\r\n二\n", ""):
        files.write_text(tmp_path / "file", text)
        assert (tmp_path / "file").read_bytes() == text.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, call):
    (tmp_path / "file").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")
    assert tree(tmp_path) == {"file": "old"}


def test_a_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "file", "a\ud800")
    assert tree(tmp_path) == {}
    files.write_text(tmp_path / "file", "a\ud800", errors="replace")
    assert tree(tmp_path) == {"file": "a?"}


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    files.write_text(os.devnull, "gone")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


@pytest.mark.parametrize("name", ["x" * 250, "名" * 80])
def test_long_names_can_be_written(tmp_path, name):
    files.write_text(tmp_path / name, "new")
    assert tree(tmp_path) == {name: "new"}


def test_a_folder_takes_the_place_of_another(tmp_path):
    files.replace_folder(folder_with(tmp_path / "one", "first"), tmp_path / "model")
    files.replace_folder(folder_with(tmp_path / "two", "second"), tmp_path / "model")
    assert tree(tmp_path) == {"model/inner/file": "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_is_back_when_the_second_rename_fails(tmp_path, monkeypatch):
    folder_with(tmp_path / "model", "old")
    fresh, real = folder_with(tmp_path / "fresh", "new"), os.rename

    def rename(source, target):
        if Path(source) == fresh:
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PermissionError) as caught:
        files.replace_folder(fresh, tmp_path / "model")
    assert caught.value.filename == str(tmp_path / "model")
    assert tree(tmp_path) == {"model/inner/file": "old", "fresh/inner/file": "new"}


def test_a_kill_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    folder_with(tmp_path / "model", "old")
    fresh, real = folder_with(tmp_path / "fresh", "new"), os.rename

    def rename(source, target):
        if Path(source) == fresh:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        files.replace_folder(fresh, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    files.remove_leftovers(tmp_path / "model")
    assert tree(tmp_path / "model") == {"inner/file": "old"}


def test_leftovers_are_deleted_and_nothing_else(tmp_path):
    target = tmp_path / "model"
    folder_with(target, "whole")
    for kind in (files.WRITING, files.REPLACED):
        folder_with(files.temporary_path(target, kind), "half")
        files.temporary_path(target, kind).write_text("half")
    others = ["model.copy", ".nfs0001", ".other.writing-1", "model.writing-mine", ".model.backup"]
    for name in others:
        (tmp_path / name).write_text("mine")
    files.remove_leftovers(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "model"])
    assert tree(target) == {"inner/file": "whole"}


def test_leftovers_of_nothing_are_no_error(tmp_path):
    files.remove_leftovers(tmp_path / "nowhere" / "model")


def test_it_works_on_windows(tmp_path, windows):
    files.write_text(tmp_path / "file", "new")
    files.replace_folder(folder_with(tmp_path / "one", "first"), tmp_path / "model")
    files.replace_folder(folder_with(tmp_path / "two", "second"), tmp_path / "model")
    (tmp_path / "read-only").write_text("x")
    files.sync(tmp_path / "read-only")
    assert tree(tmp_path) == {"file": "new", "model/inner/file": "second", "read-only": "x"}


def test_a_disk_that_does_not_sync_folders_is_used_all_the_same(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "file", "new")
    assert tree(tmp_path) == {"file": "new"}


def test_readers_find_the_old_folder_between_the_renames_and_move_nothing(tmp_path):
    target = tmp_path / "model"
    assert files.whole_folder(target) == target, "there is none yet"
    old = folder_with(files.temporary_path(target, files.REPLACED), "old")
    folder_with(files.temporary_path(target, files.WRITING), "half")
    before = tree(tmp_path)
    assert files.whole_folder(target) == old
    assert tree(tmp_path) == before
    folder_with(target, "whole")
    assert files.whole_folder(target) == target
