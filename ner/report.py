"""A run's folder → one self-contained HTML page: curves, scores, errors. `python -m ner.report RUN`.

The page is one file without scripts, fonts or images from elsewhere, and its content policy forbids the browser to load
any; everything from the run (texts, types, config) reaches it through Jinja2's autoescape. Charts are SVG drawn by the
template, so that no plotting library is needed and the page follows the reader's light or dark theme. Whatever a run
has not written yet is left out.
"""

import argparse
from pathlib import Path
from typing import Any

from ner import comparison, mistakes, run_files
from ner.chart import chart
from ner.errors import UserError, command
from ner.markup import hues, templates, visible


def write(run: Path) -> Path:
    """Write run/report.html from what the run's folder holds; return its path. Raises UserError."""
    run = Path(run)
    run_files.check_is_run(run)
    return run_files.write_page(run / "report.html", str(templates().report(page(run))).lstrip())


def page(run: Path) -> dict[str, Any]:
    """Return what the template shows of a run."""
    scores, scored = run_files.best_scores(run)
    errors = mistakes.summary(run_files.predictions(run))
    types = [*(scores["types"] if scores else ()), *(errors["types"] if errors else ())]
    return {
        "name": run.resolve().name,
        "scores": scores,
        "scored": scored,
        "finished": run_files.is_finished(run),
        "charts": _charts(run_files.epochs(run)),
        "errors": errors,
        "kinds": mistakes.KINDS,
        "worst_limit": mistakes.WORST,
        "hues": hues(types),
        "config": "\n".join(visible(line) for line in run_files.text(run / "config.yaml").splitlines()),
        "environment": run_files.flat(run_files.json_object(run / "environment.json")),
        "warnings": run_files.warnings(run),
    }


def _charts(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curves over the epochs, without those that have no point."""
    losses = [
        ("train", 0, run_files.curve(epochs, lambda line: line.get("train_loss"))),
        ("dev", 1, run_files.curve(epochs, lambda line: line.get("dev_loss"))),
    ]
    f1 = [
        ("micro", 0, run_files.curve(epochs, run_files.dev_f1)),
        ("macro", 1, run_files.curve(epochs, lambda line: run_files.dev_f1(line, "macro"))),
    ]
    charts = [chart("Loss", losses), chart("F1 on dev", f1)]
    return [data for data in charts if data]


@command
def main(argv: list[str] | None = None) -> None:
    """Write the page of a run, or of several beside each other, and print its path."""
    parser = argparse.ArgumentParser(
        prog="python -m ner.report",
        description="Writes the page of a run, RUN/report.html: its scores, curves and mistakes; or compares runs.",
        epilog="Examples:\n  python -m ner.report\n  python -m ner.report output/first\n"
        "  python -m ner.report --compare output/first output/second",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="The run's folder. [the newest finished one]")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="Put these runs side by side on one page instead.")
    parser.add_argument(
        "--output", metavar="FILE", help="The page that --compare writes. [comparison.html beside the first run]"
    )
    options = parser.parse_args(argv)
    if options.compare:
        runs = [Path(run) for run in ([options.run] if options.run else []) + options.compare]
        print(comparison.write(runs, options.output))
        return
    if options.output:
        raise UserError("--output is for --compare; the page of one run is RUN/report.html")
    if options.run is None:
        from ner.scores import newest_run

        options.run = newest_run()
    print(write(Path(options.run).expanduser()))


if __name__ == "__main__":
    main()
