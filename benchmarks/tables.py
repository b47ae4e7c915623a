"""Write the tables of README and docs/ from the measurements under benchmarks/results/ (see measure.py).

    python benchmarks/tables.py fill     # write them
    python benchmarks/tables.py check    # exit 1 where a table is not what the measurements give

Speeds are the median of the runs with the lowest and the highest, scores mean and standard deviation over the seeds.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from measure import how_measured, load  # noqa: E402
from speed_tables import Rows, base_size, cost, kernels, ray_speed, tagging_speed, training_speed  # noqa: E402

from ner.tunings import BASE_SIZE, TUNINGS  # noqa: E402

DOCUMENTS = (
    "README.md",
    "README.zh.md",
    *(f"docs/{name}.md" for name in ("results", "performance", "tuning", "cluster", "zh/tuning")),
)
SCORE_HEAD = ["trained on", "tuning", "micro-F1 (seeds)", "first49", "macro-F1", "best dev", "by type", "command",
              "measured"]  # fmt: skip
TRAINED_ZH = {
    "lora": "每个线性层旁的低秩矩阵（Hu 等，2021）",
    "full": "所有权重",
    "dora": "LoRA，每列另有一个幅度（Liu 等，2024）",
    "rslora": "LoRA，按 alpha / √r 缩放（Kalajdzievski，2023）",
    "adalora": "LoRA，把秩分配给最需要的层（Zhang 等，2023）",
    "ia3": "key、value 和前馈层激活的缩放系数（Liu 等，2022）",
    "bitfit": "偏置（Ben Zaken 等，2021）",
    "freeze": "无，只训练分类头",
    "prompt": "每个窗口前的虚拟 token 向量（Lester 等，2021）",
    "prefix": "每层虚拟 token 的 key 和 value（Li 和 Liang，2021）",
    "ptuning": "由小网络生成的虚拟 token（Liu 等，2021）",
}


def spread(values: Iterable[float]) -> str:
    """Return mean ± standard deviation of scores over seeds, and how many: `0.874 ± 0.002 (3)`; a dash for none."""
    values = list(values)
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.3f} (1)"
    return f"{mean(values):.3f} ± {stdev(values):.3f} ({len(values)})"


def counted(seeds: list[dict], count: str, average: str) -> list[float]:
    """Return the F1 of each seed by one count ("strict", "first49") and average ("micro", "macro")."""
    return [seed[count][average]["f1"] for seed in seeds if average in seed.get(count, {})]


def score_rows(names: dict[str, str]) -> Rows:
    """Return a row for each tuning of each measurement: data, tuning, scores on test and dev, command, commit."""
    return [
        score_row(data, tuning, seeds, measurement)
        for name, data in names.items()
        for measurement in load(name)
        for tuning, seeds in measurement["runs"][0].items()
    ]


def score_row(data: str, tuning: str, seeds: list[dict], measurement: dict) -> list[str]:
    """Return the row of one tuning of a measurement."""
    types = sorted(seeds[0]["strict"].get("types", {}))
    by_type = [f"{kind} {mean(seed['strict']['types'][kind]['f1'] for seed in seeds):.3f}" for kind in types]
    averages = (("strict", "micro"), ("first49", "micro"), ("strict", "macro"))
    return [
        data,
        f"`{tuning}`",
        *(spread(counted(seeds, *which)) for which in averages),
        spread(seed["dev_f1"] for seed in seeds if "dev_f1" in seed),
        ", ".join(by_type) or "–",
        *how_measured(measurement),
    ]


def scores(chinese: bool) -> tuple[list[str], Rows]:
    """The table of README: what a user gets by default."""
    names = {
        "scores-ner_data": "ner_data，1,412 句，12 轮" if chinese else "ner_data, 1,412 sentences, 12 epochs",
        "scores-ner_data-300": "ner_data，300 句，12 轮" if chinese else "ner_data, 300 sentences, 12 epochs",
        "scores-msra": "MSRA，抽样 8,000 句，4 轮" if chinese else "MSRA, a sample of 8,000 sentences, 4 epochs",
        "scores-msra-all": "MSRA，全部，3 轮" if chinese else "MSRA, all of train, 3 epochs",
    }
    head = ["数据", "tuning", "测试集 micro-F1（种子数）"] if chinese else ["data", "tuning", "test micro-F1 (seeds)"]
    return head, [row[:3] for row in score_rows(names)]


def results_table(names: dict[str, str], chinese: bool) -> tuple[list[str], Rows]:
    """A table of docs/results.md, which is in English only: the measurements that RESULTS_TABLES names for it."""
    return SCORE_HEAD, score_rows(names)


def methods(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/tuning.md: all tuning methods, one run each."""
    head = ["tuning", "F1, ner_data", "trained weights", "saved"]
    if chinese:
        head = ["方法", "F1，ner_data", "可训练参数量", "保存大小"]
    rows = []
    for measurement in load("methods-ner_data"):
        for tuning, (run, *_) in measurement["runs"][0].items():
            size = f"{run['saved_mb']:.1f} MB" if run["saved_mb"] >= 1 else f"{run['saved_mb'] * 1000:.0f} kB"
            rows.append([f"`{tuning}`", f"{run['strict']['micro']['f1']:.3f}", f"{run['trained_weights']:,}", size])
    return head, rows


def rates(chinese: bool) -> tuple[list[str], Rows]:
    """The table of docs/tuning.md: the learning rates that ner/tunings.py holds."""
    head = ["tuning", "learning rate", "head_factor", "the same, base size", "what is trained beside the head"]
    if chinese:
        head = ["方法", "学习率", "head_factor", "base 规模的编码器", "分类头之外训练什么"]
    rows = []
    for name, tuning in TUNINGS.items():
        small, base = ([f"{number:g}" for number in tuning.rates(size)] for size in (BASE_SIZE - 1, BASE_SIZE))
        rows.append([f"`{name}`", *small, ", ".join(base), TRAINED_ZH[name] if chinese else tuning.summary])
    return head, rows


# Tables of docs/results.md, each {name of a measurement: what its rows say they were trained on, and how}.
RESULTS_TABLES = {
    "all scores": {  # default settings
        "scores-ner_data": "ner_data",
        "scores-ner_data-300": "ner_data, 300 sentences",
        "scores-msra": "MSRA, 8,000 sentences",
        "scores-msra-all": "MSRA, all of train",
    },
    "comparisons": {  # on the encoder after its fifth distillation, without dropout where nothing else is said
        "encoder55-ner_data": "ner_data",  # encoder55-…, encoder35-…: the defaults of then; not to be run anew
        "encoder55-ner_data-300": "ner_data, 300 sentences",
        "encoder55-msra": "MSRA, 8,000 sentences",
        "encoder55-msra-all": "MSRA, all of train",
        "dropout0.1-ner_data": "ner_data, `dropout: 0.1`",
        "dropout0.1-ner_data-300": "ner_data, 300 sentences, `dropout: 0.1`",
        "dropout0.1-msra": "MSRA, 8,000 sentences, `dropout: 0.1`",
        "dropout0.2-ner_data": "ner_data, `dropout: 0.2`",
        "epochs20-ner_data-300": "ner_data, 300 sentences, 20 epochs",
    },
    "earlier comparisons": {  # on the encoder after its third distillation, with dropout 0.1
        "encoder35-ner_data": "ner_data",
        "encoder35-ner_data-300": "ner_data, 300 sentences",
        "encoder35-msra": "MSRA, 8,000 sentences",
        "epochs8-ner_data": "ner_data, 8 epochs",
        "epochs8-ner_data-300": "ner_data, 300 sentences, 8 epochs",
        "softmax-ner_data": "ner_data, 8 epochs, `head: softmax`",
        "fgm-ner_data": "ner_data, 8 epochs, `adversarial: fgm`",
        "smoothing-ner_data": "ner_data, 8 epochs, `label_smoothing: 0.1`",
        "focal-ner_data": "ner_data, 8 epochs, `loss: focal`",
        "softmax-msra": "MSRA, 8,000 sentences, `head: softmax`",
    },
}

TABLES: dict[str, Callable[[bool], tuple[list[str], Rows]]] = {
    "scores": scores,
    **{table: functools.partial(results_table, names) for table, names in RESULTS_TABLES.items()},
    "methods": methods,
    "rates": rates,
    "training speed": training_speed,
    "kernels": kernels,
    "base size": base_size,
    "tagging speed": tagging_speed,
    "ray speed": ray_speed,
    "cost": cost,
}


def as_markdown(head: list[str], rows: Rows, chinese: bool) -> str:
    """Return a Markdown table; a sentence where nothing was measured."""
    if not rows:
        return "尚未测量。\n" if chinese else "Not measured yet.\n"
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def filled(text: str, chinese: bool) -> str:
    """Return a document's text with every table between its markers made anew. Raises KeyError for unknown tables."""

    def table(match: re.Match) -> str:
        head, rows = TABLES[match[1]](chinese)
        return f"<!-- table: {match[1]} -->\n{as_markdown(head, rows, chinese)}<!-- end of table -->"

    return re.sub(r"<!-- table: ([\w ]+) -->\n.*?<!-- end of table -->", table, text, flags=re.S)


def stale_documents() -> dict[Path, str]:
    """Return the documents whose tables are not what the measurements give, with the text they should have."""
    stale = {}
    for name in DOCUMENTS:
        file = ROOT / name
        text = file.read_text("utf-8")
        if (fresh := filled(text, chinese="zh" in name)) != text:
            stale[file] = fresh
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["fill", "check"], help="Write the tables, or only compare them.")
    action = parser.parse_args().action
    stale = stale_documents()
    for file, text in stale.items():
        print(f"{file.relative_to(ROOT)}: {'filled' if action == 'fill' else 'not what the results give'}")
        if action == "fill":
            file.write_text(text, encoding="utf-8")
    sys.exit(action == "check" and bool(stale))


if __name__ == "__main__":
    main()
