"""Look before you train: what a corpus holds, and what two of them have in common that they should not.

`python loader.py FILE...` prints it; main.py logs the warnings of `compare`.
"""

from collections import Counter, defaultdict

from ner.decoding import spans
from ner.corpus import Corpus

RARE = 10  # a type with fewer entities is neither learned nor measured well


def compare(train: Corpus, other: Corpus) -> list[str]:
    """Warnings, a line each, about `other` (dev or test) beside `train`; or about `train` alone if it is given twice.

    Sentences that both hold, the same text with different tags, types that `train` lacks, types with few entities.
    """
    found, alone = [], train is other
    texts = {_text(sentence): sentence for sentence in reversed(train.sentences)}
    shared = [] if alone else [s for s in other.sentences if _text(s) in texts]
    if shared:
        places = ", ".join(f"line {s.line} = line {texts[_text(s)].line} ({_clip(s.chars)})" for s in shared[:3])
        found.append(f"{len(shared):,} of {len(other.sentences):,} sentences of {other.path} are in {train.path} too: "
                     f"{places}{', …' * (len(shared) > 3)}; scores on them are too good")

    tags_of = defaultdict(dict)
    for corpus in [train] if alone else [train, other]:
        for sentence in corpus.sentences:
            tags_of[_text(sentence)].setdefault(tuple(sentence.tags), f"{corpus.path}:{sentence.line}")
    torn = [list(places.values()) for places in tags_of.values() if len(places) > 1]
    if torn:
        places = ", ".join(" and ".join(places[:2]) for places in torn[:3])
        found.append(f"{len(torn):,} texts stand there with different tags: {places}{', …' * (len(torn) > 3)}")

    known, asked = train.entities(), other.entities()
    for kind in sorted(asked.keys() - known.keys()):
        line = next(s.line + s.tags.index("B-" + kind) * other.line_a_char
                    for s in other.sentences if "B-" + kind in s.tags)
        found.append(f"{other.path}:{line}: type {kind} is not in {train.path}; its {asked[kind]:,} entities cannot be "
                     "found")
    for corpus, counts in [(train, known)] if alone else [(train, known), (other, asked)]:
        few = [f"{kind} {count}" for kind, count in sorted(counts.items()) if count < RARE]
        if few:
            found.append(f"{corpus.path}: fewer than {RARE} entities of {', '.join(few)}; do not trust their scores")
    return found


def survey(corpora: list[Corpus], units=None, max_length: int = 256) -> dict:
    """All that `python loader.py` tells, as one dict for JSON. `units` is a windows.Windower where there is a tokenizer."""
    forms = defaultdict(Counter)
    files = [_file(corpus, forms, units, max_length) for corpus in corpora]
    torn = [(form, types) for form, types in forms.items() if len(types) > 1]
    torn.sort(key=lambda item: -(item[1].total() - max(item[1].values())))
    pairs = [warning for index, other in enumerate(corpora) for train in corpora[:index]
             for warning in compare(train, other)]
    return {"files": files, "several_types": {form: dict(types.most_common()) for form, types in torn[:20]},
            "several_types_count": len(torn), "warnings": list(dict.fromkeys(pairs))}


def _file(corpus: Corpus, forms: dict, units, max_length: int) -> dict:
    types = defaultdict(Counter)
    for sentence in corpus.sentences:
        for kind, start, end in spans(sentence.tags):
            form = (" " if corpus.unit == "word" else "").join(sentence.chars[start:end])
            types[kind][form] += 1
            forms[form][kind] += 1
    if units:
        lengths = sorted(len(units.encode(sentence.chars)[0]) for sentence in corpus.sentences)
    else:
        lengths = sorted(len(sentence.chars) for sentence in corpus.sentences)
    room = units.room if units else max_length - 2
    long = sum(length > room for length in lengths)
    report = {
        "path": corpus.path, "sentences": len(corpus.sentences), "characters": corpus.characters, "unit": corpus.unit,
        "scheme": corpus.scheme, "repairs": corpus.repairs, "skipped": corpus.skipped,
        "types": {kind: {"count": count.total(), "forms": len(count), "examples": dict(count.most_common(5))}
                  for kind, count in sorted(types.items())},
        "lengths": {"of": "tokens" if units else corpus.unit + "s", "min": lengths[0], "max": lengths[-1],
                    "mean": sum(lengths) / len(lengths), "median": lengths[len(lengths) // 2],
                    "p95": lengths[len(lengths) * 95 // 100], "room": room, "need_windows": long,
                    "need_windows_share": long / len(lengths)},
        "rare": [kind for kind, count in sorted(types.items()) if count.total() < RARE],
        "warnings": corpus.warnings() + compare(corpus, corpus),
    }
    if units:
        counts = Counter(char for sentence in corpus.sentences for char in sentence.chars)
        gone = Counter({char: n for char, n in counts.items() if char in units.dropped})
        unknown = Counter({char: n for char, n in counts.items() if char not in gone and units.is_unknown(char)})
        report["tokenizer"] = {
            "tokens": sum(lengths), "tokens_a_unit": sum(lengths) / counts.total(),
            "unknown": unknown.total(), "unknown_share": unknown.total() / counts.total(),
            "unknown_examples": dict(unknown.most_common(10)),
            "vanished": gone.total(), "vanished_examples": dict(gone.most_common(10)),
        }
    return report


def render(report: dict, colour: bool) -> str:
    """The dict of `survey` as lines for a person, with ANSI colours where they are wanted."""
    def paint(code, text):
        return f"\033[{code}m{text}\033[0m" if colour else text

    lines = []
    for file in report["files"]:
        length = file["lengths"]
        lines += [paint("1", file["path"]),
                  f"  {file['sentences']:,} sentences, {file['characters']:,} {file['unit']}s, "
                  f"scheme {file['scheme']}, {file['repairs']:,} repairs",
                  f"  lengths in {length['of']}: {length['min']:,} to {length['max']:,}, mean {length['mean']:.1f}, "
                  f"median {length['median']:,}, 95% up to {length['p95']:,}; {length['need_windows']:,} "
                  f"({length['need_windows_share']:.2%}) are longer than {length['room']:,} and need windows"]
        width = max(map(len, file["types"]), default=0)
        for kind, found in file["types"].items():
            examples = ", ".join(f"{_show(form)} {count:,}" for form, count in found["examples"].items())
            lines.append(f"  {paint('36', kind.ljust(width))} {found['count']:>8,} entities, "
                         f"{found['forms']:>6,} forms: {examples}")
        if tokens := file.get("tokenizer"):
            lines.append(f"  tokenizer: {tokens['tokens_a_unit']:.2f} tokens a {file['unit']}; "
                         f"unknown {tokens['unknown_share']:.2%}{_some(tokens['unknown_examples'])}; "
                         f"vanish {tokens['vanished']:,}{_some(tokens['vanished_examples'])}")
        lines += [paint("33", f"  warning: {warning}") for warning in file["warnings"]]
    if report["several_types"]:
        lines.append(paint("1", f"{report['several_types_count']:,} forms stand under different types"))
        lines += [f"  {_show(form)}: " + ", ".join(f"{paint('36', kind)} {count:,}" for kind, count in types.items())
                  for form, types in list(report["several_types"].items())[:10]]
    lines += [paint("33", f"warning: {warning}") for warning in report["warnings"]]
    return "\n".join(lines)


def _some(examples: dict) -> str:
    return f" ({', '.join(f'{_show(char)} {count:,}' for char, count in examples.items())})" if examples else ""


def _show(text: str) -> str:
    """Text that does no harm on a terminal and can be seen: anything unprintable by its number."""
    text = text if len(text) <= 30 else text[:30] + "…"
    return "".join(c if c.isprintable() and (c != " " or len(text) > 1) else f"U+{ord(c):04X}" for c in text)


def _text(sentence) -> str:
    return "\x1f".join(sentence.chars)


def _clip(chars: list[str]) -> str:
    return _show("".join(chars[:12])) + "…" * (len(chars) > 12)
