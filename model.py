"""Hands a finished run on: `python model.py merge RUN DIR` and `python model.py export RUN DIR`."""

import sys

from ner import export
from ner.errors import command


@command
def main() -> None:
    export.main(sys.argv[1:])


if __name__ == "__main__":
    main()
