"""The schema of config.yaml: one source of defaults and comments, every key as an option, errors that name the line.

FUZZ_CASES sets how many damaged files are made of config.yaml (400 unless told), and as many by hypothesis.
"""

import os
import random
import re
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ner import config
from ner.errors import UserError
from ner.tunings import TUNINGS

CASES = int(os.environ.get("FUZZ_CASES", "400"))
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


# one source


def test_config_yaml_is_what_config_prints():
    assert config.dump(config.Config()) == YAML


def test_every_line_of_config_yaml_has_a_sentence_and_every_group_a_heading():
    for line in YAML.splitlines():
        assert re.fullmatch(r"(#.*| *[a-z_]+:.* # \S.*\.|)", line) and len(line) <= 120, line
    for heading in config.GROUPS.values():
        assert f"\n\n# {heading}\n" in YAML
    assert list(config.FIELDS).index("max_train_sentences") == 8, "eight everyday keys come first"


def test_config_py_prints_config_yaml():
    done = subprocess.run(
        [sys.executable, "-m", "ner.config"], cwd=config.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == YAML


def test_help_lists_every_key_with_comment_and_value_in_under_a_second_without_torch():
    code = (
        "import sys; from ner import config\ntry: config.load(['--help'])\n"
        "finally: print('LOADED', [name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    )
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True)
    assert time.perf_counter() - begun < 1.5, "slower than a second even with half a second of grace for a busy machine"
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("LOADED []")
    lines = {line.split()[0][2:]: line for line in done.stdout.splitlines() if line.startswith("  --")}
    for key, field in config.FIELDS.items():
        assert field.description in lines[key]
        assert lines[key].endswith("]")
    assert "[auto]" in lines["max_train_sentences"] and "[16]" in lines["lora.r"]
    assert {"config", "resume", "push_to_hub", "help"} <= set(lines)
    assert "fp32, bf16, fp16" in lines["precision"] and "tensorboard" in lines["trackers"]
    headings = [done.stdout.index(text) for text in [*config.GROUPS.values(), "Examples:\n  python main.py"]]
    assert headings == sorted(headings)


def test_help_shows_the_values_of_the_file_in_use(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("epochs: 77\n")
    with pytest.raises(SystemExit) as ended:
        config.load(["--help", "--config", str(tmp_path / "my.yaml")])
    assert ended.value.code == 0
    assert "[77]" in capsys.readouterr().out


def test_defaults_of_the_card():
    made, flags = config.load([])
    assert made.train in ("data/msra/train", str(config.ROOT / "data/msra/train")), "absolute where it is there"
    assert (made.pretrained, made.tuning) == (str(config.ROOT / "data/encoder"), "lora")
    assert (made.kernels, made.export) == ("auto", "int8")
    assert made.lora == config.Lora(r=16, alpha=32, dropout=0, target_modules="all-linear", bias="none")
    assert flags == config.Flags()


# the command line


def test_keys_on_the_command_line():
    made, flags = config.load(
        [
            "--tuning",
            "full",
            "--learning_rate",
            "2e-5",
            "--lora.r=8",
            "--push_to_hub",
            "me/it",
            "--special_tokens",
            "off",
            "--dev",
            "null",
            "--run",
            "2024",
            "--trackers",
            "a, b",
            "--lora.target_modules",
            "query,value",
        ]
    )
    assert (made.tuning, made.learning_rate, made.lora.r, flags.push_to_hub) == ("full", 2e-5, 8, "me/it")
    assert (made.special_tokens, made.dev, made.run, made.trackers) == (False, None, "2024", ["a", "b"])
    assert made.lora.target_modules == ["query", "value"]


@pytest.mark.parametrize("key", config.FIELDS)
def test_every_key_can_be_given(key):
    default = config.get(config.Config(), key)
    made, _ = config.load([f"--{key}", config._yaml(default)])
    suited = ("learning_rate", "head_factor", "max_train_sentences", *config.PATHS)
    assert config.get(made, key) == default or key in suited


@pytest.mark.parametrize("argv, said", [
    (["--epoch", "3"], "the closest is --epochs"),
    (["--learning-rate", "3"], "the closest is --learning_rate"),
    (["--lr", "3"], "the closest is --learning_rate"),
    (["--r", "3"], "the closest is --lora.r"),
    (["--epochs"], "needs a value"),
    (["--epochs", "--seed"], "needs a value"),
    (["--epochs", "3", "--epochs", "4"], "twice"),
    (["--lora", "3"], "--lora.r 8"),
    (["train"], "expected --key value"),
    (["--config", "nosuch.yaml"], "there is no such file"),
    (["--config="], "needs a value"),
    (["--resume", "nosuch"], "expected the folder of a run"),
    (["--epochs", "many"], '--epochs: epochs is "many"; expected a whole number, at least 1'),
    (["--epochs", "0"], "epochs is 0; expected a whole number, at least 1"),
    (["--epochs", "1.5"], "epochs is 1.5; expected a whole number"),
    (["--epochs", "true"], "expected a whole number"),
    (["--learning_rate", "nan"], "learning_rate is NaN; expected a number, above 0 or null"),
    (["--learning_rate", "-1e-3"], "learning_rate is -0.001"),
    (["--learning_rate", "1e999"], "learning_rate is Infinity"),
    (["--warmup_ratio", "1.1"], "at least 0, at most 1"),
    (["--tuning", "laro"], "expected one of lora, full, dora"),
    (["--special_tokens", "maybe"], "true or false"),
    (["--lora.bias", "some"], "one of none, all, lora_only"),
    (["--lora.target_modules", "[]"], "expected all-linear or a list of names or null"),
    (["--run", "a/b"], "without slashes"),
    (["--run", ".."], "without slashes"),
    (["--run", "x" * 81], "at most 80 characters"),
    (["--train", "null"], "train is null; expected a text"),
])  # fmt: skip
def test_wrong_command_lines_are_named(argv, said):
    with pytest.raises(UserError) as caught:
        config.load(argv)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_to_resume_gives_the_config(tmp_path):
    older, newer = tmp_path / "older", tmp_path / "newer"
    for run, epochs in ((older, 5), (newer, 6)):
        (run / "checkpoint").mkdir(parents=True)
        (run / "config.yaml").write_text(f"epochs: {epochs}\noutput: {tmp_path}\n")
    os.utime(older / "checkpoint", (1, 1))
    made, flags = config.load(["--resume", str(older), "--seed", "9"])
    assert (made.epochs, made.seed, flags.resume) == (5, 9, str(older))
    made, flags = config.load(["--resume", "latest", "--output", str(tmp_path)])
    assert (made.epochs, flags.resume) == (6, str(newer))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no run under .*none holds a checkpoint"):
        config.load(["--resume", "latest", "--output", str(tmp_path / "none")])


# the file


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


def run_or_error(text):
    """A Config, or the message of the UserError: nothing else may come of any file."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        try:
            made = load(Path(folder), text)
        except UserError as error:
            assert re.match(r".*my\.yaml(:\d+)?: \S", str(error)) and "\n" not in str(error)
            return str(error)
        assert isinstance(made, config.Config)
        return made


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


@pytest.mark.parametrize("file", sorted((config.ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_configs_that_ship_are_right(file):
    made, _ = config.load(["--config", str(file)])
    assert config.rate_warning(made) is None


# what is derived


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.builds(
        config.Config,
        train=st.text(min_size=1, max_size=20),
        dev=st.none() | st.text(min_size=1, max_size=20),
        run=st.none() | st.from_regex(r"\A[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,20}\Z"),
        learning_rate=st.floats(min_value=1e-12, max_value=1e3),
        head_factor=st.floats(min_value=1e-3, max_value=1e3),
        lora=st.builds(
            config.Lora,
            alpha=st.floats(min_value=1e-3, max_value=1e6),
            target_modules=st.just("all-linear") | st.lists(st.text(min_size=1), min_size=1, max_size=3),
        ),
        trackers=st.lists(st.text(min_size=1, max_size=8), max_size=3),
    )
)  # fmt: skip
def test_a_dump_reads_back_equal(made):
    text = config.dump(made)
    assert yaml.safe_load(text).keys() == config.Config.model_fields.keys()
    paths = {key: config._resolved(getattr(made, key)) for key in config.PATHS}
    assert run_or_error(text) == config.with_defaults(made.model_copy(update=paths))


def test_the_rate_suits_tuning_and_encoder(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 384}')
    for name, tuning in TUNINGS.items():
        made = config.load(["--tuning", name, "--pretrained", str(tmp_path)])[0]
        assert (made.learning_rate, made.head_factor) == (tuning.learning_rate, tuning.head_factor)
    (tmp_path / "config.json").write_text('{"hidden_size": 768}')
    for pretrained in (str(tmp_path), "google-bert/bert-base-chinese"):
        for name, rate in {"full": 2e-5, "lora": 1e-3}.items():
            made = config.load(["--tuning", name, "--pretrained", pretrained])[0]
            assert (made.learning_rate, made.head_factor) == (rate, 1)
    assert config.load(["--tuning", "full", "--learning_rate", "3e-3"])[0].learning_rate == 3e-3
    assert [config.load(["--tuning", tuning])[0].head_factor for tuning in ("lora", "full", "ia3")] == [10, 10, 1]
    assert config.load(["--head_factor", "2.5"])[0].head_factor == 2.5


@pytest.mark.parametrize("argv, said", [
    (["--learning_rate", "9e-5"], "so the loss falls and F1 stays low, or 0"),
    (["--tuning", "dora", "--learning_rate", "2e-5"], "so the loss falls and F1 stays low, or 0"),
    (["--tuning", "full", "--learning_rate", "1e-3"], "at 0.001 and above"),
    (["--learning_rate", "1e-4"], None),
    (["--tuning", "full", "--learning_rate", "9e-4"], None),
    (["--tuning", "freeze", "--learning_rate", "1e-2"], None),
    ([], None),
    (["--tuning", "full"], None),
])  # fmt: skip
def test_rates_that_are_known_to_fail_are_warned_about(argv, said):
    warning = config.rate_warning(config.load(argv)[0])
    assert warning is None if said is None else said in warning


def test_a_sample_is_taken_of_the_default_corpus_only(tmp_path):
    corpus = tmp_path / "train"
    corpus.write_text("")
    for train, asked, limit in [
        ("data/msra/train", None, 8000),
        ("data/msra/train", "null", None),
        ("data/msra/train", "50", 50),
        (str(corpus), None, None),
        (str(corpus), "auto", None),
        (str(corpus), "50", 50),
        ("hub:somebody/corpus", None, None),
    ]:
        argv = ["--train", train] + (["--max_train_sentences", asked] if asked else [])
        made, _ = config.load(argv)
        assert made.max_train_sentences == limit, argv
        dumped = load(tmp_path, config.dump(made))
        assert dumped.max_train_sentences == limit, "a run's config.yaml says what was used"


# paths


def test_paths_are_absolute_from_the_start(tmp_path, monkeypatch):
    """The same relative path in the working folder and in the project: what was read is what is written down."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "encoder").mkdir(parents=True)
    made, _ = config.load([])
    assert made.pretrained == str(tmp_path / "data" / "encoder")
    monkeypatch.chdir(config.ROOT)
    assert config.load(["--pretrained", "data/encoder"])[0].pretrained == str(config.ROOT / "data" / "encoder")
    assert load(tmp_path, config.dump(made)).pretrained == str(tmp_path / "data" / "encoder")


def test_a_run_names_what_lies_in_the_project_from_there(tmp_path, monkeypatch):
    made, _ = config.load(["--pretrained", "data/encoder"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.dump(made))
    (run / "environment.json").write_text("{}")
    assert "pretrained: data/encoder " in config.dump(made)
    (tmp_path / "data" / "encoder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    ours = str(config.ROOT / "data" / "encoder")
    assert config.load_run(run).pretrained == ours
    assert config.load(["--resume", str(run)])[0].pretrained == ours
    assert config.load(["--config", str(run / "config.yaml")])[0].pretrained == ours
    mine = config.load(["--resume", str(run), "--pretrained", "data/encoder"])[0].pretrained
    assert mine == str(tmp_path / "data" / "encoder"), "the command line is read from where the user stands"


def test_a_run_in_the_project_goes_on_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.load(["--resume", "tests/saved_runs/lora"])[1].resume == str(config.ROOT / "tests/saved_runs/lora")


def test_the_home_folder_is_known_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train").write_text("")
    made, _ = config.load(["--output", "~/runs", "--train", "~/train"])
    assert (made.output, made.train) == (str(tmp_path / "runs"), str(tmp_path / "train"))
    assert load(tmp_path, "output: ~/runs\n").output == str(tmp_path / "runs")
    with pytest.raises(UserError, match="there is no home folder ~nobody-here; write the whole path"):
        config.load(["--output", "~nobody-here/runs"])
