"""The model card: data, scores, config, and a way to load the model that works."""

import yaml
from made_run import LABELS, run_of

from ner import card


def test_the_card_has_data_scores_config_and_a_way_to_load(lora_run):
    text = card.write_card(lora_run).read_text("utf-8")
    assert text == (lora_run / "model" / "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "peft", "pipeline_tag": "token-classification",
                                    "tags": ["named-entity-recognition", "lora"]}  # fmt: skip
    assert "| PER | 0.5000 | 0.2500 | 0.3333 | 8 |" in body and "train: `data/msra/train`" in body
    assert "Scores on test" in body and "Best epoch, on dev" in body and " ".join(LABELS) in body
    config_text = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(config_text)["lora"]["r"] == 4
    assert "/tmp" not in text and str(lora_run.parent) not in text, "no folder of this machine is shown"
    code = body.split("With peft:")[1].split("```python\n")[1].split("```")[0]
    made = {"FOLDER": str(lora_run / "model")}
    exec(code.replace("AutoPeftModelForTokenClassification.f", "loaded = AutoPeftModelForTokenClassification.f"), made)
    assert made["loaded"].config.num_labels == len(LABELS)


def test_the_card_without_scores(encoder, tmp_path):
    made = run_of(tmp_path / "run", encoder, "--tuning", "full", "--test", "null")
    (made / "test.json").unlink()
    (made / "metrics.jsonl").unlink()
    text = card.write_card(made).read_text("utf-8")
    assert "Scores" not in text and "- test:" not in text and 'pipeline("token-classification"' in text
