"""A processor for tests: in the worker it does what the rows say, such as dying; it waits at gates.

An installed package to whoever has its folder on the path: see the fixture `stage` of `conftest.py`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from pathlib import Path

import numpy as np

from propeller.errors import DataError
from propeller.processor import Processor

# The first number of a row that makes its worker die, hang, or wait at the gate `batch`.
DIE, HANG, WAIT = 1000.0, 1001.0, 1002.0


def pass_gate(name):
    """Waits while the test holds a gate, which is a lock on a file."""
    gate = Path(os.environ["STAGE_GATES"], name)
    if gate.exists():
        with gate.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)


class Stage(Processor):
    """Examples are `{"x": [number, number]}`, answers `{"y": [three numbers]}`."""

    name = "stage"

    def prepare(self, raws):
        for raw in raws:
            if len(raw["x"]) != 2:
                raise DataError(f"x is {raw['x']}; expected two numbers")
        return [{"x": np.array(raw["x"], np.float32), "number": place} for place, raw in enumerate(raws)]

    def finish(self, outputs):
        for command in outputs["command"].round():
            if command == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
            elif command == HANG:
                while True:
                    signal.pause()
            elif command == WAIT:
                pass_gate("batch")
        return [{"y": [float(value) for value in row]} for row in outputs["y"]]

    def parse(self, line):
        return {"x": [float(word) for word in line.split()]}

    def format(self, answer):
        return str(answer["y"])

    def metrics(self):
        return {}

    def save(self, folder):
        return {"labels": ["a", "b", "c"]}

    @classmethod
    def load(cls, folder, settings):
        if Path(sys.argv[0]).name == "worker.py":  # a host, while the server goes on
            pass_gate("load")
        return cls()

    fingerprint = "1"
