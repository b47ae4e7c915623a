"""config.yaml as a file: whatever is in it gives a config, or one line that names file and line.

FUZZ_CASES sets how many damaged files are made of config.yaml (400 unless told), and as many by hypothesis.
"""

import os
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_config import YAML, fails, load, run_or_error

from ner import config

CASES = int(os.environ.get("FUZZ_CASES", "400"))


@pytest.mark.parametrize("text, line, said", [
    ("seed: 1\nepoch: 3\n", 2, "unknown key 'epoch'; the closest is epochs"),
    ("seed: 1\n\nlora:\n  r: 8\n  alfa: 3\n", 5, "unknown key 'lora.alfa'; the closest is lora.alpha"),
    ("seed: 1\nlora.r: 8\n", 2, "lora.r is a key of the group lora; write `lora: {r: 8}`"),
    ("# hello\nepochs: many\n", 2, 'epochs is "many"; expected a whole number, at least 1'),
    ("epochs: [1]\n", 1, "expected a whole number"),
    ("epochs: {a: 1}\n", 1, "expected a whole number"),
    ("epochs:\n", 1, "epochs is null; expected a whole number"),
    ("epochs: yes\n", 1, "epochs is \"yes\""),
    ("lora: 8\n", 1, "lora is a group; write its keys beneath it, as in `lora: {r: 8}`"),
    ("lora:\n  r: -1\n", 2, "lora.r is -1; expected a whole number, at least 1"),
    ("epochs: 1\nseed: 2\nepochs: 3\n", 3, "epochs is given twice"),
    ("lora: {r: 1}\nlora: {alpha: 1}\n", 2, "lora is given twice"),
    ("lora: {r: 1, r: 2}\n", 1, "lora.r is given twice"),
    ("a: &a [x, x]\nb: &b [*a, *a]\n", 2, "alias"),
    ("epochs: 1\nseed: &s 3\nrun: *s\n", 3, "alias"),
    ("trackers: [[[[[]]]]]\n", 1, "nested too deeply"),
    ("trackers: [[a]]\n", 1, "list of lists"),
    ("epochs: 1\n\tseed: 2\n", 2, "not YAML"),
    ("epochs: 'x\n", 2, "not YAML"),
    ("- a\n- b\n", 1, "the file must hold lines of `key: value`"),
    ("just a text\n", 1, "the file must hold lines of `key: value`"),
    ("[1]: 2\n", 1, "unknown key"),
    ("run: !!python/object/apply:os.system ['touch /tmp/owned']\n", 1, "expected a folder name"),
    ("run: !!python/name:os.system\n", 1, "has the tag"),
    ("run: !mine x\n", 1, "has the tag"),
    ("run: a\x00b\n", 1, "not YAML"),
    (b"seed: 1\nrun: \xff\n", 2, "not UTF-8"),
    ("epochs: 1\n---\nseed: 2\n", 2, "not YAML"),
])  # fmt: skip
def test_wrong_files_are_named_with_the_line(tmp_path, text, line, said):
    message = fails(tmp_path, text)
    assert message.startswith(f"{tmp_path / 'my.yaml'}:{line}: ") and said in message, message


def test_files_that_are_fine(tmp_path):
    assert load(tmp_path, "") == load(tmp_path, "# nothing\n") == load(tmp_path, "---\n") == load(tmp_path, YAML)
    assert load(tmp_path, "\ufefflearning_rate: 2e-5\r\nrun: 2024-05-06\r\n").run == "2024-05-06"
    assert load(tmp_path, "learning_rate: 2e-5").learning_rate == 2e-5
    assert load(tmp_path, "trackers: [tensorboard]\nlora: {target_modules: [query]}").lora.target_modules == ["query"]
    assert load(tmp_path, "epochs: 3", "--epochs", "4").epochs == 4


def test_bombs_end_at_once(tmp_path):
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 60))
    begun = time.perf_counter()
    assert "alias" in fails(tmp_path, laughs)
    assert "too deeply" in fails(tmp_path, "run: " + "[" * 90_000)
    assert "too deeply" in fails(tmp_path, "run: " + "{a: " * 20_000)
    assert "larger than" in fails(tmp_path, "# " + "x" * 200_000)
    assert time.perf_counter() - begun < 5


SCALARS = st.one_of(
    st.sampled_from(["null", "~", "1", "-1", "1e400", "0x10", ".inf", ".nan", "1:30", "yes", "2024-01-01", "''", '"a"',
                     "[]", "{}", "[a, 1]", "&x 1", "*x", "!!int 3", "!!binary aa", "|\n  x", ">\n", "? ", "- "]),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from([*config.Config.model_fields, "<<", "=", "? a"]), st.text(max_size=8))


@settings(max_examples=max(10, CASES), deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["", "  ", "lora:\n  "]), KEYS, SCALARS), max_size=6))
def test_any_lines_give_a_config_or_an_error(lines):
    run_or_error("".join(f"{indent}{key}: {value}\n" for indent, key, value in lines).encode("utf-8", "surrogatepass"))


@settings(max_examples=max(10, CASES // 2), deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_config_or_an_error(data):
    run_or_error(data)


def test_mutated_config_yaml_gives_a_config_or_an_error():
    draw, outcomes = random.Random(0), set()
    for _ in range(CASES):
        data = bytearray(YAML.encode())
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[at] = draw.randrange(256)
                case 1:
                    del data[at : at + draw.randrange(1, 40)]
                case 2:
                    data[at:at] = draw.choice(b"[ { &a *a \n \t ' !! \x00 -_ :_".split(b" ")).replace(b"_", b" ")
                case 3:
                    data[at:at] = data[draw.randrange(len(data)) :][:60]
        outcomes.add(type(run_or_error(bytes(data))))
    assert outcomes == {config.Config, str}
