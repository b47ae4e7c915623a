"""engines.py and onnx_file.py: the exported file tags as the model does; which engine is taken; files to be refused."""

import json
import os
import shutil

import numpy as np
import onnx
import pytest
import tiny
import torch
import trained
from onnx import TensorProto, helper

from ner import engines
from ner.engines import OnnxEngine, choose_engine
from ner.errors import UserError
from ner.meta import read_meta
from ner.onnx_file import check_self_contained, exported_file
from ner.tagging import Tagger

LABELS = trained.LABELS
TEXTS = [chars for chars, _ in tiny.sentences(60, seed=8)] + [list(trained.TEXT * 12), list("a"), []]


@pytest.fixture
def folder(tmp_path):
    """A copy of the exported run's model folder."""
    return shutil.copytree(trained.exported() / "model", tmp_path / "model")


def test_the_exported_file_tags_as_the_model_does():
    exact = Tagger.of(trained.exported(), precision="fp32")
    quick = Tagger.of(trained.exported(), engine="onnx")
    same = total = 0
    for text, one, other in zip(TEXTS, exact.log_probs(TEXTS), quick.log_probs(TEXTS), strict=True):
        assert one.shape == other.shape == (len(text), len(LABELS)) and other.dtype == np.float32
        same, total = same + (one.argmax(1) == other.argmax(1)).sum(), total + len(text)
    assert same / total >= 0.99


def test_threads_change_nothing():
    one, three = (Tagger.of(trained.exported(), engine="onnx", threads=threads) for threads in (1, 3))
    batches = three._batches(three.windower.windows(TEXTS))
    for batch in batches:
        assert np.array_equal(one._scored(batch)[1], three._scored(batch)[1])
    with three.engine.workers() as each:
        assert [id(batch) for batch, _ in each(three._scored, batches)] == [id(batch) for batch in batches]
    assert max(len(b) * len(b[0].ids) for b in batches if len(b) > 1) <= OnnxEngine.most_tokens


def test_cores(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert engines.available_cores() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert engines.available_cores() == len(os.sched_getaffinity(0))


def test_which_engine_is_taken(folder, monkeypatch):
    assert choose_engine(folder) == ("onnx", "")
    assert choose_engine(folder, "torch") == ("torch", "")
    assert choose_engine(folder, "auto", "bf16") == ("torch", "")
    with monkeypatch.context() as patched:
        patched.setattr(engines, "may_have_accelerator", lambda: True)
        patched.setattr(engines, "has_accelerator", lambda: True)
        assert choose_engine(folder) == ("torch", "")
        assert choose_engine(folder, "onnx") == ("onnx", "")
    with pytest.raises(UserError, match="--precision bf16"):
        choose_engine(folder, "onnx", "bf16")
    (folder / "onnx.json").write_text(json.dumps({"default": False}))
    name, note = choose_engine(folder)
    assert name == "torch" and "scores worse" in note and choose_engine(folder, "onnx")[0] == "onnx"
    shutil.copy(folder / "model_int8.onnx", folder / "model.onnx")
    for file in ("model.onnx", "model_int8.onnx"):  # the one that was written last, as onnx.json says
        (folder / "onnx.json").write_text(json.dumps({"file": file, "default": True}))
        assert exported_file(folder) == folder / file
    (folder / "model.onnx").unlink()
    (folder / "onnx.json").write_text("[]")
    with pytest.raises(UserError, match="onnx.json"):
        choose_engine(folder)
    (folder / "onnx.json").unlink()
    (folder / "model_int8.onnx").unlink()
    name, note = choose_engine(folder)
    assert name == "torch" and f"python model.py export {folder}" in note
    with pytest.raises(UserError, match="--engine onnx needs model_int8.onnx"):
        choose_engine(folder, "onnx")


def test_an_export_folder_is_tagged_without_the_model(folder, tmp_path):
    for file in ("model.safetensors", "config.json"):
        (folder / file).unlink()
    tags, _, _ = Tagger.of(folder, engine="onnx").tag([list(trained.TEXT)])[0]
    assert tags[:2] == ["B-PER", "I-PER"]


def save(file, inputs=("input_ids", "attention_mask"), output="logits", count=7, location=None):
    """Write an ONNX model that gives `count` zeros a token."""
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, ["b", "l"]) for name in inputs]
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["b", "l", count])
    zeros = helper.make_tensor("zeros", TensorProto.FLOAT, [count], [0.0] * count)
    if location:
        zeros.ClearField("float_data")
        zeros.data_location = TensorProto.EXTERNAL
        entry = zeros.external_data.add()
        entry.key, entry.value = "location", location
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
    nodes = [
        helper.make_node("Cast", [inputs[0]], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "axes"], ["wide"], name="relocation"),
        helper.make_node("Mul", ["wide", "zeros"], [output]),
    ]
    graph = helper.make_graph(nodes, "g", values, [result], [zeros, axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    file.write_bytes(model.SerializeToString())
    return file


def test_foreign_files_are_refused(tmp_path):
    file = tmp_path / "model.onnx"
    OnnxEngine(save(file), LABELS)
    for wrong in ({"inputs": ("input_ids", "token_type_ids")}, {"output": "scores"}):
        with pytest.raises(UserError, match="no export of this suite"):
            OnnxEngine(save(file, **wrong), LABELS)
    with pytest.raises(UserError, match="gives 5 scores a token, ner.json has 7 labels"):
        OnnxEngine(save(file, count=5), LABELS)
    model = onnx.load(str(save(file)))
    helper.set_model_props(model, {"labels": json.dumps(LABELS[::-1])})
    onnx.save(model, str(file))
    with pytest.raises(UserError, match="its labels and those of ner.json differ"):
        OnnxEngine(file, LABELS)


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "beside"])
def test_weights_in_other_files_are_refused(tmp_path, location):
    (tmp_path / "beside").write_bytes(b"\0" * 28)
    with pytest.raises(UserError, match="has weights in other files"):
        OnnxEngine(save(tmp_path / "model.onnx", location=location), LABELS)
    check_self_contained(save(tmp_path / "model.onnx"))  # has a node named "relocation"


def test_onnxruntime_that_is_not_there(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        Tagger.of(folder, engine="onnx")


def test_torch_is_left_with_as_many_threads_as_asked_for():
    before = torch.get_num_threads()
    try:
        assert Tagger.of(trained.run(), threads=3).engine.threads == 3
    finally:
        torch.set_num_threads(before)


def test_meta_of_the_export_is_that_of_the_run(folder):
    assert Tagger.of(folder, engine="onnx").labels == read_meta(folder)["labels"] == LABELS
