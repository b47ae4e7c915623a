"""The one error a user is meant to see, and how every command begins and ends."""

import contextlib
import errno
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any

WRONG_USE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit codes
DISK_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))


class UserError(Exception):
    """Something the user gave cannot be used. The text is one line: where, what was expected, what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, at most 200 characters; its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else lines[0][:200] + "…"


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command's main(): its streams take any text, and what ends it is one line on stderr and an exit code.

    A UserError, or a standard output that cannot be written, gives 2, Ctrl-C 130, a reader that went away 141.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _take_any_text()
        try:
            try:
                return main(*args, **kwargs)
            finally:
                if sys.stdout is not None:
                    sys.stdout.flush()  # here, where what goes wrong can still be said
        except UserError as error:
            _end(f"error: {error}", WRONG_USE)
        except KeyboardInterrupt:
            _end("interrupted", INTERRUPTED)
        except BrokenPipeError:  # the reader of a pipe (head, less) went away
            _discard_output()
            sys.exit(PIPE_CLOSED)
        except OSError as error:
            if not _output_is_broken(error):
                raise
            _discard_output()
            _end(f"error: standard output: cannot be written ({error.strerror})", WRONG_USE)

    return wrapped


def _take_any_text() -> None:
    """Have the standard streams take every character: in UTF-8 for files and pipes, as the terminal can otherwise."""
    if sys.stdout is not None and isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase):
        sys.stdout = _buffered(sys.stdout)
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        if hasattr(stream, "reconfigure"):
            encoding = {} if stream.isatty() else {"encoding": "utf-8"}
            with contextlib.suppress(OSError, ValueError):  # closed, or read from already
                stream.reconfigure(errors="replace", **encoding)


def _buffered(stream: Any) -> io.TextIOWrapper:
    """Return a stream to the same file that flushes after each line, for one that has no buffer (PYTHONUNBUFFERED).

    Without a buffer, what cannot be written is forgotten: where logging or argparse suppress the error, no later flush
    would tell of it.
    """
    return io.TextIOWrapper(
        open(stream.fileno(), "wb", closefd=False),  # noqa: SIM115  (it lives as long as the process)
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
    )


def _output_is_broken(error: OSError) -> bool:
    """Whether the error comes from standard output, which then fails again on one character more."""
    if error.filename is not None or error.errno not in DISK_ERRORS or sys.stdout is None:
        return False
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def _discard_output() -> None:
    """Send what is left for standard output nowhere, so that Python does not fail once more when it ends."""
    with contextlib.suppress(OSError, ValueError):  # no file of the system, as under a test
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end(line: str, code: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # stderr is closed, or full too
        print(line, file=sys.stderr, flush=True)
    sys.exit(code)
