"""A finished run → what other programs load: a merged transformers folder, ONNX files.

The ONNX file in a run's own model folder is what predict.py tags with on a CPU (write_onnx). Each file is run and
compared with PyTorch before it is kept.
"""

import json
import logging
import shutil
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ner import files
from ner import model as models
from ner.corpus import Sentence, sample
from ner.errors import UserError
from ner.meta import model_folder, write_meta
from ner.tunings import TUNINGS

if TYPE_CHECKING:
    from ner.tagging import Tagger

log = logging.getLogger("__main__")  # the run's log
OPSET = 17
INPUTS = ["input_ids", "attention_mask"]
FILES = {"int8": "model_int8.onnx", "fp32": "model.onnx"}
RECORD_VERSION = 1  # of onnx.json
LARGEST_ERROR = 1e-3  # by which a logit of the float32 file may differ from PyTorch's
LARGEST_LOSS = 0.003  # of strict F1 on dev that the file may have against PyTorch, to be what tags by default
COMPARED_SENTENCES = 1000  # of dev, at most
SAMPLES, LONGEST_SAMPLE = 32, 128  # sentences that the graph is traced, calibrated and checked on; their tokens

Arrays = dict[str, np.ndarray]


@dataclass
class OnnxFile:
    """What is known of a written ONNX file; what onnx.json holds of it.

    same_tags: share of the tokens (or of dev's characters) with PyTorch's tag. f1, torch_f1: strict micro-F1 on dev,
    None where there were no dev sentences. default: the file tags by default, as it is no worse than PyTorch.
    """

    file: str
    bytes: int
    largest_logit_error: float
    same_tags: float
    sentences: int = 0
    f1: float | None = None
    torch_f1: float | None = None
    default: bool = True

    def line(self) -> str:
        """Return one line that says how the file compares with PyTorch."""
        text = f"{self.file}, {self.bytes / 1e6:.1f} MB, {self.same_tags:.2%} of the tags as PyTorch's"
        if self.f1 is None or self.torch_f1 is None:
            return f"{text}; not compared on dev sentences, as there are none"
        return f"{text}; strict F1 on {self.sentences} sentences of dev {self.f1:.4f}, PyTorch's {self.torch_f1:.4f}"


def merge(run: str | Path, folder: str | Path) -> Path:
    """Write the model of `run` as a plain transformers folder: adapter and encoder in one, tokenizer beside them.

    run: a run folder or its model folder. Returns `folder`, which must be new. Raises UserError.
    """
    _check_new(folder)
    model, tokenizer, meta = models.load(run, merged=True)
    _refuse_virtual_tokens(meta, "merged")
    meta = {**meta, "tuning": "full", "pretrained": str(Path(folder).absolute()), "encoder_sha256": {}}
    models.save(model, as_trained(tokenizer, meta), meta, folder)
    return Path(folder)


def export(run: str | Path, folder: str | Path, int8: bool = False) -> list[OnnxFile]:
    """Write the model of `run` as model.onnx (and model_int8.onnx) into a new folder, tokenizer and labels beside it.

    The graph takes input_ids and attention_mask, int64 [B, L], and gives logits, float32 [B, L, labels], for every B
    and L up to max_length. Raises UserError where a logit differs from PyTorch's by more than LARGEST_ERROR.
    """
    _check_new(folder)
    model, tokenizer, meta = _load(run)
    samples = _samples(Path(run), tokenizer, meta)
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as temporary:
        written = [_write_fp32(model, meta, samples, Path(temporary))]
        if int8:
            written.append(_write_int8(model, meta, samples, Path(temporary)))
        folder.mkdir(parents=True, exist_ok=True)
        for row in written:
            shutil.copyfile(Path(temporary) / row.file, folder / row.file)
    as_trained(tokenizer, meta).save_pretrained(folder)
    model.config.save_pretrained(folder)
    write_meta(folder, meta)
    return written


def write_onnx(run: str | Path, kind: str = "int8", dev: list[Sentence] | None = None) -> OnnxFile:
    """Write the model of `run` into its own model folder as an ONNX file, for tagging on a CPU.

    kind: a key of FILES. dev: sentences with gold tags; those of the run's config where None. Tags are compared with
    PyTorch's on up to COMPARED_SENTENCES of them. onnx.json beside the file says how they compare, and that it does not
    tag by default where its strict F1 is more than LARGEST_LOSS under PyTorch's. Raises UserError, OSError.
    """
    folder = model_folder(run)
    model, tokenizer, meta = _load(run)
    dev = sample(_dev_sentences(folder.parent) if dev is None else dev, COMPARED_SENTENCES, seed=0)
    samples = _samples(folder.parent, tokenizer, meta, dev)
    with tempfile.TemporaryDirectory() as temporary:
        row = _write_fp32(model, meta, samples, Path(temporary))
        if kind == "int8":
            row = _write_int8(model, meta, samples, Path(temporary))
        if dev:
            _compare_on_dev(row, Path(temporary) / row.file, model, tokenizer, meta, dev)
        for name in ("onnx.json", *FILES.values()):  # a model folder has one file, and what is known of that one
            (folder / name).unlink(missing_ok=True)
        with files.replacing(folder / row.file) as target:
            shutil.copyfile(Path(temporary) / row.file, target)
    record = {"format_version": RECORD_VERSION, **asdict(row)}
    files.write_text(folder / "onnx.json", json.dumps(record, indent=1) + "\n")
    return row


def export_finished(run: str | Path, kind: str, dev: list[Sentence]) -> None:
    """Write the ONNX file that the config's `export` asks for, at the end of a run; log what came of it.

    Never raises for what the run itself does not need: a model that cannot be exported is tagged by PyTorch.
    """
    if kind == "none":
        return
    try:
        row = write_onnx(run, kind, dev)
    except Exception as error:  # whatever the tracer cannot do with an encoder; the run is whole without it
        log.warning("no ONNX file was written, PyTorch will tag: %s", models.encoder.first_line(error))
        return
    log.info("onnx: %s", row.line())
    if not row.default:
        log.warning(
            "%s scores more than %.1f points under PyTorch, so PyTorch tags by default; --engine onnx takes the file",
            row.file,
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
    model, tokenizer, meta = models.load(run, merged=True, attention="eager")
    _refuse_virtual_tokens(meta, "exported")
    return model, tokenizer, meta


def _write_fp32(model: Any, meta: dict[str, Any], samples: list[Arrays], folder: Path) -> OnnxFile:
    """Trace the model to folder/model.onnx and compare the logits. Raises UserError where they differ."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    kind, file = model.config.model_type, folder / FILES["fp32"]
    sizes = {0: "batch", 1: "length"}
    example = tuple(torch.from_numpy(samples[0][name]) for name in INPUTS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about branches; the check below is what counts
            torch.onnx.export(
                Logits().eval(),
                example,
                str(file),
                input_names=INPUTS,
                output_names=["logits"],
                dynamic_axes=dict.fromkeys([*INPUTS, "logits"], sizes),
                opset_version=OPSET,
                dynamo=False,
            )
        _add_labels(file, meta)
        row = _compare_logits(file, model, samples)
    except Exception as error:  # the tracer and ONNX Runtime raise what they like
        reason = models.encoder.first_line(error)
        raise UserError(f"this encoder ({kind}) cannot be exported to ONNX: {reason}") from None
    if not row.largest_logit_error <= LARGEST_ERROR:
        raise UserError(
            f"this encoder ({kind}) cannot be exported to ONNX: the file's logits differ from PyTorch's by up to "
            f"{row.largest_logit_error:g}"
        )
    return row


def _write_int8(model: Any, meta: dict[str, Any], samples: list[Arrays], folder: Path) -> OnnxFile:
    """Write folder/model_int8.onnx from the model.onnx that lies there."""
    from ner.quantize import quantize

    file = folder / FILES["int8"]
    quantize(folder / FILES["fp32"], file, samples)
    _add_labels(file, meta)
    return _compare_logits(file, model, samples)


def _add_labels(file: Path, meta: dict[str, Any]) -> None:
    """Put the labels into the file's own metadata, so that a file of another model is noticed."""
    import onnx

    model = onnx.load(str(file))
    onnx.helper.set_model_props(model, {"labels": json.dumps(meta["labels"], ensure_ascii=False)})
    onnx.save(model, str(file))


def _compare_logits(file: Path, model: Any, samples: list[Arrays]) -> OnnxFile:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest, same, tokens = 0.0, 0, 0
    for inputs in samples:
        mask = inputs["attention_mask"].astype(bool)
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()[mask]
        logits = session.run(["logits"], inputs)[0][mask]
        largest = max(largest, float(np.abs(logits - expected).max()))
        same += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        tokens += len(expected)
    return OnnxFile(file.name, file.stat().st_size, largest, same / tokens)


def _compare_on_dev(
    row: OnnxFile, file: Path, model: Any, tokenizer: Any, meta: dict[str, Any], dev: list[Sentence]
) -> None:
    """Tag dev with the file and with PyTorch; note in `row` how they compare and whether it is the default."""
    from ner.engines import OnnxEngine
    from ner.scores import score
    from ner.tagging import Tagger

    def tags_of(tagger: "Tagger") -> list[list[str]]:
        return [tags for tags, _, _ in tagger.tag([sentence.chars for sentence in dev])]

    tags = tags_of(Tagger(OnnxEngine(file, meta["labels"]), tokenizer, meta))
    expected = tags_of(Tagger(model, tokenizer, meta))
    gold = [sentence.tags for sentence in dev]
    row.f1, row.torch_f1 = (score(gold, one)["micro"]["f1"] for one in (tags, expected))
    pairs = [pair for one, other in zip(tags, expected, strict=True) for pair in zip(one, other, strict=True)]
    row.same_tags = sum(one == other for one, other in pairs) / max(1, len(pairs))
    row.sentences = len(dev)
    row.default = row.f1 >= row.torch_f1 - LARGEST_LOSS


def _dev_sentences(run: Path) -> list[Sentence]:
    """Return the sentences of the run's dev file; none where there is no run around the model, or no file any more."""
    from ner import config as settings
    from ner import formats

    if not (run / "config.yaml").is_file():
        return []
    config = settings.load_run(run)
    path = settings.resolve_path(config.dev) if config.dev and not config.dev.startswith("hub:") else None
    try:
        return formats.read(str(path), "dev").sentences if path else []
    except UserError as error:
        log.warning("dev is not compared: %s", error)
        return []


def _samples(run: Path, tokenizer: Any, meta: dict[str, Any], dev: list[Sentence] | None = None) -> list[Arrays]:
    """Return batches of eight (input_ids, attention_mask), int64 [8, L]: sentences where there are some, else noise.

    The sentences are dev's, else those of the run's predictions.
    """
    longest = min(meta["max_length"], LONGEST_SAMPLE)
    sentences = [sentence.chars for sentence in sample(dev or [], SAMPLES, seed=0)]
    if not sentences and (run / "predictions.jsonl").is_file():
        lines = (run / "predictions.jsonl").read_text("utf-8").splitlines()[:SAMPLES]
        sentences = [json.loads(line)["chars"] for line in lines]
    rows = [
        tokenizer(chars, is_split_into_words=True, truncation=True, max_length=longest).input_ids or [0]
        for chars in sentences
    ]
    draw = np.random.default_rng(0)
    while len(rows) < SAMPLES:
        rows.append(draw.integers(0, len(tokenizer), draw.integers(1, longest + 1)).tolist())
    return [_padded(rows[start : start + 8], tokenizer.pad_token_id or 0) for start in range(0, SAMPLES, 8)]


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
