"""The schema of config.yaml: types, bounds, the learning rate that suits a tuning, and the command line.

Every key's default and comment live in the two classes below; `python config.py` prints config.yaml from them. Torch is
not imported here, so a wrong key is reported (and --help answers) at once.
"""

import dataclasses
import difflib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import pydantic
import yaml

from ner.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TUNINGS = Literal["lora", "full", "dora", "rslora", "adalora", "ia3", "bitfit", "freeze", "prompt", "prefix", "ptuning"]
DEFAULT_RATES = {
    "lora": 1e-3, "full": 2e-4, "dora": 1e-3, "rslora": 2.5e-4, "adalora": 9e-3, "ia3": 2e-2, "bitfit": 1e-2,
    "freeze": 3e-2, "prompt": 1e-2, "prefix": 3e-2, "ptuning": 2e-2,
}  # fmt: skip
HEAD_FACTORS = {"lora": 10, "full": 10, "dora": 10, "rslora": 10}  # 1 for the others, whose rates are a head's
BASE_SIZE_FULL_RATE = 2e-5  # `full` on encoders of hidden size 768 and more, which 2e-4 would ruin
LARGEST_FILE = 100_000  # bytes; a config.yaml is two thousand
DEEPEST = 3  # levels: the file, lora, lora.target_modules


def _key(default, comment: str, **bounds):
    return pydantic.Field(default, description=comment, **bounds)


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Lora(_Strict):
    """The group `lora:`, read by lora, dora, rslora and adalora."""

    r: int = _key(16, "rank: the width of the adapter", ge=1)
    alpha: float = _key(32, "scale: the adapter's output is multiplied by alpha / r", gt=0)
    dropout: float = _key(0.0, "dropout before the adapter, while training", ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[list[str], pydantic.Field(min_length=1)] | None = _key(
        "all-linear", "layers that get one: all-linear, [query, value], or null for peft's choice"
    )
    bias: Literal["none", "all", "lora_only"] = _key("none", "biases trained too: none, all, lora_only")


class Config(_Strict):
    """Every knob of a run, in the order in which a user meets them."""

    train: str = _key("data/msra/train", "labelled sentences, a file or hub:NAME", min_length=1)
    dev: str | None = _key("data/msra/dev", "picks the best epoch; null holds 5% of train out", min_length=1)
    test: str | None = _key("data/msra/test", "scored once, at the end; null for none", min_length=1)
    max_train_sentences: int | None = _key(8000, "a seeded sample of train; null takes all of it", ge=1)
    pretrained: str = _key("data/encoder", "the encoder: a local folder or a hub name", min_length=1)
    tuning: TUNINGS = _key("lora", "lora, full, dora, rslora, adalora, ia3, bitfit, freeze, prompt, prefix, ptuning")
    special_tokens: bool = _key(True, "put [CLS] and [SEP] around each window")
    max_length: int = _key(256, "tokens in a window; longer sentences become several, none is cut off", ge=8)
    lora: Lora = pydantic.Field(Lora(), description="the adapter of lora, dora, rslora, adalora")
    learning_rate: float | None = _key(None, "null takes what suits the tuning (lora 1e-3, full 2e-4 or 2e-5)", gt=0)
    head_factor: float | None = _key(
        None, "how many times faster the new head learns; null takes what suits (lora, full 10)", gt=0
    )
    epochs: int = _key(4, "passes over train", ge=1)
    batch_size: int = _key(16, "windows in a batch", ge=1)
    accumulation: int = _key(1, "batches whose gradients make one step", ge=1)
    weight_decay: float = _key(0.01, "AdamW's, on matrices only", ge=0)
    warmup_ratio: float = _key(0.1, "share of the steps in which the learning rate rises", ge=0, le=1)
    max_grad_norm: float = _key(1.0, "gradients longer than this are shortened to it", gt=0)
    averaging: bool = _key(True, "score and save a running mean of the weights, steadier than the last ones")
    dropout: float | None = _key(0.1, "dropout of encoder and classifier; null keeps the encoder's own", ge=0, lt=1)
    decode: Literal["argmax", "viterbi"] = _key("viterbi", "viterbi allows well-formed IOB2 only; argmax allows all")
    virtual_tokens: int = _key(10, "for prompt, prefix and ptuning", ge=1)
    seed: int = _key(1, "of sampling, order, new weights and dropout", ge=0, lt=2**32)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _key("auto", "auto takes what the device does fastest")
    output: str = _key("output", "the folder of all runs", min_length=1)
    run: str | None = _key(None, "name of this run's folder; null names it by the time", max_length=80,
                           pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$")  # fmt: skip
    checkpoint_minutes: float = _key(5.0, "minutes between checkpoints; there is one after each epoch too", gt=0)
    trackers: list[str] = _key([], "accelerate's trackers, as [tensorboard] or [wandb]")


FIELDS = {}  # dotted key -> pydantic field, in the order of the file
for _name, _field in Config.model_fields.items():
    FIELDS |= {f"lora.{key}": inner for key, inner in Lora.model_fields.items()} if _name == "lora" else {_name: _field}


@dataclasses.dataclass(slots=True)
class Flags:
    """What the command line says beside the config. `resume`: the folder of the run to continue."""

    resume: str | None = None
    push_to_hub: str | None = None


def resolve_path(path: str) -> Path | None:
    """The absolute path that a file or folder named in a config has: against the working folder, then against ROOT.

    None where neither exists.
    """
    try:
        for candidate in (Path(path).expanduser(), ROOT / path):
            if candidate.exists():
                return candidate.resolve()
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, no home folder
        pass
    return None


def load(argv: list[str] | None = None) -> tuple[Config, Flags]:
    """Config and flags from the command line (sys.argv where None); a config file lies under it.

    The file is --config, else config.yaml of the run to resume, else ROOT/config.yaml; keys it does not have keep
    their defaults. --help prints all keys and exits. Raises UserError with file and line, or the option's name.
    """
    options = _options(sys.argv[1:] if argv is None else argv)
    file, flags = options.pop("config", None), Flags(options.pop("resume", None), options.pop("push_to_hub", None))
    wants_help = options.pop("help", None)
    if wants_help and not file:
        flags.resume = None
    default = ROOT / "config.yaml"
    if flags.resume:
        flags.resume = str(_run_to_resume(flags.resume, options, default))
        default = Path(flags.resume) / "config.yaml"
    if file and not Path(file).is_file():
        raise UserError(f"--config {file}: there is no such file")
    values, places = _read(Path(file) if file else default) if file or default.is_file() else ({}, {})
    values |= {key: _value(key, text) for key, text in options.items()}
    places |= {key: f"--{key}" for key in options}
    config = _checked(values, places)
    if wants_help:
        print(_help(config))
        sys.exit(0)
    return with_rate(config), flags


def with_rate(config: Config) -> Config:
    """The same config with numbers in learning_rate and head_factor: its own, or those that suit tuning and encoder."""
    rate, factor = config.learning_rate, config.head_factor
    if rate is None:
        base_size = config.tuning == "full" and _hidden_size(config.pretrained) >= 768
        rate = BASE_SIZE_FULL_RATE if base_size else DEFAULT_RATES[config.tuning]
    if factor is None:
        factor = HEAD_FACTORS.get(config.tuning, 1)
    return config.model_copy(update={"learning_rate": rate, "head_factor": factor})


def rate_warning(config: Config) -> str | None:
    """The reason to doubt the learning rate, where it lies in a zone that is known to fail."""
    rate, tuning = config.learning_rate, config.tuning
    if tuning in ("lora", "dora", "rslora", "adalora") and rate is not None and rate < 1e-4:
        return (
            f"learning_rate {rate:g} is too low for {tuning}: below 1e-4 the adapter hardly moves, so "
            f"the loss falls and F1 stays low, or 0 with every character tagged O; try {DEFAULT_RATES[tuning]:g}"
        )
    if tuning == "full" and rate is not None and rate >= 1e-3:
        better = with_rate(config.model_copy(update={"learning_rate": None})).learning_rate
        return (
            f"learning_rate {rate:g} is too high for full: at 1e-3 and above the encoder forgets what it was "
            f"pretrained on and F1 stays 0; try {better:g}"
        )
    return None


def dump(config: Config) -> str:
    """The config as commented YAML that `--config` reads back to an equal one."""
    rows = []
    for key, field in FIELDS.items():
        if key == "lora.r":
            rows.append(("lora:", Config.model_fields["lora"].description))
        rows.append((f"{key.replace('lora.', '  ')}: {_yaml(_get(config, key))}", field.description))
    return "".join(f"{text:<34}  # {comment}\n" for text, comment in rows)


def _options(argv: list[str]) -> dict[str, str]:
    """`--key value` and `--key=value` as {key: value}; --help as {"help": ""}."""
    options, rest = {}, list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            options["help"] = "yes"
            continue
        if not word.startswith("--"):
            raise UserError(f"{word!r}: expected --key value; --help lists the keys")
        key, equals, text = word[2:].partition("=")
        if key == "lora":
            raise UserError("--lora is a group: give its keys, as in --lora.r 8")
        if key not in FIELDS and key not in ("config", "resume", "push_to_hub"):
            raise UserError(f"unknown option --{key}; {_closest(key, prefix='--')}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} needs a value")
            text = rest.pop(0)
        if key in options:
            raise UserError(f"--{key} is given twice")
        if not text and key not in FIELDS:
            raise UserError(f"--{key} needs a value")
        options[key] = text
    return options


def _closest(key: str, prefix: str = "") -> str:
    names = list(FIELDS) + ["lora"] + (["config", "resume", "push_to_hub"] if prefix else [])
    spelled = {name: name for name in names} | {name[5:]: name for name in FIELDS if name.startswith("lora.")}
    spelled |= {name: name for name in names} | {"lr": "learning_rate", "model": "pretrained", "encoder": "pretrained"}
    found = difflib.get_close_matches(key.lower().replace("-", "_"), spelled, 1, 0.3)
    return f"the closest is {prefix}{spelled[found[0]]}" if found else "--help lists the keys"


def _run_to_resume(resume: str, options: dict[str, str], default: Path) -> Path:
    """The run folder that --resume names; `latest` is the newest one under output that holds a checkpoint."""
    if resume == "latest":
        output = options.get("output") or (_read(default)[0].get("output") if default.is_file() else None)
        output = resolve_path(output or Config().output) or Path(output)
        runs = [path for path in output.glob("*/checkpoint") if (path.parent / "config.yaml").is_file()]
        if not runs:
            raise UserError(f"--resume latest: no run under {output} holds a checkpoint")
        return max(runs, key=lambda path: path.stat().st_mtime).parent
    run = Path(resume)
    if not (run / "config.yaml").is_file():
        raise UserError(f"--resume {resume}: expected the folder of a run, which holds a config.yaml")
    return run


def _read(file: Path) -> tuple[dict, dict[str, str]]:
    """A config file as {dotted key: value} and {dotted key: "file:line"}; nothing is validated but its shape."""
    try:
        with open(file, "rb") as handle:
            data = handle.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise UserError(f"{file}: larger than {LARGEST_FILE} bytes, which no config is")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8; save the file as UTF-8") from None
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):  # before composing, which recurses
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            where = f"{file}:{event.start_mark.line + 1}"
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{where}: *{event.anchor} is an alias; write the value out")
            if depth > DEEPEST:
                raise UserError(f"{where}: nested too deeply; only lora has keys of its own")
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "wrong syntax"
        raise UserError(f"{file}:{line}: not YAML: {' '.join(str(reason).split())}; expected `key: value`") from None
    values, places = {}, {}
    if root is not None and not (root.tag == "tag:yaml.org,2002:null" and not root.value):
        _collect(root, "", file, values, places)
    return values, places


def _collect(group: yaml.Node, prefix: str, file: Path, values: dict, places: dict) -> None:
    if not isinstance(group, yaml.MappingNode):
        name = prefix.rstrip(".") or "the file"
        raise UserError(f"{file}:{group.start_mark.line + 1}: {name} must hold lines of `key: value`")
    for key_node, node in group.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        key = prefix + key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key in values or (key == "lora" and any(name.startswith("lora.") for name in values)):
            raise UserError(f"{where}: {key} is given twice; keep one of the lines")
        if key == "lora":
            _collect(node, "lora.", file, values, places)
        elif key not in FIELDS or (key.startswith("lora.") and not prefix):
            shown = repr(key) if key is not None else "of several values"
            raise UserError(f"{where}: unknown key {shown}; {_closest(key or '')}")
        else:
            values[key], places[key] = _plain(key, node, where), where


def _plain(key: str, node: yaml.Node, where: str):
    """The value of a node without constructing anything: text, number, bool, None, or a list of texts."""
    if isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: {key} is a group of keys; expected {allowed(key)}")
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise UserError(f"{where}: {key} is a list of lists; expected {allowed(key)}")
        return [item.value for item in node.value]
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UserError(f"{where}: {key} has the tag {node.tag}; expected {allowed(key)}")
    return node.value if node.style else _value(key, node.value)  # a quoted value is text


def _value(key: str, text: str):
    """An unquoted value, from the file or the command line, as what its key wants where it can be read so.

    Numbers are Python's, since YAML 1.1 takes 2e-5 for a text; `run: 2024` is a name, not a number.
    """
    kinds = _kinds(FIELDS[key].annotation)
    if text in ("null", "Null", "NULL", "~", ""):
        return None
    if list in kinds and text not in kinds:
        return [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",") if part.strip()]
    if bool in kinds and text.lower() in ("true", "yes", "on", "false", "no", "off"):
        return text.lower() in ("true", "yes", "on")
    for number in (int, float):
        if int in kinds or float in kinds:
            try:
                return number(text)
            except ValueError:
                pass
    return text


def _kinds(annotation) -> list:
    """The types and literals that an annotation admits, flat: `int | None` is [int, NoneType], `list[str]` [list]."""
    if isinstance(annotation, type) or annotation is None:
        return [annotation] if not get_args(annotation) else [list]
    if not get_args(annotation):
        return [annotation]
    if getattr(annotation, "__origin__", None) is list:
        return [list]
    if hasattr(annotation, "__metadata__"):
        return _kinds(get_args(annotation)[0])
    return [kind for part in get_args(annotation) for kind in _kinds(part)]


def allowed(key: str) -> str:
    """What a key accepts, in words: `a whole number, at least 1, or null`."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list of names"}
    kinds = _kinds(FIELDS[key].annotation)
    texts = [words[kind] for kind in kinds if kind in words]
    literals = [kind for kind in kinds if isinstance(kind, str)]
    texts[:0] = ["one of " + ", ".join(literals)] if len(literals) > 1 else literals
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f", {sign} {getattr(item, name):g}"
        for item in FIELDS[key].metadata for name, sign in signs.items() if hasattr(item, name)
    ]  # fmt: skip
    if key == "run":
        texts = ["a folder name of at most 80 characters, without slashes or a leading dot"]
    return " or ".join(texts) + "".join(bounds) + (" or null" if type(None) in kinds else "")


def _checked(values: dict, places: dict[str, str]) -> Config:
    """The Config of dotted keys; raises UserError naming the first wrong key, its value, what is allowed and where."""
    nested = {key: value for key, value in values.items() if "." not in key}
    nested["lora"] = {key[5:]: value for key, value in values.items() if key.startswith("lora.")}
    try:
        return Config(**nested)
    except pydantic.ValidationError as error:
        place = error.errors()[0]["loc"]
        key = f"lora.{place[1]}" if place[0] == "lora" else place[0]
        value = "null" if values[key] is None else json.dumps(values[key], ensure_ascii=False)
        value = value if len(value) <= 60 else value[:60] + "…"
        raise UserError(f"{places[key]}: {key} is {value}; expected {allowed(key)}") from None


def _hidden_size(pretrained: str) -> int:
    """The encoder's width by its config.json, or 768 for one on the hub unless its name says it is small."""
    folder = resolve_path(pretrained)
    if folder is None:
        return 256 if re.search("tiny|mini|small", pretrained.lower()) else 768
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        return int(settings.get("hidden_size") or settings.get("dim") or settings.get("d_model") or 768)
    except (OSError, ValueError, TypeError, AttributeError):
        return 768  # model.py says what is wrong with the folder


def _yaml(value) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if not isinstance(value, str):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if re.fullmatch(r"[\w/][\w/.:+-]*[\w/]", value) and value.lower() not in ("null", "true", "false", "yes", "no"):
        return value
    return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**9).strip()


def _help(config: Config) -> str:
    rows = [(f"--{key}", f"{field.description} [{_yaml(_get(config, key))}]") for key, field in FIELDS.items()]
    rows += [
        ("--config FILE", "another config.yaml"),
        ("--resume RUN|latest", "continue a run that was stopped"),
        ("--push_to_hub NAME", "upload model and card when the run has ended"),
        ("--help", "this text"),
    ]
    title = "usage: python main.py [--key value]...   keys of config.yaml, [value without the option]\n\n"
    return title + "\n".join(f"  {name:<24} {text}" for name, text in rows)


def _get(config: Config, key: str):
    return getattr(config.lora, key[5:]) if key.startswith("lora.") else getattr(config, key)


if __name__ == "__main__":
    print(dump(Config()), end="")
