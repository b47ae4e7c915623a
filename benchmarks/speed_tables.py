"""The tables of speed and memory in docs/, which tables.py writes: the median of the runs, with lowest and highest."""

from collections.abc import Iterable
from statistics import median, quantiles

from measure import how_measured, load, source

Rows = list[list[str]]


def figure(values: Iterable[float], digits: int = 0) -> str:
    """Return the median, with the lowest and the highest where they differ: `3,542 (3,401–3,600)`."""
    values = list(values)
    middle, lowest, highest = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if lowest == highest else f"{middle} ({lowest}–{highest})"


# Prefix of a peer's figures -> its name.
PEERS = {"peer_": "Trainer + peft", "tuned_": "the same, length-grouped, `bf16=True` where native"}


def training_speed(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/performance.md: main.py against the Trainer, as it comes and with its faster settings."""
    head = ["training", "tokens/s", "against", "its tokens/s", "ratio", "F1", "peak memory, MB", "command", "measured"]
    rows = []
    for name in ("train-ner_data", "train-msra"):
        for measurement in load(name):
            rows += training_rows(name.removeprefix("train-"), measurement)
    return head, rows


def training_rows(data: str, measurement: dict) -> Rows:
    """Return a row for each tuning of a measurement and each peer that it has figures of."""
    rows = []
    for tuning in measurement["runs"][0]:
        runs = [run[tuning] for run in measurement["runs"]]
        for prefix, peer in PEERS.items():
            if f"{prefix}tokens_per_second" in runs[0]:
                rows.append([f"{data}, `{tuning}`", *against(runs, prefix, peer), *how_measured(measurement)])
    return rows


def against(runs: list[dict], prefix: str, peer: str) -> list[str]:
    """Return the cells that compare main.py's runs with one peer's, whose figures begin with `prefix`."""
    speed, memory, f1 = (
        [figure([run[before + key] for run in runs], digits) for before in ("", prefix)]
        for key, digits in (("tokens_per_second", 0), ("peak_mb", 0), ("f1", 3))
    )
    ratio = figure([run["ratio" if prefix == "peer_" else f"{prefix}ratio"] for run in runs], 1)
    return [speed[0], peer, speed[1], ratio, " / ".join(f1), " / ".join(memory)]


def kernels(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/performance.md: the time of a training step without each kernel, the step with all being 1."""
    head = ["without", "`lora`", "`full`", "command", "measured"]
    rows = []
    for measurement in load("kernels"):
        steps = measurement["runs"][0]
        for name in steps["lora"]:
            cells = [quartiles(steps[tuning][name]) if name in steps[tuning] else "–" for tuning in ("lora", "full")]
            what = "all of them (`kernels: plain`)" if name == "plain" else name
            rows.append([what, *cells, *how_measured(measurement)])
    return head, rows


def quartiles(values: list[float]) -> str:
    """Return the median with the lowest and the highest quarter: `1.06 (1.04–1.09)`."""
    low, middle, high = quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def tagging_speed(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/performance.md: predict.py's engines against transformers' pipeline."""
    columns = {
        "ONNX, characters/s": ("characters_per_second", 0),
        "PyTorch": ("characters_per_second_torch", 0),
        "pipeline": ("peer_characters_per_second", 0),
        "ONNX to pipeline": ("ratio", 1),
        "seconds for one text": ("start_seconds", 2),
        "same tags": ("same_tags", 4),
        "F1, ONNX": ("f1_onnx", 3),
        "F1, PyTorch in float32": ("f1_torch_fp32", 3),
    }
    rows = []
    for name in ("predict-msra", "predict-ner_data"):
        for measurement in load(name):
            cells = [figure([run[key] for run in measurement["runs"]], digits) for key, digits in columns.values()]
            rows.append([name.removeprefix("predict-"), *cells, *how_measured(measurement)])
    return ["tagging", *columns, "command", "measured"], rows


def base_size(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/performance.md: training steps at the size of bert-base and of the embedded encoder."""
    head = ["encoder", "tuning", "seconds a step", "peak memory, MB", "tokens/s", "ratio", "command", "measured"]
    names = {"base": "12 × 768, random", "embedded": "the embedded one"}
    rows = []
    for measurement in load("base-size"):
        for size, tunings in measurement["runs"][0].items():
            for tuning in tunings:
                runs = [run[size][tuning] for run in measurement["runs"]]
                pairs = [
                    " / ".join(figure([run[prefix + key] for run in runs], digits) for prefix in ("", "peer_"))
                    for key, digits in (("seconds_per_step", 2), ("peak_mb", 0), ("tokens_per_second", 0))
                ]
                ratio = figure([run["ratio"] for run in runs], 1)
                rows.append([names[size], f"`{tuning}`", *pairs, ratio, *how_measured(measurement)])
    return head, rows


def ray_speed(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/cluster.md: Ray's workers of one thread against one process of as many threads."""
    head = ["workers", "characters/s", "one process", "ratio", "with all loading", "one process", "command", "measured"]
    rows = []
    for measurement in load("ray-msra"):
        for count in measurement["runs"][0]["ray"]:
            ray, plain = ([run[way][count] for run in measurement["runs"]] for way in ("ray", "plain"))
            cells = [figure([run[key] for run in way]) for key in ("loaded", "whole") for way in (ray, plain)]
            ratio = figure([run["ratio"] for run in ray], 2)
            rows.append([count, *cells[:2], ratio, *cells[2:], *how_measured(measurement)])
    return head, rows


def cost(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/cluster.md: hours of one process on all cores of a machine, from the measured rates."""
    amounts = (("a million sentences of 43 characters", 43e6), ("a billion characters", 1e9))
    rows = []
    for text, characters in amounts:
        for measurement in load("predict-msra"):
            rate = median(run["characters_per_second"] for run in measurement["runs"])
            rows.append([text, f"{characters / rate / 3600:.2f}", f"{rate:,.0f}", source(measurement)])
    return ["to tag", "hours", "at characters a second", "measured"], rows
