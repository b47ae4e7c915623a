"""predict.py --ray with one and two workers of one thread against predict.py alone with one and two threads.

    python benchmarks/cluster.py [--run DIR] [--megabytes 20] [--input FILE...] [--workers 1 2] [--json FILE]

All tag the same file, a text a line: the sentences of MSRA's train part, or the lines of --input (.xz too), over and
over until there are so many megabytes of UTF-8. Characters a second are given from command to end (`whole`), and
from the first result that is begun to the last that is written (`loaded`), which leaves out the seconds in which
the program, Ray and the model are loaded. `ratio` is Ray's loaded rate to the plain one with as many threads.
"""

import argparse
import itertools
import json
import lzma
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
POLL_SECONDS = 0.02


def sentences_of_msra() -> Iterator[str]:
    """Yield the sentences of the default corpus, which is fetched where it is missing."""
    from data import msra
    from ner import formats

    msra.ensure(say=print)
    for sentence in formats.read(str(ROOT / "data/msra/train")).sentences:
        yield "".join(sentence.units)


def lines_of(files: list[Path]) -> Iterator[str]:
    """Yield the lines of text files, compressed by xz or not."""
    for path in files:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)


def write_texts(texts: list[str], size: int, target: Path) -> int:
    """Write texts over and over until there are `size` bytes; return how many characters they have."""
    characters = written = 0
    with target.open("wb") as file:
        for text in itertools.cycle(texts):
            if written >= size:
                return characters
            written += file.write(text.encode() + b"\n")
            characters += len(text)
    return characters


def timed(command: list[str], folder: Path, characters: int) -> dict[str, float]:
    """Run a command that writes into `folder`, which is empty; return its characters a second and its seconds."""
    folder.mkdir()
    began, first = time.time(), None
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first is None and any(path.name != "shards.json" for path in folder.iterdir()):
                first = time.time()
            time.sleep(POLL_SECONDS)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\nfailed:\n" + log.read().decode(errors="replace")[-2000:])
    seconds = time.time() - began
    last = max(path.stat().st_mtime for path in folder.iterdir())
    return {
        "whole": characters / seconds,
        "loaded": characters / (last - (first or began)),
        "seconds": seconds,
    }


def main() -> None:
    """Measure, print a line each, and write the figures."""
    options = arguments()
    from ner import scores

    run = str(Path(options.run or scores.newest_run()).resolve())
    result: dict[str, dict[str, dict[str, float]]] = {"plain": {}, "ray": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [text for text in (lines_of(options.input) if options.input else sentences_of_msra()) if text]
        characters = write_texts(texts, int(options.megabytes * 1e6), folder / "texts.txt")
        command = [sys.executable, str(ROOT / "predict.py"), "--run", run, "--input", str(folder / "texts.txt")]
        for count in options.workers:
            number = str(count)
            plain = [*command, "--threads", number, "--output", str(folder / f"plain-{number}" / "tagged.jsonl")]
            result["plain"][number] = timed(plain, folder / f"plain-{number}", characters)
            ray = [*command, "--ray", "local", "--workers", number, "--output", str(folder / f"ray-{number}")]
            result["ray"][number] = timed(ray, folder / f"ray-{number}", characters)
            ratio = result["ray"][number]["loaded"] / result["plain"][number]["loaded"]
            result["ray"][number]["ratio"] = ratio
            for way in ("plain", "ray"):
                row = result[way][number]
                print(f"{way}, {number}: {row['loaded']:.0f} characters a second, {row['whole']:.0f} with all loading, "
                      f"{row['seconds']:.1f} seconds", flush=True)  # fmt: skip
            print(f"ratio at {number}: {ratio:.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"characters": characters, **result}, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="run folder; the newest finished one where none is given")
    parser.add_argument("--megabytes", type=float, default=20, help="of UTF-8 to tag (%(default)s)")
    parser.add_argument("--input", type=Path, nargs="+", metavar="FILE", help="texts, a line each (default: MSRA's)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="and threads (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
