"""Fixtures that several files share; functions that they share stand in modules named after what they make."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def one_thread():
    """Compute with one thread, as tests must that compare runs bit for bit.

    Sums over several threads round in another order for another number of them, and MKL uses fewer than it may where it
    sees fit, until torch.set_num_threads() is called for the first time, which tagging does.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """A run that nothing stopped, of a process with one thread, to compare with those that are stopped."""
    import runs
    from stopped_runs import OFTEN

    output = tmp_path_factory.mktemp("whole")
    assert runs.Process(runs.argv(output, **OFTEN)).wait() == 0
    return output / "run"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The folder of a tiny random BERT."""
    import tiny

    return tiny.encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def lora_run(encoder, tmp_path_factory) -> Path:
    """A run with tuning lora as main.py leaves it, whose weights are random."""
    import made_run

    return made_run.run_of(tmp_path_factory.mktemp("lora") / "run", encoder)


@pytest.fixture(scope="module")
def build_parts(tmp_path_factory) -> tuple[Path, Path, Path, Path]:
    """What data/encoder/build.py takes: (work folder with the wheels in place, text, held-out file, labelled file)."""
    from encoder_parts import write_parts

    return write_parts(tmp_path_factory.mktemp("build"))
