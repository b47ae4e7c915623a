"""Texts with entities as safe HTML and safe terminal text: what the report and predict.py's pages have in common."""

import functools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LONGEST_GAP = 160  # characters of text without an entity, past which the middle of the stretch is left out
MOST_ENTITIES = 80  # shown in one sentence
HUES = (212, 28, 140, 285, 50, 335, 178, 0, 95, 250)  # degrees; neighbours in the list are far apart on the wheel

# Control characters have a picture in Unicode; lone surrogates cannot be encoded at all.
PICTURES = {code: 0x2400 + code for code in range(32)} | {0x7F: 0x2421}
PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


def visible(text: str) -> str:
    """Return the text with control characters and lone surrogates made harmless, as many characters as before."""
    return text.translate(PICTURES)


def language(text: str) -> str:
    """Return the lang attribute that picks the shapes of Chinese characters, "" where there is no need."""
    return "zh-CN" if re.search("[\u4e00-\u9fff]", text) and not re.search("[\u3040-\u30ff]", text) else ""


def hues(types: Iterable[str]) -> dict[str, int]:
    """Return a hue in degrees for each type, the same for the same set of types."""
    return {name: HUES[i] if i < len(HUES) else int(i * 137.5) % 360 for i, name in enumerate(sorted(set(types)))}


def segments(
    units: Sequence[str], entities: list[tuple], separator: str = "", whole: bool = False
) -> list[tuple[str, str | None, str | None]]:
    """Cut a sentence into (text, type or None, kind or None), which the template marks.

    entities: (type, start, end, kind), sorted, not overlapping, in units. separator: what stands between two units (""
    or " "). Unless `whole`, long stretches without entities lose their middle, a sentence with very many entities its
    end.
    """
    parts: list[tuple[str, str | None, str | None]] = []
    shown = entities if whole else entities[:MOST_ENTITIES]
    position = 0
    rest = (None, len(units), len(units), None)  # an entity of no type, for the text after the last one
    for name, start, end, kind in [*shown, rest]:
        between = separator.join(units[position:start])
        if len(between) > LONGEST_GAP and not whole:
            between = f"{between[: LONGEST_GAP // 2]} … {between[-(LONGEST_GAP // 2) :]}"
        if between:
            before, after = separator if position else "", separator if name is not None else ""
            parts.append((visible(before + between + after), None, None))
        if name is not None:
            parts.append((visible(separator.join(units[start:end])), name, kind))
        position = end
    if len(entities) > len(shown):
        parts.append((f" … and {len(entities) - len(shown)} more entities", None, None))
    return parts


@functools.cache
def templates(name: str = "report.html.j2") -> Any:
    """Return the macros of a template, with autoescape; report.html.j2 has head, sentence, tail and report."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name).module
