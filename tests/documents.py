"""What the documents tell a reader to type: their commands, options and settings, and which of them are wrong."""

import argparse
import contextlib
import functools
import io
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

from ner import command_line, config
from ner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md"), ROOT / "data/encoder/README.md"}
    | {*ROOT.glob("tests/*.md"), *ROOT.glob("tests/*/*.md")}
)
BENCHMARKS = [f"benchmarks/{name}.py" for name in ("kernels", "predict", "scores", "tables", "taggers")]
COMMANDS = ["loader.py", "evaluate.py", "predict.py", "ner.report", "ner.config", "data/msra.py"]
SUBCOMMANDS = ["model.py merge", "model.py export", "benchmarks/measure.py run"]
CURRENT = [file for file in DOCUMENTS if file.name != "CHANGELOG.md"]  # which also names what is gone


def ids(file: Path) -> str:
    return str(file.relative_to(ROOT))


def section(text: str, heading: str) -> str:
    """Return a second-level section of a document."""
    match = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    assert match, f"no section {heading!r}"
    return match[1]


def commands(text: str) -> list[list[str]]:
    """Return the `python …` commands of a section, as words: those of its bash blocks, then those of its table."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    for cell in re.findall(r"^\| (`.*?) \|", text, re.M):
        whole = re.findall(r"`(.*?)`", cell)
        script = re.match(r"python (-m )?\S+", whole[0])[0]
        lines += [part.replace("…", script, 1) if part.startswith("…") else part for part in whole]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "python"]


class Captured(BaseException):
    """Raised in place of parsing, with the parser of a script."""


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser that a command makes of its options: `predict.py`, or the module `ner.report`."""

    def capture(self, *args, **kwargs):
        raise Captured(self)

    path = sys.path[:]
    file = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
    assert file.is_file(), f"there is no {script}"
    try:
        sys.path.insert(0, str(file.parent))  # as when it is run
        with mock.patch.object(argparse.ArgumentParser, "parse_args", capture):
            runpy.run_path(str(file), run_name="__main__")
    except Captured as captured:
        return captured.args[0]
    finally:
        sys.path[:] = path
    raise AssertionError(f"{script}: makes no parser")


def code_of(text: str) -> list[str]:
    """Return the lines of a document's code blocks, continued ones joined, and what stands in backticks elsewhere."""
    text = text.replace("\\\n", " ")
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.S)
    rest = re.sub(r"```\w*\n.*?```", "", text, flags=re.S)
    indented = re.findall(r"^ {4,}(\S.*)$", rest, re.M)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ {4,}\S.*$", "", rest, flags=re.M))
    return [line for block in fenced for line in block.splitlines()] + indented + [" ".join(i.split()) for i in inline]


def calls(text: str) -> list[list[str]]:
    """Return the calls of this project's commands in a document: [script, argument, …]."""
    found = []
    for line in code_of(text):
        starts = re.match(r"(\w+=\S+ )*(python|accelerate|torchrun|srun|\w+\.py) ", line)
        if not starts or re.search(" -c | -m pytest ", line):
            continue
        words = itertools.takewhile(lambda word: word not in ("|", ">"), shlex.split(line, comments=True))
        words = [word for word in words if word != "…"]
        ours = [number for number, word in enumerate(words) if re.fullmatch(r"[\w/]+\.py|ner\.\w+", word)]
        if ours:
            found.append(words[ours[0] :])
    return found


def what_is_wrong(script: str, words: list[str]) -> str:
    """Return what a command says of its arguments, where it does not take them; an empty text where it does."""
    stand_ins = {"N": "1", "NAME": "scores-msra" if script.endswith("measure.py") else "NAME"}
    words = [stand_ins.get(word, word) for word in words]
    if script == "main.py":
        for option in ("--config", "--resume"):  # files that are not here
            if option in words:
                del words[words.index(option) : words.index(option) + 2]
        try:
            config.load(words)
        except UserError as error:
            return str(error)
        return ""
    if "--" in words:  # benchmarks/scores.py gives the rest to main.py
        if wrong := what_is_wrong("main.py", words[words.index("--") + 1 :]):
            return wrong
        words = words[: words.index("--")]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser_of(script).parse_args(words)
    except SystemExit:
        return said.getvalue()
    return ""


def wrong_commands(text: str) -> list[str]:
    """Return the commands of a document that would be refused, and why."""
    wrong = []
    for script, *words in calls(text):
        if reason := what_is_wrong(script, words):
            wrong.append(f"{script} {' '.join(words)}: {reason}")
    return wrong


def unknown_options(text: str) -> list[str]:
    """Return the options that a document names by themselves (`--threads 2`) and that no command has."""
    known = {f"--{key}" for key in (*config.FIELDS, *command_line.FLAG_NAMES)}
    for script in (*COMMANDS, *BENCHMARKS, *SUBCOMMANDS, "data/encoder/build.py"):
        parser = parser_of(script.split()[0])
        for word in script.split()[1:]:
            (subparsers,) = [action for action in parser._actions if isinstance(action.choices, dict)]
            parser = subparsers.choices[word]
        known |= {option for action in parser._actions for option in action.option_strings}
    named = [match[1] for line in code_of(text) if (match := re.match(r"(--[\w.-]+)", line))]
    return [option for option in named if option not in known]


def wrong_settings(text: str) -> list[str]:
    """Return what a document writes as a line of config.yaml (`head: softmax`) and config.yaml would not take."""
    wrong = []
    text = re.sub(r"```yaml\napiVersion: .*?```", "", text, flags=re.S)  # a Kubernetes resource
    for line in code_of(text):
        key, colon, value = line.partition(": ")
        if not colon or not re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", key) or key == "lora":
            continue
        try:
            settings = {"head": "softmax"} if key in ("loss", "label_smoothing", "decode") else {}
            assert key in config.FIELDS, "no key"
            config.load([f"--{name}={given}" for name, given in (settings | {key: value}).items()])
        except (UserError, AssertionError) as error:
            wrong.append(f"{line}: {error}")
    return wrong
