"""What every command does around its work: exit codes, error lines, logging."""

from __future__ import annotations

import errno
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


def test_a_broken_pipe_that_is_not_standard_output_is_an_error(capfd):
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert stop.value.code == 1
    assert capfd.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_what_nobody_reads_does_not_change_the_exit_code(root):
    code = (
        "import sys; from propeller import cli; from propeller.errors import Interrupted\n"
        "def main():\n    sys.stdin.read(); raise Interrupted('saved', 1)\n"
        "cli.run(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
    )
    process.stderr.close()
    process.stderr = None
    process.communicate(b"", timeout=60)
    assert process.returncode == 129


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


@pytest.mark.parametrize("rank, expected", [("0", "one"), ("1", "")])
def test_verbose_logs_in_detail_but_only_on_rank_0(loggers, capsys, monkeypatch, rank, expected):
    monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    cli.setup_logging(verbose=True)
    logging.getLogger("propeller").debug("one")
    assert capsys.readouterr().err.partition("] ")[2].strip() == expected
