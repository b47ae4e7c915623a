"""The tuning methods: one table, one entry a method. What a method is stands here and nowhere else.

A method either trains weights of the encoder itself (`trains`, a pattern of their names) or adds an adapter beside them
(`adapter`, which makes peft's config). The head is trained by every method. A new method is a new entry. Neither torch
nor peft is imported until an adapter's config is asked for, so that config.py can read this table at once.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BASE_SIZE = 768  # hidden size from which an encoder counts as base-size, as bert-base-chinese
ADALORA_STEPS = 10**9  # peft wants the number of steps before it is known; the training loop sets the real one
HEADS_PEFT_TRAINS = {"classifier", "score"}  # peft trains heads of these names without being told


@dataclass(frozen=True)
class Tuning:
    """One tuning method.

    summary: what it does, for --help and the documents. learning_rate, head_factor: the defaults; the head learns
    head_factor times as fast. base_learning_rate, base_head_factor: the same for encoders of hidden size BASE_SIZE and
    more, None where there is no difference. lowest_rate, highest_rate: learning rates below (from) which it is known
    to fail.

    trains: pattern of the names of the encoder's weights that are trained. adapter: makes peft's config instead, from
    the run's config, the names of the head's modules and `options`. low_rank: the adapter is set by the config's group
    `lora:`. virtual_tokens: the adapter puts tokens before each window. virtual_logits: peft's own model gives logits
    for them too. merges: the adapter can be added into the encoder's weights; merges_plainly: as W + scale·B·A, for
    which peft is not needed.
    """

    summary: str
    learning_rate: float
    head_factor: float = 1.0
    base_learning_rate: float | None = None
    base_head_factor: float | None = None
    lowest_rate: float | None = None
    highest_rate: float | None = None
    trains: str | None = None
    adapter: Callable[..., Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    low_rank: bool = False
    virtual_tokens: bool = False
    virtual_logits: bool = False
    merges: bool = False
    merges_plainly: bool = False

    def rates(self, hidden_size: int) -> tuple[float, float]:
        """Return (learning rate, head factor) that suit an encoder of this hidden size."""
        rate, factor = self.learning_rate, self.head_factor
        if hidden_size >= BASE_SIZE:
            rate = rate if self.base_learning_rate is None else self.base_learning_rate
            factor = factor if self.base_head_factor is None else self.base_head_factor
        return rate, factor

    def trains_weight(self, name: str) -> bool:
        """Return whether the encoder's weight of this name is trained. False for every weight under an adapter."""
        return self.trains is not None and re.search(self.trains, name) is not None

    def peft_config(self, config: Any, heads: list[str]) -> Any:
        """Return peft's config of the adapter. config: the run's ner.config.Config; heads: names of head modules.

        Raises ValueError where peft refuses a value, TypeError for a method without an adapter.
        """
        if self.adapter is None:
            raise TypeError("this tuning has no adapter")
        return self.adapter(config, heads, **self.options)


def _lora(config: Any, heads: list[str], **options: Any) -> Any:
    import peft

    return peft.LoraConfig(r=config.lora.r, **_lora_group(config, heads), **options)


def _adalora(config: Any, heads: list[str]) -> Any:
    """AdaLoRA begins with 1.5 times the rank that it ends with, and masks the least important ranks on the way."""
    import peft

    rank = config.lora.r
    first = rank + (rank + 1) // 2
    return peft.AdaLoraConfig(target_r=rank, init_r=first, total_step=ADALORA_STEPS, **_lora_group(config, heads))


def _ia3(config: Any, heads: list[str]) -> Any:
    import peft

    return peft.IA3Config(**_task(heads))


def _prompt(config: Any, heads: list[str]) -> Any:
    import peft

    return peft.PromptTuningConfig(**_virtual(config), prompt_tuning_init="SAMPLE_VOCAB")


def _prefix(config: Any, heads: list[str]) -> Any:
    import peft

    return peft.PrefixTuningConfig(**_virtual(config))


def _ptuning(config: Any, heads: list[str]) -> Any:
    import peft

    return peft.PromptEncoderConfig(**_virtual(config))


def _lora_group(config: Any, heads: list[str]) -> dict[str, Any]:
    """The config's group `lora:` in peft's words, but for the rank."""
    lora = config.lora
    return _task(heads) | {
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": lora.bias,
        "target_modules": lora.target_modules,
        "exclude_modules": heads,
    }


def _task(heads: list[str]) -> dict[str, Any]:
    task: dict[str, Any] = {"task_type": "TOKEN_CLS"}
    if not set(heads) <= HEADS_PEFT_TRAINS:
        task["modules_to_save"] = heads
    return task


def _virtual(config: Any) -> dict[str, Any]:
    return {"task_type": "TOKEN_CLS", "num_virtual_tokens": config.virtual_tokens}


TUNINGS: dict[str, Tuning] = {
    "lora": Tuning(
        "low-rank matrices beside each linear layer (Hu et al. 2021)",
        learning_rate=1e-3,
        head_factor=10,
        base_head_factor=1,
        lowest_rate=1e-4,
        adapter=_lora,
        low_rank=True,
        merges=True,
        merges_plainly=True,
    ),
    "full": Tuning(
        "all weights",
        learning_rate=2e-4,
        head_factor=10,
        base_learning_rate=2e-5,  # 2e-4 would ruin them
        base_head_factor=1,
        highest_rate=1e-3,
        trains=".*",
    ),
    "dora": Tuning(
        "LoRA with a magnitude of its own for each column (Liu et al. 2024)",
        learning_rate=1e-3,
        head_factor=10,
        base_head_factor=1,
        lowest_rate=1e-4,
        adapter=_lora,
        low_rank=True,
        options={"use_dora": True},
        merges=True,
    ),
    "rslora": Tuning(
        "LoRA scaled by alpha / sqrt(r) (Kalajdzievski 2023)",
        learning_rate=2.5e-4,
        head_factor=10,
        base_head_factor=1,
        lowest_rate=1e-4,
        adapter=_lora,
        low_rank=True,
        options={"use_rslora": True},
        merges=True,
        merges_plainly=True,
    ),
    "adalora": Tuning(
        "LoRA that moves its rank to the layers where it counts most (Zhang et al. 2023)",
        learning_rate=9e-3,
        lowest_rate=1e-4,
        adapter=_adalora,
        low_rank=True,
        merges=True,
    ),
    "ia3": Tuning(
        "a factor for each key, value and feed-forward activation (Liu et al. 2022)",
        learning_rate=2e-2,
        adapter=_ia3,
        merges=True,
    ),
    "bitfit": Tuning("the biases (Ben Zaken et al. 2021)", learning_rate=1e-2, trains=r"bias$"),
    "freeze": Tuning("nothing: the head alone", learning_rate=3e-2, trains=r"(?!)"),  # a pattern that matches nothing
    "prompt": Tuning(
        "vectors of virtual tokens before each window (Lester et al. 2021)",
        learning_rate=1e-2,
        adapter=_prompt,
        virtual_tokens=True,
        virtual_logits=True,
    ),
    "prefix": Tuning(
        "keys and values of virtual tokens in each layer (Li and Liang 2021)",
        learning_rate=3e-2,
        adapter=_prefix,
        virtual_tokens=True,
    ),
    "ptuning": Tuning(
        "virtual tokens that a small network makes (Liu et al. 2021)",
        learning_rate=2e-2,
        adapter=_ptuning,
        virtual_tokens=True,
        virtual_logits=True,
    ),
}
