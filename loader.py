"""Looks at tagged files before training on them: `python loader.py FILE...`."""

import argparse
import json
import os
import sys

from ner.errors import UserError, command
from ner.formats import read
from ner.survey import render, survey
from ner.windows import Windower


@command
def main(argv: list[str] | None = None) -> None:
    """`python loader.py FILE...`: look at tagged files before training on them."""
    parser = argparse.ArgumentParser(description="Shows what tagged files hold, and warns of what spoils a training.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="tagged files, the training file first; or hub:NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--tokenizer", metavar="DIR", help="encoder whose tokenizer is tried: a folder or a hub name")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a window (%(default)s)")
    args = parser.parse_args(argv)
    corpora = [read(file) for file in args.files]
    units = None
    if args.tokenizer:
        from transformers import AutoTokenizer  # slow to import, and only needed here

        words = {"add_prefix_space": True} if corpora[0].unit == "word" else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, **words)
        except Exception as error:  # whatever lies below: network, missing files, damaged ones
            raise UserError(f"{args.tokenizer}: no tokenizer there ({str(error).splitlines()[0]}); give a folder with "
                            "tokenizer.json or a hub name") from None
        units = Windower(tokenizer, corpora[0].unit, True, args.max_length)
    report = survey(corpora, units, args.max_length)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print(render(report, sys.stdout.isatty() and "NO_COLOR" not in os.environ))


if __name__ == "__main__":
    main()
