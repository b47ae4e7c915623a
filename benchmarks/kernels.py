"""What each kernel gains: the time of a training step without it, relative to a step with all of them.

    python benchmarks/kernels.py [--tuning lora full] [--rounds 12] [--json FILE]

A step is forward, loss and backward on one batch of 16 sentences of 20 to 60 characters with the embedded encoder. All
variants take the same step in turn in one process; the figure is the median over the rounds of the ratio of their
processor times, with the lowest and highest quarter.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
WARM_UP = 3  # rounds that are not counted: products are compiled in them


def build(tuning: str) -> Any:
    """Return the embedded encoder with a head of 9 labels and dropout, under LoRA or with all weights trained."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForTokenClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(
        ROOT / "data" / "encoder",
        num_labels=9,
        dtype=torch.float32,
        attn_implementation="eager",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    if tuning == "lora":
        lora = LoraConfig(
            task_type=TaskType.TOKEN_CLS, r=16, target_modules="all-linear", exclude_modules=["classifier"]
        )
        model = get_peft_model(model, lora)
    return model


def batch(seed: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return (ids, mask), int64 [16, L], of sentences of 20 to 60 random characters."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(20, 61, (16,), generator=generator)
    longest = -(-int(lengths.max()) // 8) * 8
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return torch.randint(10, 4000, (16, longest), generator=generator) * mask, mask


def step_seconds(model: Any, ids: "torch.Tensor", mask: "torch.Tensor") -> float:
    """Return the processor seconds of one forward and backward pass."""
    begun = time.process_time()
    logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    logits.float().square().mean().backward()
    model.zero_grad()
    return time.process_time() - begun


@contextlib.contextmanager
def without(kernel: str) -> Iterator[None]:
    """Turn one kernel off while models are prepared and run."""
    targets = {
        "dropout drawn beforehand": ("ner.kernels.dropout.replace_dropouts", lambda model, dtype: None),
        "layers on packed tokens": (
            "ner.kernels.bert_layers.PackedLayers.supports",
            staticmethod(lambda module: False),
        ),
        "LoRA in one product": ("ner.kernels.lora.plain_adapter", lambda module: None),
    }
    if kernel not in targets:
        yield
        return
    with mock.patch(*targets[kernel]):
        yield


def compare(tuning: str, rounds: int) -> dict[str, list[float]]:
    """Return for each kernel the ratios of a step's time without it to one with all, a number a round."""
    from ner import kernels
    from ner.precision import choose_dtype

    names = ["all kernels", "dropout drawn beforehand", "layers on packed tokens"]
    names += ["LoRA in one product"] if tuning == "lora" else []
    dtype = choose_dtype("auto", "cpu")[0]
    models = {}
    for name in [*names, "plain"]:
        models[name] = build(tuning)
        with without(name):
            kernels.prepare(models[name], dtype, "cpu", "plain" if name == "plain" else "auto")
        models[name].train()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(WARM_UP + rounds):
        ids, mask = batch(number % 4)
        for name, model in models.items():
            with without(name):
                taken = step_seconds(model, ids, mask)
            if number >= WARM_UP:
                seconds[name].append(taken)
    base = seconds.pop("all kernels")
    return {name: [slow / fast for slow, fast in zip(values, base, strict=True)] for name, values in seconds.items()}


def main() -> None:
    """Measure and print a line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tuning", nargs="+", default=["lora", "full"], choices=["lora", "full"], help="What is trained. [lora full]")
    add("--rounds", type=int, metavar="N", default=12, help="Steps of each variant. [%(default)s]")
    add("--json", type=Path, metavar="FILE", help="Write the ratios there too.")
    options = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    for tuning in options.tuning:
        results[tuning] = compare(tuning, options.rounds)
        for name, ratios in results[tuning].items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{tuning}: without {name}: {middle:.3f} times the time ({low:.3f} to {high:.3f})", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
