"""Text → entities with offsets. `python predict.py "TEXT"`, `--input FILE`, or a prompt without arguments.

    predictor = load("output/20240506-104917")          # or load(): the newest finished run
    for entity in predictor.predict(["江泽民在北京。"])[0]:
        print(entity.text, entity.type, entity.start, entity.end, entity.score)

Torch is imported when a model is loaded, so that --help and wrong arguments are answered at once. Files are read in
chunks of bounded size: sorting a chunk's texts by length fills batches well, and memory does not grow with the file.
"""

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ner.errors import UserError, command

CHUNK_TEXTS, CHUNK_CHARACTERS = 2048, 65536  # a chunk ends with the text that reaches either
COLOURS = (117, 216, 120, 183, 222, 211, 123, 153, 187, 225)  # of 256; all light, so that black text is read on them
_LONE = re.compile("[\ud800-\udfff]")  # surrogates without a partner, which no tokenizer takes

_last = None  # the predictor that the module's predict() uses


@dataclass(slots=True, frozen=True)
class Entity:
    """text == the whole text[start:end]; offsets count characters, half-open; score: 0 to 1."""

    text: str
    type: str
    start: int
    end: int
    score: float


class Predictor:
    """A loaded model, ready for texts. `types`: what it can find, sorted."""

    def __init__(self, tagger):
        self.unit = tagger.unit
        self.types = sorted({label[2:] for label in tagger.labels if label != "O"})
        self.tagger = tagger

    def predict(self, texts: list[str]) -> list[list[Entity]]:
        """The entities of each text, in order of their offsets. Texts may be empty and of any length."""
        from ner.windows import text_units

        if isinstance(texts, str):
            raise TypeError("predict() takes a list of texts; for one text give [text]")
        units = [text_units(_LONE.sub("\ufffd", text), self.unit) for text in texts]
        kept = [i for i, cut in enumerate(units) if cut]
        tagged = self.tagger.tag([[unit for unit, _, _ in units[i]] for i in kept])
        found = [[] for _ in texts]
        for i, (tags, scores) in zip(kept, tagged, strict=True):
            found[i] = _entities(texts[i], units[i], tags, scores)
        return found


def load(run: str | Path | None = None, batch_size: int = 32, precision: str = "auto") -> Predictor:
    """Loads a run's model: a run folder, a model folder, or None for the newest finished run under output/.

    The GPU is taken where there is one. precision: as config.yaml calls it. Raises UserError where there is no model or
    it is damaged.
    """
    global _last
    folder = _folder(run)
    import torch

    from ner.tagging import Tagger

    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    _last = Predictor(Tagger.of(folder, device, precision, batch_size))
    return _last


def predict(texts: list[str]) -> list[list[Entity]]:
    """Predictor.predict with the model loaded last, or the newest finished run's."""
    return (_last or load()).predict(texts)


def _folder(run) -> Path:
    if run is None:
        from ner import scores as scoring

        run = scoring.newest_run()
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a run, such as output/20240506-104917, or its model folder")
    return folder


def _entities(text: str, units: list[tuple], tags: list[str], scores) -> list[Entity]:
    """Entities of one text; white space at the ends of one is not part of it."""
    from ner.decoding import spans

    entities = []
    for name, first, last in spans(tags):
        while first < last and units[first][0].isspace():
            first += 1
        while first < last and units[last - 1][0].isspace():
            last -= 1
        if first < last:
            start, end = units[first][1], units[last - 1][2]
            entities.append(Entity(text[start:end], name, start, end, float(scores[first:last].mean())))
    return entities


def as_json(text: str, entities: list[Entity]) -> str:
    """{"text", "entities": [{"text", "type", "start", "end", "score"}]} on one line."""
    record = {"text": text, "entities": [
        {"text": e.text, "type": e.type, "start": e.start, "end": e.end, "score": round(e.score, 6)} for e in entities]}
    # A lone surrogate has no UTF-8; as an escape it survives.
    return json.dumps(record, ensure_ascii=bool(_LONE.search(text))) + "\n"


def as_bio(text: str, entities: list[Entity], unit: str = "character") -> str:
    """`character tag` lines and a blank one, as loader.py reads them (`word tag` for a model of words).

    White space and the byte-order mark are no tokens of that format: they are left out.
    """
    from ner.windows import text_units

    lines, rest = [], iter(entities)
    entity, inside = next(rest, None), False
    for token, start, end in text_units(_LONE.sub("\ufffd", text), unit):
        if entity and start >= entity.end:
            entity, inside = next(rest, None), False
        if token := "".join(token.split()).replace("\ufeff", ""):
            within = entity and entity.start <= start
            lines.append(f"{token} {'I-' if inside else 'B-'}{entity.type}\n" if within else f"{token} O\n")
            inside = within
    return "".join(lines) + "\n" if lines else ""


def as_html(text: str, entities: list[Entity], types: list[str] = ()) -> str:
    """The text as a paragraph with its entities marked; everything escaped."""
    from ner import markup

    marked = [(e.type, e.start, e.end, None) for e in entities]
    parts = markup.segments(text, marked, whole=True)
    return str(markup.templates().sentence(parts, markup.hues(types), markup.language(text))).strip() + "\n"


def as_text(text: str, entities: list[Entity], types: list[str] = (), colour: bool = False, title: bool = True) -> str:
    """For a person: the text (with `colour`: its entities on coloured ground), then an entity a line, tabs between.

    Control characters become pictures, so that no text can command the terminal. title: False leaves a plain text out.
    """
    from ner.markup import visible

    marked, at = [], 0
    for e in entities if colour else ():
        number = COLOURS[types.index(e.type) % len(COLOURS)]
        marked += [visible(text[at:e.start]), f"\x1b[38;5;16;48;5;{number}m{visible(e.text)}\x1b[0m"
                   f"\x1b[2m{visible(e.type)}\x1b[0m"]
        at = e.end
    lines = ["".join(marked) + visible(text[at:])] if colour or title else []
    lines += [f"{visible(e.text)}\t{visible(e.type)}\t{e.start}\t{e.end}\t{e.score:.4f}" for e in entities]
    return "".join(f"{line}\n" for line in lines) + "\n" * title


def _format(name: str, predictor: Predictor, colour: bool, several: bool):
    """(head, record, tail) of a format: a text before, a function (text, entities) -> str, a text after."""
    types = predictor.types
    if name == "html":
        from ner import markup

        page = markup.templates()
        head = str(page.head("Entities")).lstrip() + str(page.legend(markup.hues(types)))
        return head, lambda text, found: as_html(text, found, types), str(page.tail()).lstrip()
    record = {"jsonl": as_json, "bio": lambda text, found: as_bio(text, found, predictor.unit),
              "text": lambda text, found: as_text(text, found, types, colour, several)}[name]
    return "", record, ""


def read_texts(stream, name: str):
    """Yields the texts of a binary stream, one a line (only LF and CRLF end one), in UTF-8 or GB18030, with BOM or not.

    The first line beyond ASCII decides on the encoding; later bytes that do not fit it become U+FFFD, with a warning.
    Raises UserError with file and line for what is no text.
    """
    encoding, settled, bad, first_bad = "utf-8", False, 0, 0
    for number, raw in enumerate(stream, 1):
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if b"\0" in raw:
            raise UserError(f"{name}:{number}: a NUL character: this is not a text file; give UTF-8, one text a line")
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            text = raw.decode(encoding, errors="replace")
            # GB18030 accepts much that is damaged UTF-8, so it is tried only for what hardly fits UTF-8 at all.
            if not settled and text.count("\ufffd") * 10 > sum(character > "\x7f" for character in text):
                try:
                    encoding, text = "gb18030", raw.decode("gb18030")
                except UnicodeDecodeError:
                    raise UserError(f"{name}:{number}: neither UTF-8 nor GB18030; save it as UTF-8 text") from None
            else:
                bad, first_bad = bad + 1, first_bad or number
        settled = settled or not raw.isascii()
        yield text
    if bad:
        print(f"warning: {name}:{first_bad}: not {encoding}; what does not fit became \ufffd in {bad} lines",
              file=sys.stderr)


def chunks(texts):
    """Groups texts into lists of bounded size, in order."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if len(chunk) >= CHUNK_TEXTS or size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _arguments(argv):
    parser = argparse.ArgumentParser(
        description="Finds the entities in texts. Without a text: a prompt on a terminal, else standard input.")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="one or more texts")
    parser.add_argument("--input", metavar="FILE", help="a text a line, UTF-8 or GB18030; - is standard input")
    parser.add_argument("--output", metavar="FILE", help="write there instead of the terminal (jsonl unless --format)")
    parser.add_argument("--json", action="store_true", help="the same as --format jsonl")
    parser.add_argument("--format", choices=("text", "jsonl", "bio", "html"),
                        help="text: an entity a line; jsonl: a text a line, with offsets; bio: tags; html: a page")
    parser.add_argument("--run", metavar="DIR", help="a run's folder (default: the newest finished one under output/)")
    parser.add_argument("--batch_size", type=int, default=32, help="windows in a batch (default: 32)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                        help="auto (default): as a run is scored")
    options = parser.parse_args(argv)
    if options.texts and options.input:
        raise UserError("give texts or --input, not both")
    if options.json and options.format not in (None, "jsonl"):
        raise UserError(f"--json and --format {options.format} contradict each other")
    if options.batch_size < 1:
        raise UserError(f"--batch_size {options.batch_size}: at least 1")
    if options.input and options.input != "-":
        if not Path(options.input).exists():
            raise UserError(f"{options.input}: no such file")
        if Path(options.input).is_dir():
            raise UserError(f"{options.input}: a folder; give a file, a text a line")
        if options.output and Path(options.output).exists() and os.path.samefile(options.input, options.output):
            raise UserError(f"{options.output}: input and output are the same file")
    options.format = options.format or ("jsonl" if options.json or options.output else "text")
    return options


@command
def main(argv: list[str] | None = None) -> None:
    """Prints or writes the entities of the texts given; see --help."""
    options = _arguments(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not options.input:
        if rank > 0:
            return  # a few texts are one process's work
        world = 1
    if world > 1 and (options.input == "-" or not options.output):
        raise UserError("several processes need --input FILE and --output FILE, where each of them can read and write")
    folder = _folder(options.run)
    prompt = not options.texts and not options.input and sys.stdin.isatty() and options.format == "text"
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", **({} if stream.isatty() else {"encoding": "utf-8"}))
    colour = options.format == "text" and not options.output and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if world > 1:
        return _share(options, folder, rank, world)
    predictor = load(folder, options.batch_size, options.precision)
    with _opened(options) as source, _output(options.output) as write:
        several = bool(options.input) or len(options.texts) != 1
        head, record, tail = _format(options.format, predictor, colour, several)
        if prompt:
            return _prompt(predictor, colour)
        write(head)
        for chunk in chunks(source):
            write("".join(map(record, chunk, predictor.predict(chunk))))
        write(tail)


@contextlib.contextmanager
def _opened(options):
    """The texts to tag, as an iterator."""
    if options.texts:
        yield options.texts
    elif options.input and options.input != "-":
        try:
            file = open(options.input, "rb", buffering=1 << 16)
        except OSError as error:
            raise UserError(f"{options.input}: cannot be read ({error.strerror})") from None
        with file:
            yield read_texts(file, options.input)
    else:
        yield read_texts(sys.stdin.buffer, "standard input") if not sys.stdin.isatty() or options.input else ()


@contextlib.contextmanager
def _output(path: str | None):
    """A function that writes text to a file, or to standard output where there is none."""
    name = "standard output" if path in (None, "-") else path
    with _writing(name):
        file = sys.stdout if path in (None, "-") else open(path, "w", encoding="utf-8", newline="\n")

    def write(text):
        with _writing(name):
            file.write(text)
            file.flush()

    try:
        yield write
    finally:
        if file is not sys.stdout:
            with contextlib.suppress(OSError):  # write() has flushed and reported
                file.close()


@contextlib.contextmanager
def _writing(path):
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _prompt(predictor: Predictor, colour: bool) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print(f"Type a sentence to see its entities ({', '.join(predictor.types)}). Ctrl-D ends.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if text := input("> "):
                found = predictor.predict([text])[0]
                shown = as_text(text, found, predictor.types, colour, title=False)
                print(shown or "none\n", end="")
    print()


def _share(options, folder: Path, rank: int, world: int) -> None:
    """One process's part under `torchrun -- predict.py …` or accelerate launch: every world-th chunk of the input.

    Each chunk becomes a file in a folder beside the output; the first process joins them in the input's order as they
    appear. A number that the first one draws names the folder, so that nothing of an earlier launch is read.
    """
    from torch import distributed, tensor

    distributed.init_process_group("gloo")
    key = tensor(secrets.randbits(60))
    if rank == 0:
        with _writing(options.output):
            Path(f"{options.output}.{key.item():x}").mkdir()
    distributed.broadcast(key, 0)
    parts = Path(f"{options.output}.{key.item():x}")
    try:
        predictor = load(folder, options.batch_size, options.precision)
        head, record, tail = _format(options.format, predictor, False, True)
        with _opened(options) as source, _output(options.output if rank == 0 else os.devnull) as write:
            count = 0
            for count, chunk in enumerate(chunks(source), 1):
                if (count - 1) % world == rank:
                    text, part = "".join(map(record, chunk, predictor.predict(chunk))), parts / f"{count}.new"
                    with _writing(part):
                        part.write_text(text, encoding="utf-8", newline="\n")
                        part.rename(parts / str(count))
            write(head)
            for part in (parts / str(number) for number in range(1, count + 1) if rank == 0):
                while not part.exists():
                    if (parts / "failed").exists():
                        raise UserError("another process failed; its own message says why")
                    time.sleep(0.05)
                write(part.read_text(encoding="utf-8"))
                part.unlink()
            write(tail)
    except BaseException:
        with contextlib.suppress(OSError):
            (parts / "failed").touch()
        raise
    finally:
        if rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
