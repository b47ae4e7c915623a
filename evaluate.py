"""Scores a saved run on labelled sentences: `python evaluate.py --run RUN --data FILE`."""

import argparse
import json
import sys
from pathlib import Path

from ner.errors import UserError, command
from ner.scores import newest_run, score_sentences, table


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Scores a saved run: strict entities by type, micro, macro, weighted.")
    parser.add_argument("--run", help="the run's folder (default: the newest finished one under output/)")
    parser.add_argument("--data", help="a labelled file or hub:NAME (default: the test file of the run)")
    parser.add_argument("--json", metavar="FILE", help="write the scores there as JSON; - prints them")
    given = parser.parse_args(argv)
    run = Path(given.run) if given.run else newest_run()
    if not (run / "model").is_dir():
        raise UserError(f"{run}: expected the folder of a run, which holds model/")
    from ner import config as settings

    saved = settings.load(["--config", str(run / "config.yaml")])[0] if (run / "config.yaml").is_file() else None
    data = given.data or (saved.test if saved else None)
    if data is None:
        raise UserError(f"{run}: its config names no test file; name one with --data")
    from ner import formats

    corpus = formats.read(data)
    if given.json != "-":
        print(f"run {run}\n{corpus.describe()}")
    import torch

    from ner.tagging import Tagger

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tagger = Tagger.of(run, device, saved.precision if saved else "auto")
    unknown = sorted(set(corpus.entities()) - {label[2:] for label in tagger.labels})
    if unknown:
        print(
            f"warning: {data}: types that the run was not trained on count as missed: {', '.join(unknown)}",
            file=sys.stderr,
        )
    scores, _, _ = score_sentences(tagger, corpus.sentences)
    text = json.dumps(scores, ensure_ascii=False, indent=1) + "\n"
    if given.json == "-":
        print(text, end="")
        return
    print(table(scores))
    if given.json:
        try:
            Path(given.json).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {given.json}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    main()
