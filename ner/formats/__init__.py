"""Files and hub data sets → sentences with IOB2 tags.

The format is recognised from the file, never declared. A file is read whole: its lines repeat so much (`的 O`) that
each distinct line is parsed once and then looked up, which reads two million characters in about a second.
A new format is one function that yields (characters, tags, line) and one line in FORMATS.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from ner.corpus import Corpus, Sentence
from ner.errors import UserError

SCHEMES = {"BIO": "BI", "BIOES": "BIES", "BMES": "BMES", "BILOU": "BILU"}  # the prefixes beside O; all become IOB2
STARTS, CLOSES = "BSU", "SUEL"  # prefixes that always start an entity; prefixes after which none is open
FORM = "expected a character and its tag on each line, such as '北 B-LOC' (see data/README.md)"
Raw = Iterator[tuple[list[str], list[str], int]]  # characters, tags as they are in the file, first line (from 1)


def read(path: str, split: str = "train") -> Corpus:
    """Reads a corpus of any known format from a file, or `hub:NAME[:CONFIG][@SPLIT]` through the datasets library.

    `split` (train, dev or test) picks the part of a hub data set whose name gives none; a file has no parts.
    Raises UserError with file and line where the content cannot be used.
    """
    path = str(path)
    if path.startswith("hub:"):
        return _hub(path, split)
    text = decode(path)
    head = next((line for line in io.StringIO(text, newline="\n") if line.strip()), None)
    if head is None:
        raise UserError(f"{path}:1: the file is empty; {FORM}")
    return next(reader for fits, reader in FORMATS if fits(head.strip(), Path(path).suffix.lower()))(path, text)


def decode(path: str) -> str:
    """The text of a file in UTF-8 (with or without BOM), GB18030, or UTF-16 with BOM. Raises UserError otherwise."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a tagged file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            lossy = data.decode("utf-8", "replace")
            bad = lossy.count("\ufffd")
            if wide or bad * 2 < sum(not char.isascii() for char in lossy):
                raise error  # damaged UTF-8, which GB18030 might take and turn into nonsense
            text = data.decode("gb18030")
        except UnicodeDecodeError as last:
            worst = max(error, last, key=lambda e: e.start)
            line = data.count(b"\n", 0, worst.start) + 1
            raise UserError(f"{path}:{line}: byte 0x{data[worst.start]:02x} fits neither UTF-8 nor GB18030; "
                            "save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: a NUL character: this is not a text file; save it as UTF-8 text")
    return text if "\n" in text else text.replace("\r", "\n")


def _fields(line: str) -> list[str]:
    """The columns of a line. Only space and tab part them; a line such as '  O' holds a space character."""
    parts = [part for part in line.rstrip("\r\n").replace("\t", " ").split(" ") if part]
    if len(parts) == 1 and line[0] in " \t" and line[1] in " \t":
        return [line[0], parts[0]]
    return parts


def _columns(path: str, text: str) -> Raw:
    """`character tag` lines, and CoNLL lines of more columns, of which the first and the last count."""
    counts = Counter()
    for line in io.StringIO(text, newline="\n"):
        if line.strip():
            counts[len(_fields(line))] += 1
            if counts.total() == 1000:
                break
    columns = max(counts, key=lambda n: (counts[n], n == 2))
    if columns == 1 or counts[columns] * 2 <= counts.total():  # no table at all: measured as the plainest one
        columns = 2

    known: dict[str, tuple[str, str] | None] = {}  # line → token and tag; None where it ends a block
    chars, tags, start = [], [], 0
    for number, line in enumerate(chain(io.StringIO(text, newline="\n"), [""]), 1):
        try:
            pair = known[line]
        except KeyError:
            pair = known[line] = _parse(path, number, line, columns)
        if pair:
            if not chars:
                start = number
            chars.append(pair[0])
            tags.append(pair[1])
        elif chars:
            yield chars, tags, start
            chars, tags = [], []


def _parse(path: str, number: int, line: str, columns: int) -> tuple[str, str] | None:
    fields = _fields(line)
    if not line.strip() or fields[0] == "-DOCSTART-" or columns > 2 and fields[0] == "#" and not _is_tag(fields[-1]):
        return None  # CoNLL's document mark, and a comment
    if len(fields) != columns:
        raise UserError(f"{path}:{number}: {len(fields)} field{'s' * (len(fields) > 1)} where the file has {columns}: "
                        f"{_quote(line)}; {FORM}")
    if not _is_tag(fields[-1]):
        raise _no_tag(f"{path}:{number}", fields[-1])
    return fields[0], fields[-1]


def _is_tag(tag: str) -> bool:
    return tag == "O" or len(tag) > 2 and tag[0] in "BIESMLU" and tag[1] == "-"


def _no_tag(where: str, tag: str) -> UserError:
    hint = "did you mean the letter O? " if tag in ("0", "o") else ""
    return UserError(f"{where}: {_quote(tag)} is no tag; {hint}expected O, or a prefix of BIO, BIOES, BMES or BILOU, "
                     "a hyphen and a type, such as B-PER")


def _quote(text: str) -> str:
    text = text.rstrip("\r\n")
    return repr(text if len(text) <= 40 else text[:40] + "…")


def _finish(path: str, sentences: Raw, line_a_char: bool = True) -> Corpus:
    """Recognises the scheme, turns every tag into IOB2, and counts what had to be repaired."""
    steps = _Steps()
    corpus = Corpus(path, [], "BIO", line_a_char=line_a_char)
    raw, loose, words = list(sentences), 0, 0
    for chars, tags, line in raw:
        if tags.count("O") < len(tags):
            open_type, converted = None, []
            for index, tag in enumerate(tags):
                tag, open_type, orphan, free = steps[open_type, tag]
                converted.append(tag)
                if orphan or free:
                    corpus.repairs += orphan
                    loose += free
                    if orphan and not corpus.repair_line:
                        corpus.repair_line = line + index * line_a_char
        else:
            converted = tags
        words += sum(map(len, chars)) > len(chars) and sum(len(char) > 1 for char in chars)
        corpus.sentences.append(Sentence(chars, converted, line))
    if not raw:
        raise UserError(f"{path}:1: no sentence in it; {FORM}")
    seen = {tag[0] for _, tag in steps} - {"O"}
    fitting = [scheme for scheme, prefixes in SCHEMES.items() if seen <= set(prefixes)]
    if not fitting:
        raise UserError(_mixture(path, raw, line_a_char))
    corpus.scheme = fitting[0]
    # In IOB1 an entity starts with I; B only parts it from a neighbour of its type, so hardly any B stands by itself.
    if corpus.scheme == "BIO" and corpus.repairs > 20 * loose:
        corpus.scheme, corpus.repairs, corpus.repair_line = "IOB1", 0, 0
    corpus.unit = "word" if words > 0.2 * corpus.characters else "character"
    return corpus


class _Steps(dict):
    """(type of the open entity or None, tag) → (IOB2 tag, open type after it, is it an orphan, is it a free B)."""

    def __missing__(self, key):
        open_type, tag = key
        if tag == "O":
            step = "O", None, False, False
        else:
            prefix, kind = tag[0], tag[2:]
            fresh = prefix in STARTS or kind != open_type
            step = (("B-" if fresh else "I-") + kind, None if prefix in CLOSES else kind,
                    fresh and prefix not in STARTS, prefix == "B" and kind != open_type)
        self[key] = step
        return step


def _mixture(path: str, raw: list, line_a_char: bool) -> str:
    """Names the first tag outside the scheme that most of the file follows."""
    counts = Counter(tag[0] for _, tags, _ in raw for tag in tags)
    scheme = max(SCHEMES, key=lambda scheme: sum(counts[prefix] for prefix in SCHEMES[scheme]))
    line, tag = next((line + index * line_a_char, tag) for _, tags, line in raw
                     for index, tag in enumerate(tags) if tag[0] not in SCHEMES[scheme] + "O")
    return (f"{path}:{line}: {_quote(tag)} does not belong in {scheme}, the scheme of most tags here; expected the "
            "tags of one scheme: BIO, BIOES, BMES or BILOU")


def _json_lines(path: str, text: str) -> Corpus:
    """A JSON object a line with a text and its entities: CLUENER, doccano, Label Studio, or what predict.py writes."""
    sentences, skipped = [], 0
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object ({_short(error)}); expected one on each line, such as "
                            '{"text": "…", "label": [[0, 3, "PER"]]}') from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise UserError(f'{where}: no "text" in {_quote(line)}; expected {{"text": "…", "label": …}}')
        chars = list(record["text"])
        if any("\ud800" <= char <= "\udfff" for char in chars):
            raise UserError(f"{where}: half a surrogate pair in the text; write the character itself or both halves")
        tags, dropped = _paint(chars, _entities(where, record))
        skipped += dropped
        if chars:
            sentences.append((chars, tags, number))
    found = _finish(path, sentences, line_a_char=False)
    return replace(found, scheme="offsets", unit="character", skipped=skipped)


def _entities(where: str, record: dict) -> Iterator[tuple[int, int, str]]:
    """The (start, end, type) of one JSON line, half-open, checked against its text."""
    text, listed = record["text"], next((record[key] for key in ("label", "labels", "entities") if key in record), None)
    if isinstance(listed, dict):  # CLUENER: {type: {entity: [[start, end]]}}, ends inclusive
        try:
            listed = [(start, end + 1, kind, name) for kind, names in listed.items()
                      for name, places in names.items() for start, end in places]
        except (AttributeError, TypeError, ValueError):
            raise UserError(f'{where}: {_quote(json.dumps(listed, ensure_ascii=False))} is not CLUENER\'s '
                            '{type: {entity: [[start, end]]}}') from None
    elif not isinstance(listed, list):
        raise UserError(f'{where}: no "label" beside the text; expected a list of [start, end, type], empty where '
                        "there is no entity")
    for entity in listed:
        if isinstance(entity, dict):
            start, end, kind = (next((entity[key] for key in keys if key in entity), None) for keys in (
                ("start", "start_offset"), ("end", "end_offset"), ("type", "label", "labels")))
            entity = start, end, kind[0] if isinstance(kind, list) and kind else kind
        start, end, kind, *name = entity if isinstance(entity, (list, tuple)) and len(entity) > 2 else (None,) * 3
        if type(start) is not int or type(end) is not int or not isinstance(kind, str) or not kind.strip():
            raise UserError(f"{where}: {_quote(str(entity))} is no entity; expected [start, end, type]")
        if not 0 <= start < end <= len(text):
            raise UserError(f"{where}: {_quote(str(entity))} is empty or outside its text of {len(text)} characters")
        if name and text[start:end] != name[0]:
            raise UserError(f"{where}: the text at {start} to {end - 1} is {_quote(text[start:end])}, not "
                            f"{_quote(str(name[0]))}; CLUENER's ends are inclusive")
        yield start, end, "_".join(kind.split())  # a tag holds no white space


def _paint(chars: list[str], entities: Iterator[tuple[int, int, str]]) -> tuple[list[str], int]:
    """IOB2 tags for the entities, longest first, and the number of those left out because they overlap one."""
    tags, taken, dropped = ["O"] * len(chars), bytearray(len(chars)), 0
    for start, end, kind in sorted(entities, key=lambda entity: (entity[0] - entity[1], entity[0])):
        if taken.find(1, start, end) >= 0:
            dropped += 1
            continue
        taken[start:end] = b"\1" * (end - start)
        tags[start:end] = ["B-" + kind] + ["I-" + kind] * (end - start - 1)
    return tags, dropped


def _hub(path: str, split: str) -> Corpus:
    """A data set of the hub, or one saved in a local folder: tokens beside tags, as names or as numbers with names."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: hub data sets need the datasets library: pip install datasets") from None
    name, _, part = path.removeprefix("hub:").partition("@")
    name, _, subset = name.partition(":")
    try:
        if os.path.exists(f"{name}/dataset_dict.json"):
            found = datasets.load_from_disk(name)
        else:
            found = _from_hub(datasets.load_dataset, name, subset or None)
    except Exception as error:  # the library raises whatever lies below it: network, parser, disk
        raise UserError(f"{path}: the datasets library cannot load {name!r} ({_short(error)}); check the name, set "
                        "HF_ENDPOINT to a mirror, or give a local folder after hub:") from None
    wanted = [part] if part else {"dev": ["validation", "dev", "valid"]}.get(split, [split])
    part = next((choice for choice in wanted if choice in found), None)
    if part is None:
        raise UserError(f"{path}: has no split {' or '.join(wanted)}, but {', '.join(found)}; name one after @")
    rows = found[part]
    tokens, column = (next((name for name in names if name in rows.column_names), None)
                      for names in (("tokens", "words"), ("ner_tags", "tags", "labels")))
    if not tokens or not column:
        raise UserError(f"{path}: has the columns {', '.join(rows.column_names)}; expected tokens and ner_tags or tags")
    feature = getattr(rows.features[column], "feature", None)
    names = {} if getattr(feature, "dtype", "") == "string" else _tag_names(name, feature)
    return _finish(path, _hub_rows(path, zip(rows[tokens], rows[column]), names), line_a_char=False)


def _from_hub(load, name: str, subset: str | None):
    try:
        return load(name, subset)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
    return load(name, subset, revision="refs/convert/parquet")  # no program is run; the hub keeps a converted copy


def _hub_rows(path: str, rows, names: dict[int, str]) -> Raw:
    for number, (chars, tags) in enumerate(rows, 1):
        where, chars, tags = f"{path}:{number}", chars or [], [names.get(tag, str(tag)) for tag in tags or []]
        if len(chars) != len(tags) or not all(isinstance(char, str) for char in chars):
            raise UserError(f"{where}: {len(chars)} tokens and {len(tags)} tags; expected a tag for each token, a text")
        if bad := next((tag for tag in tags if not _is_tag(tag)), ""):
            raise _no_tag(where, bad)
        if chars:
            yield chars, tags, number


def _tag_names(name: str, feature) -> dict[int, str]:
    """The names of numbered tags: from the column itself, or from the label.json that some data sets keep beside."""
    if getattr(feature, "names", None):
        return dict(enumerate(feature.names))
    for place in (f"{name}/label.json", f"{name}/dataset/label.json"):
        try:
            if not os.path.isdir(name):
                from huggingface_hub import hf_hub_download
                place = hf_hub_download(name, place.removeprefix(f"{name}/"), repo_type="dataset")
            with open(place, encoding="utf-8") as file:
                return {number: str(tag) for tag, number in json.load(file).items()}
        except Exception:  # not there, or not that: the next place
            continue
    raise UserError(f"hub:{name}: its tags are numbers without names; expected a ClassLabel column or a label.json "
                    "beside the data")


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


# recognises(first line that is not blank, suffix of the file) → the function that reads it; the last takes the rest
FORMATS = [
    (lambda head, suffix: suffix in (".json", ".jsonl") or head[0] == "{" and head[-1] == "}" and '"' in head,
     _json_lines),
    (lambda head, suffix: True, lambda path, text: _finish(path, _columns(path, text))),
]
