"""Models on disk that are damaged or do not fit: every damage is named, and no pickle runs."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import built_model
import pytest
import torch
from built_model import LABELS, built

from ner import meta as meta_file
from ner import saved_model
from ner.errors import UserError


@pytest.fixture(scope="session")
def encoders():
    return built_model.encoders()


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture(scope="session")
def saved(encoders, tmp_path_factory):
    """A saved model folder for a tuning of each kind: plain, merged without peft, by peft, virtual tokens."""
    folders = {}
    for tuning in ("full", "lora", "dora", "prefix"):
        network, tokenizer, meta = built(encoders["bert"], "--tuning", tuning)
        folders[tuning] = tmp_path_factory.mktemp(tuning) / "model"
        saved_model.save(network, tokenizer, meta, folders[tuning])
        linked = folders[tuning] / "encoder" / "model.safetensors"
        if linked.exists():  # a copy, so that a test may damage it
            data = linked.read_bytes()
            linked.unlink()
            linked.write_bytes(data)
    return folders


def copied(saved, tuning, tmp_path):
    return Path(shutil.copytree(saved[tuning], tmp_path / "model"))


def damage(folder):
    with pytest.raises(UserError) as caught:
        saved_model.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "tuning, name",
    [
        (tuning, name)
        for tuning in ("full", "lora", "dora", "prefix")
        for name in ["ner.json", "tokenizer.json"]
        + (
            ["config.json", "model.safetensors"]
            if tuning == "full"
            else ["adapter_config.json", "adapter_model.safetensors"]
        )
    ],
)
def test_missing_cut_and_garbled_files_are_named(saved, tmp_path, tuning, name):
    folder = copied(saved, tuning, tmp_path)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    message = damage(folder)
    assert name in message or ("weights" in message and name == "model.safetensors") or "tokenizer" in message
    last = data[:-1] + b"\xff" if name.endswith("json") else b"x"
    for wrong in (data[: len(data) // 2], b"", b"\x00" * 64, b"[" * 100_000, b"null", last):
        (folder / name).write_bytes(wrong)
        message = damage(folder)
        assert str(folder) in message and ("tokenizer" if name == "tokenizer.json" else name) in message


@pytest.mark.parametrize("tuning", ["full", "lora", "dora", "prefix"])
def test_malicious_pickles_do_not_run(saved, tmp_path, tuning):
    folder, owned = copied(saved, tuning, tmp_path), tmp_path / "owned"
    bomb = pickle.dumps(Bomb(owned))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for file in files:
        data = file.read_bytes()
        file.write_bytes(bomb)
        with contextlib.suppress(UserError):
            saved_model.load(folder)
        assert not owned.exists(), file
        file.write_bytes(data)
    for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "model.bin"):
        (folder / name).write_bytes(bomb)  # beside what is right, and then instead of it
    saved_model.load(folder)
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    (folder / "encoder").mkdir(exist_ok=True)
    (folder / "encoder" / "pytorch_model.bin").write_bytes(bomb)
    damage(folder)
    assert not owned.exists()
    pickle.loads(bomb)
    assert owned.is_dir(), "the bomb works"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("tuning", ["full", "lora", "dora", "prefix"])
def test_labels_that_do_not_match_the_head_are_named(saved, tmp_path, tuning):
    folder = copied(saved, tuning, tmp_path)
    edit(folder / "ner.json", labels=LABELS[:3])
    assert "labels" in damage(folder) and "ner.json" in damage(folder)
    if tuning == "full":
        edit(folder / "ner.json", labels=[*LABELS[:3], "B-ORG", "I-ORG"])
        assert "labels of config.json and ner.json differ" in damage(folder)
        few = LABELS[:3]
        edit(folder / "ner.json", labels=few)
        edit(folder / "config.json", id2label=dict(enumerate(few)), label2id={label: i for i, label in enumerate(few)})
        assert "weights cannot be loaded" in damage(folder)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"labels": []}, "labels"),
        ({"labels": ["O", "O", "B-X", "I-X", "B-Y"]}, "labels"),
        ({"labels": "O"}, "labels"),
        ({"labels": ["O", "XB-PERSON", "I-X", "B-Y", "I-Y"]}, "'XB-PERSON' is no IOB2 tag"),
        ({"labels": ["O", "S-X", "I-X", "B-Y", "I-Y"]}, "'S-X' is no IOB2 tag"),
        ({"labels": [0, 1, 2, 3, 4]}, "labels"),
        ({"tuning": "nosuch"}, "tuning is 'nosuch'"),
        ({"tuning": 1}, "tuning is 1"),
        ({"unit": "byte"}, "unit"),
        ({"decode": "beam"}, "decode"),
        ({"max_length": "9"}, "max_length is '9'"),
        ({"max_length": True}, "max_length is True"),
        ({"special_tokens": None}, "special_tokens is None"),
    ],
)
def test_wrong_values_in_ner_json_are_named(saved, tmp_path, changes, said):
    folder = copied(saved, "lora", tmp_path)
    edit(folder / "ner.json", **changes)
    assert said in damage(folder)


def test_adapters_that_do_not_fit_are_named(saved, encoders, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = copied(saved, "lora", tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    assert "do not fit" in damage(folder)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    assert "do not fit" in damage(folder)
    save_file({key: value for key, value in tensors.items() if "classifier" not in key}, file)
    assert "the head in adapter_model.safetensors is missing" in damage(folder)
    save_file({key: value for key, value in tensors.items() if not key.endswith("classifier.bias")}, file)
    assert "a weight of the head is missing" in damage(folder)
    save_file(tensors | {"base_model.model.bert.nosuch": torch.zeros(2)}, file)
    assert "bert.nosuch is missing" in damage(folder)
    save_file(tensors, file)
    for changes in ({"r": 0}, {"r": None}, {"lora_alpha": "x"}, {"r": []}):
        before = (folder / "adapter_config.json").read_text()
        edit(folder / "adapter_config.json", **changes)
        assert "do not fit" in damage(folder)
        (folder / "adapter_config.json").write_text(before)
    shutil.rmtree(folder / "encoder")
    edit(folder / "ner.json", pretrained=str(encoders["roberta"]))
    assert "do not fit" in damage(folder)


def test_a_run_folder_is_taken_for_its_model(saved, tmp_path):
    copied(saved, "full", tmp_path)
    assert saved_model.load(tmp_path)[2]["tuning"] == "full"
    with pytest.raises(UserError, match="no ner.json, so it is no saved model"):
        saved_model.load(tmp_path / "nosuch")


def test_an_encoder_that_changed_under_an_adapter_is_noticed(saved, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    folder = copied(saved, "lora", tmp_path)
    file = folder / "encoder" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight * 1.5 for name, weight in weights.items()}, file, {"format": "pt"})
    assert str(file) in damage(folder) and "changed since" in damage(folder)
    known = json.loads((folder / "ner.json").read_text())
    del known["encoder_sha256"], known["format_version"]  # as older runs are
    (folder / "ner.json").write_text(json.dumps(known))
    assert saved_model.load(folder)[2]["encoder_sha256"] == {}
    assert "saved without a digest of its encoder" in caplog.text


@pytest.mark.parametrize("tuning", ["lora", "dora", "prefix"])
def test_labels_that_were_renamed_in_ner_json_are_noticed(saved, tmp_path, tuning):
    folder = copied(saved, tuning, tmp_path)
    edit(folder / "ner.json", labels=[LABELS[0], *LABELS[3:], *LABELS[1:3]])
    assert "labels of" in damage(folder) and "ner.json differ" in damage(folder)
    edit(folder / "ner.json", labels=[*LABELS[:4], "XB-PERSON"])
    assert "'XB-PERSON' is no IOB2 tag" in damage(folder)


def test_a_newer_format_says_so(saved, tmp_path):
    folder = copied(saved, "full", tmp_path)
    edit(folder / "ner.json", format_version=meta_file.FORMAT_VERSION + 1)
    assert "is newer than this program knows" in damage(folder) and "ner.json" in damage(folder)


def test_unreadable_is_not_damaged(saved, tmp_path, monkeypatch):
    folder = copied(saved, "lora", tmp_path)
    real = Path.read_text

    def refuse(path, *rest, **keys):
        if path.name == "adapter_config.json":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **keys)

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "cannot be read: Permission denied" in damage(folder) and "is damaged" not in damage(folder)


def test_an_onnx_export_says_what_it_is(saved, tmp_path):
    folder = copied(saved, "full", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.onnx").touch()
    assert "is an ONNX export" in damage(folder)
