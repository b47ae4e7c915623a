"""A finished run → what is handed on: a merged transformers folder, ONNX files, a model card, an upload.

The commands are model.py's: `python model.py merge RUN DIR`, `python model.py export RUN DIR [--int8]`.
"""

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

from ner import config as settings
from ner import encoder
from ner import model as models
from ner.errors import UserError
from ner.paths import portable_path
from ner.tunings import TUNINGS

OPSET = 17
FURTHEST = 1e-3  # the most by which an ONNX logit may differ from torch's
CARD = """---
{head}
---
# {name}

Finds {types} in text. The encoder `{pretrained}`, tuned by {tuning}.

## Data

{data}
{scores}
## How to load it

With the suite that trained it, where FOLDER is this one:

```python
import predict
predict.load(FOLDER).predict(["…"])
```

{load}
Labels, in the order of the logits: {labels}

## Config

```yaml
{config}```
"""
LOAD_PLAIN = """With transformers:

```python
from transformers import pipeline
pipeline("token-classification", model=FOLDER, aggregation_strategy="simple")("…")
```
"""
LOAD_ADAPTER = """With peft:

```python
from peft import AutoPeftModelForTokenClassification
AutoPeftModelForTokenClassification.from_pretrained(FOLDER, num_labels={count})
```
"""
VIRTUAL_NOTE = """
There, the first {tokens} logits of each sentence are those of the virtual tokens: drop them.
"""


def merge(run, folder) -> Path:
    """Writes the model of `run` as a plain transformers folder: adapter and encoder in one, tokenizer beside them.

    run: a run folder or its model folder. Returns `folder`, which must be new. Raises UserError.
    """
    _check_new(folder)
    model, tokenizer, meta = models.load(run, merged=True)
    _refuse_virtual(meta, "merged")
    meta = {**meta, "tuning": "full", "pretrained": str(Path(folder).absolute())}
    models.save(model, _as_trained(tokenizer, meta), meta, folder)
    return Path(folder)


def export(run, folder, format: str = "onnx", int8: bool = False) -> dict:
    """Writes the model of `run` as model.onnx (and model_int8.onnx), with tokenizer and labels beside it.

    The graph takes input_ids and attention_mask, int64 [B, L], and gives logits, float32 [B, L, labels], for every B
    and L up to max_length. Both files are run and held against torch before this returns {file name: what was found}.
    Raises UserError where a logit of the float32 file is off by more than FURTHEST, or onnx is not installed.
    """
    if format != "onnx":
        raise UserError(f"--format {format}: expected onnx")
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise UserError(f"export needs {error.name}: pip install onnx onnxruntime") from None
    import torch

    _check_new(folder)
    model, tokenizer, meta = models.load(run, merged=True, attention="eager")
    _refuse_virtual(meta, "exported")
    folder, found = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    batches = _samples(Path(run), tokenizer, meta)
    names, sizes = ["input_ids", "attention_mask"], {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about branches; the check below is what counts
        torch.onnx.export(
            Logits().eval(), batches[0], str(folder / "model.onnx"), input_names=names, output_names=["logits"],
            dynamic_axes=dict.fromkeys([*names, "logits"], sizes), opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source, target = folder / "model.onnx", folder / "model_int8.onnx"
        logging.disable(logging.WARNING)  # advice on convolutions, for a file that has none
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
        logging.disable(logging.NOTSET)
    for file in sorted(folder.glob("*.onnx")):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        furthest, same, units = 0.0, 0, 0
        for ids, mask in batches:
            with torch.no_grad():
                wanted = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
            feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
            got = torch.from_numpy(session.run(["logits"], feed)[0])[mask.bool()]
            furthest = max(furthest, (got - wanted).abs().max().item())
            same += (got.argmax(-1) == wanted.argmax(-1)).sum().item()
            units += len(wanted)
        found[file.name] = {"furthest_logit": furthest, "same_tags": same / units, "bytes": file.stat().st_size}
        if file.name == "model.onnx" and not furthest <= FURTHEST:
            shutil.rmtree(folder)
            raise UserError(f"{file}: its logits differ from torch's by up to {furthest:g}, so it was removed; this "
                            f"encoder ({model.config.model_type}) cannot be exported")  # fmt: skip
    _as_trained(tokenizer, meta).save_pretrained(folder)
    model.config.save_pretrained(folder)
    (folder / "ner.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return found


def write_card(run) -> Path:
    """Writes RUN/model/README.md: data, scores, config, how to load the model. Returns its path. Raises UserError."""
    run = Path(run)
    meta = models.read_meta(run / "model")
    config = settings.load_run(run)
    shown = {key: _public(getattr(config, key)) for key in ("train", "dev", "test", "pretrained", "output")}
    adapter = TUNINGS[meta["tuning"]].adapter is not None
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "token-classification",
        "tags": ["named-entity-recognition", meta["tuning"]],
    }
    if not Path(meta["pretrained"]).is_absolute():
        head["base_model"] = meta["pretrained"]
    types = ", ".join(sorted({label[2:] for label in meta["labels"] if label != "O"}))
    data = "\n".join(f"- {name}: `{shown[name]}`" for name in ("train", "dev", "test") if shown[name])
    test = encoder.read_json(run / "test.json") if (run / "test.json").is_file() else None
    text = CARD.format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        name=_public(run.name), types=types, pretrained=shown["pretrained"], tuning=meta["tuning"], data=data,
        scores=_score_table("Scores on test", test) + _score_table("Best epoch, on dev", _best_dev(run)),
        load=(LOAD_ADAPTER if adapter else LOAD_PLAIN).format(count=len(meta["labels"])) + VIRTUAL_NOTE.format(
            tokens=meta["virtual_tokens"]) * TUNINGS[meta["tuning"]].virtual_logits,
        labels=" ".join(meta["labels"]), config=settings.dump(config.model_copy(update=shown)),
    )  # fmt: skip
    path = run / "model" / "README.md"
    path.write_text(text, "utf-8")
    return path


def push(run, name: str) -> str:
    """Uploads the run's model and card to the hub as `name`; returns where it is.

    What is uploaded loads by itself: an adapter whose encoder is on the hub goes alone, one whose encoder is a local
    folder goes merged, or with its encoder where it cannot be merged. Raises UserError.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    run, endpoint = Path(run), constants.ENDPOINT
    meta, card = models.read_meta(run / "model"), write_card(run)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        adapter, local = (run / "model" / "adapter_config.json").exists(), Path(meta["pretrained"]).is_absolute()
        if adapter and local and not TUNINGS[meta["tuning"]].virtual_tokens:
            merge(run, folder)
            text = card.read_text("utf-8").replace(LOAD_ADAPTER.format(count=len(meta["labels"])), LOAD_PLAIN)
            (folder / "README.md").write_text(text.replace('"peft"', '"transformers"', 1), "utf-8")
        else:
            shutil.copytree(run / "model", folder, ignore=None if local else shutil.ignore_patterns("encoder"))
        base = "encoder" if local else meta["pretrained"]  # not where it lies on this machine
        for file, key in (("ner.json", "pretrained"), ("adapter_config.json", "base_model_name_or_path")):
            if (folder / file).exists():
                values = encoder.read_json(folder / file) | {key: base}
                (folder / file).write_text(json.dumps(values, ensure_ascii=False, indent=1) + "\n", "utf-8")
        api = hub.HfApi(endpoint=endpoint)
        try:
            with encoder.quiet():
                url = api.create_repo(name, exist_ok=True)
                api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="A tagger and its card")
        except Exception as error:  # no network, no rights, a wrong name, a full quota
            reason = encoder.first_line(error)
            if isinstance(error, errors.LocalTokenNotFoundError) or "401" in reason or "403" in reason:
                reason += "; run `hf auth login` or set HF_TOKEN to a token that may write there"
            raise UserError(f"--push_to_hub {name}: {endpoint} did not take it: {reason}; the run is whole, and "
                            f"{run / 'model'} can be uploaded later by `hf upload`") from None  # fmt: skip
    return str(url)


def main(argv: list[str]) -> None:
    """The command line of model.py."""
    parser = argparse.ArgumentParser("python model.py", description="Hands the model of a run on.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("merge", "write a plain transformers folder"), ("export", "write ONNX, held against torch")):
        one = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        one.add_argument("run", metavar="RUN", help="a run folder or its model folder")
        one.add_argument("folder", metavar="DIR", help="a new folder")
        if name == "export":
            one.add_argument("--format", default="onnx", help="onnx, the only one there is")
            one.add_argument("--int8", action="store_true", help="write model_int8.onnx too: a quarter of the size")
    given = parser.parse_args(argv)
    try:
        if given.command == "merge":
            print(f"merged: {merge(given.run, given.folder)}")
            return
        for file, row in export(given.run, given.folder, given.format, given.int8).items():
            print(f"{Path(given.folder) / file}: {row['bytes'] / 1e6:.1f} MB, logits within "
                  f"{row['furthest_logit']:.2g} of torch's, {row['same_tags']:.2%} of the tags the same")  # fmt: skip
    except OSError as error:
        raise UserError(f"{error.filename or given.folder}: cannot be written: {error.strerror or error}") from None


def _as_trained(tokenizer, meta: dict):
    """The tokenizer made to cut whole texts as loader.py cuts them: by characters, with the same special tokens.

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


def _samples(run: Path, tokenizer, meta: dict) -> list:
    """Two batches (input_ids, attention_mask), int64 [8, L]: test sentences of the run, else random tokens."""
    import torch

    file, most = run / "predictions.jsonl", min(meta["max_length"], 128)
    ids = []
    if file.is_file():
        for line in file.read_text("utf-8").splitlines()[:16]:
            text = ("" if meta["unit"] == "character" else " ").join(json.loads(line)["chars"])
            ids.append(tokenizer(text, truncation=True, max_length=most).input_ids or [0])
    generator = torch.Generator().manual_seed(0)
    while len(ids) < 16:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        ids.append(torch.randint(0, len(tokenizer), (length,), generator=generator).tolist())
    batches = []
    for part in (ids[:8], ids[8:]):
        length = max(map(len, part))
        padded = [one + [tokenizer.pad_token_id or 0] * (length - len(one)) for one in part]
        mask = [[1] * len(one) + [0] * (length - len(one)) for one in part]
        batches.append((torch.tensor(padded), torch.tensor(mask)))
    return batches


def _check_new(folder) -> None:
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise UserError(f"{folder}: already exists; name a folder that does not")


def _refuse_virtual(meta: dict, done: str) -> None:
    if TUNINGS[meta["tuning"]].virtual_tokens:
        raise UserError(f"tuning {meta['tuning']} cannot be {done}: its virtual tokens are no weights of the encoder")


def _public(path: str | None) -> str | None:
    """A path as a stranger may see it: without the folders of this machine."""
    path = portable_path(path) if path else None
    return Path(path).name if path and Path(path).is_absolute() else path


def _score_table(title: str, scores: dict | None) -> str:
    if not scores:
        return ""
    rows = list(scores["types"].items()) + [(name, scores[name]) for name in ("micro", "macro", "weighted")]
    lines = [f"| {name} | {row['precision']:.4f} | {row['recall']:.4f} | {row['f1']:.4f} | {row['support']} |"
             for name, row in rows]  # fmt: skip
    header = "| whole entities, strict | precision | recall | F1 | support |\n|---|---|---|---|---|\n"
    return f"\n## {title}\n\n{header}" + "\n".join(lines) + "\n"


def _best_dev(run: Path) -> dict | None:
    if not (run / "metrics.jsonl").is_file():
        return None
    epochs = [json.loads(line)["dev"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return max(epochs, key=lambda scores: scores["micro"]["f1"], default=None)
