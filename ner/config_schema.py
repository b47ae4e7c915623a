"""The keys of config.yaml: default, type, bounds and one sentence about each, in the order in which a user meets them.

The sentences are the comments of config.yaml and the text of --help. A new key is a new line here.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic

from ner.tunings import TUNINGS

GROUPS = {  # the first key of each group -> what the group is called
    "train": "Everyday: what a run usually changes.",
    "max_train_sentences": "Tuning: how the model learns. The defaults suit the encoder and the tuning method.",
    "special_tokens": "Expert: rarely worth a change.",
}
FEWEST_EPOCHS, MOST_EPOCHS = 3, 12  # that epochs: auto takes
SAMPLE = 8000  # sentences of the default corpus that max_train_sentences: auto takes
RUN_NAME = r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$"

if TYPE_CHECKING:
    TuningName = str
else:
    TuningName = Literal[tuple(TUNINGS)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _key(default: Any, sentence: str, **bounds: Any) -> Any:
    return pydantic.Field(default, description=sentence, **bounds)


class Lora(_Strict):
    """The group `lora:`."""

    r: int = _key(16, "Rank: the width of the adapter.", ge=1)
    alpha: float = _key(32, "Scale: the adapter's output is multiplied by alpha / r.", gt=0)
    dropout: float = _key(0.0, "Dropout before the adapter, while training.", ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[list[str], pydantic.Field(min_length=1)] | None = _key(
        "all-linear", "Layers with an adapter: all-linear, a list like [query, value], or null: peft's choice."
    )
    bias: Literal["none", "all", "lora_only"] = _key("none", "Biases that are trained too: none, all or lora_only.")


class Config(_Strict):
    """All keys of a run. See ner.config.load for what replaces `auto` and null."""

    train: str = _key("data/msra/train", "Labelled sentences to train on: a file, or hub:NAME.", min_length=1)
    dev: str | None = _key(
        "data/msra/dev", "Labelled sentences that pick the best epoch; null holds 5% of train out.", min_length=1
    )
    test: str | None = _key(
        "data/msra/test", "Labelled sentences that are scored once, at the end; null for none.", min_length=1
    )
    pretrained: str = _key("data/encoder", "Pretrained encoder: a folder, or a name on the hub.", min_length=1)
    tuning: TuningName = _key("lora", f"Method: {', '.join(TUNINGS)}.")
    epochs: Annotated[int, pydantic.Field(ge=1)] | Literal["auto"] = _key(
        "auto", f"Passes over train; auto: {FEWEST_EPOCHS} to {MOST_EPOCHS}, the more the smaller train is."
    )
    batch_size: int = _key(16, "Windows in a batch: sentences, or parts of long ones.", ge=1)
    output: str = _key("output", "Folder that holds all runs.", min_length=1)

    max_train_sentences: Annotated[int, pydantic.Field(ge=1)] | Literal["auto"] | None = _key(
        "auto", f"Sample at most this many sentences; null: all; auto: {SAMPLE} of data/msra, else all."
    )
    learning_rate: float | None = _key(None, "Peak learning rate; null takes what suits tuning and encoder.", gt=0)
    head_factor: float | None = _key(
        None, "Learning rate of the new head, in multiples of learning_rate; null takes what suits.", gt=0
    )
    lora: Lora = _key(Lora(), "The adapter of lora, dora, rslora and adalora.")
    virtual_tokens: int = _key(10, "How many virtual tokens prompt, prefix and ptuning put before the text.", ge=1)
    max_length: int = _key(256, "Tokens in a window; a longer sentence becomes several, none is cut off.", ge=8)
    dropout: float | None = _key(
        None, "Dropout of encoder and head, while training; null: the encoder's own (data/encoder: 0).", ge=0, lt=1
    )
    weight_decay: float = _key(0.01, "AdamW's weight decay, on matrices only.", ge=0)
    warmup_ratio: float = _key(
        0.1, "Share of the steps in which the learning rate rises; after it, it falls to 0.", ge=0, le=1
    )
    averaging: bool = _key(
        True, "true: score and save a running average of the weights, which is steadier than the last."
    )
    decode: Literal["argmax", "viterbi"] = _key(
        "viterbi", "viterbi: the best tags that are well-formed IOB2; argmax: each character's likeliest."
    )
    head: Literal["softmax", "crf"] = _key(
        "crf", "crf: also learns transition scores between tags; softmax: each tag by itself."
    )
    crf_learning_rate: float = _key(1e-2, "Peak learning rate of the CRF's transition scores.", gt=0)
    loss: Literal["cross_entropy", "focal"] = _key(
        "cross_entropy", "For head softmax: cross_entropy, or focal, which counts easy characters less."
    )
    label_smoothing: float = _key(
        0.0, "For head softmax: the share of a gold tag's weight that is spread over all tags.", ge=0, lt=1
    )
    adversarial: Literal["none", "fgm"] = _key(
        "none", "none, or fgm: each step also trains on embeddings perturbed to raise the loss."
    )
    adversarial_epsilon: float = _key(
        1.0, "L2 norm of the perturbation that fgm adds to the embeddings of a window.", gt=0
    )

    special_tokens: bool = _key(True, "true: put [CLS] and [SEP] around each window, as in pretraining.")
    accumulation: int = _key(
        1, "Batches whose gradients make one step: 4 batches of 4 compute what 1 of 16 does.", ge=1
    )
    max_grad_norm: float = _key(1.0, "Maximum gradient norm (clipping).", gt=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _key(
        "auto", "fp32, bf16, fp16, or auto: what the device computes fastest."
    )
    kernels: Literal["auto", "plain"] = _key(
        "auto", "auto: faster CPU kernels where they fit; plain: transformers and peft compute all."
    )
    export: Literal["int8", "fp32", "none"] = _key(
        "int8", "ONNX file written beside the model, for fast tagging on a CPU: int8, fp32 or none."
    )
    seed: int = _key(1, "Seed of sampling, order, new weights and dropout.", ge=0, lt=2**32)
    run: str | None = _key(
        None, "Name of this run's folder; null names it by the time.", max_length=80, pattern=RUN_NAME
    )
    checkpoint_minutes: float = _key(5.0, "Minutes between checkpoints; each epoch ends with one too.", gt=0)
    trackers: list[str] = _key(
        [], "A list of tensorboard, wandb, swanlab, mlflow, aim, clearml, comet_ml, dvclive, trackio."
    )


def _flat(prefix: str, model: type[pydantic.BaseModel]) -> dict[str, pydantic.fields.FieldInfo]:
    """The fields of a model under dotted keys, a group's own fields in place of the group."""
    fields: dict[str, pydantic.fields.FieldInfo] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            fields |= _flat(f"{name}.", field.annotation)
        else:
            fields[prefix + name] = field
    return fields


FIELDS = _flat("", Config)  # dotted key -> pydantic field, in the order of the file
LOW_RANK = tuple(name for name, tuning in TUNINGS.items() if tuning.low_rank)
VIRTUAL_TOKENS = tuple(name for name, tuning in TUNINGS.items() if tuning.virtual_tokens)
# Keys -> another key and its values; the keys have no effect with any other value of it.
EFFECT_ONLY_WITH: dict[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    tuple(key for key in FIELDS if key.startswith("lora.")): ("tuning", LOW_RANK),
    ("virtual_tokens",): ("tuning", VIRTUAL_TOKENS),
    ("crf_learning_rate",): ("head", ("crf",)),
    ("adversarial_epsilon",): ("adversarial", ("fgm",)),
}
_JSON_SCHEMA = Config.model_json_schema()["properties"] | {
    f"lora.{name}": schema for name, schema in Lora.model_json_schema()["properties"].items()
}
_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "a text",
    "array": "a list of names",
}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def alternatives(key: str) -> list[dict]:
    """Return the JSON schemas of the kinds of value that a dotted key accepts: {"type": "integer", "minimum": 1}."""
    schema = _JSON_SCHEMA[key]
    return schema.get("anyOf") or [schema]


def json_types(key: str) -> set[str]:
    """Return the JSON types that a dotted key accepts: {"integer", "null"}."""
    return {schema["type"] for schema in alternatives(key)}


def literals(key: str) -> list[str]:
    """Return the words that a dotted key accepts, where it accepts certain words only."""
    return [word for schema in alternatives(key) for word in schema.get("enum", [schema.get("const")]) if word]


def allowed(key: str) -> str:
    """Return what a dotted key accepts, in words: `a whole number, at least 1, or null`."""
    if key == "run":
        return "a folder name of at most 80 characters, without slashes or a leading dot, or null"
    return " or ".join(_in_words(schema) for schema in alternatives(key))


def _in_words(schema: dict) -> str:
    if schema["type"] == "null":
        return "null"
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    bounds = [f", {words} {schema[bound]:g}" for bound, words in _BOUNDS.items() if bound in schema]
    return _WORDS[schema["type"]] + "".join(bounds)
