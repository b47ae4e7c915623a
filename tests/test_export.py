"""What is handed on: merged folders and ONNX files. Each is used the way a stranger would use it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from made_run import LABELS, TEXTS, piped, run_of, tagged

import model as model_command
from ner import config, export, formats, onnx_writer, saved_model
from ner.errors import UserError
from ner.meta import write_meta

ENCODERS = [config.ROOT / "data" / "encoder"]
NER_DATA = config.ROOT.parent / "shared" / "ner_data" / "train"


@pytest.mark.parametrize("tuning", ["lora", "dora", "adalora", "ia3", "full", "freeze"])
def test_a_merged_folder_computes_the_same_without_peft(encoder, tmp_path, tuning):
    from transformers import AutoModelForTokenClassification

    made = run_of(tmp_path / "run", encoder, "--tuning", tuning)
    assert export.merge(made, tmp_path / "merged") == tmp_path / "merged"
    ids = torch.arange(5, 25).view(2, 10)
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    apart = saved_model.load(made / "model", merged=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, apart(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert theirs.config.id2label == dict(enumerate(LABELS))
    again, _, meta = saved_model.load(tmp_path / "merged")
    assert meta["tuning"] == "full" and meta["labels"] == LABELS


@pytest.mark.skipif(not NER_DATA.exists(), reason="no real corpus beside the project")
@pytest.mark.parametrize("special", ["true", "false"])
def test_the_pipeline_on_a_merged_folder_finds_what_predict_finds(tmp_path, special):
    source = next((path for path in ENCODERS if (path / "tokenizer.json").exists()), None)
    if source is None:
        pytest.skip("no real encoder yet")
    from transformers import AutoTokenizer

    tiny.encoder(tmp_path / "encoder", AutoTokenizer.from_pretrained(source))  # the real tokenizer, a fast network
    made = run_of(tmp_path / "run", tmp_path / "encoder", "--special_tokens", special)
    export.merge(made, tmp_path / "merged")
    sentences = [sentence.units for sentence in formats.read(str(NER_DATA)).sentences if len(sentence.units) <= 60]
    texts = ["".join(chars) for chars in sentences][:500]
    assert len(texts) == 500
    wanted = tagged(made / "model", texts)
    assert sum(map(len, wanted)) > 1000
    assert piped(tmp_path / "merged", texts) == wanted


def test_merging_a_crf_says_what_a_pipeline_ignores(encoder, tmp_path, lora_run, caplog):
    made = run_of(tmp_path / "run", encoder)
    meta = json.loads((made / "model" / "ner.json").read_text("utf-8")) | {"head": "crf"}
    write_meta(made / "model", meta | {"transitions": np.zeros((len(LABELS), len(LABELS)))})
    export.merge(made, tmp_path / "merged")
    (entry,) = caplog.records
    assert "a transformers pipeline ignores its transition scores (crf.safetensors)" in entry.getMessage()
    caplog.clear()
    export.merge(lora_run, tmp_path / "softmax")
    assert not caplog.records


def test_what_cannot_be_merged_says_so(encoder, tmp_path, lora_run):
    virtual = run_of(tmp_path / "prompt", encoder, "--tuning", "prompt")
    with pytest.raises(UserError, match="tuning prompt cannot be merged"):
        export.merge(virtual, tmp_path / "merged")
    with pytest.raises(UserError, match="tuning prompt cannot be exported"):
        export.export(virtual, tmp_path / "onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for done in (export.merge, export.export):
        with pytest.raises(UserError, match="already exists"):
            done(lora_run, tmp_path / "full")
    with pytest.raises(UserError, match="no saved model"):
        export.merge(tmp_path, tmp_path / "merged")


def test_onnx_files_run_without_torch_and_agree_with_it(lora_run, tmp_path):
    exact, int8 = export.export(lora_run, tmp_path / "onnx", int8=True)
    assert (exact.file, int8.file) == ("model.onnx", "model_int8.onnx")
    assert exact.largest_logit_error < 1e-4 and exact.same_tags == 1
    assert int8.same_tags > 0.8 and int8.bytes < exact.bytes
    code = """
import json, sys
import numpy, onnxruntime, tokenizers
folder, text = sys.argv[1:]
tokenizer = tokenizers.Tokenizer.from_file(folder + "/tokenizer.json")
labels = json.load(open(folder + "/ner.json", encoding="utf-8"))["labels"]
session = onnxruntime.InferenceSession(folder + "/model.onnx")
coded = tokenizer.encode(text)
ids = numpy.array([coded.ids])
logits = session.run(None, {"input_ids": ids, "attention_mask": numpy.ones_like(ids)})[0][0]
print(json.dumps([labels[row.argmax()] for row in logits]), "torch" in sys.modules)
"""
    argv = [sys.executable, "-c", code, str(tmp_path / "onnx"), TEXTS[0]]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    network, tokenizer, _ = saved_model.load(lora_run)
    with torch.no_grad():
        rows = network(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0].argmax(-1).tolist()
    assert done.stdout == json.dumps([LABELS[row] for row in rows]) + " False\n"


def test_an_onnx_file_that_computes_something_else_is_not_kept(lora_run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_writer, "LARGEST_ERROR", 0.0)
    with pytest.raises(UserError, match="differ from PyTorch's"):
        export.export(lora_run, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_export_says_what_it_needs(lora_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        export.export(lora_run, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command(lora_run, tmp_path, capsys):
    def command(*argv):
        try:
            model_command.main(list(map(str, argv)))
        except SystemExit as ended:
            return ended.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, said = command("merge", lora_run, tmp_path / "merged")
    assert code == 0 and said.out == f"merged: {tmp_path / 'merged'}\n"
    code, said = command("merge", lora_run, tmp_path / "merged")
    assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
    code, said = command("export", lora_run, tmp_path / "onnx", "--format", "onnx")
    assert code == 0 and "100.00% of the tags as PyTorch's" in said.out
    assert command("mrege", lora_run, tmp_path / "x")[0] == 2
    assert command("export", lora_run, tmp_path / "x", "--format", "tflite")[0] == 2
    (tmp_path / "file").touch()
    code, said = command("merge", lora_run, tmp_path / "file" / "below")
    assert code == 2 and "cannot be written" in said.err


def test_the_exported_config_names_the_class_with_the_head(lora_run, tmp_path):
    export.export(lora_run, tmp_path / "onnx")
    settings = json.loads((tmp_path / "onnx" / "config.json").read_text("utf-8"))
    assert settings["architectures"] == ["BertForTokenClassification"]
