"""The command line: every key is an option, --help lists them, errors name the option."""

import os
import subprocess
import sys
import time

import pytest

from ner import config
from ner.errors import UserError


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
    assert lines["trackers"].endswith(" [none]"), "not [[]]"
    assert {"config", "resume", "push_to_hub", "help"} <= set(lines)
    assert "fp32, bf16, fp16" in lines["precision"] and "tensorboard" in lines["trackers"]
    headings = [done.stdout.index(text) for text in [*config.GROUPS.values(), "Examples:\n  python main.py"]]
    assert headings == sorted(headings)


def test_help_shows_the_values_of_the_file_in_use(tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("epochs: 77\nlora: {target_modules: [query, value]}\n")
    with pytest.raises(SystemExit) as ended:
        config.load(["--help", "--config", str(tmp_path / "my.yaml")])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "[77]" in text and "[query, value]" in text and "[[" not in text


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
