"""What every command does around its work: exit codes, error lines, logging."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys

import pytest

from propeller import cli
from propeller.errors import CheckpointError, ConfigError, Interrupted


@pytest.fixture
def loggers():
    """The project's loggers, put back afterwards."""
    own = [logging.getLogger(name) for name in ("propeller", "ernie")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in own]
    yield own
    for logger, (handlers, level, propagate) in zip(own, before, strict=True):
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "line"),
    [
        (lambda: None, 0, ""),
        (lambda: 0, 0, ""),
        (lambda: 3, 3, ""),
        (raising(CheckpointError("it is damaged")), 1, "error: it is damaged\n"),
        (raising(ConfigError("no such flag")), 2, "error: no such flag\n"),
        (raising(Interrupted("saved", signal.SIGTERM)), 143, "saved\n"),
        (raising(Interrupted("saved", signal.SIGINT)), 130, "saved\n"),
        (raising(KeyboardInterrupt()), 130, ""),
        (raising(ImportError("it is too old", name="paddle")), 2, "error: it is too old\n"),
    ],
    ids=["none", "zero", "three", "error", "config", "sigterm", "sigint", "ctrl-c", "paddle"],
)
def test_exit_codes_and_lines(main, code, line, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == code
    assert capsys.readouterr().err == line


def test_a_programming_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 // 0)
    with pytest.raises(ImportError):
        cli.run(raising(ImportError("no module", name="something_else")))


@pytest.mark.parametrize("flush", ["", "sys.stdout.flush(); "], ids=["at the end", "in main"])
def test_a_reader_that_went_away_ends_quietly(root, flush):
    code = (
        "import sys; from propeller import cli\n"
        f"def main():\n    sys.stdin.read(); print('line'); {flush}return 5\n"
        "cli.run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip
    process.stdout.close()  # before it writes: it waits for its input's end
    process.stdout = None
    _, errors = process.communicate("", timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_logging_goes_to_standard_error_once(loggers, capsys):
    cli.setup_logging()
    cli.setup_logging()
    logging.getLogger("propeller").info("one")
    logging.getLogger("ernie.tasks").warning("two")
    logging.getLogger("propeller").debug("not this")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO one", "WARNING two"]


def test_logging_level(loggers, capsys):
    cli.setup_logging(logging.WARNING)
    logging.getLogger("propeller").info("one")
    assert capsys.readouterr().err == ""
