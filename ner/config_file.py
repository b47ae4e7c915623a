"""config.yaml → keys and values, each with the line where it stands. Whatever the file holds, nothing is constructed.

yaml.safe_load would give no lines, take 2e-5 for a text and the later of two equal keys, so the nodes are read here.
"""

from pathlib import Path
from typing import Any

import yaml

from ner.config_schema import FIELDS, allowed, json_types, literals
from ner.errors import UserError

LARGEST_FILE = 100_000  # bytes; a config.yaml is four thousand
DEEPEST = 3  # levels: the file, lora, lora.target_modules
NULL = ("null", "Null", "NULL", "~", "")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


def read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return {dotted key: value} and {dotted key: "file:line"} of a config file; the values are not validated.

    Raises UserError with file and line for what is no config: other text, unknown or repeated keys, YAML's aliases.
    """
    text = _text(file)
    try:
        _check_events(text, file)
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(_syntax_error(error, text, file)) from None
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    if root is not None and (root.tag != "tag:yaml.org,2002:null" or root.value):  # else the file holds no key
        _collect(root, "", file, values, places)
    return values, places


def parse_value(key: str, text: str) -> Any:
    """Return an unquoted value, of the file or the command line, as what its key accepts where it can be read so.

    Numbers are Python's, since YAML 1.1 takes 2e-5 for a text; `run: 2024` is a name, not a number.
    """
    types = json_types(key)
    if text in NULL:
        return None
    if "array" in types and text not in literals(key):
        return [name.strip() for name in text.strip().removeprefix("[").removesuffix("]").split(",") if name.strip()]
    if "boolean" in types and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    if types & {"integer", "number"}:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    return text


def _text(file: Path) -> str:
    try:
        with open(file, "rb") as handle:
            data = handle.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > LARGEST_FILE:
        raise UserError(f"{file}: larger than {LARGEST_FILE} bytes, which no config is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8; save the file as UTF-8") from None


def _check_events(text: str, file: Path) -> None:
    """Refuse aliases and deep nesting before the nodes are composed, which recurses."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        where = f"{file}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{where}: *{event.anchor} is an alias; write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise UserError(f"{where}: nested too deeply; only lora has keys of its own")


def _syntax_error(error: yaml.YAMLError, text: str, file: Path) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "wrong syntax"
    return f"{file}:{line}: not YAML: {' '.join(str(reason).split())}; expected `key: value`"


def _collect(group: yaml.Node, prefix: str, file: Path, values: dict[str, Any], places: dict[str, str]) -> None:
    """Add the keys of a mapping to `values` and `places`. prefix: "" for the file, "lora." for the group."""
    if not isinstance(group, yaml.MappingNode):
        where = f"{file}:{group.start_mark.line + 1}"
        if prefix:
            raise UserError(f"{where}: lora is a group; write its keys beneath it, as in `lora: {{r: 8}}`")
        raise UserError(f"{where}: the file must hold lines of `key: value`")
    for key_node, node in group.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}: unknown key of several values; expected a name, such as epochs")
        key = prefix + key_node.value
        if key in values or (key == "lora" and any(name.startswith("lora.") for name in values)):
            raise UserError(f"{where}: {key} is given twice; keep one of the lines")
        if key == "lora":
            _collect(node, "lora.", file, values, places)
        elif key in FIELDS and "." in key and not prefix:
            name = key.removeprefix("lora.")
            value = node.value if isinstance(node, yaml.ScalarNode) else "…"
            raise UserError(f"{where}: {key} is a key of the group lora; write `lora: {{{name}: {value}}}`")
        elif key not in FIELDS:
            raise UserError(f"{where}: unknown key {key!r}; {closest(key)}")
        else:
            values[key], places[key] = _plain(key, node, where), where


def _plain(key: str, node: yaml.Node, where: str) -> Any:
    """The value of a node without constructing anything: text, number, bool, None, or a list of texts."""
    if isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: {key} is a group of keys; expected {allowed(key)}")
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise UserError(f"{where}: {key} is a list of lists; expected {allowed(key)}")
        return [item.value for item in node.value]
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise UserError(f"{where}: {key} has the tag {node.tag}; expected {allowed(key)}")
    is_quoted = isinstance(node, yaml.ScalarNode) and bool(node.style)
    return node.value if is_quoted else parse_value(key, node.value)


def closest(key: str, options: tuple[str, ...] = (), prefix: str = "") -> str:
    """Return a hint at the key that was probably meant. options: what the command line takes beside the keys."""
    import difflib

    meant = {key: key for key in [*FIELDS, "lora", *options]}
    meant = {"lr": "learning_rate", "model": "pretrained", "encoder": "pretrained"} | meant
    for name in FIELDS:
        meant.setdefault(name.removeprefix("lora."), name)
    matches = difflib.get_close_matches(key.lower().replace("-", "_"), meant, 1, 0.3)
    return f"the closest is {prefix}{meant[matches[0]]}" if matches else "--help lists the keys"
