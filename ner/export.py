"""A finished run → what other programs load: a merged transformers folder, ONNX files.

The ONNX file in a run's own model folder is what predict.py tags with on a CPU (write_onnx). Each file is run and
compared with PyTorch before it is kept.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from ner import config as settings
from ner import files, formats, onnx_writer, saved_model
from ner.corpus import Sentence
from ner.engines import OnnxEngine
from ner.errors import UserError, first_line
from ner.meta import CRF_FILE, model_folder, write_meta
from ner.onnx_writer import FILES, OnnxFile
from ner.quantize import Arrays
from ner.scores import score
from ner.tagging import Tagger
from ner.tunings import TUNINGS

log = logging.getLogger("__main__")  # the run's log
RECORD_VERSION = 1  # of onnx.json
LARGEST_LOSS = 0.003  # of strict F1 on dev that the file may have against PyTorch, to be what tags by default
COMPARED_SENTENCES = 1000  # of dev, at most
SAMPLES, LONGEST_SAMPLE = 32, 128  # sentences that the graph is traced and calibrated on, at most; their tokens
SAMPLE_SHARE = 1 / 4  # of dev that may go into the samples, where dev is small
SAMPLE_BATCH = 8  # sentences


def merge(run: str | Path, folder: str | Path) -> Path:
    """Write the model of `run` as a plain transformers folder: adapter and encoder in one, tokenizer beside them.

    run: a run folder or its model folder. Returns `folder`, which must be new. Warns where the model has a CRF, which
    transformers has no place for. Raises UserError.
    """
    _check_new(folder)
    model, tokenizer, meta = saved_model.load(run, merged=True)
    _refuse_virtual_tokens(meta, "merged")
    if meta["head"] == "crf":
        log.warning(
            "this model has a CRF: a transformers pipeline ignores its transition scores (%s) and takes the likeliest "
            "tag of each token, so some of its entities will differ from predict.py's",
            CRF_FILE,
        )
    meta = {**meta, "tuning": "full", "pretrained": str(Path(folder).absolute()), "encoder_sha256": {}}
    saved_model.save(model, as_trained(tokenizer, meta), meta, folder)
    return Path(folder)


def export(run: str | Path, folder: str | Path, int8: bool = False) -> list[OnnxFile]:
    """Write the model of `run` as model.onnx (and model_int8.onnx) into a new folder, tokenizer and labels beside it.

    The graph takes input_ids and attention_mask, int64 [B, L], and gives logits, float32 [B, L, labels], for every B
    and L up to max_length. The files are calibrated and compared on the dev file of the run's config, as write_onnx
    does it. Raises UserError where the folder is not new or the encoder cannot be exported.
    """
    _check_new(folder)
    folder, inside = Path(folder), model_folder(run).parent
    model, tokenizer, meta = _load(run)
    with tempfile.TemporaryDirectory() as temporary:
        kinds = ["fp32", "int8"] if int8 else ["fp32"]
        written = _write_compared(kinds, (model, tokenizer, meta), _dev_sentences(inside), inside, Path(temporary))
        folder.mkdir(parents=True, exist_ok=True)
        for row in written:
            shutil.copyfile(Path(temporary) / row.file, folder / row.file)
    as_trained(tokenizer, meta).save_pretrained(folder)
    model.config.architectures = [type(model).__name__]  # that of a LoRA run's encoder stands there until now
    model.config.save_pretrained(folder)
    write_meta(folder, meta)
    return written


def write_onnx(run: str | Path, kind: str = "int8", dev: list[Sentence] | None = None) -> OnnxFile:
    """Write the model of `run` into its own model folder as an ONNX file, for tagging on a CPU.

    kind: a key of FILES. dev: sentences with gold tags; those of the run's config where None. Tags are compared with
    PyTorch's on up to COMPARED_SENTENCES of them, on none that int8 was calibrated on. onnx.json beside the file
    says how they compare, and that it does not tag by default where its strict F1 is more than LARGEST_LOSS under
    PyTorch's. Raises UserError, OSError.
    """
    folder = model_folder(run)
    loaded = _load(run)
    dev = _dev_sentences(folder.parent) if dev is None else dev
    with tempfile.TemporaryDirectory() as temporary:
        (written,) = _write_compared([kind], loaded, dev, folder.parent, Path(temporary))
        for name in ("onnx.json", *FILES.values()):  # a model folder has one file, and what is known of that one
            (folder / name).unlink(missing_ok=True)
        record = {"format_version": RECORD_VERSION, **asdict(written)}  # before the file: it may not be the default
        files.write_text(folder / "onnx.json", json.dumps(record, indent=1) + "\n")
        with files.replacing(folder / written.file) as target:
            shutil.copyfile(Path(temporary) / written.file, target)
    return written


def _write_compared(
    kinds: list[str], loaded: tuple[Any, Any, dict[str, Any]], dev: list[Sentence], run: Path, folder: Path
) -> list[OnnxFile]:
    """Write an ONNX file of each kind into a folder, and compare each with PyTorch.

    loaded: (model, tokenizer, meta). dev: sentences to calibrate on and to compare scores on; where there are none,
    texts that the run has tagged are calibrated on, and no scores are compared. Raises UserError.
    """
    model, tokenizer, meta = loaded
    calibration, compared = _split(dev)
    texts = [sentence.units for sentence in calibration] or _tagged_texts(run)
    samples = _samples(texts, tokenizer, meta)
    files_by_kind = {"fp32": onnx_writer.write_fp32(model, meta["labels"], samples, folder)}
    if "int8" in kinds:  # made from the float32 file
        files_by_kind["int8"] = onnx_writer.write_int8(model, meta["labels"], samples, folder)
    written = [files_by_kind[kind] for kind in kinds]
    if compared:
        torch_tags = _tags(Tagger(model, tokenizer, meta), compared)
        for row in written:
            engine = OnnxEngine(folder / row.file, meta["labels"])
            _compare_on_dev(row, _tags(Tagger(engine, tokenizer, meta), compared), torch_tags, compared)
    return written


def export_finished(run: str | Path, kind: str, dev: list[Sentence]) -> None:
    """Write the ONNX file that the config's `export` asks for, at the end of a run; log what came of it.

    Never raises for what the run itself does not need: a model that cannot be exported is tagged by PyTorch.
    """
    if kind == "none":
        return
    try:
        written = write_onnx(run, kind, dev)
    except Exception as error:  # whatever the tracer cannot do with an encoder; the run is whole without it
        log.warning("no ONNX file was written, PyTorch will tag: %s", first_line(error))
        return
    log.info("onnx: %s", written.line())
    if not written.default:
        log.warning(
            "%s scores more than %.1f points under PyTorch, so PyTorch tags by default; --engine onnx takes the file",
            written.file,
            100 * LARGEST_LOSS,
        )


def as_trained(tokenizer: Any, meta: dict[str, Any]) -> Any:
    """Make the tokenizer cut whole texts as ner.windows cuts them: by characters, with the same special tokens.

    WordPiece takes 1998 for one token, where this model was trained on four.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if not meta["special_tokens"]:
        state["post_processor"] = None
    if meta["unit"] == "character" and '"Metaspace"' not in json.dumps(state["pre_tokenizer"]):
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        rest = [state["pre_tokenizer"]] if state["pre_tokenizer"] else []
        state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *rest]}
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    tokenizer.model_max_length = min(tokenizer.model_max_length, meta["max_length"])
    return tokenizer


def _load(run: str | Path) -> tuple[Any, Any, dict[str, Any]]:
    """Load a model to be exported, in float32 with plain attention. Raises UserError where it cannot be."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install onnx onnxruntime") from None
    model, tokenizer, meta = saved_model.load(run, merged=True, attention="eager")
    _refuse_virtual_tokens(meta, "exported")
    return model, tokenizer, meta


def _split(dev: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Return the sentences of dev to calibrate on, and those to compare tags on: no text is in both."""
    sample = Random(0).sample(dev, min(len(dev), SAMPLES + COMPARED_SENTENCES))
    count = min(SAMPLES, int(len(sample) * SAMPLE_SHARE))
    calibration = sample[:count]
    texts = {tuple(sentence.units) for sentence in calibration}
    return calibration, [sentence for sentence in sample[count:] if tuple(sentence.units) not in texts]


def _tags(tagger: Tagger, sentences: list[Sentence]) -> list[list[str]]:
    """Return the tags that the tagger gives each sentence."""
    return [tags for tags, _, _ in tagger.tag([sentence.units for sentence in sentences])]


def _compare_on_dev(written: OnnxFile, tags: list[list[str]], torch_tags: list[list[str]], dev: list[Sentence]) -> None:
    """Note in `written` how the file's tags of dev compare with PyTorch's, and whether it is the default."""
    gold = [sentence.tags for sentence in dev]
    f1, torch_f1 = score(gold, tags)["micro"]["f1"], score(gold, torch_tags)["micro"]["f1"]
    pairs = [pair for rows in zip(tags, torch_tags, strict=True) for pair in zip(*rows, strict=True)]
    written.same_tags = sum(tag == torch_tag for tag, torch_tag in pairs) / max(1, len(pairs))
    written.sentences, written.f1, written.torch_f1 = len(dev), f1, torch_f1
    written.default = f1 >= torch_f1 - LARGEST_LOSS


def _dev_sentences(run: Path) -> list[Sentence]:
    """Return the sentences of the run's dev file; none, with a warning that says why, where it cannot be read."""
    try:
        return formats.read(_dev_path(run), "dev").sentences
    except UserError as error:
        log.warning("scores are not compared on dev sentences: %s", error)
        return []


def _dev_path(run: Path) -> str:
    """Return the path of the run's dev file. Raises UserError where there is none on this disk."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml that names a dev file")
    dev = settings.load_run(run).dev
    if dev is None:
        raise UserError(f"{run / 'config.yaml'} names no dev file")
    if dev.startswith("hub:"):
        raise UserError(f"{dev} is not on this disk")
    return str(settings.resolve_path(dev) or dev)


def _tagged_texts(run: Path) -> list[list[str]]:
    """Return the characters of the first sentences that the run has tagged, none where it has tagged none."""
    file = run / "predictions.jsonl"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:  # not splitlines(): JSON may hold U+2028 and U+0085 as they are
        return [json.loads(line)["chars"] for line in islice(lines, SAMPLES)]


def _samples(texts: list[list[str]], tokenizer: Any, meta: dict[str, Any]) -> list[Arrays]:
    """Return batches of (input_ids, attention_mask), int64 [SAMPLE_BATCH, length], of at most SAMPLES texts.

    Where there is no text the tokens are noise, which is enough to trace a graph.
    """
    longest = min(meta["max_length"], LONGEST_SAMPLE)
    rows = [
        tokenizer(chars, is_split_into_words=True, truncation=True, max_length=longest).input_ids or [0]
        for chars in texts[:SAMPLES]
    ]
    if not rows:
        noise = np.random.default_rng(0)
        rows = [noise.integers(0, len(tokenizer), noise.integers(1, longest + 1)).tolist() for _ in range(SAMPLES)]
    pad = tokenizer.pad_token_id or 0
    return [_padded(rows[start : start + SAMPLE_BATCH], pad) for start in range(0, len(rows), SAMPLE_BATCH)]


def _padded(rows: list[list[int]], pad: int) -> Arrays:
    length = max(map(len, rows))
    ids = [row + [pad] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {"input_ids": np.array(ids, np.int64), "attention_mask": np.array(mask, np.int64)}


def _check_new(folder: str | Path) -> None:
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise UserError(f"{folder}: already exists; name a folder that does not")


def _refuse_virtual_tokens(meta: dict[str, Any], what: str) -> None:
    if TUNINGS[meta["tuning"]].virtual_tokens:
        raise UserError(f"tuning {meta['tuning']} cannot be {what}: its virtual tokens are no weights of the encoder")
