"""Encoders that cannot be had say why in a line; the embedded one: its size, its vocabulary, a short real run."""

import json
import shutil
import socket
import threading
import time
from pathlib import Path

import built_model
import pytest
import tiny
import torch
from built_model import built
from safetensors import safe_open
from transformers import AutoModelForTokenClassification, AutoTokenizer

import main
import predict
from ner import config, encoder, formats
from ner.errors import UserError

FOLDER = config.ROOT / "data/encoder"
NER_DATA = config.ROOT.parent / "shared/ner_data"


@pytest.fixture(scope="session")
def encoders():
    return built_model.encoders()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_it_is_small_standard_and_in_half_precision():
    files = [FOLDER / name for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")]
    assert sum(file.stat().st_size for file in files) < 35e6
    with safe_open(files[1], "pt") as weights:
        names = weights.keys()
        assert {str(weights.get_tensor(name).dtype) for name in names} == {"torch.float16"}
    model = AutoModelForTokenClassification.from_pretrained(FOLDER, num_labels=3)
    assert model.config.model_type == "bert" and model.num_labels == 3
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0, "as it was trained"


def test_gb2312_ascii_and_full_width_forms_are_known(tokenizer):
    known = [
        bytes([high, low]).decode("gb2312")
        for high in range(0xB0, 0xF8)
        for low in range(0xA1, 0xFF)
        if (high, low) < (0xD7, 0xFA) or high > 0xD7
    ]
    assert len(known) == 6763
    known += (
        [chr(c) for c in range(0x20, 0x7F)]
        + [chr(c) for c in range(0xFF01, 0xFF5F)]
        + list("，。、；：？！“”‘’（）《》—…·％℃")
    )
    ids = tokenizer(known, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(known) and tokenizer.unk_token_id not in ids and len(set(ids)) == len(set(known))


@pytest.mark.parametrize(
    "text", ["1998年3月，江泽民在北京会见了比尔·盖茨。", "Ａ a\t\u3000\u200b😀e\u0301\n한글", "x" * 300]
)
def test_one_token_a_character_with_exact_offsets(tokenizer, text):
    raw = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert raw["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
    assert raw["input_ids"] == tokenizer(list(text), is_split_into_words=True, add_special_tokens=False)["input_ids"]


@pytest.mark.skipif(not NER_DATA.exists(), reason="the real corpus (../shared/ner_data) is not here")
def test_real_sentences_are_learned_and_found(tmp_path, capsys):
    """100 short real sentences, two epochs on the default encoder: far from its best, and far from nothing."""
    short = [sentence for sentence in formats.read(str(NER_DATA / "train")).sentences if len(sentence.units) <= 30]
    for name, part in {"train": short[:100], "dev": short[100:140]}.items():
        lines = ["".join(f"{c} {t}\n" for c, t in zip(s.units, s.tags, strict=True)) for s in part]
        (tmp_path / name).write_text("\n".join(lines), "utf-8")
    settings = {"train": tmp_path / "train", "dev": tmp_path / "dev", "test": "null", "epochs": 2}
    settings |= {"learning_rate": 2e-3, "output": tmp_path, "run": "short"}
    main.main([part for key, value in settings.items() for part in (f"--{key}", str(value))])
    last = json.loads((tmp_path / "short/metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert last["dev"]["micro"]["f1"] > 0.4
    text = "1998年3月，江泽民在北京会见了比尔·盖茨。"
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "short"), "--json", text])
    for entity in json.loads(capsys.readouterr().out)["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]


def test_half_precision_encoders_are_loaded_in_float32(tmp_path):
    from transformers import BertModel

    tiny.encoder(tmp_path / "encoder")
    BertModel.from_pretrained(tmp_path / "encoder", dtype=torch.float16).save_pretrained(tmp_path / "encoder")
    network, _, _ = built(tmp_path / "encoder", "--tuning", "full")
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}


def test_wrong_encoders_are_named(encoders, tmp_path):
    def fails(name, *argv):
        with pytest.raises(UserError) as caught:
            built(name, *argv)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def copy(name):
        return Path(shutil.copytree(encoders["bert"], tmp_path / name))

    assert "there is no such folder" in fails(tmp_path / "nosuch")
    assert "is a file" in fails(encoders["bert"] / "config.json")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in fails(tmp_path / "empty")
    (copy("weightless") / "model.safetensors").unlink()
    assert "there are no weights in" in fails(tmp_path / "weightless")
    file = copy("cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "model.safetensors: truncated or not safetensors" in fails(tmp_path / "cut")
    (copy("broken") / "config.json").write_text("{")
    assert "config.json cannot be used" in fails(tmp_path / "broken")
    (copy("alien") / "config.json").write_text('{"model_type": "alien"}')
    assert "config.json cannot be used" in fails(tmp_path / "alien")
    (copy("headless") / "config.json").write_text('{"model_type": "clip"}')
    assert "clip has no token-classification head" in fails(tmp_path / "headless")
    known = json.loads((copy("deeper") / "config.json").read_text())
    (tmp_path / "deeper" / "config.json").write_text(json.dumps(known | {"num_hidden_layers": 3}))
    assert "16 are missing or of another shape, the first is bert.encoder.layer.2" in fails(tmp_path / "deeper")
    (copy("narrow") / "config.json").write_text(json.dumps(known | {"intermediate_size": 63}))
    assert "of another shape" in fails(tmp_path / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy(name) / name).unlink()
    assert "tokenizer" in fails(tmp_path / "tokenizer.json")
    (copy("mixed") / "config.json").write_text(json.dumps(known))
    tiny.wordpiece(tmp_path / "mixed", tiny.TEXT + "".join(map(chr, range(0x4E00, 0x4F00))))
    assert "do not fit" in fails(tmp_path / "mixed")
    assert "does not fit bert encoders" in fails(encoders["bert"], "--lora.target_modules", "nosuch")


def test_code_that_comes_with_an_encoder_is_not_run(encoders, tmp_path):
    folder = Path(shutil.copytree(encoders["bert"], tmp_path / "encoder"))
    known = json.loads((folder / "config.json").read_text())
    known |= {"model_type": "theirs", "auto_map": {"AutoConfig": "code.A", "AutoModelForTokenClassification": "code.B"}}
    (folder / "config.json").write_text(json.dumps(known))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    with pytest.raises(UserError, match="config.json cannot be used"):
        built(folder)
    assert not (tmp_path / "owned").exists()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Points huggingface_hub at an address, with an empty cache."""
    from huggingface_hub import constants

    def point(endpoint):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"  # built once, of HF_ENDPOINT
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    return point


def test_a_hub_that_does_not_answer(hub, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection and says nothing
        monkeypatch.setattr(encoder, "ANSWER_SECONDS", 0.5)
        for endpoint in ("http://127.0.0.1:9", f"http://127.0.0.1:{silent.getsockname()[1]}"):
            hub(endpoint)
            begun = time.perf_counter()
            with pytest.raises(UserError) as caught:
                built("nobody/encoder")
            assert endpoint in str(caught.value) and "HF_ENDPOINT" in str(caught.value)
            assert "a local folder" in str(caught.value) and "\n" not in str(caught.value)
            assert time.perf_counter() - begun < 5


def test_a_hub_that_has_no_such_model(hub, monkeypatch):
    import http.server

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match="neither a folder here nor a model on http"):
            built("nobody/encoder")
        server.shutdown()
