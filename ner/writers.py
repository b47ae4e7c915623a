"""Tagged texts → the output formats of predict.py. A new format is a function and a line in writer()."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from ner.markup import hues, language, segments, templates, visible
from ner.predictor import LONE_SURROGATE, Result
from ner.windows import text_units

FORMATS = ("text", "jsonl", "bio", "html", "labelstudio", "doccano")
COLOURS = (117, 216, 120, 183, 222, 211, 123, 153, 187, 225)  # of 256; all light, so that black text is read on them


@dataclass(frozen=True)
class Writer:
    """`record` turns a result into text; head, separator and tail stand before, between and after all of them."""

    record: Callable[[Result], str]
    head: str = ""
    separator: str = ""
    tail: str = ""


def writer(name: str, types: list[str], unit: str, model: str, colour: bool = False, several: bool = True) -> Writer:
    """Return the writer of one of FORMATS.

    types: those of the model. unit: its unit, for bio. model: its name, for labelstudio. colour, several: for a
    terminal that shows colours, and where there is more than one text.
    """
    if name == "html":
        page, colours = templates(), hues(types)
        head = str(page.head("Entities")).lstrip() + str(page.legend(colours))
        return Writer(lambda result: html(result, colours), head, "", str(page.tail()).lstrip())
    if name == "labelstudio":  # one list of tasks
        return Writer(lambda result: labelstudio(result, model), "[\n", ",\n", "\n]\n")
    return {
        "text": Writer(lambda result: plain(result, types, colour, several)),
        "jsonl": Writer(jsonl),
        "bio": Writer(lambda result: bio(result, unit)),
        "doccano": Writer(doccano),
    }[name]


def jsonl(result: Result) -> str:
    """Return {"text", "entities": [{"text", "type", "start", "end", "score"}]} on one line."""
    return as_json(record(result), result.text) + "\n"


def record(result: Result) -> dict:
    """Return {"text", "entities": [{"text", "type", "start", "end", "score"}]}."""
    entities = [
        {"text": e.text, "type": e.type, "start": e.start, "end": e.end, "score": round(e.score, 6)}
        for e in result.entities
    ]
    return {"text": result.text, "entities": entities}


def doccano(result: Result) -> str:
    """Return {"text", "label": [[start, end, type]]} on one line, which doccano imports for sequence labelling."""
    labelled = {"text": result.text, "label": [[e.start, e.end, e.type] for e in result.entities]}
    return as_json(labelled, result.text) + "\n"


def labelstudio(result: Result, model: str) -> str:
    """Return a task with a prediction, which Label Studio imports for a Labels tag `label` over a Text tag `text`.

    The prediction's score is the result's margin, so that sorting tasks by it shows the least certain ones first.
    """
    regions = [
        {
            "id": str(number),
            "from_name": "label",
            "to_name": "text",
            "type": "labels",
            "value": {"start": e.start, "end": e.end, "text": e.text, "labels": [e.type]},
            "score": round(e.score, 6),
        }
        for number, e in enumerate(result.entities)
    ]
    prediction = {"model_version": model, "score": round(result.margin, 6), "result": regions}
    return as_json({"data": {"text": result.text}, "predictions": [prediction]}, result.text)


def bio(result: Result, unit: str = "character") -> str:
    """Return `character tag` lines and a blank one, as loader.py reads them (`word tag` for a model of words).

    White space and the byte-order mark are no tokens of that format: they are left out.
    """
    lines = []
    rest = iter(result.entities)
    entity, inside = next(rest, None), False
    for token, start, _ in text_units(LONE_SURROGATE.sub("\ufffd", result.text), unit):
        if entity and start >= entity.end:
            entity, inside = next(rest, None), False
        token = "".join(token.split()).replace("\ufeff", "")
        if not token:
            continue
        if entity and entity.start <= start:
            lines.append(f"{token} {'I' if inside else 'B'}-{entity.type}\n")
            inside = True
        else:
            lines.append(f"{token} O\n")
    return "".join(lines) + "\n" if lines else ""


def html(result: Result, colours: dict[str, int]) -> str:
    """Return the text as a paragraph with its entities marked; everything escaped."""
    marked = [(e.type, e.start, e.end, None) for e in result.entities]
    parts = segments(result.text, marked, whole=True)
    return str(templates().sentence(parts, colours, language(result.text))).strip() + "\n"


def plain(result: Result, types: list[str], colour: bool = False, title: bool = True) -> str:
    """Return for a person: the text (with `colour`: its entities on coloured ground), then an entity a line.

    Control characters become pictures, so that no text can command the terminal. title: whether the text is shown
    without colours too, and a blank line ends it.
    """
    lines = []
    if colour:
        lines.append(_coloured(result, types))
    elif title:
        lines.append(visible(result.text))
    lines += [f"{visible(e.text)}\t{visible(e.type)}\t{e.start}\t{e.end}\t{e.score:.4f}" for e in result.entities]
    return "".join(f"{line}\n" for line in lines) + ("\n" if title else "")


def _coloured(result: Result, types: list[str]) -> str:
    """Return the text with each entity on the ground of its type, the type in faint letters after it."""
    parts, position = [], 0
    for e in result.entities:
        ground = COLOURS[types.index(e.type) % len(COLOURS)]
        parts.append(visible(result.text[position : e.start]))
        parts.append(f"\x1b[38;5;16;48;5;{ground}m{visible(e.text)}\x1b[0m\x1b[2m{visible(e.type)}\x1b[0m")
        position = e.end
    return "".join(parts) + visible(result.text[position:])


def as_json(value: dict, text: str) -> str:
    """Return a value as JSON on one line. Where the text holds a lone surrogate, which UTF-8 cannot, it is escaped."""
    return json.dumps(value, ensure_ascii=bool(LONE_SURROGATE.search(text)))
