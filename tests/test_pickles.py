"""A pickle in any file of a run is never run, by whichever command reads it."""

import contextlib
import io
import pickle
import shutil
from pathlib import Path

import pytest
import runs
import torch

import main


class Malice:
    """What runs when this is unpickled leaves a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def poisons(mark):
    """The same malice as a bare pickle, as torch saved files once and as it does now."""
    plain, zipped, old = pickle.dumps(Malice(mark)), io.BytesIO(), io.BytesIO()
    torch.save(Malice(mark), zipped)
    torch.save(Malice(mark), old, _use_new_zipfile_serialization=False)
    return [plain, zipped.getvalue(), old.getvalue()]


def test_the_malice_of_the_next_test_works(tmp_path):
    for number, poison in enumerate(poisons(tmp_path / "mark")[:2]):
        with contextlib.suppress(Exception):
            if number:
                torch.load(io.BytesIO(poison), weights_only=False)
            else:
                pickle.loads(poison)
        assert (tmp_path / "mark").exists()
        (tmp_path / "mark").unlink()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_pickle_in_any_file_of_a_run_is_never_run(tmp_path, capsys, tuning):
    import evaluate
    import predict
    from ner import report

    main.main(runs.argv(tmp_path, tuning=tuning, epochs=1))
    run, mark, bad = tmp_path / "run", tmp_path / "mark", tmp_path / "bad"
    files = [path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file()]
    extra = ("model/pytorch_model.bin", "model/adapter_model.bin", "model/encoder/pytorch_model.bin",
             "model/training_args.bin", "model/tokenizer.pkl", "checkpoint/state.pt")  # fmt: skip
    extra = set(map(Path, extra))
    assert len(files) >= 12
    opened = 0
    for number, file in enumerate([*files, *sorted(extra)]):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(run, bad)
        (bad / file).parent.mkdir(exist_ok=True)
        (bad / file).unlink(missing_ok=True)  # not through a hard link
        (bad / file).write_bytes(poisons(mark)[number % 3])
        if file in extra:  # those are looked at where the safe file is missing
            for safe in (bad / file).parent.glob("*.safetensors"):
                safe.unlink()
        readers = [(main, ["--resume", str(bad)]), (report, [str(bad)])]
        if file.parts[0] in ("model", "config.yaml"):
            readers += [(evaluate, ["--run", str(bad)]), (predict, ["--run", str(bad), "江泽民在北京"])]
        for command, arguments in readers:
            try:
                command.main(arguments)
            except SystemExit as end:
                assert end.code in (None, 0, 2), (command, file)
            opened += 1
            assert not mark.exists(), f"{command.__name__} ran the pickle in {file}"
    capsys.readouterr()
    assert opened >= 50
