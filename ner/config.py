"""The config of a run: config.yaml, then the command line over it, checked and completed. `python -m ner.config`.

The keys stand in ner/config_schema.py; the command prints config.yaml from them. Torch is not imported, so a wrong key
is reported, and --help answers, at once.

pydantic checks the values. Neither pydantic-settings nor jsonargparse reads the file and the command line: the one
loses the line of a key, the other's messages are several lines long, and both take the later of two equal keys.
"""

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pydantic
import yaml

from ner import command_line, config_file
from ner.config_schema import (
    EFFECT_ONLY_WITH,
    FEWEST_EPOCHS,
    FIELDS,
    GROUPS,
    MOST_EPOCHS,
    SAMPLE,
    Config,
    Lora,
    allowed,
)
from ner.errors import UserError, command
from ner.paths import ROOT, expand_home, portable_path, resolve_path
from ner.tunings import BASE_SIZE, TUNINGS

__all__ = ["FIELDS", "ROOT", "Config", "Flags", "Lora", "allowed", "dump", "load", "load_run", "resolve_path"]
PATHS = ("train", "dev", "test", "pretrained")  # keys that name a file or folder which exists before the run
DEFAULT_CORPUS = "data/msra/train"
SENTENCES_OF_A_RUN = 32_000  # that epochs: auto goes through, where its bounds let it: 2,000 steps of 16
COMMENT_COLUMN = 29
HEAD = """\
# The config of `python main.py`. Every key is an option of the command too: --epochs 8, --lora.r 8; see --help.
# For a config of your own, copy the lines that you change into a file and name it with --config FILE; keys that it
# leaves out keep their defaults. Relative paths are looked for in the working folder, then in the project's.
"""


@dataclasses.dataclass(slots=True)
class Flags:
    """What the command line says beside the config. `resume`: the folder of the run to continue."""

    resume: str | None = None
    push_to_hub: str | None = None


def load(argv: list[str] | None = None) -> tuple[Config, Flags]:
    """Return config and flags of the command line (sys.argv where None) over a config file.

    The file is --config, else config.yaml of the run to resume, else ROOT/config.yaml; keys that it does not have keep
    their defaults. Paths that exist are absolute in the config. --help prints all keys and exits. Raises UserError
    with file and line, or with the option's name.
    """
    options = command_line.parse(sys.argv[1:] if argv is None else argv)
    wants_help = options.pop("help", None) is not None
    file, flags = _file_and_flags(options, wants_help)
    values, places = config_file.read(file) if file else ({}, {})
    of_run = file is not None and _is_of_run(file, flags)
    values = _resolve_paths(_with_old_keys(values) if of_run else values, from_project=of_run)
    given = {key: config_file.parse_value(key, text) for key, text in options.items()}
    values |= {key: _resolved(value) if key in PATHS else value for key, value in given.items()}
    places |= {key: f"--{key}" for key in options}
    config = _checked(values, places)
    _check_head(config, places)
    if wants_help:
        print(command_line.help_text({key: _in_help(_portable(config, key)) for key in FIELDS}))
        sys.exit(0)
    return with_defaults(config), flags


def load_run(run: Path) -> Config:
    """Return the config of a saved run, its paths absolute. Raises UserError where it has none."""
    file = Path(run) / "config.yaml"
    values, places = config_file.read(file)
    return with_defaults(_checked(_resolve_paths(_with_old_keys(values), from_project=True), places))


def _with_old_keys(values: dict[str, Any]) -> dict[str, Any]:
    """Return a run's values; a key that did not exist yet when it was saved has the value that such runs used."""
    return {"head": "softmax"} | values


def with_defaults(config: Config) -> Config:
    """Return the config with what suits tuning, encoder and corpus in place of `auto` and null.

    learning_rate and head_factor become numbers, max_train_sentences a number or None, missing paths that exist
    become absolute. What `epochs: auto` means is known when train is read: see with_epochs().
    """
    rate, factor = TUNINGS[config.tuning].rates(_hidden_size(config.pretrained))
    limit = config.max_train_sentences
    if limit == "auto":
        limit = SAMPLE if _is_default_corpus(config.train) else None
    return config.model_copy(
        update={
            "learning_rate": rate if config.learning_rate is None else config.learning_rate,
            "head_factor": factor if config.head_factor is None else config.head_factor,
            "max_train_sentences": limit,
            "output": expand_home(config.output),
        }
    )


def with_epochs(config: Config, sentences: int) -> Config:
    """Return the config with a number in place of `epochs: auto`, by how many sentences are trained on (at least 1)."""
    if config.epochs != "auto":
        return config
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, round(SENTENCES_OF_A_RUN / sentences)))
    return config.model_copy(update={"epochs": epochs})


def rate_warning(config: Config) -> str | None:
    """Return the reason to doubt the learning rate, where it lies in a zone that is known to fail."""
    rate, tuning = config.learning_rate, TUNINGS[config.tuning]
    suits, _ = tuning.rates(_hidden_size(config.pretrained))
    if rate is not None and tuning.lowest_rate is not None and rate < tuning.lowest_rate:
        return (
            f"learning_rate {rate:g} is too low for {config.tuning}: below {tuning.lowest_rate:g} the adapter hardly "
            f"moves, so the loss falls and F1 stays low, or 0 with every character tagged O; try {suits:g}"
        )
    if rate is not None and tuning.highest_rate is not None and rate >= tuning.highest_rate:
        return (
            f"learning_rate {rate:g} is too high for {config.tuning}: at {tuning.highest_rate:g} and above the encoder "
            f"forgets what it was pretrained on and F1 stays 0; try {suits:g}"
        )
    return None


def no_effect_warnings(config: Config) -> list[str]:
    """Return a line on keys that were changed from their defaults, but have no effect in this config.

    They are no error, so that one file serves several tuning methods.
    """
    warnings = []
    for keys, (other, values) in EFFECT_ONLY_WITH.items():
        changed = [key for key in keys if get(config, key) != FIELDS[key].default]
        if changed and get(config, other) not in values:
            verb = "has" if len(changed) == 1 else "have"
            here, there = f"{other} {get(config, other)}", ", ".join(values)
            warnings.append(f"{', '.join(changed)} {verb} no effect with {here}, only with {there}")
    return warnings


def dump(config: Config) -> str:
    """Return the config as commented YAML that `--config` reads back to an equal one. Paths are portable."""
    lines = [HEAD]
    for key, field in FIELDS.items():
        if key in GROUPS:
            lines.append(f"\n# {GROUPS[key]}\n")
        if key == "lora.r":
            lines.append(_commented("lora:", Config.model_fields["lora"].description))
        lines.append(_commented(f"{key.replace('lora.', '  ')}: {_yaml(_portable(config, key))}", field.description))
    return "".join(lines)


def get(config: Config, key: str) -> Any:
    """Return the value of a dotted key."""
    group, _, name = key.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def _file_and_flags(options: dict[str, str], wants_help: bool) -> tuple[Path | None, Flags]:
    """Take --config, --resume and --push_to_hub out of the options. Returns the config file to read, and the flags."""
    named = options.pop("config", None)
    flags = Flags(options.pop("resume", None), options.pop("push_to_hub", None))
    default = ROOT / "config.yaml"
    if wants_help and not named:
        flags.resume = None
    if flags.resume:
        run = _run_to_resume(flags.resume, options, default)
        flags.resume, default = str(run), run / "config.yaml"
    if named is None:
        return (default if default.is_file() else None), flags
    file = resolve_path(named)
    if file is None or file.is_dir():
        raise UserError(f"--config {named}: there is no such file")
    return file, flags


def _run_to_resume(resume: str, options: dict[str, str], default: Path) -> Path:
    """Return the run folder that --resume names; `latest` is the newest one under output that holds a checkpoint."""
    if resume == "latest":
        output = options.get("output") or (config_file.read(default)[0].get("output") if default.is_file() else None)
        folder = resolve_path(output or Config().output) or Path(output or Config().output)
        checkpoints = [path for path in folder.glob("*/checkpoint") if (path.parent / "config.yaml").is_file()]
        if not checkpoints:
            raise UserError(f"--resume latest: no run under {folder} holds a checkpoint")
        return max(checkpoints, key=lambda path: path.stat().st_mtime).parent
    run = Path(expand_home(resume))
    try:
        for folder in (run, ROOT / run):
            if (folder / "config.yaml").is_file():
                return folder
    except OSError as error:  # a folder that may not be entered
        raise UserError(f"--resume {run.absolute()}: cannot be read: {error.strerror}") from None
    raise UserError(f"--resume {resume}: expected the folder of a run, which holds a config.yaml")


def _is_of_run(file: Path, flags: Flags) -> bool:
    """Whether a run wrote this config file, so that its relative paths start from the project's folder."""
    if file.name != "config.yaml":
        return False
    return (flags.resume is not None and file.parent == Path(flags.resume)) or (
        file.parent / "environment.json"
    ).is_file()


def _resolve_paths(values: dict[str, Any], from_project: bool = False) -> dict[str, Any]:
    """The values of a config file and the default paths, absolute where they exist."""
    paths = {key: values.get(key, Config.model_fields[key].default) for key in PATHS}
    return values | {key: _resolved(path, from_project) for key, path in paths.items()}


def _resolved(path: Any, from_project: bool = False) -> Any:
    """The absolute path where it exists; names on the hub, missing files and what is no text stay as they are."""
    resolved = resolve_path(path, from_project) if isinstance(path, str) and path else None
    return path if resolved is None else str(resolved)


def _is_default_corpus(train: str) -> bool:
    return train == DEFAULT_CORPUS or Path(train) == (ROOT / DEFAULT_CORPUS).resolve()


def _checked(values: dict[str, Any], places: dict[str, str]) -> Config:
    """Return the Config of dotted keys. Raises UserError naming the first wrong key, its value and what is allowed."""
    nested = {key: value for key, value in values.items() if "." not in key}
    nested["lora"] = {key.removeprefix("lora."): value for key, value in values.items() if key.startswith("lora.")}
    try:
        return Config(**nested)
    except pydantic.ValidationError as error:
        location = error.errors()[0]["loc"]
        key = f"lora.{location[1]}" if location[0] == "lora" else str(location[0])
        value = "null" if values[key] is None else json.dumps(values[key], ensure_ascii=False)
        value = value if len(value) <= 60 else value[:60] + "…"
        raise UserError(f"{places[key]}: {key} is {value}; expected {allowed(key)}") from None


def _check_head(config: Config, places: dict[str, str]) -> None:
    """Raise UserError where a key is set that head: crf has no use for, as it has its own loss and best path."""
    if config.head != "crf":
        return
    for key in ("loss", "label_smoothing", "decode"):
        value, default = get(config, key), Config.model_fields[key].default
        if value != default:
            place = places[key]
            raise UserError(
                f"{place}: {key} {_yaml(value)} does not go with head crf; "
                f"set head: softmax, or leave it at {_yaml(default)}"
            )


def _hidden_size(pretrained: str) -> int:
    """The encoder's width by its config.json; by the name for one on the hub: base size unless it says small."""
    folder = resolve_path(pretrained)
    if folder is None:
        return 256 if re.search("tiny|mini|small", pretrained.lower()) else BASE_SIZE
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        return int(settings.get("hidden_size") or settings.get("dim") or settings.get("d_model") or BASE_SIZE)
    except (OSError, ValueError, TypeError, AttributeError):
        return BASE_SIZE  # ner/encoder.py says what is wrong with the folder


def _portable(config: Config, key: str) -> Any:
    value = get(config, key)
    return portable_path(value) if key in PATHS and value is not None else value


def _in_help(value: Any) -> str:
    """A value as --help shows it in [brackets], so a list without brackets of its own."""
    return ", ".join(value) or "none" if isinstance(value, list) else _yaml(value)


def _commented(text: str, comment: str | None) -> str:
    return f"{text:<{COMMENT_COLUMN}} # {comment}\n"


def _yaml(value: Any) -> str:
    """A value as YAML on one line, plain where that reads back to the same value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if not isinstance(value, str):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    is_plain = re.fullmatch(r"[\w/][\w/.:+-]*[\w/]", value) is not None
    if is_plain and value.lower() not in ("null", "true", "false", "yes", "no"):
        return value
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9).strip()


@command
def main(argv: list[str] | None = None) -> None:
    """Print config.yaml."""
    parser = argparse.ArgumentParser(
        prog="python -m ner.config",
        description="Prints config.yaml: every key with its default and a sentence about it.",
        epilog="Example:\n  python -m ner.config > config.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    print(dump(Config()), end="")


if __name__ == "__main__":
    main()
