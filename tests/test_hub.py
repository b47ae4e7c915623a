"""An upload to a hub and back: what comes down by its name tags as what went up."""

import base64
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
from made_run import TEXTS, piped, run_of, tagged, without_scores

from ner import config, model, saved_model
from ner import hub as model_hub
from ner.errors import UserError

COMMIT = "a" * 40


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


def test_an_adapter_of_a_local_encoder_goes_up_merged_and_comes_down_by_name(lora_run, hub, tmp_path):
    assert model_hub.push(lora_run, "me/it") == f"{hub.endpoint}/me/it"
    assert {"README.md", "config.json", "model.safetensors", "ner.json", "tokenizer.json"} <= set(hub.files)
    assert not [name for name in hub.files if "adapter" in name or "/" in name]
    assert not [name for name, data in hub.files.items() if str(lora_run).encode() in data], "no folder of this machine"
    assert b'library_name: "transformers"' in hub.files["README.md"] and b"With transformers" in hub.files["README.md"]
    down = lay_out(hub.files, tmp_path / "down")
    wanted = tagged(lora_run / "model", TEXTS)
    assert piped(down, TEXTS) == wanted
    assert without_scores(tagged(down, TEXTS)) == without_scores(wanted)


def test_an_upload_is_an_encoder_by_its_name_also_from_the_cache_with_no_hub_at_all(
    lora_run, hub, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    model_hub.push(lora_run, "me/it")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    settings = config.load(["--pretrained", "me/it", "--head", "softmax"])[0]
    for endpoint in (hub.endpoint, "http://127.0.0.1:9"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"  # built once, of HF_ENDPOINT
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        network, tokenizer, meta = model.build(settings, ["O", "B-X", "I-X"], "character")
        saved_model.save(network, tokenizer, meta, tmp_path / "next")
        assert meta["pretrained"] == "me/it"
        assert saved_model.load(tmp_path / "next")[0].config.num_labels == 3


def test_virtual_tokens_go_up_with_their_encoder(encoder, hub, tmp_path):
    made = run_of(tmp_path / "run", encoder, "--tuning", "ptuning", "--virtual_tokens", "4")
    model_hub.push(made, "me/it")
    assert {"adapter_model.safetensors", "adapter_config.json", "encoder/model.safetensors"} <= set(hub.files)
    assert not [name for name, data in hub.files.items() if str(tmp_path).encode() in data]
    down = lay_out(hub.files, tmp_path / "down")
    wanted = tagged(made / "model", TEXTS)
    shutil.rmtree(made)
    assert without_scores(tagged(down, TEXTS)) == without_scores(wanted)


def test_an_adapter_of_a_hub_encoder_goes_up_alone(lora_run, hub, tmp_path):
    made = Path(shutil.copytree(lora_run, tmp_path / "run"))
    meta = json.loads((made / "model" / "ner.json").read_text())
    (made / "model" / "ner.json").write_text(json.dumps(meta | {"pretrained": "you/encoder"}))
    model_hub.push(made, "me/it")
    assert "adapter_model.safetensors" in hub.files and not [name for name in hub.files if name.startswith("encoder")]
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "you/encoder"
    assert b'base_model: "you/encoder"' in hub.files["README.md"]


def test_uploads_that_fail_are_one_line(lora_run, hub, monkeypatch):
    from huggingface_hub import constants

    def fails():
        with pytest.raises(UserError) as caught:
            model_hub.push(lora_run, "me/it")
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
    assert "http://127.0.0.1:9 did not take it" in fails() and (lora_run / "model").is_dir()
