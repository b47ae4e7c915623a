"""Scores a finished run on labelled sentences, by the model as it was trained: see --help.

Nothing heavy is imported up here and importing does nothing, so that a package which looks for the library of the
same name finds a harmless module.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ner.errors import UserError, command
from ner.files import whole_folder, write_text
from ner.paths import resolve_path

if TYPE_CHECKING:
    from ner.config import Config
    from ner.corpus import Corpus
    from ner.tagging import Tagger

EXAMPLES = """Examples:
  python evaluate.py                                  # the newest finished run, on its test file
  python evaluate.py --run output/RUN --data FILE     # another run, other sentences
  python evaluate.py --json scores.json               # the scores as JSON too
  python evaluate.py --engine onnx                    # the run's ONNX file instead of the model as it was trained"""


@command
def main(argv: list[str] | None = None) -> None:
    """Score the run that the command line names and print the table, or write JSON."""
    options = _parser().parse_args(argv)
    from ner.corpus import check_unit
    from ner.scores import newest_run, score_sentences, table

    run = resolve_path(options.run) if options.run else newest_run()
    if run is None or not whole_folder(run / "model").is_dir():
        raise UserError(f"{options.run or run}: expected the folder of a run, which holds model/")
    config = _config_of(run)
    corpus = _read(options.data, config, run)
    only_json = options.json == "-"
    if not only_json:
        print(f"run {run}\n{corpus.describe()}")
    tagger = _tagger(run, config, options.engine)
    check_unit(corpus, tagger.unit, str(run))
    _warn_of_unknown_types(corpus, tagger)
    scores, predicted, _ = score_sentences(tagger, corpus.sentences)
    _warn_of_orphans(predicted)
    text = json.dumps(scores, ensure_ascii=False, indent=1) + "\n"
    print(text if only_json else table(scores) + "\n", end="")
    if options.json and not only_json:
        try:
            write_text(options.json, text)
        except OSError as error:
            raise UserError(f"--json {options.json}: cannot be written: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python evaluate.py",
        description="Scores a finished run on labelled sentences: strict F1 by type, micro, macro and weighted.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", help="The run's folder. [the newest finished one under output/]")
    parser.add_argument("--data", metavar="FILE", help="A labelled file, or hub:NAME. [the test file of the run]")
    parser.add_argument(
        "--engine",
        choices=["torch", "onnx"],
        default="torch",
        help="torch: the model as it was trained; onnx: the file that predict.py tags with on a CPU. [torch]",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="Write the scores to FILE as JSON too; - prints them, and nothing else."
    )
    return parser


def _config_of(run: Path) -> "Config | None":
    """Return the config that the run was trained with, None where it has none. Raises UserError."""
    from ner import config as settings

    return settings.load_run(run) if (run / "config.yaml").is_file() else None


def _read(data: str | None, config: "Config | None", run: Path) -> "Corpus":
    """Return the sentences to score: of `data`, or the run's test sentences where it is None. Raises UserError."""
    from ner import formats

    data = data or (config.test if config else None)
    if data is None:
        raise UserError(f"{run}: its config names no test file; name one with --data")
    return formats.read(str(resolve_path(data) or data), "test")


def _tagger(run: Path, config: "Config | None", engine: str) -> "Tagger":
    """Return the run's model, by PyTorch in the run's precision on the device that training takes, or its ONNX file."""
    from ner.tagging import Tagger

    if engine == "onnx":
        return Tagger.of(run, engine="onnx")
    import torch

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return Tagger.of(run, device, config.precision if config else "auto")


def _warn_of_unknown_types(corpus: "Corpus", tagger: "Tagger") -> None:
    unknown = sorted(set(corpus.entities()) - {label[2:] for label in tagger.labels})
    if unknown:
        names = ", ".join(unknown)
        print(
            f"warning: {corpus.path}: types that the run was not trained on count as missed: {names}", file=sys.stderr
        )


def _warn_of_orphans(predicted: list[list[str]]) -> None:
    """Say how many predicted tags belong to no entity, which decode: argmax lets happen."""
    from ner.decoding import orphans

    count = sum(map(orphans, predicted))
    if count:
        print(f"warning: {count:,} predicted I- tags follow no beginning of their type: no entities", file=sys.stderr)


if __name__ == "__main__":
    main()
