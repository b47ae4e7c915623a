"""How fast single steps of a training are, and how fast the machine could be: what benchmarks/train.py compares.

    python benchmarks/train_steps.py lora --data FOLDER FILE.json

Ten batches spread over an epoch, each trained on ten times, of which the fastest counts, as it does for the peak.
"""

import json
import time
from collections.abc import Callable

import torch
from train_setup import Setup, parser_of_side, setup_of

import main as loop
from ner import config, distributed, formats
from ner.progress import Progress, tokens_of
from ner.training import Training, build
from ner.windows import Window

BATCHES, REPEATS = 10, 10
SIDE, PRODUCTS = 2048, 5  # of the matrices that the peak is measured with: their side, products at a time


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def fastest(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the seconds of the fastest of several calls."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations a second (two for each multiply-add) of a square matrix product, the best of ten."""
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))

    def products() -> None:
        for _ in range(PRODUCTS):
            a @ b

    return PRODUCTS * 2 * SIDE**3 / fastest(products, device)


def take_step(training: Training, batch: list[Window], step: int) -> None:
    """Take one step as main.py's loop does: forward, loss, backward, optimizer."""
    loss = loop.add_gradients(training, batch, Progress(micro_batch=len(batch)), step)
    distributed.sum_over_processes(training.accelerator, loss, training.optimizer)
    training.optimizer_step(step)


def time_steps(setup: Setup) -> dict[str, float]:
    """Return the tokens a second of single steps, and the matrix peak measured meanwhile."""
    settings, _ = config.load(setup.of_main())
    training = build(settings, formats.read(str(settings.train)), distributed.start(settings))
    dtype = next(weight.dtype for weight in training.model.parameters())
    tokens, seconds, peak, step = 0, 0.0, 0.0, 0
    order = training.batches_of(0)
    training.model.train()

    for batch in order[:: max(1, len(order) // BATCHES)][:BATCHES]:
        peak = max(peak, matrix_peak(dtype, training.device))

        def next_step(batch: list[Window] = batch) -> None:
            nonlocal step
            take_step(training, batch, step % training.steps)
            step += 1

        seconds += fastest(next_step, training.device)
        tokens += tokens_of(batch)
    return {"tokens_per_second": tokens / seconds, "peak": peak}


def main() -> None:
    options = parser_of_side(__doc__).parse_args()
    options.file.write_text(json.dumps(time_steps(setup_of(options))))


if __name__ == "__main__":
    main()
