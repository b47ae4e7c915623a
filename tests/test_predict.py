"""predict.py: offsets on any text, scores, formats, files of any size and kind, several processes, its command line."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ner import config
from ner import batches, decoding, formats
from ner.tagging import Tagger
from ner.windows import Windower
from ner import model
import predict
from ner.errors import UserError

ROOT = Path(predict.__file__).parent
LABELS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
TEXT = "王芳出生于北京，现在住在武汉；"
FOUND = [("王芳", "PER", 0, 2), ("北京", "LOC", 5, 7), ("武汉", "LOC", 12, 14)]


def build(folder, tokenizer, unit="character", seed=0):
    """A random model on a tiny encoder: (model, tokenizer, meta)."""
    settings, _ = config.load(["--pretrained", str(tiny.encoder(folder, tokenizer)), "--tuning", "full",
                               "--max_length", "64", "--dropout", "0"])
    torch.manual_seed(seed)
    return model.build(settings, LABELS, unit)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose model knows the names of tiny.py."""
    folder = tmp_path_factory.mktemp("trained")
    network, tokenizer, meta = build(folder / "encoder", tiny.wordpiece())
    sentences = tiny.sentences(240)
    windows = Windower(tokenizer, "character", True, 64).windows([chars for chars, _ in sentences])
    gold = [[LABELS.index(tag) for tag in tags] for _, tags in sentences]
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    network.train()
    for epoch in range(6):
        for batch in batches.shuffled(windows, 16, seed=epoch):
            inputs = batches.collate(batch, tokenizer.pad_token_id, gold)
            logits = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            loss, count = model.loss_sum(logits, inputs["labels"])
            (loss / count).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save(network, tokenizer, meta, folder / "run" / "model")
    return folder / "run"


@pytest.fixture(scope="module")
def predictor(run):
    return predict.load(run)


KINDS = {"wordpiece": ("character", tiny.wordpiece), "sentencepiece": ("character", tiny.sentencepiece),
         "bytelevel": ("character", tiny.bytelevel), "words": ("word", tiny.bytelevel)}


@pytest.fixture(scope="module")
def random_predictors(tmp_path_factory):
    """Untrained models: they see entities everywhere, which makes offsets easy to get wrong."""
    made = {}
    for kind, (unit, tokenizer) in KINDS.items():
        network, tokens, meta = build(tmp_path_factory.mktemp(kind), tokenizer(), unit, seed=5)
        made[kind] = predict.Predictor(Tagger(network, tokens, meta))
    return made


def plain(entities):
    return [(e.text, e.type, e.start, e.end) for e in entities]


def check(text, entities):
    """What holds for every text."""
    at = 0
    for entity in entities:
        assert text[entity.start:entity.end] == entity.text
        assert at <= entity.start < entity.end <= len(text)
        assert entity.type in ("LOC", "ORG", "PER") and 0 < entity.score <= 1
        assert entity.text == entity.text.strip()
        at = entity.end


def test_finds_what_it_learned(predictor):
    assert predictor.types == ["LOC", "ORG", "PER"]
    found = predictor.predict([TEXT, "", "她没有回答。", "据新华社报道，李娜今天访问了上海"])
    assert plain(found[0]) == FOUND and found[1] == []
    assert plain(found[3]) == [("新华社", "ORG", 1, 4), ("李娜", "PER", 7, 9), ("上海", "LOC", 14, 16)]
    assert all(entity.score > 0.5 for entities in found for entity in entities)


def test_score_is_the_mean_probability_of_the_tags(predictor):
    tags, scores = predictor.tagger.tag([list(TEXT)])[0]
    entity = predictor.predict([TEXT])[0][1]
    assert tags[5:7] == ["B-LOC", "I-LOC"]
    assert entity.score == pytest.approx(float(np.mean(scores[5:7])), abs=1e-4)


def test_many_at_once_are_the_same_as_one_by_one(predictor):
    texts = ["".join(chars) for chars, _ in tiny.sentences(80, seed=3)] + ["", " ", TEXT * 30]
    together = predictor.predict(texts)
    for text, entities in zip(texts, together, strict=True):
        alone = predictor.predict([text])[0]
        assert plain(alone) == plain(entities)
        assert [e.score for e in alone] == pytest.approx([e.score for e in entities], abs=0.02)  # bfloat16


def test_module_functions(predictor, run):
    assert plain(predict.predict([TEXT])[0]) == FOUND
    assert plain(predict.load(run / "model").predict([TEXT])[0]) == FOUND
    with pytest.raises(TypeError, match="list of texts"):
        predict.predict(TEXT)
    with pytest.raises(AttributeError):
        predict.predict([TEXT])[0][0].start = 3


def test_newest_run_where_none_is_named(run, tmp_path, monkeypatch):
    (tmp_path / "output").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "_last", None)
    (tmp_path / "output" / "only").symlink_to(run)
    assert plain(predict.predict([TEXT])[0]) == FOUND


ODD = ["张伟", "北京", "联合国", " ", "\u3000", "\n", "\t", "\x00", "\u200b", "\u200d", "\u202e", "\ufeff", "\u2028",
       "e\u0301", "\u0301", "שלום", "مرحبا", "👩‍👩‍👧‍👦", "🇨🇳", "👍🏽", "\U00020000", "\ud800", "\udfff", "\ue000", "ﬁ",
       "İ", "T-cells", "[CLS]", "<s>", "##", "▁", "。", "\u0e33", "각", "ก็", "\uffff"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=40),
    st.lists(st.sampled_from(ODD) | st.text(max_size=3), max_size=60).map("".join))


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_of_any_text(random_predictors, kind):
    entities = []

    @settings(max_examples=60, deadline=None)
    @given(st.lists(texts, max_size=4))
    @example(["".join(ODD)])
    @example(["".join(ODD) * 40])
    @example(["\ud800", " ", "", "\ufeff\ufeff"])
    def fuzz(given_texts):
        found = random_predictors[kind].predict(given_texts)
        assert len(found) == len(given_texts)
        for text, of_text in zip(given_texts, found, strict=True):
            check(text, of_text)
            entities.extend(of_text)

    fuzz()
    assert len(entities) > 50  # else nothing was tested


def test_book_in_one_line(predictor, run, tmp_path, capsys):
    book = (TEXT + "她没有回答。") * 48_000
    assert len(book) > 1_000_000
    (tmp_path / "book.txt").write_text(book, encoding="utf-8")
    predict.main(["--run", str(run), "--input", str(tmp_path / "book.txt"), "--output", str(tmp_path / "book.jsonl")])
    record = json.loads((tmp_path / "book.jsonl").read_text(encoding="utf-8"))
    assert record["text"] == book and len(record["entities"]) > 100_000
    assert all(book[e["start"]:e["end"]] == e["text"] for e in record["entities"])


# The command.


def call(*arguments, capsys):
    predict.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def test_one_text(run, capsys):
    lines = [line.split("\t") for line in call("--run", run, TEXT, capsys=capsys).splitlines()]
    assert [(text, kind, int(start), int(end)) for text, kind, start, end, _ in lines] == FOUND
    assert all(re.fullmatch(r"[01]\.\d{4}", line[4]) for line in lines)


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
def test_every_precision_finds_the_same(run, precision, capsys):
    lines = call("--run", run, "--precision", precision, TEXT, capsys=capsys).splitlines()
    assert [tuple(line.split("\t")[:2]) for line in lines] == [found[:2] for found in FOUND]


def test_several_texts(run, capsys):
    blocks = call("--run", run, TEXT, "她没有回答。", TEXT, capsys=capsys).split("\n\n")
    assert [block.splitlines()[0] for block in blocks if block] == [TEXT, "她没有回答。", TEXT]
    assert len(blocks[0].splitlines()) == 4


def test_json(run, capsys):
    out = call("--run", run, "--json", TEXT, "a\udcffb", "", capsys=capsys)
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["text"] for record in records] == [TEXT, "a\udcffb", ""]
    assert set(records[0]) == {"text", "entities"} and "王芳" in out
    assert set(records[0]["entities"][0]) == {"text", "type", "start", "end", "score"}
    assert [(e["text"], e["type"], e["start"], e["end"]) for e in records[0]["entities"]] == FOUND
    assert call("--run", run, "--format", "jsonl", TEXT, capsys=capsys) == out.splitlines()[0] + "\n"


def test_files_come_back_through_the_loader(run, tmp_path, capsys):
    lines = ["".join(chars) for chars, _ in tiny.sentences(50, seed=9)] + [f" {TEXT}\u3000{TEXT}\ufeff"]
    (tmp_path / "in.txt").write_text("\n".join(lines), encoding="utf-8")
    for form in ("bio", "jsonl"):
        out = tmp_path / f"out.{form}"
        said = call("--run", run, "--input", tmp_path / "in.txt", "--output", out, "--format", form, capsys=capsys)
        assert said == ""
        found = [plain(entities) for entities in predict.predict(lines)]
        corpus = formats.read(str(out))
        assert len(corpus.sentences) == len(lines)
        for sentence, entities in zip(corpus.sentences, found, strict=True):
            read = [("".join(sentence.chars[s:e]), kind) for kind, s, e in decoding.spans(sentence.tags)]
            assert read == [("".join(text.split()), kind) for text, kind, _, _ in entities]


@settings(max_examples=60, deadline=None)
@given(texts)
def test_bio_of_any_text(random_predictors, tmp_path_factory, text):
    predictor = random_predictors["wordpiece"]
    entities = predictor.predict([text])[0]
    written = predict.as_bio(text, entities)
    kept = [c for c in predict._LONE.sub("\ufffd", text) if not c.isspace() and c != "\ufeff"]
    rows = [line.rsplit(" ", 1) for line in written.split("\n") if line]
    assert [row[0] for row in rows] == kept
    assert sum(tag.startswith("B-") for _, tag in rows) == len([e for e in entities if e.text.strip("\ufeff")])
    assert all(tag == "O" or tag[:2] in ("B-", "I-") for _, tag in rows)


def test_html(run, tmp_path, capsys):
    page = call("--run", run, "--format", "html", "<script>alert(1)</script>" + TEXT, TEXT, capsys=capsys)
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert "<script" not in page and re.sub("<b>[^<]*</b>|<[^>]*>", "", page).count("&lt;script&gt;") == 1
    assert re.findall(r"<mark[^>]*>([^<]+)<b>PER</b></mark>", page)[-1] == "王芳"
    assert page.count('<p class="sentence"') == 2 and 'lang="zh-CN"' in page


def test_colours_and_control_characters(predictor):
    found = predictor.predict([TEXT])[0]
    shown = predict.as_text(TEXT, found, predictor.types, colour=True)
    assert re.sub("\x1b\\[[0-9;]*m", "", shown.splitlines()[0]) == "王芳PER出生于北京LOC，现在住在武汉LOC；"
    assert len(set(re.findall(r"48;5;(\d+)", shown))) == 2  # one colour a type
    assert "\x1b" not in predict.as_text("a\x1b[2J\x07\n", [predict.Entity("\x1b[2J", "PER", 1, 5, 1.0)])


def test_standard_input_and_encodings(run, tmp_path, capsys, monkeypatch):
    three = f"{TEXT}\n\n{TEXT}"
    for data in (three.replace("\n", "\r\n").encode(), f"\ufeff{three}\n".encode(), three.encode("gb18030")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        out = call("--run", run, "--input", "-", "--json", capsys=capsys)
        records = [json.loads(line) for line in out.splitlines()]
        assert [record["text"] for record in records] == [TEXT, "", TEXT]
        assert len(records[2]["entities"]) == 3


def read(data: bytes) -> list[str]:
    return list(predict.read_texts(io.BytesIO(data), "f"))


def test_only_line_feeds_end_a_text():
    assert read("a\u2028b\x0bc\x85d\x1ce\n\nf\r\n".encode()) == ["a\u2028b\x0bc\x85d\x1ce", "", "f"]
    assert read(b"") == [] and read(b"\n") == [""] and read(b"\xef\xbb\xbf") == [""]


def test_damaged_bytes_are_replaced_with_a_warning(capsys):
    data = "北京\n上海和深圳的天气都很好\n".encode() + b"\xe5\x8c \n\xff\n"
    assert read(data) == ["北京", "上海和深圳的天气都很好", "\ufffd ", "\ufffd"]
    assert "f:3: not utf-8" in capsys.readouterr().err
    damaged = ("这是一个很长的句子" * 5).encode()[:-1] + b"\n" + "北京".encode()  # not GB18030, though it would decode
    assert read(damaged)[1] == "北京"


@pytest.mark.parametrize("data, line", [(b"\x7fELF\x02\x01\x01\x00\x00", 1), (b"ok\nPK\x03\x04\x00", 2),
                                        (b"\xff\xfe5S\xacN\n\x00", 1), (b"a\n\xff\xff\xff\x80\xff", 2),
                                        (bytes(range(1, 256)), 2)])
def test_binary_files(data, line):
    with pytest.raises(UserError, match=f"^f:{line}: "):
        read(data)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n\r\0")), min_size=1))
def test_utf8_lines_come_back(lines):
    assert read("\n".join(["好", *lines]).encode() + b"\n") == ["好", *lines]


@given(st.lists(st.integers(0, 200_000), max_size=40))
def test_chunks_are_bounded_and_in_order(lengths):
    texts = ["x" * length for length in lengths]
    cut = list(predict.chunks(texts))
    assert [text for chunk in cut for text in chunk] == texts
    assert all(chunk and sum(map(len, chunk[:-1])) < predict.CHUNK_CHARACTERS for chunk in cut)
    assert [len(c) for c in predict.chunks([""] * 10_000)] == [2048] * 4 + [1808]


class Stub:
    """A predictor that finds the first character."""

    types, unit = ["PER"], "character"

    def predict(self, texts):
        return [[predict.Entity(text[0], "PER", 0, 1, 1.0)] if text else [] for text in texts]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, run):
    monkeypatch.setattr(predict, "load", lambda *_: Stub())
    peaks = []
    for lines in (10_000, 40_000):
        (tmp_path / "in").write_text(("记者从有关部门获悉，" * 8 + "\n") * lines, encoding="utf-8")
        tracemalloc.start()
        predict.main(["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with open(tmp_path / "out", encoding="utf-8") as file:
            assert sum(1 for _ in file) == lines
    assert peaks[1] < 1.1 * peaks[0] + 100_000 < (tmp_path / "in").stat().st_size / 4


def test_wrong_arguments_cost_no_torch(run, tmp_path):
    """Each ends with code 2 (--help: 0) and one clear line before torch is imported."""
    (tmp_path / "same").write_text("x")
    cases = [(["--help"], ""), (["--input", "none.txt"], "none.txt: no such file"),
             (["--input", str(tmp_path)], "a folder; give a file"), (["a", "--input", "b"], "not both"),
             (["--json", "--format", "bio", "a"], "contradict"), (["--run", "none", "a"], "none: no such folder"),
             (["--batch_size", "0", "a"], "at least 1"), (["--format", "xml", "a"], "invalid choice"),
             (["--input", str(tmp_path / "same"), "--output", str(tmp_path / "same")], "same file")]
    code = ("import sys, io, json, contextlib, predict\n"
            "for arguments in json.loads(sys.argv[1]):\n"
            "    said = io.StringIO()\n"
            "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):\n"
            "        try: predict.main(arguments)\n"
            "        except SystemExit as stop: code = stop.code\n"
            "    print(json.dumps([code, said.getvalue(), 'torch' in sys.modules]))\n")
    done = subprocess.run([sys.executable, "-c", code, json.dumps([arguments for arguments, _ in cases])], cwd=ROOT,
                          check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(cases)
    for (arguments, message), (code, said, torch_imported) in zip(cases, answers, strict=True):
        assert message in said and code == (0 if arguments == ["--help"] else 2) and not torch_imported, arguments
        assert "Traceback" not in said
        if message and "invalid choice" not in message:
            assert said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("harm, message", [
    (lambda m: os.truncate(m / "model.safetensors", 999), "model.safetensors"),
    (lambda m: (m / "ner.json").unlink(), "ner.json"),
    (lambda m: (m / "tokenizer.json").unlink(), "tokenizer"),
    (lambda m: (m / "ner.json").write_text((m / "ner.json").read_text().replace('"B-LOC"', '"B-X"')), "labels")])
def test_damaged_model(run, tmp_path, capsys, harm, message):
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    for file in (run / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    harm(folder)
    with pytest.raises(SystemExit) as stop:
        predict.main(["--run", str(tmp_path / "run"), TEXT])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize("output, message", [("folder", "folder: cannot be written (Is a directory)"),
                                             ("none/out", "out: cannot be written (No such file or directory)"),
                                             ("/dev/full", "/dev/full: cannot be written (No space left on device)")])
def test_output_that_cannot_be_written(run, tmp_path, monkeypatch, capsys, output, message):
    if output == "/dev/full" and not os.path.exists(output):
        pytest.skip("no /dev/full on this system")
    monkeypatch.setattr(predict, "load", lambda *_: Stub())
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as stop:
        predict.main(["--run", str(run), TEXT, "--output", str(tmp_path / output)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_prompt_on_a_terminal(run):
    """A real terminal: two sentences typed in, coloured entities out, Ctrl-D ends it with code 0."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "predict.py", "--run", str(run)], cwd=ROOT, env=environment,
                               stdin=child, stdout=child, stderr=child, close_fds=True)
    os.close(child)
    seen = b""

    def until(mark, count):
        nonlocal seen
        while seen.count(mark) < count:
            assert select.select([parent], [], [], 90)[0], seen
            seen += os.read(parent, 4096)

    try:
        until(b"> ", 1)
        for count, line in enumerate((TEXT, "她没有回答。"), 2):
            os.write(parent, line.encode() + b"\n")
            until(b"\n> ", count)
        os.write(parent, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    text = seen.decode()
    assert "LOC, ORG, PER" in text and re.search("\x1b\\[38;5;16;48;5;\\d+m北京\x1b\\[0m", text)
    assert re.search(r"王芳\s+PER\s+0\s+2\s+0\.\d{4}", text)
    assert text.count("她没有回答。") == 2  # typed and shown, without an entity


def test_two_processes(run, tmp_path):
    """The same file as one process writes, in the order of the input, and nothing left beside it."""
    lines = ["".join(chars) + str(i) for i, (chars, _) in enumerate(tiny.sentences(5000, seed=4))]
    lines[5:5] = ["", TEXT * 3000, " "]
    (tmp_path / "in.txt").write_text("\n".join(lines), encoding="utf-8")
    assert len(list(predict.chunks(lines))) >= 3
    command = ["predict.py", "--run", str(run), "--input", str(tmp_path / "in.txt"), "--output"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun: sums round in another order otherwise
    predict.main([*command[1:], str(tmp_path / "one.jsonl")])
    torch.set_num_threads(threads)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--",
                           *command, str(tmp_path / "two.jsonl")], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "one.jsonl", "two.jsonl"]
    with open(tmp_path / "two.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["text"] for line in file] == lines
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


@pytest.fixture
def several_processes(monkeypatch):
    """The environment of process `rank` of two, without a second one."""
    for name in ("init_process_group", "destroy_process_group", "broadcast"):
        monkeypatch.setattr(torch.distributed, name, lambda *_: None)

    def set_rank(rank):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")

    return set_rank


def test_another_process_fails(several_processes, monkeypatch, tmp_path, run, capsys):
    several_processes(0)

    class Failing(Stub):
        def predict(self, texts):
            next(tmp_path.glob("out.jsonl.*")).joinpath("failed").touch()
            return super().predict(texts)

    monkeypatch.setattr(predict, "load", lambda *_: Failing())
    (tmp_path / "in").write_text("x\n" * 9000)
    with pytest.raises(SystemExit) as stop:
        predict.main(["--run", str(run), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out.jsonl")])
    assert stop.value.code == 2 and "another process failed" in capsys.readouterr().err
    assert not list(tmp_path.glob("out.jsonl.*"))


def test_what_several_processes_need(several_processes, run, tmp_path, capsys, monkeypatch):
    for arguments in (["--input", "-", "--output", "x"], ["--input", __file__]):
        several_processes(1)
        with pytest.raises(SystemExit) as stop:
            predict.main(["--run", str(run), *arguments])
        assert stop.value.code == 2 and "several processes need" in capsys.readouterr().err
    assert call("--run", run, TEXT, capsys=capsys) == ""  # a few texts are the first process's work
    several_processes(0)
    assert "王芳" in call("--run", run, TEXT, capsys=capsys)
