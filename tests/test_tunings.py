"""The table of tuning methods: complete, consistent with peft, and readable without torch."""

import subprocess
import sys

import peft
import pytest

from ner import config
from ner.tunings import BASE_SIZE, TUNINGS


def test_the_table_is_read_without_torch_and_peft():
    code = "import sys; import ner.tunings; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", TUNINGS)
def test_each_method_trains_weights_or_adds_an_adapter(name):
    tuning = TUNINGS[name]
    assert (tuning.trains is None) != (tuning.adapter is None)
    assert tuning.summary and tuning.learning_rate > 0 and tuning.head_factor >= 1
    if tuning.adapter is None:
        assert not (tuning.virtual_tokens or tuning.merges or tuning.options)
    else:
        assert tuning.merges != tuning.virtual_tokens, "what has virtual tokens is no weight of the encoder"
        assert not tuning.trains_weight("bert.encoder.layer.0.output.dense.bias")
    assert not tuning.merges_plainly or tuning.merges
    assert not tuning.virtual_logits or tuning.virtual_tokens


@pytest.mark.parametrize("name", [name for name, tuning in TUNINGS.items() if tuning.adapter])
def test_adapters_are_what_the_config_says(name):
    settings = config.Config(tuning=name, virtual_tokens=7, lora=config.Lora(r=6, alpha=5, dropout=0.25, bias="all"))
    made = TUNINGS[name].peft_config(settings, ["classifier"])
    assert made.task_type == peft.TaskType.TOKEN_CLS
    assert made.is_prompt_learning == TUNINGS[name].virtual_tokens
    if made.is_prompt_learning:
        assert made.num_virtual_tokens == 7
    if isinstance(made, peft.LoraConfig):
        assert (made.lora_alpha, made.lora_dropout, made.bias) == (5, 0.25, "all")
        assert (made.use_dora, made.use_rslora) == (name == "dora", name == "rslora")
        assert ((made.target_r, made.init_r) == (6, 9)) if name == "adalora" else made.r == 6


def test_heads_of_other_names_are_trained_by_every_adapter_that_would_leave_them():
    settings = config.Config()
    for name in ("lora", "dora", "rslora", "adalora", "ia3"):
        assert TUNINGS[name].peft_config(settings, ["qa_outputs"]).modules_to_save == ["qa_outputs"]
        assert not TUNINGS[name].peft_config(settings, ["classifier"]).modules_to_save


def test_weights_of_the_encoder_are_chosen_by_name():
    weight, bias = "bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.bias"
    chosen = {
        name: [TUNINGS[name].trains_weight(one) for one in (weight, bias)] for name in ("full", "bitfit", "freeze")
    }
    assert chosen == {"full": [True, True], "bitfit": [False, True], "freeze": [False, False]}
    with pytest.raises(TypeError):
        TUNINGS["full"].peft_config(config.Config(), ["classifier"])


def test_base_size_encoders_get_the_recipe_that_is_known_to_work_there():
    small, base = BASE_SIZE - 1, BASE_SIZE
    assert TUNINGS["lora"].rates(small) == (1e-3, 10) and TUNINGS["lora"].rates(base) == (1e-3, 1)
    assert TUNINGS["full"].rates(small) == (2e-4, 10) and TUNINGS["full"].rates(base) == (2e-5, 1)
    for tuning in TUNINGS.values():
        for size in (small, base):
            rate, factor = tuning.rates(size)
            assert rate > 0 and factor >= 1
            assert tuning.lowest_rate is None or rate >= tuning.lowest_rate
            assert tuning.highest_rate is None or rate < tuning.highest_rate
