"""Texts → entities with offsets, by a saved run. predict.py is its command line."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ner import decoding
from ner.engines import best_device, choose_engine
from ner.errors import UserError
from ner.files import whole_folder
from ner.meta import model_folder, read_meta
from ner.paths import resolve_path
from ner.tagging import Tagger
from ner.tunings import TUNINGS
from ner.windows import text_units

log = logging.getLogger("ner.predictor")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # one without a partner, which no tokenizer takes


@dataclass(slots=True, frozen=True)
class Entity:
    """text == the whole text[start:end]; offsets count characters, half-open; score: 0 to 1."""

    text: str
    type: str
    start: int
    end: int
    score: float


@dataclass(slots=True, frozen=True)
class Result:
    """A tagged text. margin: by how much the best tag of the least certain character leads the next, 0 to 1."""

    text: str
    entities: list[Entity]
    margin: float


class Predictor:
    """A loaded model, ready for texts. `types`: what it can find, sorted. `unit`: "character" or "word"."""

    def __init__(self, tagger: Tagger):
        self.tagger, self.unit = tagger, tagger.unit
        self.types = sorted({label[2:] for label in tagger.labels if label != "O"})

    def predict(self, texts: list[str]) -> list[list[Entity]]:
        """Return the entities of each text, in order of their offsets. Texts may be empty and of any length."""
        return [result.entities for result in self.results(texts)]

    def results(self, texts: list[str]) -> list[Result]:
        """Return entities and margin of each text; the margin of a text without characters is 1."""
        if isinstance(texts, str):
            raise TypeError("predict() takes a list of texts; for one text give [text]")
        units = [text_units(LONE_SURROGATE.sub("\ufffd", text), self.unit) for text in texts]
        with_units = [index for index, units_of_text in enumerate(units) if units_of_text]
        tagged = self.tagger.tag([[unit for unit, _, _ in units[index]] for index in with_units])
        results = [Result(text, [], 1.0) for text in texts]
        for index, (tags, scores, margin) in zip(with_units, tagged, strict=True):
            text = texts[index]
            results[index] = Result(text, _entities(text, units[index], tags, scores), margin)
        return results


def load(
    run: str | Path | None = None,
    batch_size: int = 32,
    precision: str = "auto",
    engine: str = "auto",
    threads: int | None = None,
) -> Predictor:
    """Load a run's model: a run folder, a model folder, an ONNX export, or None for the newest finished run in output/.

    engine: "onnx" computes the exported file of the model's folder on the CPU, "torch" the model itself on a GPU or the
    CPU in `precision`, which config.yaml explains; "auto" takes a GPU where there is one, else the file where there is
    one. threads: all cores where None. Settings of the process stay as they are, but for PyTorch's number of threads
    where `threads` is given. Raises UserError where there is no model or it is damaged.
    """
    folder = model_folder(run_folder(run))
    tuning = read_meta(folder)["tuning"]
    chosen, note = choose_engine(folder, engine, precision)
    if note and not TUNINGS[tuning].virtual_tokens:  # those cannot be exported
        log.warning("%s", note)
    device = best_device() if chosen == "torch" else "cpu"
    return Predictor(Tagger.of(folder, device, precision, batch_size, chosen, threads))


def run_folder(run: str | Path | None) -> Path:
    """Return the folder of a run, the newest finished one where None. Raises UserError where there is none."""
    if run is None:
        from ner.scores import newest_run

        run = newest_run()
    folder = resolve_path(whole_folder(run))
    if folder is None or not folder.is_dir():
        raise UserError(f"{run}: no such folder; give a run, such as output/20240506-104917, or its model folder")
    return folder


def _entities(text: str, units: list[tuple[str, int, int]], tags: list[str], scores: np.ndarray) -> list[Entity]:
    """Return the entities of one text; white space at the ends of one is not part of it."""
    entities = []
    for name, first, last in decoding.spans(tags):
        while first < last and units[first][0].isspace():
            first += 1
        while first < last and units[last - 1][0].isspace():
            last -= 1
        if first < last:
            start, end = units[first][1], units[last - 1][2]
            entities.append(Entity(text[start:end], name, start, end, float(scores[first:last].mean())))
    return entities
