"""What launchers tell ranks, and the launcher behind `--nproc`, with a stand-in for Paddle's."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from propeller import atomic, cores, launch
from propeller.errors import ConfigError
from propeller.types import RunConfig

CHIEF, WORKERS = "10.0.0.1:6170", ["10.0.0.1:6171", "10.0.0.2:6170"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*os.environ,):
        if name.startswith(("PADDLE_", "PROPELLER_", "CUDA_VISIBLE")):
            monkeypatch.delenv(name)


def disconfig(kind="worker", index=0, *, chief=(CHIEF,), worker=tuple(WORKERS)):
    cluster = {"chief": list(chief)} | ({} if worker is None else {"worker": list(worker)})
    return {"PROPELLER_DISCONFIG": json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})}


def with_gpus(monkeypatch, folder, listed):
    """Makes it look as if Paddle for GPUs was installed, and `nvidia-smi` said this."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.3.1")
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{listed}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as other:
        chief = f"127.0.0.1:{other.getsockname()[1]}"
        environ = disconfig("chief", chief=[chief])
        with pytest.raises(ConfigError, match=rf"cannot listen on {chief}: .* Is it running already"):
            launch.apply_disconfig(environ)


class TestRankFromEnvironment:
    def test_ranks(self):
        assert cores.rank_from_environment({}) == (0, 1)
        assert cores.rank_from_environment({"PADDLE_TRAINER_ID": "2", "PADDLE_TRAINERS_NUM": "4"}) == (2, 4)
        assert cores.rank_from_environment({"PADDLE_TRAINER_ID": "0"}) == (0, 1)

    @pytest.mark.parametrize(
        ("rank", "size"), [("4", "4"), ("-1", "2"), ("x", "2"), ("0", "0"), ("", "2"), ("1", None)]
    )
    def test_nonsense(self, rank, size):
        environ = {"PADDLE_TRAINER_ID": rank} | ({} if size is None else {"PADDLE_TRAINERS_NUM": size})
        with pytest.raises(ConfigError, match=f"PADDLE_TRAINER_ID is '{rank}' and PADDLE_TRAINERS_NUM is "):
            cores.rank_from_environment(environ)


class TestDisconfig:
    @pytest.mark.parametrize(
        ("kind", "index", "rank", "local_rank", "local_size"),
        [("chief", 0, 0, 0, 2), ("worker", 0, 1, 1, 2), ("worker", 1, 2, 0, 1)],
    )
    def test_the_variables_of_each_task(self, kind, index, rank, local_rank, local_size):
        environ = disconfig(kind, index)
        launch.apply_disconfig(environ)
        del environ["PROPELLER_DISCONFIG"]
        assert environ == {
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_TRAINERS_NUM": "3",
            "PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:6170,10.0.0.1:6171,10.0.0.2:6170",
            "PADDLE_CURRENT_ENDPOINT": [CHIEF, *WORKERS][rank],
            "PADDLE_LOCAL_RANK": str(local_rank),
            "PADDLE_LOCAL_SIZE": str(local_size),
            "PADDLE_DISTRI_BACKEND": "gloo",
        }
        assert cores.rank_from_environment(environ) == (rank, 3)

    @pytest.mark.parametrize(("shown", "card"), [("0,1", "1"), ("3", "0")])
    def test_the_card_of_a_rank(self, monkeypatch, tmp_path, shown, card):
        with_gpus(monkeypatch, tmp_path, "exit 1")
        environ = {**disconfig("worker", 0), "CUDA_VISIBLE_DEVICES": shown}
        launch.apply_disconfig(environ)
        assert environ["FLAGS_selected_gpus"] == card
        assert "PADDLE_DISTRI_BACKEND" not in environ

    @pytest.mark.parametrize(
        "environ",
        [
            {},
            {"PROPELLER_DISCONFIG": " "},
            disconfig("chief", worker=None),
            disconfig("chief", worker=()),
            {**disconfig(), "PADDLE_TRAINER_ID": "7"},
            {"PROPELLER_DISCONFIG": "broken", "PADDLE_TRAINERS_NUM": "7"},
        ],
        ids=["unset", "blank", "no-worker", "empty-worker", "rank-set", "size-set"],
    )
    def test_nothing_to_do(self, environ):
        before = dict(environ)
        launch.apply_disconfig(environ)
        assert environ == before

    def test_what_is_set_stays(self):
        environ = {**disconfig(), "PADDLE_DISTRI_BACKEND": "nccl"}
        launch.apply_disconfig(environ)
        assert environ["PADDLE_DISTRI_BACKEND"] == "nccl"

    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            ({"PROPELLER_DISCONFIG": "{"}, "PROPELLER_DISCONFIG is neither JSON"),
            ({"PROPELLER_DISCONFIG": "{}"}, "PROPELLER_DISCONFIG: cluster is missing; expected an object"),
            ({"PROPELLER_DISCONFIG": '{"cluster": {}}'}, "PROPELLER_DISCONFIG: task is missing"),
            ({"PROPELLER_DISCONFIG": '{"cluster": {}, "task": 3}'}, "task has 3; expected an object"),
            ({"PROPELLER_DISCONFIG": '{"cluster": {}, "task": {}}'}, r"cluster\.chief is missing"),
            (disconfig(chief=()), r"cluster\.chief has \[\]; expected at least one"),
            (disconfig(chief=("host",)), r"cluster\.chief has 'host'; expected an address such as"),
            (disconfig(chief=(7,)), r"cluster\.chief has 7; expected an address"),
            (disconfig(worker=("host:0",)), r"cluster\.worker has 'host:0'; expected an address"),
            (disconfig(worker=("host:65536",)), r"cluster\.worker has 'host:65536'"),
            (disconfig(worker=("[::1]:80",)), r"cluster\.worker has '\[::1\]:80'"),
            ({"PROPELLER_DISCONFIG": '{"cluster": {"chief": "a:1"}, "task": {}}'},
             r"cluster\.chief has 'a:1'; expected a list"),
            (disconfig(worker=(CHIEF,)), f"cluster has '{CHIEF}'; expected every address once"),
            (disconfig("evaluator"), r"task\.type has 'evaluator'; expected 'chief' or 'worker'"),
            (disconfig(None), r"task\.type is missing"),
            (disconfig("worker", 2), r"task\.index has 2; expected one of the 2 of type worker"),
            (disconfig("worker", -1), r"task\.index has -1"),
            (disconfig("worker", True), r"task\.index has True"),
            (disconfig("worker", None), r"task\.index is missing"),
            (disconfig("worker", worker=None), r"task\.index has 0; expected one of the 0 of type worker"),
        ],
    )  # fmt: skip
    def test_wrong(self, environ, message):
        before = dict(environ)
        with pytest.raises(ConfigError, match=message):
            launch.apply_disconfig(environ)
        assert environ == before


class TestNumRanks:
    @pytest.mark.parametrize(("cores", "ranks"), [(1, 1), (2, 2), (8, 8), (64, 8)])
    @pytest.mark.parametrize("device", [None, "cpu"])
    def test_on_a_cpu(self, monkeypatch, cores, ranks, device):
        monkeypatch.setattr(launch, "available_cores", lambda: cores)
        assert launch.num_ranks("auto", device) == ranks
        assert launch.num_ranks("3", device) == 3

    @pytest.mark.parametrize(
        ("listed", "visible", "cards"),
        [
            ("printf 'GPU 0: H200\\nGPU 1: H200\\n'", None, 2),
            ("printf 'GPU 0: H200\\nGPU 1: H200\\n'", "all", 2),
            ("exit 1", "4,5,6", 3),
            ("exit 1", "4,-1,6", 1),
            ("exit 1", "", 0),
            ("exit 1", None, 0),
        ],
    )
    def test_one_a_card(self, monkeypatch, tmp_path, listed, visible, cards):
        with_gpus(monkeypatch, tmp_path, listed)
        monkeypatch.setattr(launch, "available_cores", lambda: 5)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert launch.visible_gpus() == cards
        assert launch.num_ranks("auto") == (cards or 5)
        assert launch.num_ranks("auto", "gpu") == (cards or 1)
        assert launch.num_ranks("auto", "cpu") == 5
        assert launch.num_ranks("auto", "gpu:1") == launch.num_ranks("1", "gpu:1") == 1
        if cards:
            with pytest.raises(ConfigError, match=f"--nproc is 4, but there are {cards} cards"):
                launch.num_ranks("4")

    def test_cards_do_not_count_for_a_paddle_without(self, monkeypatch):
        def version(name):
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        assert launch.visible_gpus({"CUDA_VISIBLE_DEVICES": "0,1"}) == 0

    @pytest.mark.parametrize("nproc", ["0", "-2", "two", "", "1.5", "AUTO"])
    def test_wrong(self, nproc):
        with pytest.raises(ConfigError, match=f"--nproc is '{nproc}'; expected auto, or a number"):
            launch.num_ranks(nproc)

    def test_several_on_one_card(self):
        with pytest.raises(ConfigError, match="--nproc 2 with device 'gpu:1', which is one card"):
            launch.num_ranks("2", "gpu:1")


# A stand-in for Paddle's launcher: says how it was called, leaves what that leaves, and does as `MODE` says.
LAUNCHER = """
import json, os, pathlib, signal, sys
at = sys.argv.index("--log_dir") + 1
folder = pathlib.Path(sys.argv[at])
called = {"flags": sys.argv[1:], "environment": dict(os.environ), "mode": oct(folder.stat().st_mode)}
pathlib.Path("called.json").write_text(json.dumps(called))
for name in ("envlog.0", "envlog.1", "backup_env.0.json", "default.abcdef.log"):
    (folder / name).write_text("SECRET")
(folder / "workerlog.0").open("ab").write("rank 0: größe\\n".encode() + b"\\xff half")
(folder / "workerlog.1").open("a").write("".join(f"line {n}\\n" for n in range(100)))
print("not shown")
failed = "LAUNCH ERROR Container failed !!!\\nContainer rank {} status failed cmd ['x'] code {} log y\\n"
mode = os.environ["MODE"]
if mode == "own":
    sys.exit("no module named paddle.distributed")
if mode == "wait":
    def stop(number, frame):
        (folder / "workerlog.0").open("a").write(f"\\nstopped by {number}\\n")
        sys.exit(number)
    signal.signal(signal.SIGTERM, stop)
    (folder / "workerlog.0").open("a").write("\\nwaiting\\n")
    signal.pause()
if mode != "0":
    rank, code = mode.split(":")
    sys.stderr.write(failed.format(rank, code))
    sys.exit(241)
"""
SCRIPT = """
import sys
from propeller import cli, launch
from propeller.config import ArgumentParser, parse_runconfig
def main():
    cli.setup_logging()
    parser = ArgumentParser()
    parser.add_argument("--text")
    args = parser.parse_args()
    code = launch.relaunch(args.nproc, parse_runconfig(args))
    print("in place" if code is None else "launched")
    return code
cli.run(main)
"""


@pytest.fixture
def start(tmp_path, root):
    """Starts a script with `--nproc` where the launcher is a stand-in."""
    package = tmp_path / "site/paddle/distributed/launch"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    (package / "__main__.py").write_text(LAUNCHER)
    (tmp_path / "script.py").write_text(SCRIPT)

    def started(mode, *flags, script=("script.py",), **environment):
        path = os.pathsep.join([str(tmp_path / "site"), str(root)])
        return subprocess.Popen(
            [sys.executable, "-B", *script, "--run_config", '{"model_dir": "out"}', *flags], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "MODE": mode, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    return started


@pytest.fixture
def run(start):
    """Runs it to its end; returns exit code, standard output and standard error."""

    def ended(mode, *flags, **options):
        process = start(mode, *flags, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return ended


class TestRelaunch:
    def test_the_ranks_get_the_flags(self, run, tmp_path):
        flags = ["--nproc", "2", "--text", "--nproc is text", "--restart"]
        code, out, err = run("0", *flags, CUDA_VISIBLE_DEVICES="0", PADDLE_LOG_DIR="elsewhere", OTHER="kept")
        assert (code, out) == (0, "launched\n")
        called = json.loads((tmp_path / "called.json").read_text())
        own = ["script.py", "--run_config", '{"model_dir": "out"}', "--text", "--nproc is text"]
        at = called["flags"].index("script.py")
        assert called["flags"][at:] == own
        assert called["flags"][:2] == ["--nproc_per_node", "2"]
        environment = called["environment"]
        assert environment["PROPELLER_WHOLE_BATCH"] == "1" and environment["OTHER"] == "kept"
        assert environment["CUDA_VISIBLE_DEVICES"] == "-1,-1", "two ranks on a CPU"
        assert environment["PADDLE_DISTRI_BACKEND"] == "gloo"
        assert "PADDLE_LOG_DIR" not in environment
        assert environment.get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")

    def test_logs_are_private_and_hold_no_environment(self, run, tmp_path):
        for _ in range(2):
            code, out, err = run("0", "--nproc=2")
            assert code == 0
            assert err.endswith("their logs: out/launch\nrank 0: größe\n\ufffd half"), "of this run alone"
        folder = tmp_path / "out/launch"
        assert json.loads((tmp_path / "called.json").read_text())["mode"] == "0o40700"
        assert sorted(path.name for path in folder.iterdir()) == [".lock", "workerlog.0", "workerlog.1"]

    @pytest.mark.parametrize(
        ("mode", "expected", "said"),
        [
            ("1:3", 3, "error: rank 1 ended with exit code 3, and so all were ended. "),
            ("1:-9", 137, "error: rank 1 was killed by SIGKILL, and so all were ended. "),
        ],
    )
    def test_the_rank_that_failed_is_shown(self, run, mode, expected, said):
        code, out, err = run(mode, "--nproc", "2")
        assert code == expected
        assert err.endswith(said + "The logs of all: out/launch\n")
        assert "[rank 1] line 70\n" in err and "[rank 1] line 99\n" in err and "line 69" not in err
        assert "LAUNCH" not in err

    def test_rank_0_is_not_shown_twice(self, run):
        code, out, err = run("0:1", "--nproc", "2")
        assert code == 1
        assert err.count("größe") == 1
        assert "error: rank 0 ended with exit code 1" in err

    def test_a_launcher_that_fails_itself(self, run):
        code, out, err = run("own", "--nproc", "2")
        assert code == 1
        assert "no module named paddle.distributed\nerror: the launcher ended with exit code 1.\n" in err

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_signals_are_passed_on(self, start, tmp_path, number):
        with start("wait", "--nproc", "2") as process:
            while "waiting" not in (line := process.stderr.readline()):
                assert line, "ended too early"
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert err.endswith("stopped by 15\n"), "the launcher is asked to end, and shown to the end"
        assert not list((tmp_path / "out/launch").glob("envlog.*"))

    def test_a_second_run_is_refused(self, start, run, tmp_path):
        with start("wait", "--nproc", "2") as process:
            while "waiting" not in (line := process.stderr.readline()):
                assert line, "ended too early"
            code, out, err = run("0", "--nproc", "2")
            assert code == 1 and f"launch is in use by process {process.pid}." in err
            process.terminate()
            process.communicate(timeout=60)
        with atomic.FolderLock(tmp_path / "out"):
            code, out, err = run("0", "--nproc", "2")
        assert code == 1 and f"out is in use by process {os.getpid()}." in err

    @pytest.mark.parametrize(
        ("flags", "environment"),
        [
            ([], {}),
            (["--nproc", "1"], {}),
            (["--nproc", "2"], {"PROPELLER_WHOLE_BATCH": "1", "PADDLE_TRAINERS_NUM": "2"}),
        ],
        ids=["no-flag", "one", "a-rank"],
    )
    def test_in_place(self, run, tmp_path, flags, environment):
        assert run("0", *flags, **environment) == (0, "in place\n", "")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("flags", "options", "message"),
        [
            (["--nproc", "many"], {}, "error: --nproc is 'many'; expected auto"),
            (["--nproc", "2"], {"PADDLE_TRAINERS_NUM": "2"}, "but one has started this already"),
            (["--nproc", "2"], {"script": ("-m", "script")}, "error: --nproc starts the script's file again"),
            (["--nproc", "2"], {"script": ("-c", SCRIPT)}, "error: --nproc starts the script's file again"),
        ],
        ids=["nonsense", "launched", "module", "command"],
    )
    def test_wrong(self, run, tmp_path, flags, options, message):
        code, out, err = run("0", *flags, **options)
        assert code == 2 and message in err
        assert not (tmp_path / "out").exists()


def test_importing_it_costs_no_paddle():
    code = "import sys, propeller.launch; assert not {'paddle', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert launch.relaunch(None, RunConfig()) is None
