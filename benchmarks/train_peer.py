"""One side of benchmarks/train.py: training with transformers' Trainer and peft, as their guides have it.

    python benchmarks/train_peer.py lora --data FOLDER FILE.json [--tuned]

DataCollatorForTokenClassification, and the Trainer's defaults for everything not named, so float32 on a CPU. --tuned:
what a practitioner would switch on, length-grouped batches, and bf16=True where the device multiplies it natively.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from train_setup import BATCH, LORA, RATES, Setup, encoder_folder, parser_of_side, setup_of
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ner import formats
from ner import scores as scoring
from ner.corpus import Sentence, label_list
from ner.precision import cpu_has_bfloat16

MAX_LENGTH = 512  # tokens; the guide cuts off what is longer
IGNORED = -100  # the label of tokens that are not scored

Item = dict[str, list[int]]


def encode(tokenizer: Any, sentence: Sentence, label2id: dict[str, int]) -> Item:
    """Return input_ids, attention_mask and labels of a sentence, the label at the first token of each unit."""
    item = tokenizer(sentence.units, is_split_into_words=True, truncation=True, max_length=MAX_LENGTH)
    labels, previous = [], None
    for unit in item.word_ids():
        is_first = unit is not None and unit != previous
        labels.append(label2id[sentence.tags[unit]] if is_first else IGNORED)
        previous = unit
    return dict(item) | {"labels": labels}


def build_model(tuning: str, encoder: Path, labels: int) -> Any:
    """Return the encoder with a new head, float32, with a LoRA adapter on it where the tuning is lora."""
    model = AutoModelForTokenClassification.from_pretrained(encoder, num_labels=labels, dtype=torch.float32)
    if tuning != "lora":
        return model
    settings = LoraConfig(
        task_type=TaskType.TOKEN_CLS,
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=["classifier"],
    )
    return get_peft_model(model, settings)


def training_arguments(setup: Setup, folder: str, tuned: bool) -> TrainingArguments:
    """Return the Trainer's settings; tuned: with batches of like length, and bfloat16 where it is native."""
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=folder,
        learning_rate=RATES[setup.tuning],
        num_train_epochs=setup.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        seed=setup.seed,
        disable_tqdm=True,
        bf16=has_gpu or (tuned and cpu_has_bfloat16()),
        use_cpu=not has_gpu,
        train_sampling_strategy="group_by_length" if tuned else "random",
    )


def decoded(scores: np.ndarray, item: Item, units: int, labels: list[str]) -> list[str]:
    """Return the argmax tags of a sentence's units; those that were cut off are O, as the guide has it.

    scores: float32 [tokens, labels] of its logits, padding included.
    """
    pairs = zip(scores.argmax(-1), item["labels"], strict=False)
    tags = [labels[index] for index, label in pairs if label != IGNORED]
    return tags + ["O"] * (units - len(tags))


def train(setup: Setup, tuned: bool) -> dict[str, float]:
    """Train and score; return tokens a second, seconds an epoch and the micro-F1 on test."""
    set_seed(setup.seed)
    corpus, test = (formats.read(str(setup.data / name)) for name in ("train", "test"))
    labels = label_list(corpus)
    label2id = {label: index for index, label in enumerate(labels)}
    encoder = encoder_folder(setup.pretrained)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    train_set, test_set = ([encode(tokenizer, s, label2id) for s in part.sentences] for part in (corpus, test))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=build_model(setup.tuning, encoder, len(labels)),
            train_dataset=train_set,
            eval_dataset=test_set,
            processing_class=tokenizer,
            data_collator=DataCollatorForTokenClassification(tokenizer),
            args=training_arguments(setup, folder, tuned),
        )
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        trainer.args.train_sampling_strategy = (
            "random"  # predict goes by it too: groups would reorder the test sentences
        )
        scores = trainer.predict(test_set).predictions  # type: ignore[arg-type]
    gold = [sentence.tags for sentence in test.sentences]
    rows = zip(scores, test_set, gold, strict=True)
    predicted = [decoded(logits, item, len(tags), labels) for logits, item, tags in rows]
    tokens = setup.epochs * sum(len(item["input_ids"]) for item in train_set)
    return {
        "tokens_per_second": tokens / seconds,
        "seconds_per_epoch": seconds / setup.epochs,
        "f1": scoring.score(gold, predicted)["micro"]["f1"],
    }


def main() -> None:
    parser = parser_of_side(__doc__)
    parser.add_argument("--tuned", action="store_true", help="length-grouped batches, and bfloat16 where it is native")
    options = parser.parse_args()
    options.file.write_text(json.dumps(train(setup_of(options), options.tuned)))


if __name__ == "__main__":
    main()
