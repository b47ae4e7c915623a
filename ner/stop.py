"""Ctrl-C, and the SIGTERM of a cluster: a first one lets the step under way end, a second ends the process at once."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


class Stop:
    """Within `with Stop(accelerator) as stop`: stop.agreed() says whether a signal came, stop.requested which.

    A second signal has its usual effect, which is to end the process.
    """

    def __init__(self, accelerator: "Accelerator"):
        self.requested = 0  # the first signal to any process, as of the last agreement
        self.accelerator = accelerator
        self._received = 0  # the first signal to this process; written by the handler alone, at any moment
        self._before: dict[int, Any] = {}  # the handlers that stood there before
        self._at_once = False  # whether a signal ends the work under way, by an exception

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._first) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _first(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._at_once:
            raise _BrokenOff

    def break_off(self, work: Callable[[], Result]) -> Result | None:
        """Return work(), which changes nothing that outlives it; a signal ends it at once, and None is returned.

        Several processes wait for one another in their work, so there it is done to the end.
        """
        if self.accelerator.num_processes > 1:
            return work()
        try:
            self._at_once = True
            return None if self._received else work()
        except _BrokenOff:
            return None
        finally:
            self._at_once = False

    def agreed(self) -> bool:
        """Return whether any process got a signal. All processes call this together, and all know of it then."""
        self.requested = self._received
        if self.accelerator.num_processes > 1:
            import torch

            mine = torch.tensor([self.requested], device=self.accelerator.device)
            self.requested = int(self.accelerator.gather(mine).max())
        return self.requested > 0


class _BrokenOff(BaseException):
    """Raised by a signal where it ends work at once; leaves nothing but break_off()."""
