"""What every command of the project does around its own work: logging, errors, signals, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from tqdm import tqdm

from propeller.errors import ConfigError, Interrupted, PropellerError
from propeller.launch import rank_from_environment


class _Handler(logging.Handler):
    """Writes to standard error, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError:  # nobody reads the log any more; the work goes on
            self.handleError(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Sends the logs of `propeller` and `ernie` to standard error; called by commands, never at import.

    Of several ranks only rank 0 tells how it goes; the others warn.
    """
    rank, size = rank_from_environment()
    level = max(level, logging.WARNING) if rank else level
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
        print(stop, file=sys.stderr)
        code = 128 + stop.signum
    except PropellerError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    except ImportError as error:  # no Paddle here, or one that is too old: the message says what to do
        if error.name != "paddle":
            raise
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # Python would flush standard output once more at exit and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:  # a full disk, a folder without rights
        print(f"error: {error}", file=sys.stderr)
        code = 1
    sys.exit(code)
