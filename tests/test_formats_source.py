"""Files that are read, and those that cannot be."""

import os
import threading

import pytest

from ner import formats
from ner.errors import UserError


def test_files_that_cannot_be_read(tmp_path):
    for path in (str(tmp_path / "missing"), str(tmp_path), "a\0b"):
        with pytest.raises(UserError, match="no such file|cannot be read"):
            formats.read(path)


def test_a_folder_says_what_is_expected_of_one(tmp_path):
    with pytest.raises(UserError, match=r"without \.ann files of brat; give a tagged file$"):
        formats.read(str(tmp_path))
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match=f"for a saved data set write hub:{tmp_path}$"):
        formats.read(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_read_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for content in ("北 B-LOC\n京 I-LOC\n", ""):
        writer = threading.Thread(target=pipe.write_text, args=(content,))
        writer.start()
        if content:
            assert formats.read(str(pipe)).sentences[0].units == ["北", "京"]
        else:
            with pytest.raises(UserError, match=r"the file is empty \(a pipe can be read only once\)"):
                formats.read(str(pipe))
        writer.join()
