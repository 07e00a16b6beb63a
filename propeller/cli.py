"""What every command of the project does around its own work: logging, errors, signals, exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
from collections.abc import Callable

from tqdm import tqdm

from propeller.cores import rank_from_environment
from propeller.errors import ConfigError, Interrupted, PropellerError


class _Handler(logging.Handler):
    """Writes to standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # nobody reads the log any more; the work goes on
            self.handleError(record)


def setup_logging(verbose: bool = False) -> None:
    """Sends the logs of `propeller` and `ernie` to standard error; called by commands, never at import.

    Of several ranks only rank 0 tells how it goes, with `verbose` in detail; the others warn.
    """
    rank, size = rank_from_environment()
    level = logging.WARNING if rank else logging.DEBUG if verbose else logging.INFO
    who = f"[rank {rank}] " if size > 1 else ""
    handler = _Handler()
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s {who}%(message)s", "%Y-%m-%d %H:%M:%S")
    )
    for name in ("propeller", "ernie"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def run(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and ends the process with its exit code.

    An error of the project becomes one line on standard error, and exit code 2 for a wrong flag or
    configuration, 1 for all else. A reader that went away (`| head`) and Ctrl-C end quietly. A run
    that a signal stopped after saving exits as that signal would.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except Interrupted as stop:
        _say(str(stop))
        code = 128 + stop.signum
    except PropellerError as error:
        _say(f"error: {error}")
        code = 2 if isinstance(error, ConfigError) else 1
    except ImportError as error:  # no Paddle here, or one that is too old: the message says what to do
        if error.name != "paddle":
            raise
        _say(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except OSError as error:  # a full disk, a folder without rights
        if isinstance(error, BrokenPipeError) and _is_unread(sys.stdout.fileno()):
            # Python would flush standard output once more at exit and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        else:
            _say(f"error: {error}")
            code = 1
    sys.exit(code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr)


def _is_unread(descriptor: int) -> bool:
    """Whether nobody reads any more what is written there; Windows does not tell."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
