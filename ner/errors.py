"""The one error a user is meant to see, and how every command ends."""

import functools
import os
import sys


class UserError(Exception):
    """Something the user gave cannot be used. The text is one line: where, what was expected, what to do."""


def command(main):
    """Wraps a command's main(): a UserError becomes `error: …` on stderr and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of a pipe (head, less) went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    return wrapped
