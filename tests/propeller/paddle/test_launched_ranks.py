"""Runs of several ranks under Paddle's launcher, as users start them: how they end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import json, sys
from propeller import cli, launch
from propeller.config import ArgumentParser, parse_runconfig
def main():
    parser = ArgumentParser()
    parser.add_argument("--job")
    args = parser.parse_args()
    cli.setup_logging()
    code = launch.relaunch(args.nproc, parse_runconfig(args))
    if code is None:
        import rank_jobs
        rank_jobs.train(lambda *event: print(*event, flush=True), "out", **json.loads(args.job))
    return code
cli.run(main)
"""
LAUNCHER = ["-m", "paddle.distributed.launch", "--log_level", "ERROR", "--nproc_per_node", "2",
            "--log_dir", "out/launch"]  # fmt: skip


class TestLaunched:
    """By Paddle's launcher, as users start ranks."""

    @pytest.fixture
    def launch(self, tmp_path, root):
        """Starts a script that trains, by the launcher or by `--nproc`."""
        (tmp_path / "script.py").write_text(SCRIPT)
        own = ("PADDLE_", "OMP_", "PROPELLER_", "FLAGS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        path = [str(root), os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        with contextlib.ExitStack() as stack:

            def start(launcher, *flags, **job):
                command = [sys.executable, *launcher, "script.py", *flags]
                command += ["--run_config", '{"model_dir": "out"}', "--job", json.dumps(job)]
                process = subprocess.Popen(
                    command, cwd=tmp_path, env=environment, text=True, start_new_session=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                stack.enter_context(process)
                stack.callback(process.terminate)
                return process

            yield start

    @staticmethod
    def log_of(folder, rank, wanted):
        """Waits until the rank has written `wanted`; returns its log."""
        path = folder / f"out/launch/workerlog.{rank}"
        limit = time.monotonic() + 60
        while not path.exists() or wanted not in path.read_text("utf-8"):
            assert time.monotonic() < limit, f"rank {rank} has not come to {wanted!r}"
            time.sleep(0.05)
        return path.read_text("utf-8")

    def test_the_error_of_a_rank_is_the_first_to_be_seen(self, launch):
        process = launch(LAUNCHER, broken=(1, 7))
        said, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        first = next(line for line in said.splitlines() if line.startswith("error: "))
        assert first in (
            "error: train.tsv:7: a label is 7; expected 0 or 1",
            "error: rank 1 failed: train.tsv:7: a label is 7; expected 0 or 1",
        )

    @pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
    def test_a_rank_that_is_killed_under_nproc(self, launch, tmp_path, victim):
        process = launch([], "--nproc", "2", max_steps=100_000)
        self.log_of(tmp_path, 0, "\nstep 5\n")
        pid = re.search("^pid (\\d+)$", self.log_of(tmp_path, victim, "pid "), re.MULTILINE)[1]
        os.kill(int(pid), signal.SIGKILL)
        said, _ = process.communicate(timeout=15)
        assert process.returncode in (1, 137)
        assert f"error: rank {victim} was killed by SIGKILL" in said or (
            f"error: rank {victim} ended without a word, as if it was killed" in said
        )

    def test_a_signal_to_the_launcher_saves_and_the_run_goes_on(self, launch, start_ranks, tmp_path):
        job = {"max_steps": 100_000, "data": {"kind": "bucket"}}
        process = launch(LAUNCHER, **job)
        self.log_of(tmp_path, 0, "\nstep 5\n")
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == signal.SIGTERM, "as this launcher has it"
        (saved,) = (tmp_path / "out/checkpoints").iterdir()
        step = int(saved.name.removeprefix("step_"))
        for rank in range(2):
            assert f"Stopped by SIGTERM at step {step}; the checkpoint" in self.log_of(tmp_path, rank, "")
        found = start_ranks(2, "train", model_dir=str(tmp_path / "out"), run_steps=3, **job).results()
        assert [of_rank["step"] for of_rank in found] == [step + 3] * 2
