"""Models on disk: what is saved is what is loaded, for every tuning."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import built_model
import pytest
import tiny
import torch
from built_model import LABELS, built, logits, train

from ner import config, files, model, saved_model
from ner.errors import UserError
from ner.tunings import TUNINGS

SHARED = config.ROOT.parent / "shared" / "candidate_encoder"
LORAS = ("lora", "dora", "rslora", "adalora")


@pytest.fixture(scope="session")
def encoders():
    return built_model.encoders()


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_saved_and_loaded_gives_the_same_logits(encoders, tmp_path, tuning, kind):
    network, tokenizer, meta = built(encoders[kind], "--tuning", tuning)
    losses = train(network.train())
    assert losses[-1] < losses[0]
    wanted = logits(network.eval())
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    apart, loaded_tokenizer, loaded_meta = saved_model.load(tmp_path / "model", merged=False)
    merged, _, _ = saved_model.load(tmp_path / "model")
    assert loaded_meta == meta and loaded_meta["labels"] == LABELS
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    torch.testing.assert_close(logits(apart), wanted, atol=2e-6 if tuning == "adalora" else 0, rtol=0)
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=0)
    assert not merged.training and {weight.dtype for weight in merged.parameters()} == {torch.float32}
    names = {path.name for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert not {name for name in names if name.endswith((".bin", ".pt", ".pkl"))}
    assert os.listdir(tmp_path) == ["model"], "nothing temporary stays"


@pytest.mark.parametrize("tuning", LORAS)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize(
    "argv",
    [
        ("--lora.bias", "all"),
        ("--lora.bias", "lora_only"),
        ("--lora.bias", "all", "--lora.target_modules", "query,value"),
        ("--lora.target_modules", "null"),
    ],
)
def test_biases_and_chosen_layers(encoders, tmp_path, tuning, kind, argv):
    if tuning == "adalora" and "lora_only" in argv:
        pytest.skip("peft's adalora has no lora_only")
    network, tokenizer, meta = built(encoders[kind], "--tuning", tuning, *argv)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert any(name.endswith("query.base_layer.bias") for name in trained) == ("--lora.bias" in argv)
    assert any("dense.lora_A" in name for name in trained) == (
        "--lora.target_modules" not in argv or ("null" in argv and tuning == "adalora" and kind == "roberta")
    )
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    for merged in (True, False):
        loaded = saved_model.load(tmp_path / "model", merged=merged)[0]
        torch.testing.assert_close(logits(loaded), logits(network), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tuning", ["lora", "rslora"])
def test_merging_without_peft_equals_pefts_own(encoders, tmp_path, tuning):
    network, tokenizer, meta = built(encoders["bert"], "--tuning", tuning, "--lora.bias", "all")
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    ours, theirs = (
        saved_model.load(tmp_path / "model")[0],
        saved_model.load(tmp_path / "model", merged=False)[0].merge_and_unload(),
    )
    theirs = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, theirs[name], atol=1e-7, rtol=0)


def test_loading_a_lora_needs_no_peft_and_says_nothing(encoders, tmp_path):
    saved_model.save(*built(encoders["bert"], "--tuning", "lora"), tmp_path / "model")
    load = f"saved_model.load({str(tmp_path / 'model')!r})"
    code = f"import sys; from ner import saved_model; {load}; print('peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=config.ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", ""), "no peft, and not a word of noise"


def test_adalora_moves_rank_and_keeps_what_it_chose(encoders, tmp_path):
    network, tokenizer, meta = built(encoders["bert"], "--tuning", "adalora")
    train(network.train(), 20)
    kept = [sum(row) for row in network.peft_config["default"].rank_pattern.values()]
    assert sum(kept) == 4 * len(kept) and len(set(kept)) > 1, "rank 4 on average, not everywhere alike"
    zeros = [(weight == 0).sum().item() for name, weight in network.named_parameters() if "lora_E" in name]
    assert sorted(6 - count for count in zeros) == sorted(kept)
    saved_model.save(network.eval(), tokenizer, meta, tmp_path / "model")
    torch.testing.assert_close(logits(saved_model.load(tmp_path / "model")[0]), logits(network), atol=1e-5, rtol=0)


def test_standard_loaders_read_an_adapter(encoders, tmp_path):
    from peft import AutoPeftModelForTokenClassification
    from transformers import pipeline

    network, tokenizer, meta = built(encoders["bert"])
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    theirs = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "model")
    assert theirs.config.id2label == dict(enumerate(LABELS))
    torch.testing.assert_close(logits(theirs.eval()), logits(network), atol=0, rtol=0)
    found = pipeline("token-classification", model=str(tmp_path / "model"))("江泽民在北京")
    assert {row["entity"] for row in found} <= set(LABELS[1:]) and found


def test_an_adapter_keeps_its_encoder_without_a_second_copy(encoders, tmp_path):
    network, tokenizer, meta = built(encoders["bert"])
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    linked, source = tmp_path / "model" / "encoder" / "model.safetensors", encoders["bert"] / "model.safetensors"
    assert os.path.samefile(linked, source)


def test_an_adapter_finds_its_encoder_when_the_project_moved(tmp_path, monkeypatch):
    project = tmp_path / "before"
    tiny.encoder(project / "data" / "encoder")
    monkeypatch.chdir(project)
    monkeypatch.setattr(config, "ROOT", project)
    network, tokenizer, meta = built("data/encoder")
    saved_model.save(network, tokenizer, meta, "output/run/model")
    wanted = logits(network)
    moved = tmp_path / "after"
    project.rename(moved)
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits(saved_model.load("after/output/run/model")[0]), wanted, atol=1e-5, rtol=0)
    shutil.rmtree(moved / "output/run/model/encoder")  # where a copy of the run left the links behind
    monkeypatch.setattr(saved_model, "ROOT", moved)
    torch.testing.assert_close(logits(saved_model.load("after/output/run/model")[0]), wanted, atol=1e-5, rtol=0)
    shutil.rmtree(moved / "data")
    with pytest.raises(UserError, match="its encoder .*/before/data/encoder is gone"):
        saved_model.load("after/output/run/model")


def test_links_fall_back_where_the_disk_has_none(encoders, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "not here")

    network, tokenizer, meta = built(encoders["bert"])
    monkeypatch.setattr(os, "link", refuse)
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    linked = tmp_path / "model" / "encoder" / "model.safetensors"
    assert linked.is_symlink() and not os.readlink(linked).startswith("/")
    torch.testing.assert_close(logits(saved_model.load(tmp_path / "model")[0]), logits(network), atol=1e-5, rtol=0)
    monkeypatch.setattr(os, "symlink", refuse)
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    assert not linked.is_symlink() and linked.stat().st_nlink == 1
    torch.testing.assert_close(logits(saved_model.load(tmp_path / "model")[0]), logits(network), atol=1e-5, rtol=0)


def test_a_model_that_cannot_be_put_in_place_leaves_the_old_one_there(encoders, tmp_path, monkeypatch):
    made = built(encoders["bert"], "--tuning", "full")
    saved_model.save(*made, tmp_path / "model")
    before, real = (tmp_path / "model" / "model.safetensors").read_bytes(), os.rename

    def rename(source, target):
        if ".writing-" in Path(source).name:
            raise PermissionError(13, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PermissionError, match=f"{tmp_path / 'model'}"):
        saved_model.save(*made, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_failed_save_leaves_the_old_model_whole(encoders, tmp_path, monkeypatch):
    network, tokenizer, meta = built(encoders["bert"])
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    monkeypatch.setattr(tokenizer, "save_pretrained", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        saved_model.save(network, tokenizer, meta, tmp_path / "model")
    assert {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()} == before
    assert os.listdir(tmp_path) == ["model"]
    monkeypatch.undo()
    files.temporary_path(tmp_path / "model").mkdir()
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"], "what a killed process left is swept up"


def test_words_of_byte_level_tokenizers_begin_with_a_space(encoders, tmp_path):
    network, tokenizer, meta = built(encoders["roberta"], unit="word")
    assert tokenizer.tokenize("human")[0].startswith("Ġ")
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    assert saved_model.load(tmp_path / "model")[1].tokenize("human")[0].startswith("Ġ")
    assert not built(encoders["roberta"])[1].tokenize("human")[0].startswith("Ġ")


def test_the_published_english_run_builds(encoders, tmp_path):
    file = config.ROOT / "configs" / "bionlp2004.yaml"
    made = config.load(["--config", str(file), "--pretrained", str(encoders["roberta"])])[0]
    network, tokenizer, meta = model.build(made, LABELS, "word")
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert any("query.lora_A" in name for name in trained) and any("LayerNorm.bias" in name for name in trained)
    saved_model.save(network.eval(), tokenizer, meta, tmp_path / "model")
    torch.testing.assert_close(logits(saved_model.load(tmp_path / "model")[0]), logits(network), atol=1e-5, rtol=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no candidate encoder beside the project")
def test_a_real_encoder(tmp_path):
    network, tokenizer, meta = built(SHARED)
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    torch.testing.assert_close(logits(saved_model.load(tmp_path / "model")[0]), logits(network), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tuning", ["lora", "rslora", "dora"])
def test_adapters_on_embeddings_are_saved_and_loaded(encoders, tmp_path, tuning):
    network, tokenizer, meta = built(
        encoders["bert"], "--tuning", tuning, "--lora.target_modules", "word_embeddings,query"
    )
    saved_model.save(network, tokenizer, meta, tmp_path / "model")
    for merged in (True, False):
        loaded = saved_model.load(tmp_path / "model", merged=merged)[0]
        torch.testing.assert_close(logits(loaded), logits(network), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["lora", "full"])
def test_runs_that_were_saved_before_format_versions_load(name):
    network, _, meta = saved_model.load(config.ROOT / "tests" / "saved_runs" / name)
    assert meta["format_version"] == 0 and meta["tuning"] == name
    assert torch.isfinite(network(torch.arange(5, 15)[None]).logits).all()
