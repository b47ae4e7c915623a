"""The schema of config.yaml: one source of defaults and comments, and what is derived from a config."""

import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from written_config import YAML, load, run_or_error

from ner import config
from ner.errors import UserError
from ner.tunings import TUNINGS


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


def test_defaults_of_the_card():
    made, flags = config.load([])
    assert made.train in ("data/msra/train", str(config.ROOT / "data/msra/train")), "absolute where it is there"
    assert (made.pretrained, made.tuning) == (str(config.ROOT / "data/encoder"), "lora")
    assert (made.kernels, made.export) == ("auto", "int8")
    assert made.lora == config.Lora(r=16, alpha=32, dropout=0, target_modules="all-linear", bias="none")
    assert flags == config.Flags()


@pytest.mark.parametrize("file", sorted((config.ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_configs_that_ship_are_right(file):
    made, _ = config.load(["--config", str(file)])
    assert config.rate_warning(made) is None


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


@pytest.mark.parametrize("argv, said", [
    (["--tuning", "full", "--lora.r", "8"], "lora.r has no effect with tuning full, only with lora, dora,"),
    (["--tuning", "ia3", "--lora.r", "8", "--lora.bias", "all"], "lora.r, lora.bias have no effect with tuning ia3"),
    (["--virtual_tokens", "5"], "virtual_tokens has no effect with tuning lora, only with prompt, prefix, ptuning"),
    (["--head", "softmax", "--crf_learning_rate", "1"], "crf_learning_rate has no effect with head softmax"),
    (["--adversarial_epsilon", "2"], "adversarial_epsilon has no effect with adversarial none, only with fgm"),
    (["--tuning", "adalora", "--lora.r", "8", "--adversarial", "fgm", "--adversarial_epsilon", "2"], None),
    (["--tuning", "full", "--lora.r", "16", "--head", "softmax"], None),
    (["--tuning", "prompt", "--virtual_tokens", "5", "--crf_learning_rate", "1"], None),
])  # fmt: skip
def test_keys_without_effect_are_warned_about(argv, said):
    warnings = config.no_effect_warnings(config.load(argv)[0])
    assert warnings == [] if said is None else len(warnings) == 1 and warnings[0].startswith(said)


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


@pytest.mark.parametrize("sentences, epochs", [(1, 12), (300, 12), (2_700, 12), (4_000, 8), (8_000, 4), (48_277, 3)])
def test_a_smaller_corpus_has_more_epochs(sentences, epochs):
    made = config.load([])[0]
    assert made.epochs == "auto" and config.with_epochs(made, sentences).epochs == epochs
    assert config.with_epochs(config.load(["--epochs", "5"])[0], sentences).epochs == 5


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
