"""The sentences of a run: train, dev and test as its config names them."""

import logging
from typing import TYPE_CHECKING

from ner import config as settings
from ner import formats, survey
from ner.corpus import Corpus, Sentence, check_trainable, sample

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("__main__")


def read(config: settings.Config, accelerator: "Accelerator") -> tuple[Corpus, list[Sentence], list[Sentence] | None]:
    """Return the corpus to train on and the sentences of dev and test; test is None where the config names none.

    Logs what is in them and what is odd about it. Without a dev file, 5% of train are held out by the seed. Raises
    UserError where a file cannot be used, or train holds no entity.
    """
    paths = {part: path for part in ("train", "dev", "test") if (path := getattr(config, part))}
    if any(path.startswith("data/msra/") and not settings.resolve_path(path) for path in paths.values()):
        with accelerator.main_process_first():
            from data import msra

            msra.ensure(say=lambda line: log.info("%s", line))
    corpora = {}
    for part, path in paths.items():
        corpora[part] = formats.read(
            path if path.startswith("hub:") else str(settings.resolve_path(path) or path), part
        )
        log.info("%s: %s", part, corpora[part].describe())
    train = _sampled(corpora.pop("train"), config)
    if "dev" not in corpora:
        train, corpora["dev"] = _held_out(train, config.seed)
    check_trainable(train, *corpora.values())
    for warning in survey.warnings_of(train, *corpora.values()):
        log.warning("%s", warning)
    return train, corpora["dev"].sentences, corpora["test"].sentences if "test" in corpora else None


def _sampled(corpus: Corpus, config: settings.Config) -> Corpus:
    """Return the corpus with at most config.max_train_sentences, drawn by the seed."""
    limit = config.max_train_sentences
    assert limit != "auto"  # settings.load() has put in what it means
    sentences = sample(corpus.sentences, limit, config.seed)
    if len(sentences) < len(corpus.sentences):
        log.info("train: %d of these sentences, a sample by the seed", len(sentences))
    return corpus.part(sentences)


def _held_out(train: Corpus, seed: int) -> tuple[Corpus, Corpus]:
    """Return 95% of train, and the other 5%, drawn by the seed, as dev."""
    dev = sample(train.sentences, max(1, len(train.sentences) // 20), seed)
    of_dev = set(map(id, dev))
    rest = [sentence for sentence in train.sentences if id(sentence) not in of_dev] or train.sentences
    log.info("dev: no file, so 5%% of train, %d sentences, are held out by the seed", len(dev))
    return train.part(rest), train.part(dev, "the held-out sentences")
