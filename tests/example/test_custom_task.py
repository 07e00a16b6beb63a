"""`example/custom_task`: a task that somebody else adds, in a package of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def installed(root, workplace, tmp_path_factory):
    """The package installed, its script trained once: `run(*words, stdin=)` and the folder it runs in."""
    folder = tmp_path_factory.mktemp("custom")
    source = shutil.copytree(root / "example" / "custom_task", folder / "source")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps")
    subprocess.run([*pip, "--no-build-isolation", "--target", folder / "site", source], check=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(root)]),
        "OMP_NUM_THREADS": "1",
    }

    def run(*words, stdin=None):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=folder, env=environment, input=stdin, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    for name in ("train", "dev"):
        rows = [f"the hotel is {word}\t{share}" for word, share in (("good", 0.9), ("bad", 0.2))] * 8
        (folder / f"{name}.tsv").write_text("\n".join(rows) + "\n", "utf-8")
    train = [folder / "source" / "train.py", "--data_dir", folder, "--warm_start_from", workplace / "model"]
    train += ["--max_seqlen", 16, "--cache_dir", folder / "cache"]
    train += ["--run_config", json.dumps({"model_dir": "output", "max_steps": 60, "eval_steps": 30})]
    train += ["--hparam", json.dumps({"batch_size": 8, "learning_rate": 0.02})]
    run.train = train
    done = run(*train)
    assert done.returncode == 0, done.stderr
    return run, folder


def test_it_is_used_like_any_other(installed):
    run, _ = installed
    bundle = "output/best/inference"
    done = run("-m", "ernie.commands.main", "predict", bundle, stdin="the hotel is good\nthe hotel is bad\n")
    good, bad = map(float, done.stdout.split())
    assert good > bad, done.stderr
    done = run("-m", "ernie.commands.main", "evaluate", bundle, "--data", "dev.tsv")
    assert json.loads(done.stdout)["pearson"] > 0.5, done.stderr
    code = f"from ernie import Pipeline; print(Pipeline({bundle!r})(['the hotel is good'])[0]['share'])"
    assert float(run("-c", code).stdout) == pytest.approx(good, abs=1e-4)
    done = run("-c", f"from ernie import Pipeline; Pipeline({bundle!r})([('a text', 'a second one')])")
    assert done.returncode == 1 and "takes one text, this is a pair" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("the hotel is fine", "expected 2 tab-separated cells: text_a, label"),
        ("the hotel is fine\tgood", "expected a number, found 'good'"),
        ("the hotel is fine\t1.5", "got the share 1.5; expected text<TAB>share, a share between 0 and 1"),
    ],
)
def test_a_bad_row_is_named(installed, line, message):
    run, folder = installed
    (folder / "bad.tsv").write_text(f"the hotel is good\t0.9\n{line}\n", "utf-8")
    done = run(*run.train, "--train_set", "bad.tsv", "--restart")
    assert done.returncode == 1 and "bad.tsv:2" in done.stderr and message in done.stderr


def test_the_sample(installed):
    run, folder = installed
    for name, rows in (("train", 8), ("dev", 4)):
        data = folder / "source" / "shares" / f"{name}.tsv"
        done = run("-m", "ernie.commands.main", "evaluate", "output/best/inference", "--data", data)
        assert json.loads(done.stdout)["n"] == rows, done.stderr


def test_an_edit_is_not_answered_from_the_cache(installed):
    run, folder = installed
    module = folder / "source" / "agreement.py"  # beside the script, so before the installed one
    module.write_text(module.read_text("utf-8").replace('raw["text_a"] for', 'raw["text_c"] for'), "utf-8")
    done = run(*run.train, "--restart")
    assert done.returncode == 1 and "train.tsv:1" in done.stderr and "KeyError" in done.stderr
