"""What is handed on: merged folders, ONNX files, the card, an upload. Each is used the way a stranger would use it."""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny
import torch
import yaml

from ner import config
from ner import export
from ner import formats
from ner import model
from ner import tagging
import model as model_command
import predict
from ner.errors import UserError

COMMIT = "a" * 40
LABELS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
TEXTS = ["江泽民在北京会见了比尔·盖茨。", "上海", "她没有回答，1998年3月。", "据新华社报道"]
ENCODERS = [config.ROOT / "data" / "encoder", config.ROOT.parent / "shared" / "candidate_encoder"]
NER_DATA = config.ROOT.parent / "shared" / "ner_data" / "train"
SCORES = {key: {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 8} for key in ("micro", "macro", "weighted")}
SCORES["types"] = {"LOC": SCORES["micro"], "PER": SCORES["micro"]}


def run_of(folder, encoder, *argv):
    """A run folder with a model whose trained weights are random, as main.py would leave it."""
    argv = ["--pretrained", str(encoder), "--lora.r", "4", "--max_length", "64", "--decode", "argmax", *argv]
    made = config.load(argv)[0]
    torch.manual_seed(0)
    network, tokenizer, meta = model.build(made, LABELS, "character")
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save(network, tokenizer, meta, folder / "model")
    (folder / "config.yaml").write_text(config.dump(made), "utf-8")
    (folder / "test.json").write_text(json.dumps(SCORES))
    (folder / "metrics.jsonl").write_text(json.dumps({"epoch": 1, "dev": SCORES}) + "\n")
    rows = "".join(json.dumps({"chars": list(text)}) + "\n" for text in TEXTS)
    (folder / "predictions.jsonl").write_text(rows, "utf-8")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny.encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def run(encoder, tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("lora") / "run", encoder)


def predictor(folder):
    """predict.py's, in float32 whatever the device does fastest."""
    return predict.Predictor(tagging.Tagger(*model.load(folder)))


def tagged(folder, texts):
    found = predictor(folder).predict(texts)
    return [[(one.type, one.start, one.end, pytest.approx(one.score, abs=1e-4)) for one in row] for row in found]


def plain(rows):
    """Without the scores."""
    return [[one[:3] for one in row] for row in rows]


def piped(folder, texts):
    from transformers import pipeline

    tagger = pipeline("token-classification", model=str(folder), aggregation_strategy="simple")
    return [[(one["entity_group"], one["start"], one["end"], float(one["score"])) for one in row]
            for row in tagger(texts, batch_size=16)]  # fmt: skip


# merge

@pytest.mark.parametrize("tuning", ["lora", "dora", "adalora", "ia3", "full", "freeze"])
def test_a_merged_folder_computes_the_same_without_peft(encoder, tmp_path, tuning):
    from transformers import AutoModelForTokenClassification

    made = run_of(tmp_path / "run", encoder, "--tuning", tuning)
    assert export.merge(made, tmp_path / "merged") == tmp_path / "merged"
    ids = torch.arange(5, 25).view(2, 10)
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    apart = model.load(made / "model", merged=False)[0]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, apart(input_ids=ids).logits, atol=1e-5, rtol=0)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert theirs.config.id2label == dict(enumerate(LABELS))
    again, _, meta = model.load(tmp_path / "merged")
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
    sentences = [sentence.chars for sentence in formats.read(str(NER_DATA)).sentences if len(sentence.chars) <= 60]
    texts = ["".join(chars) for chars in sentences][:500]
    assert len(texts) == 500
    wanted = tagged(made / "model", texts)
    assert sum(map(len, wanted)) > 1000
    assert piped(tmp_path / "merged", texts) == wanted


def test_what_cannot_be_merged_says_so(encoder, tmp_path, run):
    virtual = run_of(tmp_path / "prompt", encoder, "--tuning", "prompt")
    with pytest.raises(UserError, match="tuning prompt cannot be merged"):
        export.merge(virtual, tmp_path / "merged")
    with pytest.raises(UserError, match="tuning prompt cannot be exported"):
        export.export(virtual, tmp_path / "onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for done in (export.merge, export.export):
        with pytest.raises(UserError, match="already exists"):
            done(run, tmp_path / "full")
    with pytest.raises(UserError, match="no saved model"):
        export.merge(tmp_path, tmp_path / "merged")


# ONNX

def test_onnx_files_run_without_torch_and_agree_with_it(run, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    found = export.export(run, tmp_path / "onnx", int8=True)
    assert found["model.onnx"]["furthest_logit"] < 1e-4 and found["model.onnx"]["same_tags"] == 1
    assert found["model_int8.onnx"]["same_tags"] > 0.8
    assert found["model_int8.onnx"]["bytes"] < found["model.onnx"]["bytes"]
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
    network, tokenizer, _ = model.load(run)
    with torch.no_grad():
        rows = network(**tokenizer(TEXTS[0], return_tensors="pt")).logits[0].argmax(-1).tolist()
    assert done.stdout == json.dumps([LABELS[row] for row in rows]) + " False\n"


def test_an_onnx_file_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "FURTHEST", 0.0)
    with pytest.raises(UserError, match="differ from torch's"):
        export.export(run, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_export_says_what_it_needs(run, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="expected onnx"):
        export.export(run, tmp_path / "x", format="tflite")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        export.export(run, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command(run, tmp_path, capsys, monkeypatch):
    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, argv)])
        try:
            model_command.main()
        except SystemExit as ended:
            return ended.code, capsys.readouterr()
        return 0, capsys.readouterr()

    code, said = command("merge", run, tmp_path / "merged")
    assert code == 0 and said.out == f"merged: {tmp_path / 'merged'}\n"
    code, said = command("merge", run, tmp_path / "merged")
    assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
    code, said = command("export", run, tmp_path / "onnx", "--format", "onnx")
    assert code == 0 and "100.00% of the tags the same" in said.out
    assert command("mrege", run, tmp_path / "x")[0] == 2
    (tmp_path / "file").touch()
    code, said = command("merge", run, tmp_path / "file" / "below")
    assert code == 2 and "cannot be written" in said.err


# the card

def test_the_card_has_data_scores_config_and_a_way_to_load(run):
    text = export.write_card(run).read_text("utf-8")
    assert text == (run / "model" / "README.md").read_text("utf-8")
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "peft", "pipeline_tag": "token-classification",
                                    "tags": ["named-entity-recognition", "lora"]}  # fmt: skip
    assert "| PER | 0.5000 | 0.2500 | 0.3333 | 8 |" in body and "train: `data/msra/train`" in body
    assert "Scores on test" in body and "Best epoch, on dev" in body and " ".join(LABELS) in body
    config_text = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(config_text)["lora"]["r"] == 4
    assert "/tmp" not in text and str(run.parent) not in text, "no folder of this machine is shown"
    code = body.split("With peft:")[1].split("```python\n")[1].split("```")[0]
    made = {"FOLDER": str(run / "model")}
    exec(code.replace("AutoPeftModelForTokenClassification.f", "loaded = AutoPeftModelForTokenClassification.f"), made)
    assert made["loaded"].config.num_labels == len(LABELS)


def test_the_card_without_scores(encoder, tmp_path):
    made = run_of(tmp_path / "run", encoder, "--tuning", "full", "--test", "null")
    (made / "test.json").unlink()
    (made / "metrics.jsonl").unlink()
    text = export.write_card(made).read_text("utf-8")
    assert "Scores" not in text and "- test:" not in text and 'pipeline("token-classification"' in text


# the hub

class Hub(http.server.BaseHTTPRequestHandler):
    """What of the hub's interface an upload and a download take. Files lie in server.files, as {path: bytes}."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid user token"})
        if self.path == "/api/repos/create":
            return self.answer(200, {"url": f"{self.server.endpoint}/me/it"})
        if self.path.startswith("/api/models/me/it/preupload/"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            way = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer(200, {"files": [{"path": path, **way} for path in paths]})
        if self.path.startswith("/api/models/me/it/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, {"commitUrl": f"{self.server.endpoint}/me/it/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer(200, {})

    def do_GET(self):
        path = self.path.removeprefix("/me/it/resolve/main/").removeprefix(f"/me/it/resolve/{COMMIT}/")
        data = self.server.files.get(path)
        if data is None:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"} if "/resolve/" in self.path else {})
        return self.answer(200, data, {"ETag": f'"{hash(data) & 0xFFFFFFFF:x}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, code, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.endpoint, server.files = f"http://127.0.0.1:{server.server_port}", {}
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def lay_out(files, folder):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_an_adapter_of_a_local_encoder_goes_up_merged_and_comes_down_by_name(run, hub, tmp_path):
    assert export.push(run, "me/it") == f"{hub.endpoint}/me/it"
    assert {"README.md", "config.json", "model.safetensors", "ner.json", "tokenizer.json"} <= set(hub.files)
    assert not [name for name in hub.files if "adapter" in name or "/" in name]
    assert not [name for name, data in hub.files.items() if str(run).encode() in data], "no folder of this machine"
    assert b'library_name: "transformers"' in hub.files["README.md"] and b"With transformers" in hub.files["README.md"]
    down = lay_out(hub.files, tmp_path / "down")
    wanted = tagged(run / "model", TEXTS)
    assert piped(down, TEXTS) == wanted
    assert plain(tagged(down, TEXTS)) == plain(wanted)
    # as an encoder for the next one, by its name: from the hub, then from its cache with no hub at all
    code = """
import os, sys
from ner import config, model
made = config.load(["--pretrained", "me/it"])[0]
for endpoint in (os.environ["HF_ENDPOINT"], "http://127.0.0.1:9"):
    from huggingface_hub import constants
    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    network, tokenizer, meta = model.build(made, ["O", "B-X", "I-X"], "character")
    model.save(network, tokenizer, meta, sys.argv[1])
    print(meta["pretrained"], model.load(sys.argv[1])[0].config.num_labels)
"""
    surroundings = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": hub.endpoint}
    argv = [sys.executable, "-c", code, str(tmp_path / "next")]
    done = subprocess.run(argv, cwd=config.ROOT, capture_output=True, text=True, env=surroundings)
    assert done.stdout == "me/it 3\n" * 2, done.stderr


def test_virtual_tokens_go_up_with_their_encoder(encoder, hub, tmp_path):
    made = run_of(tmp_path / "run", encoder, "--tuning", "ptuning", "--virtual_tokens", "4")
    export.push(made, "me/it")
    assert {"adapter_model.safetensors", "adapter_config.json", "encoder/model.safetensors"} <= set(hub.files)
    assert not [name for name, data in hub.files.items() if str(tmp_path).encode() in data]
    down = lay_out(hub.files, tmp_path / "down")
    wanted = tagged(made / "model", TEXTS)
    shutil.rmtree(made)
    assert plain(tagged(down, TEXTS)) == plain(wanted)


def test_an_adapter_of_a_hub_encoder_goes_up_alone(run, hub, tmp_path):
    made = Path(shutil.copytree(run, tmp_path / "run"))
    meta = json.loads((made / "model" / "ner.json").read_text())
    (made / "model" / "ner.json").write_text(json.dumps(meta | {"pretrained": "you/encoder"}))
    export.push(made, "me/it")
    assert "adapter_model.safetensors" in hub.files and not [name for name in hub.files if name.startswith("encoder")]
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "you/encoder"
    assert b'base_model: "you/encoder"' in hub.files["README.md"]


def test_uploads_that_fail_are_one_line(run, hub, monkeypatch):
    from huggingface_hub import constants

    def fails():
        with pytest.raises(UserError) as caught:
            export.push(run, "me/it")
        assert "--push_to_hub me/it" in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "hf auth login" in fails() and not hub.files
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", "/nonexistent/tokens")
    assert "hf auth login" in fails()
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 did not take it" in fails() and (run / "model").is_dir()
