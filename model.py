"""Hands a finished run on.

python model.py merge RUN DIR            # a plain transformers folder: adapter and encoder in one
python model.py export RUN               # RUN/model/model_int8.onnx, which predict.py tags with on a CPU
python model.py export RUN DIR --int8    # model.onnx and model_int8.onnx with tokenizer and labels, for other programs
"""

import argparse
import sys
from pathlib import Path

from ner.errors import UserError, command


@command
def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises UserError for what cannot be merged, exported or written."""
    given = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    from ner import export

    try:
        if given.command == "merge":
            print(f"merged: {export.merge(given.run, given.folder)}")
        elif given.folder is None:
            _export_into_run(given.run, "fp32" if given.fp32 else "int8")
        else:
            for row in export.export(given.run, given.folder, given.int8):
                print(f"{Path(given.folder) / row.file}: logits within {row.largest_logit_error:.2g} of PyTorch's")
                print(row.line())
    except OSError as error:
        raise UserError(f"{error.filename or given.folder}: cannot be written: {error.strerror or error}") from None


def _export_into_run(run: str, kind: str) -> None:
    from ner import export

    row = export.write_onnx(run, kind)
    print(f"{export.model_folder(run) / row.file}: {row.line()}")
    if not row.default:
        print(f"PyTorch keeps tagging by default: {100 * export.LARGEST_LOSS:g} points less F1 are not accepted")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python model.py",
        description="Hands the model of a finished run on, to transformers or to ONNX Runtime.",
        epilog="Examples:\n" + "\n".join("  " + line for line in (__doc__ or "").splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    merge_text = "Writes a plain transformers folder, the adapter merged into the encoder."
    merge = commands.add_parser("merge", help=merge_text, description=merge_text, allow_abbrev=False)
    merge.add_argument("run", metavar="RUN", help="The folder of a run, or its model folder.")
    merge.add_argument("folder", metavar="DIR", help="The folder to make.")
    export_text = "Writes ONNX files, and compares them with PyTorch."
    export = commands.add_parser("export", help=export_text, description=export_text, allow_abbrev=False)
    export.add_argument("run", metavar="RUN", help="The folder of a run, or its model folder.")
    export.add_argument(
        "folder",
        metavar="DIR",
        nargs="?",
        help="The folder to make; without one, the file goes into RUN's model folder.",
    )
    export.add_argument("--int8", action="store_true", help="With DIR: write model_int8.onnx too.")
    export.add_argument("--fp32", action="store_true", help="Without DIR: write model.onnx instead of model_int8.onnx.")
    export.add_argument("--format", default="onnx", choices=["onnx"], help="onnx is the only one.")
    return parser


if __name__ == "__main__":
    main()
