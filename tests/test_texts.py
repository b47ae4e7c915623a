"""texts.py: lines of a file in UTF-8 or GB18030, damage and binary files, chunks of bounded size."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ner.errors import UserError
from ner.texts import CHUNK_CHARACTERS, chunks, read_texts


def read(data: bytes) -> list[str]:
    return list(read_texts(io.BytesIO(data), "f"))


def test_only_line_feeds_end_a_text():
    assert read("a\u2028b\x0bc\x85d\x1ce\n\nf\r\n".encode()) == ["a\u2028b\x0bc\x85d\x1ce", "", "f"]
    assert read(b"") == [] and read(b"\n") == [""] and read(b"\xef\xbb\xbf") == [""]


def test_damaged_bytes_are_replaced_with_a_warning(caplog):
    data = "北京\n上海和深圳的天气都很好\n".encode() + b"\xe5\x8c \n\xff\n"
    assert read(data) == ["北京", "上海和深圳的天气都很好", "\ufffd ", "\ufffd"]
    assert "f:3: not utf-8" in caplog.text
    damaged = ("这是一个很长的句子" * 5).encode()[:-1] + b"\n" + "北京".encode()  # not GB18030, though it would decode
    assert read(damaged)[1] == "北京"


@pytest.mark.parametrize(
    "data, line",
    [
        (b"\x7fELF\x02\x01\x01\x00\x00", 1),
        (b"ok\nPK\x03\x04\x00", 2),
        (b"\xff\xfe5S\xacN\n\x00", 1),
        (b"a\n\xff\xff\xff\x80\xff", 2),
        (bytes(range(1, 256)), 2),
    ],
)
def test_binary_files(data, line):
    with pytest.raises(UserError, match=f"^f:{line}: "):
        read(data)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n\r\0")), min_size=1))
def test_utf8_lines_come_back(lines):
    assert read("\n".join(["好", *lines]).encode() + b"\n") == ["好", *lines]


@given(st.lists(st.integers(0, 200_000), max_size=40))
def test_chunks_are_bounded_and_in_order(lengths):
    texts = ["x" * length for length in lengths]
    cut = list(chunks(texts))
    assert [text for chunk in cut for text in chunk] == texts
    assert all(chunk and sum(map(len, chunk[:-1])) < CHUNK_CHARACTERS for chunk in cut)
    assert [len(c) for c in chunks([""] * 10_000)] == [2048] * 4 + [1808]
