"""The command line of main.py: `--key value` for every key of config.yaml, and what --help prints."""

from ner.config_file import closest
from ner.config_schema import FIELDS, GROUPS
from ner.errors import UserError
from ner.tunings import TUNINGS

FLAGS = {  # options that are no keys of config.yaml
    "config FILE": "Read FILE instead of config.yaml; keys that it leaves out keep their defaults.",
    "resume RUN": "Go on with a run that was stopped: its folder, or latest for the newest one.",
    "push_to_hub NAME": "Upload the model and its card to the hub when the run has ended.",
    "help": "Print this text; with --config FILE, the values of that file.",
}
FLAG_NAMES = tuple(flag.split()[0] for flag in FLAGS)
TITLE = """usage: python main.py [--KEY VALUE]...

Trains a model that finds named entities in text, and scores it. Every key of config.yaml is an option. In [brackets]
stands the value that an option has when it is left out. A run writes all it makes into a folder of its own.
"""
EXAMPLES = """Examples:
  python main.py
  python main.py --train my/train --dev my/dev --test my/test
  python main.py --train my/train --dev null --test null --epochs 8
  python main.py --pretrained bert-base-chinese --tuning full --epochs 3
  python main.py --config my.yaml --lora.r 8 --run rank-8
  python main.py --resume latest"""


def parse(argv: list[str]) -> dict[str, str]:
    """Return `--key value` and `--key=value` as {key: value}, --help as {"help": "yes"}. Raises UserError."""
    options: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            options["help"] = "yes"
            continue
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --key value; --help lists the keys")
        key, equals, value = word.removeprefix("--").partition("=")
        _check_key(key)
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key} needs a value")
            value = words.pop(0)
        if key in options:
            raise UserError(f"--{key} is given twice")
        if not value and key in FLAG_NAMES:
            raise UserError(f"--{key} needs a value")
        options[key] = value
    return options


def help_text(values: dict[str, str]) -> str:
    """Return what --help prints. values: {dotted key: the value in use, as text}."""
    lines = [TITLE]
    for key, field in FIELDS.items():
        if key in GROUPS:
            lines.append(f"{GROUPS[key]}")
        lines.append(f"  {'--' + key:<24} {field.description} [{values[key]}]")
        if next_starts_group(key):
            lines.append("")
    lines += [
        "Tuning methods, and what each trains beside the head:",
        *(f"  {name:<24} {method.summary}" for name, method in TUNINGS.items()),
        "",
    ]
    lines += ["Options that are no keys:", *(f"  {'--' + flag:<24} {sentence}" for flag, sentence in FLAGS.items())]
    return "\n".join([*lines, "", EXAMPLES])


def next_starts_group(key: str) -> bool:
    """Return whether the key is the last one of its group."""
    keys = list(FIELDS)
    following = keys[keys.index(key) + 1 :]
    return not following or following[0] in GROUPS


def _check_key(key: str) -> None:
    if key == "lora":
        raise UserError("--lora is a group: give its keys, as in --lora.r 8")
    if key not in FIELDS and key not in FLAG_NAMES:
        raise UserError(f"unknown option --{key}; {closest(key, FLAG_NAMES, prefix='--')}")
