"""Text → entities with offsets. `python predict.py "TEXT"`, `--input FILE`, or a prompt without arguments.

    predictor = load("output/20240506-104917")          # or load(): the newest finished run
    for entity in predictor.predict(["江泽民在北京。"])[0]:
        print(entity.text, entity.type, entity.start, entity.end, entity.score)

Neither numpy nor a model is loaded before the arguments are known to be right, and torch only where it computes.
"""

import argparse
import contextlib
import heapq
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ner.errors import UserError, command

if TYPE_CHECKING:
    from ner.predictor import Entity, Predictor, Result

FORMATS = ("text", "jsonl", "bio", "html", "labelstudio", "doccano", "parquet")  # ner/writers.py; parquet: --ray
FORMAT_HELP = """text: an entity a line; jsonl: a text a line, with offsets; bio: a character and its tag a line; html:
a page with coloured entities; labelstudio, doccano: what these tools import; parquet: only with --ray. [text]"""
EXAMPLES = """Examples:
  python predict.py "江泽民在北京会见了比尔·盖茨。"
  python predict.py --input texts.txt --output tagged.jsonl
  python predict.py --input texts.txt --output tagged.html --format html
  python predict.py --input texts.txt --output next.json --format labelstudio --uncertain 200
  python predict.py --ray --input 'texts/*.txt' --output tagged/ --workers 4"""

_last: "Predictor | None" = None  # the one that the module's predict() uses


def load(
    run: str | Path | None = None,
    batch_size: int = 32,
    precision: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
) -> "Predictor":
    """Load a run's model; see ner.predictor.load. The module's predict() uses the one loaded last."""
    from ner import predictor

    global _last
    _last = predictor.load(run, batch_size, precision, engine, threads)
    return _last


def predict(texts: list[str]) -> "list[list[Entity]]":
    """Return the entities of each text, by the model loaded last, or the newest finished run's."""
    return (_last or load()).predict(texts)


def __getattr__(name: str) -> type:
    """Give Entity, Predictor and Result, which stand in ner/predictor.py, when they are asked for."""
    if name not in ("Entity", "Predictor", "Result"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ner import predictor

    return getattr(predictor, name)


@command
def main(argv: list[str] | None = None) -> None:
    """Print or write the entities of the texts given; see --help."""
    options = _arguments(argv)
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", **({} if stream.isatty() else {"encoding": "utf-8"}))
    logging.basicConfig(format="warning: %(message)s")
    if options.ray is not None:
        return _tag_on_ray(options)
    prompt = not options.texts and not options.input and sys.stdin.isatty() and options.format == "text"
    if prompt and options.uncertain:
        raise UserError("--uncertain chooses from many texts; name a file of them with --input")
    colour = options.format == "text" and not options.output and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    from ner.predictor import run_folder
    from ner.texts import chunks
    from ner.writers import writer

    folder = run_folder(options.run)
    predictor = load(folder, options.batch_size, options.precision, options.engine, options.threads)
    if prompt:
        return _prompt(predictor, colour)
    several = bool(options.input) or len(options.texts) != 1
    name = folder.resolve().parent.name if folder.name == "model" else folder.resolve().name
    result_writer = writer(options.format, predictor.types, predictor.unit, name, colour, several)
    with _source(options) as texts, _output(options.output) as write:
        groups: Iterable[list[Result]] = map(predictor.results, chunks(texts))
        if options.uncertain:
            groups = [least_certain(groups, options.uncertain)]
        write(result_writer.head)
        separator = ""
        for group in groups:
            for result in group:
                write(separator + result_writer.record(result))
                separator = result_writer.separator
            write("", flush=True)
        write(result_writer.tail, flush=True)


def least_certain(groups: "Iterable[list[Result]]", count: int) -> "list[Result]":
    """Return the `count` results of least margin, the least first: what to label next. The same text comes once."""
    heap: list[tuple[float, int, Result]] = []  # the one to drop next on top
    texts: set[str] = set()
    for number, result in enumerate(result for group in groups for result in group):
        if not result.text.strip() or result.text in texts:
            continue
        if len(heap) == count:
            if result.margin >= -heap[0][0]:
                continue
            texts.discard(heapq.heappop(heap)[2].text)
        heapq.heappush(heap, (-result.margin, -number, result))
        texts.add(result.text)
    return [result for _, _, result in sorted(heap, reverse=True)]


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line, checked before anything is loaded. Raises UserError."""
    options = _parser().parse_args(argv)
    if options.texts and options.input:
        raise UserError("give texts or --input, not both")
    if options.json and options.format not in (None, "jsonl"):
        raise UserError(f"--json and --format {options.format} contradict each other")
    for name in ("batch_size", "threads", "uncertain", "workers"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: at least 1")
    if options.engine == "onnx" and options.precision != "auto":
        raise UserError(f"--precision {options.precision} is for --engine torch; onnx computes as it was exported")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise UserError("predict.py uses all cores from one process; start it without torchrun or accelerate launch")
    if options.ray is None:
        _check_files(options)
    options.format = options.format or ("jsonl" if options.json or options.output else "text")
    if options.format == "parquet" and options.ray is None:
        raise UserError("--format parquet is for --ray; jsonl holds the same")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python predict.py",
        description="Finds the entities in texts. Without a text it opens a prompt on a terminal; elsewhere it reads "
        "standard input.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="One or more texts.")
    add("--input", metavar="FILE", help="A file with a text a line, in UTF-8 or GB18030; - is standard input.")
    add("--output", metavar="FILE", help="The file to write, as jsonl unless --format says otherwise. [the terminal]")
    add("--run", metavar="RUN", help="The run whose model to use. [the newest finished one under output/]")
    add("--format", choices=FORMATS, help=FORMAT_HELP)
    add("--json", action="store_true", help="The same as --format jsonl.")
    add(
        "--uncertain",
        type=int,
        metavar="N",
        help="Give only the N texts that the model is least sure of, the least sure first.",
    )
    engines = (
        "onnx: the exported file; torch: the model itself; auto: torch on a GPU, else onnx where it exists. [auto]"
    )
    add("--engine", choices=("auto", "onnx", "torch"), default="auto", help=engines)
    add("--threads", type=int, metavar="N", help="CPU threads. [all cores; with --ray, 1 for each process]")
    add("--batch_size", type=int, metavar="N", default=32, help="Windows in a batch. [%(default)s]")
    precisions = "What torch computes in; auto: what the run is scored in. [auto]"
    add("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help=precisions)
    ray = "Tag the files of --input, a file or 'PATTERN', on a Ray cluster; without ADDRESS, on this machine."
    add("--ray", nargs="?", const="", metavar="ADDRESS", help=ray)
    add("--workers", type=int, metavar="N", help="With --ray: processes. [as many as there is room for]")
    return parser


def _check_files(options: argparse.Namespace) -> None:
    if options.input and options.input != "-":
        options.input = os.path.expanduser(options.input)
        if not Path(options.input).exists():
            raise UserError(f"{options.input}: no such file")
        if Path(options.input).is_dir():
            raise UserError(f"{options.input}: a folder; give a file, a text a line")
    if options.output and options.output != "-":
        options.output = os.path.expanduser(options.output)
        if Path(options.output).is_dir():
            raise UserError(f"{options.output}: a folder; give the name of a file to write")
        both = options.input and os.path.exists(options.input) and os.path.exists(options.output)
        if both and os.path.samefile(options.input, options.output):
            raise UserError(f"{options.output}: input and output are the same file")


@contextlib.contextmanager
def _source(options: argparse.Namespace) -> Iterator[Iterable[str]]:
    """Open the texts to tag. Raises UserError where the file cannot be opened."""
    from ner.texts import read_texts

    if options.texts:
        yield options.texts
    elif options.input and options.input != "-":
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(options.input, "rb", buffering=1 << 16))
            except OSError as error:
                raise UserError(f"{options.input}: cannot be read ({error.strerror})") from None
            yield read_texts(file, options.input)
    else:
        yield read_texts(sys.stdin.buffer, "standard input") if not sys.stdin.isatty() or options.input else ()


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[Callable[..., None]]:
    """Open a function that writes text to a file, or to standard output where there is none.

    A file is written beside its place and renamed at the end, so what was there stays until all is written. Raises
    UserError where it cannot be written.
    """
    from ner.files import replacing

    name = path if path and path != "-" else "standard output"
    try:
        with contextlib.ExitStack() as stack:
            if path is None or path == "-":
                file = sys.stdout
            else:
                temporary = stack.enter_context(replacing(path))
                file = stack.enter_context(open(temporary, "w", encoding="utf-8", newline="\n"))

            def write(text: str, flush: bool = False) -> None:
                file.write(text)
                if flush:
                    file.flush()

            yield write
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.strerror})") from None


def _tag_on_ray(options: argparse.Namespace) -> None:
    """Tag the files that --input names into the folder --output. Raises UserError."""
    if options.input in (None, "-") or options.output in (None, "-"):
        raise UserError("--ray needs --input FILE or 'PATTERN' and --output FOLDER, which all machines reach")
    if options.format not in ("jsonl", "parquet") or options.uncertain:
        raise UserError("--ray tags files into --format jsonl or parquet, without --uncertain")
    if "://" in options.output:
        raise UserError(f"--output {options.output}: expected a folder on a disk that all machines share")
    if options.ray.startswith("ray://"):
        raise UserError(f"--ray {options.ray}: Ray Data does not work from outside; run it on a machine of the cluster")
    from ner import ray_tagging
    from ner.predictor import run_folder

    settings = ray_tagging.Settings(
        str(run_folder(options.run).resolve()),
        options.engine,
        options.precision,
        options.batch_size,
        options.threads or 1,
    )
    output = Path(options.output).expanduser().absolute()
    texts = ray_tagging.tag(options.input, output, settings, options.format, options.workers, options.ray)
    print(f"{texts} texts tagged into {output}")


def _prompt(predictor: "Predictor", colour: bool) -> None:
    """Tag what a person types, a text at a time, until Ctrl-D."""
    from ner.writers import plain

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print(f"Type a sentence to see its entities ({', '.join(predictor.types)}). Ctrl-D ends.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if text := input("> "):
                result = predictor.results([text])[0]
                print(plain(result, predictor.types, colour, title=False) or "none\n", end="")
    print()


if __name__ == "__main__":
    main()
