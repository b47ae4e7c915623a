"""What is the same on all sides of benchmarks/train.py and base_size.py, and how they start each of them."""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ner import config  # noqa: E402
from ner.tunings import TUNINGS  # noqa: E402

LORA = {"r": 16, "alpha": 32}
RATES = {tuning: TUNINGS[tuning].learning_rate for tuning in ("lora", "full")}
BATCH = 16


@dataclass(frozen=True)
class Setup:
    """One training: `data` is a folder with train, dev and test, `pretrained` the encoder."""

    tuning: str
    data: Path
    pretrained: str
    epochs: int
    seed: int

    def of_main(self) -> list[str]:
        """Return main.py's arguments for this training."""
        parts = {part: self.data / part for part in ("train", "dev", "test")}
        keys = {"pretrained": self.pretrained, "epochs": self.epochs, "seed": self.seed, "export": "none"}
        return main_arguments(self.tuning, RATES[self.tuning], **keys, **parts)

    def of_side(self, file: Path) -> list[str]:
        """Return the arguments of a side's own script, which writes its figures to `file` as JSON."""
        keys = {"data": self.data, "pretrained": self.pretrained, "epochs": self.epochs, "seed": self.seed}
        return [self.tuning, *(part for key, value in keys.items() for part in (f"--{key}", str(value))), str(file)]


def main_arguments(tuning: str, learning_rate: float, **keys: object) -> list[str]:
    """Return main.py's arguments for a training that a peer can do too: the softmax head, all sentences, plain LoRA.

    keys: more keys of the config, such as pretrained and train.
    """
    common = {
        "tuning": tuning,
        "learning_rate": learning_rate,
        "head": "softmax",
        "max_train_sentences": "null",
        "batch_size": BATCH,
        "lora.r": LORA["r"],
        "lora.alpha": LORA["alpha"],
        "lora.dropout": 0,
    }
    return [part for key, value in (common | keys).items() for part in (f"--{key}", str(value))]


def encoder_folder(pretrained: str) -> Path:
    """Return the folder of a local encoder, from here or from the project. Raises SystemExit where there is none."""
    folder = config.resolve_path(pretrained)
    if folder is None:
        raise SystemExit(f"{pretrained}: there is no such folder; name that of an encoder")
    return folder


def measured(command: list[str]) -> float:
    """Run a command quietly; return its peak resident memory in MB. Raises SystemExit with its last words."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\nfailed:\n" + log.read().decode(errors="replace")[-2000:])
    return usage.ru_maxrss / 1024


def parser_of_side(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of what Setup.of_side() gives."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tuning", choices=list(RATES))
    parser.add_argument("--data", type=Path, required=True, help="folder with train, dev and test")
    parser.add_argument("--pretrained", default="data/encoder")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("file", type=Path, help="where the figures go, as JSON")
    return parser


def setup_of(options: argparse.Namespace) -> Setup:
    """Return the setup that the parsed options of a side name."""
    return Setup(options.tuning, options.data, options.pretrained, options.epochs, options.seed)
