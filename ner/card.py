"""A run → the model card, README.md of its model folder: data, scores, config, how to load the model."""

import json
from pathlib import Path
from typing import Any

from ner import config as settings
from ner import files
from ner.json_file import read_object
from ner.meta import read_meta
from ner.paths import portable_path
from ner.progress import best_epoch
from ner.tunings import TUNINGS

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
LOAD_WITH_TRANSFORMERS = """With transformers:

```python
from transformers import pipeline
pipeline("token-classification", model=FOLDER, aggregation_strategy="simple")("…")
```
"""
LOAD_WITH_PEFT = """With peft:

```python
from peft import AutoPeftModelForTokenClassification
AutoPeftModelForTokenClassification.from_pretrained(FOLDER, num_labels={count})
```
"""
VIRTUAL_LOGITS_NOTE = """
There, the first {tokens} logits of each sentence are those of the virtual tokens: drop them.
"""


def write_card(run: str | Path) -> Path:
    """Write RUN/model/README.md and return its path. Raises UserError, OSError."""
    path = Path(run) / "model" / "README.md"
    files.write_text(path, card_text(run))
    return path


def card_text(run: str | Path, merged: bool = False) -> str:
    """Return the card of a run; merged: of its model once adapter and encoder are one. Raises UserError."""
    run = Path(run)
    meta = read_meta(run / "model")
    tuning = TUNINGS[meta["tuning"]]
    config = settings.load_run(run)
    public = {key: _public(getattr(config, key)) for key in ("train", "dev", "test", "pretrained", "output")}
    is_adapter = tuning.adapter is not None and not merged
    load = LOAD_WITH_PEFT.format(count=len(meta["labels"])) if is_adapter else LOAD_WITH_TRANSFORMERS
    if tuning.virtual_logits:
        load += VIRTUAL_LOGITS_NOTE.format(tokens=meta["virtual_tokens"])
    return CARD.format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in _head(meta, is_adapter).items()),
        name=_public(run.name),
        types=", ".join(sorted({label[2:] for label in meta["labels"] if label != "O"})),
        pretrained=public["pretrained"],
        tuning=meta["tuning"],
        data="\n".join(f"- {part}: `{public[part]}`" for part in ("train", "dev", "test") if public[part]),
        scores=_score_table("Scores on test", _test_scores(run)) + _score_table("Best epoch, on dev", _best_dev(run)),
        load=load,
        labels=" ".join(meta["labels"]),
        config=settings.dump(config.model_copy(update=public)),
    )


def _head(meta: dict[str, Any], is_adapter: bool) -> dict[str, Any]:
    """The hub's metadata at the head of a card."""
    head: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "token-classification",
        "tags": ["named-entity-recognition", meta["tuning"]],
    }
    if not Path(meta["pretrained"]).is_absolute():
        head["base_model"] = meta["pretrained"]
    return head


def _public(path: str | None) -> str | None:
    """A path as a stranger may see it: within the project, or without the folders of this machine."""
    path = portable_path(path) if path else None
    return Path(path).name if path and Path(path).is_absolute() else path


def _score_table(title: str, scores: dict[str, Any] | None) -> str:
    if not scores:
        return ""
    rows = list(scores["types"].items()) + [(name, scores[name]) for name in ("micro", "macro", "weighted")]
    lines = [
        f"| {name} | {row['precision']:.4f} | {row['recall']:.4f} | {row['f1']:.4f} | {row['support']} |"
        for name, row in rows
    ]
    header = "| whole entities, strict | precision | recall | F1 | support |\n|---|---|---|---|---|\n"
    return f"\n## {title}\n\n{header}" + "\n".join(lines) + "\n"


def _test_scores(run: Path) -> dict[str, Any] | None:
    return read_object(run / "test.json") if (run / "test.json").is_file() else None


def _best_dev(run: Path) -> dict[str, Any] | None:
    if not (run / "metrics.jsonl").is_file():
        return None
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    best = best_epoch(history)
    return next((line["dev"] for line in history if line["epoch"] == best), None)
