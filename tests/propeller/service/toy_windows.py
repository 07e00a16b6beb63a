"""A processor for tests that cuts its examples into windows, and does in `join` what they say.

An installed package to whoever has its folder on the path: see the fixture `windows_bundle` of `conftest.py`.
"""

from __future__ import annotations

import os
import signal

import numpy as np
from stage import pass_gate

from propeller.errors import DataError
from propeller.processor import Processor

# An id that makes its worker wait at the gate `batch`, and one that makes it die.
WAIT, DIE = 902, 901
SIZE = 4  # ids of a window; each begins with the last one of the window before


class ToyWindows(Processor):
    """Examples are `{"ids": [...], "name": text, "do": what `join` is to do}`, answers their sum and more."""

    name = "toy_windows"

    def prepare(self, raws):
        return [window for own in self.windows(raws) for window in own]

    def windows(self, raws):
        return [self._windows(raw) for raw in raws]

    def _windows(self, raw):
        ids = raw["ids"] if "ids" in raw else [len(word) for word in raw["text_a"].split(" ")]
        if not ids or min(ids) < 1:
            raise DataError(f"expected numbers of 1 or more, got {ids}")
        starts = range(0, max(1, len(ids) - 1), SIZE - 1)
        return [{"ids": np.array(ids[at : at + SIZE]), "at": at, "where": f"from {at}"} for at in starts]

    def finish(self, outputs):
        for first in outputs["first"].tolist():
            if first == WAIT:
                pass_gate("batch")
            if first == DIE:
                os.kill(os.getpid(), signal.SIGKILL)
        totals, firsts = (outputs[name].round().astype(int).tolist() for name in ("total", "first"))
        return [
            {"total": total, "first": first, "pid": os.getpid()}
            for total, first in zip(totals, firsts, strict=True)
        ]

    def join(self, raw, examples, parts):
        if raw.get("do") == "wait":
            pass_gate("join")
        elif raw.get("do") == "fail":
            return {}["there is no such thing"]
        elif raw.get("do") == "refuse":
            raise DataError("it makes no sense")
        elif raw.get("do") == "quit":
            raise SystemExit(3)
        elif raw.get("do") == "strange":
            return {"this is no JSON": {1, 2}}
        overlap = sum(part["first"] for part in parts[1:])
        assert [part["first"] for part in parts] == [example["ids"][0] for example in examples]
        return {
            "name": raw.get("name"),
            "sum": sum(part["total"] for part in parts) - overlap,
            "where": [example["where"] for example in examples],
            "pids": sorted({part["pid"] for part in parts}),
        }

    def parse(self, line):
        return {"ids": [int(word) for word in line.split()]}

    def format(self, raw, answer):
        return f"{raw.get('name')} {answer['sum']}"

    def metrics(self):
        return {}

    def save(self, folder):
        return {}

    @classmethod
    def load(cls, folder, settings):
        return cls()

    fingerprint = "1"
