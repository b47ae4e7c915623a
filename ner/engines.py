"""What computes when tagging: PyTorch or ONNX Runtime, behind one call. Padded token ids in, logits out.

PyTorch runs every model on every device, in the precision asked for. ONNX Runtime runs the file that an export left in
the model's folder, on a CPU, starts without importing torch and multiplies in 8 bits. A test compares the two.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ner.errors import UserError
from ner.onnx_file import EXPORT_AGAIN, check_self_contained, exported_file, is_worse

if TYPE_CHECKING:
    import torch

# onnxruntime's kernel that adds and normalizes in one pass is slower than its two kernels that do it in two: without
# this fusion the default encoder tags 13% more characters a second (onnxruntime 1.31 and 1.32, AVX-512).
SLOW_FUSIONS = ["SkipLayerNormFusion"]


class Engine(Protocol):
    """One loaded model. On a CPU `threads` batches run at a time, each of at most `most_tokens` with its padding."""

    @property
    def on_cpu(self) -> bool: ...

    @property
    def threads(self) -> int: ...

    @property
    def most_tokens(self) -> int: ...

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return logits, float32 [batch, length, labels], of token ids and attention mask, int64 [batch, length]."""

    def workers(self) -> contextlib.AbstractContextManager[Callable[..., Iterator]]:
        """Open a `map` that calls a function on several batches at a time and gives the results in order."""


class TorchEngine:
    """A PyTorch model on whatever device it is, in whatever precision it has. It may be one that is being trained."""

    most_tokens = 2048  # what fits a core's caches

    def __init__(self, model: "torch.nn.Module"):
        self.model = model

    @property
    def device(self) -> "torch.device":
        return next(self.model.parameters()).device

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def threads(self) -> int:
        import torch

        return torch.get_num_threads() if self.on_cpu else 1

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            output = self.model(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
            return output.logits.float().cpu().numpy()

    @contextlib.contextmanager
    def workers(self) -> Iterator[Callable[..., Iterator]]:
        """Give whole batches to as many threads as torch has: less waiting than with all of them in each product."""
        import torch

        was_training, threads = self.model.training, self.threads
        self.model.eval()
        try:
            if threads == 1:
                yield map
                return
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool.map
        finally:
            self.model.train(was_training)
            if threads > 1:
                torch.set_num_threads(threads)


class OnnxEngine:
    """An exported model on ONNX Runtime and the CPU.

    labels: those of ner.json, in the order of the logits. threads: of batches at a time; all cores where None. Raises
    UserError where onnxruntime is not installed, or the file is damaged, not of this suite, or not of these labels.
    """

    on_cpu = True
    most_tokens = 512  # larger batches are slower (9% at 2048) and take twice the memory

    def __init__(self, file: Path, labels: list[str], threads: int | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(f"--engine onnx needs onnxruntime ({error}): pip install onnxruntime") from None
        check_self_contained(file)
        self.threads = threads or available_cores()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # the threads work on whole batches
        options.log_severity_level = 4  # what goes wrong is raised, and said in one line
        try:
            self.session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
            )
        except Exception as error:  # onnxruntime's exceptions have no common type of their own
            raise UserError(f"{file}: ONNX Runtime cannot load it ({_reason(error)}); {EXPORT_AGAIN}") from None
        self._check(file, labels)

    def _check(self, file: Path, labels: list[str]) -> None:
        """Raise UserError unless the model takes token ids and gives a logit for each label."""
        inputs = {value.name for value in self.session.get_inputs()}
        outputs = [value.name for value in self.session.get_outputs()]
        if inputs != {"input_ids", "attention_mask"} or outputs != ["logits"]:
            raise UserError(
                f"{file}: takes {', '.join(sorted(inputs))} and gives {', '.join(outputs)}; expected input_ids and "
                f"attention_mask, and logits: it is no export of this suite; {EXPORT_AGAIN}"
            )
        named = self.session.get_modelmeta().custom_metadata_map.get("labels")
        if named is not None and named != json.dumps(labels, ensure_ascii=False):
            raise UserError(f"{file}: its labels and those of ner.json differ; one is of another model; {EXPORT_AGAIN}")
        try:
            count = self.logits(np.zeros((1, 2), np.int64), np.ones((1, 2), np.int64)).shape[-1]
        except Exception as error:
            raise UserError(f"{file}: ONNX Runtime cannot compute it ({_reason(error)}); {EXPORT_AGAIN}") from None
        if count != len(labels):
            raise UserError(
                f"{file}: gives {count} scores a token, ner.json has {len(labels)} labels; they are not of one model; "
                + EXPORT_AGAIN
            )

    def logits(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return self.session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]

    @contextlib.contextmanager
    def workers(self) -> Iterator[Callable[..., Iterator]]:
        if self.threads == 1:
            yield map
            return
        with ThreadPoolExecutor(self.threads) as pool:
            yield pool.map


def choose_engine(folder: Path, engine: str = "auto", precision: str = "auto") -> tuple[str, str]:
    """Return which engine tags with the model in `folder`, "onnx" or "torch", and a line that says why, or "".

    engine: "onnx" and "torch" are taken as they are. "auto" is ONNX Runtime where there is an exported file, PyTorch
    where there is an accelerator or a precision is asked for. Raises UserError for "onnx" without a file.
    """
    file = exported_file(folder)
    if engine == "onnx":
        if precision != "auto":
            raise UserError(f"--precision {precision} is PyTorch's; --engine onnx computes as the file was exported")
        if file is None:
            raise UserError(
                f"{folder}: --engine onnx needs model_int8.onnx or model.onnx there; {how_to_export(folder)}"
            )
        return "onnx", ""
    if engine == "torch" or precision != "auto" or (may_have_accelerator() and has_accelerator()):
        return "torch", ""
    if file is None:
        return "torch", f"{folder}: without model_int8.onnx PyTorch tags, slower on a CPU; {how_to_export(folder)}"
    if is_worse(folder):
        return (
            "torch",
            f"{file} scores worse than the model itself, so PyTorch tags; --engine onnx takes it anyway",
        )
    return "onnx", ""


def how_to_export(folder: Path) -> str:
    """Return what to do about a missing file."""
    return f"write it with `python model.py export {folder}`"


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def available_cores() -> int:
    """Return how many threads this process may use: OMP_NUM_THREADS, else the cores it is allowed to run on."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_have_accelerator() -> bool:
    """Return whether a driver of a GPU is there, without importing torch, which takes over a second."""
    if os.name == "nt" or os.uname().sysname == "Darwin":
        return False  # a Mac's GPU has to be asked for with --engine torch, as does one on Windows
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"))


def has_accelerator() -> bool:
    """Return whether PyTorch can compute on something else than a CPU."""
    import torch

    return torch.accelerator.is_available()


def best_device() -> "torch.device":
    """Return the accelerator that training would take, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")
