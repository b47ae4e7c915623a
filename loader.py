"""Looks at labelled files before training on them.

python loader.py my/train my/dev my/test                  # what they hold, and what spoils a training
python loader.py my/train --tokenizer bert-base-chinese   # the same, as another encoder sees it
python loader.py my/train --json                          # the same for programs
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from ner.corpus import Corpus, check_unit
from ner.errors import UserError, command
from ner.formats import read
from ner.paths import ROOT, resolve_path
from ner.survey import printable, survey
from ner.windows import Windower

DEFAULT_TOKENIZER = ROOT / "data" / "encoder"
BOLD, CYAN, YELLOW = "1", "36", "33"  # ANSI codes
Paint = Callable[[str, str], str]


@command
def main(argv: list[str] | None = None) -> None:
    """Print what the files hold that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python loader.py",
        description="Shows what labelled files hold, and warns of what spoils a training.",
        epilog="Examples:\n" + "\n".join("  " + line for line in (__doc__ or "").splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="Labelled files, the training file first, or hub:NAME."
    )
    parser.add_argument("--json", action="store_true", help="Print the same as one JSON object.")
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        default=str(DEFAULT_TOKENIZER),
        help="The encoder whose tokenizer is tried: a folder, or a name on the hub. [data/encoder]",
    )
    parser.add_argument("--max_length", type=int, metavar="N", default=256, help="Tokens in a window. [%(default)s]")
    args = parser.parse_args(argv)
    corpora = [read(str(resolve_path(file) or file)) for file in args.files]
    for corpus in corpora[1:]:
        check_unit(corpus, corpora[0].unit, corpora[0].path)
    report = survey(corpora, windower_for(corpora[0], args.tokenizer, args.max_length), args.max_length)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(render(report, sys.stdout.isatty() and "NO_COLOR" not in os.environ))


def windower_for(corpus: Corpus, tokenizer: str, max_length: int) -> Windower:
    """Return the windower of a corpus with the tokenizer of an encoder. Raises UserError where there is none."""
    from transformers import AutoTokenizer  # slow to import, and not needed for --help

    words = {"add_prefix_space": True} if corpus.unit == "word" else {}
    try:
        loaded = AutoTokenizer.from_pretrained(str(resolve_path(tokenizer) or tokenizer), **words)
    except Exception as error:  # whatever lies below: network, missing files, damaged ones
        raise UserError(
            f"{tokenizer}: no tokenizer there ({str(error).splitlines()[0]}); give a folder with tokenizer.json or a "
            "hub name"
        ) from None
    return Windower(loaded, corpus.unit, True, max_length)


def render(report: dict[str, Any], colour: bool) -> str:
    """Return the dict of `survey` as text, with ANSI colours where they are wanted."""

    def paint(code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colour else text

    lines = [line for file in report["files"] for line in _file_lines(file, paint)]
    if report["several_types"]:
        lines.append(paint(BOLD, f"{report['several_types_count']:,} forms stand under different types"))
        for form, types in list(report["several_types"].items())[:10]:
            counts = ", ".join(f"{paint(CYAN, type_)} {count:,}" for type_, count in types.items())
            lines.append(f"  {printable(form)}: {counts}")
    lines += [paint(YELLOW, f"warning: {warning}") for warning in report["warnings"]]
    return "\n".join(lines)


def _file_lines(file: dict[str, Any], paint: Paint) -> list[str]:
    length = file["lengths"]
    lines = [
        paint(BOLD, file["path"]),
        f"  {file['sentences']:,} sentences, {file['characters']:,} {file['unit']}s, scheme {file['scheme']}, "
        f"{file['repairs']:,} repairs",
        f"  lengths in {length['of']}: {length['min']:,} to {length['max']:,}, mean {length['mean']:.1f}, "
        f"median {length['median']:,}, 95% up to {length['p95']:,}; {length['need_windows']:,} "
        f"({length['need_windows_share']:.2%}) are longer than {length['room']:,} and need windows",
    ]
    width = max(map(len, file["types"]), default=0)
    for type_, entities in file["types"].items():
        lines.append(
            f"  {paint(CYAN, type_.ljust(width))} {entities['count']:>8,} entities, {entities['adjacent']:>5,} of them "
            f"right after another, {entities['forms']:>6,} forms: {_counted(entities['examples'])}"
        )
    if tokens := file.get("tokenizer"):
        lines.append(
            f"  tokenizer: {tokens['tokens_a_unit']:.2f} tokens a {file['unit']}; "
            f"unknown {tokens['unknown_share']:.2%}{_in_brackets(tokens['unknown_examples'])}; "
            f"vanish {tokens['vanished']:,}{_in_brackets(tokens['vanished_examples'])}"
        )
    return lines + [paint(YELLOW, f"  warning: {warning}") for warning in file["warnings"]]


def _counted(examples: dict[str, int]) -> str:
    return ", ".join(f"{printable(text)} {count:,}" for text, count in examples.items())


def _in_brackets(examples: dict[str, int]) -> str:
    return f" ({_counted(examples)})" if examples else ""


if __name__ == "__main__":
    main()
