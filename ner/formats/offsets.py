"""JSON with a text and its entities by offsets: doccano, CLUENER, Label Studio, and what predict.py writes.

One record a line (JSON Lines), or one array of records.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ner.corpus import Corpus, Sentence
from ner.errors import UserError, first_line
from ner.formats.assembly import corpus_of_offsets, paint
from ner.formats.schemes import is_tag
from ner.formats.source import Source, quote

EXAMPLE = '{"text": "…", "label": [[0, 3, "PER"]]}'
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
WIDE = re.compile("[\U00010000-\U0010ffff]")  # two code units in UTF-16
BLANK = re.compile(r"[ \t\r\n]*")
NOTES = {
    "unlabelled": "tasks without an annotation, left out: {count:,}",
    "unnamed": "spans without a label, left out: {count:,}",
    "several": "tasks with several annotations, of which the ground truth or else the first is taken: {count:,}",
    "wide": "texts with emoji or rare characters before or in an entity that has no copy of its text: {count:,}; "
    "its offsets are taken as characters, which doccano's are not unless the project counts grapheme clusters",
    "predictions": "tasks with predictions and no annotations; the predictions are taken for the truth: {count:,}",
}


class Entity(NamedTuple):
    """An entity of a record, half-open in characters of its text."""

    start: int
    end: int
    type: str
    text: str | None = None  # the record's own copy of the entity's text


class Record(NamedTuple):
    """A text with its entities, and the keys of NOTES that apply to it."""

    text: str
    entities: list[Entity]
    notes: Sequence[str] = ()


class Unreadable(Exception):
    """What is wrong with a record; read() puts the file and the line before it."""


def fits(source: Source) -> bool:
    """Whether the file is JSON: by its name, or as its first line begins an object or an array of objects."""
    head = source.head
    if source.suffix in (".json", ".jsonl"):
        return True
    if head[0] == "{":
        return head[-1] == "}" and '"' in head
    begins_array = head == "[" or head.removeprefix("[").lstrip().startswith("{")
    return head[0] == "[" and begins_array and not is_tag(head.split()[-1])


def read(source: Source) -> Corpus:
    """Read records of a text and its entities; an empty text is no sentence. Offsets count characters."""
    sentences, skipped, notes = [], 0, Counter[str]()
    records = _array(source) if source.head[0] == "[" else _lines(source)
    for line, value in records:
        try:
            record = _record(value)
            if record is None:
                notes["unlabelled"] += 1
                continue
            entities = [_checked(record.text, entity) for entity in record.entities]
        except Unreadable as error:
            raise UserError(f"{source.path}:{line}: {error}") from None
        notes.update(record.notes)
        if wide := WIDE.search(record.text):
            notes["wide"] += any(entity.text is None and entity.end > wide.start() for entity in record.entities)
        tags, overlapping = paint(len(record.text), entities)
        skipped += overlapping
        if record.text:
            sentences.append(Sentence(list(record.text), tags, line))
    if notes["unlabelled"] and not sentences:
        raise UserError(
            f"{source.path}:1: none of its {notes['unlabelled']:,} tasks has an annotation; annotate some, then export "
            "the project again as JSON"
        )
    lines = [f"{source.path}: {NOTES[note].format(count=count)}" for note, count in notes.items() if count]
    return corpus_of_offsets(source.path, sentences, skipped, lines)


def _lines(source: Source) -> Iterator[tuple[int, Any]]:
    """The records of JSON Lines, each with its line."""
    for line_number, line in enumerate(source.lines(), 1):
        if line.strip():
            try:
                yield line_number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{source.path}:{line_number}: not a JSON object ({first_line(error)}); expected one on each line, "
                    f"such as {EXAMPLE}, or one array of them"
                ) from None


def _array(source: Source) -> Iterator[tuple[int, Any]]:
    """The records of a JSON array, each with the line it begins in."""
    text, decoder = source.text, json.JSONDecoder()
    position = text.index("[") + 1
    line, counted = 1, 0  # the line of the character at `counted`
    separator = "["
    while True:
        position = _skip_blank(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and separator != ",":
            break
        try:
            record, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise UserError(
                f"{source.path}:{where}: not JSON ({reason}); expected an array of objects such as {EXAMPLE}"
            ) from None
        yield line, record
        position = _skip_blank(text, position)
        separator = text[position : position + 1]
        if separator == ",":
            position += 1
        elif separator != "]":
            line += text.count("\n", counted, position)
            raise UserError(f"{source.path}:{line}: expected a comma or the end of the array after an object")
    rest = _skip_blank(text, position + 1)
    if rest < len(text):
        line += text.count("\n", counted, rest)
        raise UserError(f"{source.path}:{line}: {quote(text[rest : rest + 40])} after the end of the array")


def _skip_blank(text: str, position: int) -> int:
    match = BLANK.match(text, position)
    return match.end() if match else position


def _record(value: Any) -> Record | None:
    """Return the text and the entities of a record; None for a task that nobody has labelled."""
    if not isinstance(value, dict):
        raise Unreadable(f'no "text" in {_show(value)}; expected {EXAMPLE}')
    text = _text(value)
    if LONE_SURROGATE.search(text):
        raise Unreadable("half a surrogate pair in the text; write the character itself or both halves")
    if any(key in value for key in ("annotations", "completions", "predictions")):
        return _task(text, value)
    key = next((key for key in ("label", "labels", "entities") if key in value), "label")
    labels = value.get(key)
    if isinstance(labels, dict):
        return Record(text, _cluener(labels))
    if not isinstance(labels, list):
        raise Unreadable(
            'no "label" beside the text; expected a list of [start, end, type], empty where there is no entity'
        )
    return Record(text, [entity for item in labels for entity in _entities(item)])


def _text(record: dict) -> str:
    """Return "text" or "data" of a record; in a task of Label Studio, "text" of its data or the only text there."""
    text = record.get("text", record.get("data"))
    if isinstance(text, dict):
        texts = [value for value in text.values() if isinstance(value, str)]
        text = text["text"] if "text" in text else texts[0] if len(texts) == 1 else None
    if not isinstance(text, str):
        raise Unreadable(f'no "text" in {_show(record)}; expected {EXAMPLE}')
    return text


def _task(text: str, task: dict) -> Record | None:
    """Return what Label Studio exports: the result of the ground truth or else of the first annotation.

    Predictions count only where a task has no annotations at all, as predict.py writes it: an export names both, with
    an empty list of annotations where nobody has labelled the task.
    """
    key = next(key for key in ("annotations", "completions", "predictions") if key in task)
    if not isinstance(task[key], list) or not all(isinstance(item, dict) for item in task[key]):
        raise Unreadable(f'{_show(task[key])} is no list of {key}; expected [{{"result": […]}}]')
    choices = [annotation for annotation in task[key] if not annotation.get("was_cancelled")]
    if not choices:
        return None
    chosen = next((annotation for annotation in choices if annotation.get("ground_truth")), choices[0])
    result = chosen.get("result")
    if not isinstance(result, list):
        raise Unreadable(f'no "result" in {_show(chosen)}; expected a list of labelled spans')
    notes = ["predictions"] if key == "predictions" else ["several"] if len(choices) > 1 else []
    entities = []
    for item in result:
        value = item.get("value") if isinstance(item, dict) else None
        if not isinstance(value, dict):  # a relation
            continue
        if any(value.get(name, []) != [] for name in ("labels", "hypertextlabels")):
            entities += _entities(value)
        elif "start" in value:  # no choice for the whole text, but a span
            notes.append("unnamed")
    return Record(text, _in_characters(text, entities), notes)


def _entities(item: Any) -> list[Entity]:
    """Return the entities of one item of a list: [start, end, type], or an object as doccano or Label Studio has it."""
    if isinstance(item, list) and len(item) > 2:
        return [_entity(item, *item[:3])]
    if not isinstance(item, dict):
        raise _no_entity(item)
    offsets = item.get("globalOffsets", item)  # of HTML, whose start and end are paths
    if not isinstance(offsets, dict):
        raise _no_entity(item)
    start = offsets.get("start", offsets.get("start_offset"))
    end = offsets.get("end", offsets.get("end_offset"))
    types = next((item[key] for key in ("type", "label", "labels", "hypertextlabels") if key in item), None)
    if isinstance(types, list) and not types:
        raise _no_entity(item)
    text = item.get("text") if isinstance(item.get("text"), str) else None
    return [_entity(item, start, end, type_, text) for type_ in (types if isinstance(types, list) else [types])]


def _entity(item: Any, start: Any, end: Any, type_: Any, text: str | None = None) -> Entity:
    is_offset = type(start) is int and type(end) is int  # not bool, which is an int too
    if not is_offset or not isinstance(type_, str) or not type_.strip():
        raise _no_entity(item)
    return Entity(start, end, type_, text)


def _no_entity(item: Any) -> Unreadable:
    return Unreadable(f"{_show(item)} is no entity; expected [start, end, type]")


def _cluener(labels: dict) -> list[Entity]:
    """Return the entities of {type: {text: [[start, end]]}}, whose ends are inclusive."""
    try:
        spans = [
            (start, end, type_, name)
            for type_, names in labels.items()
            for name, places in names.items()
            for start, end in places
        ]
        return [_entity([start, end, type_], start, end + 1, type_, name) for start, end, type_, name in spans]
    except (AttributeError, TypeError, ValueError):
        raise Unreadable(f"{_show(labels)} is not CLUENER's {{type: {{entity: [[start, end]]}}}}") from None


def _in_characters(text: str, entities: list[Entity]) -> list[Entity]:
    """Return the entities of a task with offsets in characters.

    Label Studio counts them so since its pull request 1559; before, it counted UTF-16 code units, as browsers do. They
    are taken as these only where that fits all entities of the task, and characters do not.
    """
    if text.isascii() or all(_fits(text, entity) for entity in entities):
        return entities
    character_at = [index for index, char in enumerate(text) for _ in range(1 + (char > "\uffff"))] + [len(text)]
    last = len(character_at) - 1
    converted = [
        entity._replace(start=character_at[min(entity.start, last)], end=character_at[min(entity.end, last)])
        for entity in entities
        if entity.start >= 0
    ]
    return converted if len(converted) == len(entities) and all(_fits(text, e) for e in converted) else entities


def _fits(text: str, entity: Entity) -> bool:
    """Whether an entity lies in the text, and agrees with the record's own copy of it."""
    inside = 0 <= entity.start < entity.end <= len(text)
    return inside and (entity.text is None or _agrees(text[entity.start : entity.end], entity.text))


def _agrees(text: str, copy: str) -> bool:
    """Whether a record's own copy of an entity is its text; tools trim white space and rewrite line ends."""
    return _without_white_space(text) == _without_white_space(copy)


def _without_white_space(text: str) -> str:
    return "".join(text.replace("\\n", "").split())


def _checked(text: str, entity: Entity) -> tuple[int, int, str]:
    """Return (start, end, type) of an entity that lies in its text; white space of the type becomes _."""
    start, end, type_, copy = entity
    if not 0 <= start < end <= len(text):
        raise Unreadable(f"{_show([start, end, type_])} is empty or outside its text of {len(text)} characters")
    if not _fits(text, entity):
        raise Unreadable(
            f"the text from {start} to {end} is {quote(text[start:end])}, not {quote(str(copy))}; offsets count "
            "characters from 0, the end is not part of the entity (in CLUENER it is)"
        )
    if LONE_SURROGATE.search(type_):
        raise Unreadable(f"half a surrogate pair in the type {_show(type_)}; write another type")
    return start, end, "_".join(type_.split())  # a tag holds no white space


def _show(value: Any) -> str:
    return quote(json.dumps(value, ensure_ascii=LONE_SURROGATE.search(str(value)) is not None))
