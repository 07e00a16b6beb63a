"""`ernie tune`: all combinations, several seeds, a table; stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ernie.commands.main import main

# Stands for a training script: what it "reaches" follows from its settings, and it can fail or wait.
TRAINER = """
import json, os, pathlib, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
flags = sys.argv[sys.argv.index("--run_config"):]
run_config, hparams = json.loads(flags[1]), json.loads(flags[3])
folder = pathlib.Path(run_config["model_dir"])
with open(os.environ["RUNS"], "a") as runs:
    runs.write(json.dumps({"seed": run_config["seed"], **hparams}) + chr(10))
if os.environ.get("FAIL_AT") == str(run_config["seed"]):
    sys.exit("error: no memory left.")
acc = 0.5 + 1000 * hparams.get("learning_rate", 0) + 0.01 * run_config["seed"]
results = {"loss": -acc, "acc": acc, "f1": "NaN", "n": 2}
with open(folder / "metrics.jsonl", "w") as metrics:
    metrics.write(json.dumps({"event": "train", "step": 1, "loss": 1.0}) + chr(10))
    metrics.write(json.dumps({"event": "eval", "step": 1, "dataset": "dev", **results}) + chr(10))
while os.environ.get("WAIT"):
    time.sleep(0.05)
    if got:
        print("signals", *map(int, got), flush=True)
        sys.exit(128 + got[0])
version = folder / "best" / ".inference" / "step_1"
version.mkdir(parents=True)
(folder / "checkpoints").mkdir()
(folder / "best" / "inference").symlink_to(".inference/step_1")
best = {"step": 1, "metric": os.environ.get("CHOSEN"), "results": {"dev": results}}
(version / "best.json").write_text(json.dumps(best))
"""


@pytest.fixture
def tune(tmp_path):
    """`tune(*flags, **environment)` runs the command and returns the finished process."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text(TRAINER)

    def start(*flags, start_new_session=False, **environment):
        words = ["-m", "ernie.commands.main", "tune", "--output_dir", str(tmp_path / "out"), *flags]
        command = [sys.executable, *words, "--", sys.executable, str(trainer), "--data_dir", "data"]
        environment = {**os.environ, "RUNS": str(tmp_path / "runs"), **environment}
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=start_new_session,
        )

    def finish(*flags, **environment):
        process = start(*flags, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(flags, process.returncode, out, err)

    finish.start = start
    return finish


def runs(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "runs").read_text().splitlines()]


def test_all_combinations_and_seeds(tune, tmp_path):
    done = tune("--learning_rate", "1e-5,5e-5", "--batch_size", "16,32", "--seeds", "1,2")
    assert done.returncode == 0, done.stderr
    assert len(runs(tmp_path)) == 8
    header, *rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == ["learning_rate", "batch_size", "acc mean", "deviation", "best", "of each seed"]
    assert rows[0] == ["5e-05", "16", "0.565", "0.00707", "0.57", "0.56 0.57"]
    assert [float(row[2]) for row in rows] == [0.565, 0.565, 0.525, 0.525]
    out = tmp_path / "out"
    assert (out / "table.tsv").read_text() == done.stdout
    best = (out / "best").resolve()
    assert json.loads((best / "best.json").read_text())["results"]["dev"]["acc"] == pytest.approx(0.57)
    assert len(list(out.glob("*/*/best"))) == 1 and not list(out.glob("*/*/checkpoints"))


def test_seeds_alone(tune, tmp_path):
    done = tune("--seeds", "1,3")
    assert done.stdout.splitlines() == [
        "acc mean\tdeviation\tbest\tof each seed",
        "0.52\t0.0141\t0.53\t0.51 0.53",
    ]
    assert runs(tmp_path) == [{"seed": 1}, {"seed": 3}]


def test_the_plot(tune, tmp_path):
    pytest.importorskip("matplotlib")
    assert tune("--learning_rate", "1e-5,5e-5").returncode == 0
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_by_the_metric_of_the_training(tune):
    done = tune("--learning_rate", "1e-5,5e-5", CHOSEN="loss")
    header, best, _ = done.stdout.splitlines()
    assert "loss mean" in header and best.startswith("5e-05")


def test_by_another_metric(tune):
    done = tune("--learning_rate", "1e-5,5e-5", "--metric", "loss")
    assert [line.split("\t")[0] for line in done.stdout.splitlines()[1:]] == ["5e-05", "1e-05"]


@pytest.mark.parametrize("environment", [{}, {"WAIT": "1"}])
def test_a_metric_that_is_not_there_is_found_at_the_first_evaluation(tune, tmp_path, environment):
    """Also while the first training is still at work."""
    done = tune("--learning_rate", "1e-5,5e-5", "--metric", "f2", **environment)
    assert done.returncode == 2
    assert "no number 'f2'; it has acc, f1, loss, n. Started again" in done.stderr
    assert len(runs(tmp_path)) == 1
    assert tune("--learning_rate", "1e-5", "--seeds", "1", "--metric", "f1").returncode == 0


def test_a_training_that_fails_is_named_and_the_search_goes_on_there(tune, tmp_path):
    done = tune("--num_epochs", "1,2", "--batch_size", "8", "--learning_rate", "1e-5", FAIL_AT="2")
    assert done.returncode == 1
    assert "exit code 1: error: no memory left. All it said is in" in done.stderr
    assert "log.txt" in done.stderr
    assert len(runs(tmp_path)) == 2
    done = tune("--num_epochs", "1,2", "--batch_size", "8", "--learning_rate", "1e-5")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    assert len(runs(tmp_path)) == 2 + 5  # what was done is not done again
    assert tune("--num_epochs", "1,2", "--batch_size", "8", "--learning_rate", "1e-5").stdout == done.stdout
    assert len(runs(tmp_path)) == 7
    # A wider grid takes what is there.
    done = tune("--num_epochs", "1,2,3", "--batch_size", "8", "--learning_rate", "1e-5")
    assert len(runs(tmp_path)) == 10 and len(done.stdout.splitlines()) == 4


def test_a_search_that_is_stopped_stops_its_training(tune, tmp_path):
    search = tune.start("--learning_rate", "1e-5", WAIT="1")
    while not (tmp_path / "runs").exists():
        assert search.poll() is None
        time.sleep(0.01)
    other = tune("--learning_rate", "1e-5")
    assert other.returncode == 2 and "Another search is writing" in other.stderr
    search.send_signal(signal.SIGTERM)
    search.communicate(timeout=60)
    assert search.returncode == 128 + signal.SIGTERM
    assert tune("--learning_rate", "1e-5").returncode == 0  # nobody is left who holds the lock


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_training_gets_one_signal(tune, tmp_path, number):
    search = tune.start("--learning_rate", "1e-5", start_new_session=True, WAIT="1")
    while not (tmp_path / "runs").exists():
        assert search.poll() is None
        time.sleep(0.01)
    os.killpg(search.pid, number)  # as a terminal does
    _, err = search.communicate(timeout=60)
    assert search.returncode == 128 + number
    assert err.splitlines()[-1] == f"Stopped by {number.name}. The same command goes on from there."
    (text,) = [path.read_text() for path in (tmp_path / "out").glob("*/*/log.txt")]
    assert text.splitlines() == [f"signals {int(signal.SIGTERM)}"]


def test_close_values_do_not_share_a_folder(tune, tmp_path):
    assert tune("--learning_rate", "1.0000001e-5,1.0000002e-5", "--seeds", "1").returncode == 0
    assert len(runs(tmp_path)) == 2


def best_acc(tmp_path: Path) -> float:
    return json.loads((tmp_path / "out/best/best.json").read_text())["results"]["dev"]["acc"]


def test_the_best_bundle_is_that_of_the_table_also_when_a_search_before_has_dropped_it(tune, tmp_path):
    assert tune("--learning_rate", "2e-5,5e-5", "--seeds", "1").returncode == 0
    assert best_acc(tmp_path) == pytest.approx(0.56)
    done = tune("--learning_rate", "2e-5,1e-5", "--seeds", "1")
    assert done.returncode == 0 and "once more, since a search before has dropped its bundle" in done.stderr
    assert done.stdout.splitlines()[1].startswith("2e-05") and best_acc(tmp_path) == pytest.approx(0.53)
    assert [run["learning_rate"] for run in runs(tmp_path)] == [2e-5, 5e-5, 1e-5, 2e-5]
    # The best of the first search is still there.
    assert tune("--learning_rate", "2e-5,5e-5", "--seeds", "1").returncode == 0
    assert len(runs(tmp_path)) == 4 and best_acc(tmp_path) == pytest.approx(0.56)


def test_another_metric_has_another_best(tune, tmp_path):
    assert tune("--learning_rate", "1e-5,5e-5", "--seeds", "1").returncode == 0
    done = tune("--learning_rate", "1e-5,5e-5", "--seeds", "1", "--metric", "f1")  # all NaN: the first counts
    assert done.returncode == 0 and done.stdout.splitlines()[1].startswith("1e-05")
    assert best_acc(tmp_path) == pytest.approx(0.52)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate", "fast"], "expected numbers such as 16,32, got 'fast'"),
        (["--batch_size", "1.5"], "expected numbers such as 16,32"),
    ],
)
def test_bad_flags(tune, flags, message):
    done = tune(*flags)
    assert done.returncode == 2 and message in done.stderr


def test_another_command_needs_another_folder(tune, tmp_path):
    assert tune("--learning_rate", "1e-5", "--seeds", "1").returncode == 0
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(plan.read_text().replace('"data"', '"others"'))
    done = tune("--learning_rate", "1e-5")
    assert done.returncode == 2 and "another command" in done.stderr and "--data_dir others" in done.stderr


def test_a_command_that_cannot_be_started(tmp_path):
    words = ["-m", "ernie.commands.main", "tune", "--output_dir", str(tmp_path), "--learning_rate", "1"]
    done = subprocess.run(
        [sys.executable, *words, "--", str(tmp_path / "none")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "cannot be started" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "tune --output_dir out python x.py --data_dir data",
            "no flag --data_dir. The command that trains, with its own flags, stands behind `--`.",
        ),
        ("predict --formt jsonl B", "there is no flag --formt. Did you mean '--format'?"),
        ("predict B C", "more arguments than there should be: C"),
    ],
)
def test_what_a_command_does_not_know(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    said = capsys.readouterr().err
    assert said.startswith(f"usage: ernie {words.split()[0]}") and said.endswith(f"{message}\n")
