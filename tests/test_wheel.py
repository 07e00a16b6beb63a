"""Builds the wheel, installs it (not the checkout) and does the main job from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


def run(*command: object, cwd: Path, **options: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=200,
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.mark.timeout(240)
def test_main_job_from_the_wheel(tmp_path: Path, root: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("propeller", "ernie"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("ernie_propeller-*.whl")

    # A new environment that sees what this one has installed, but not an editable install of the checkout.
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    site = next((tmp_path / "env/lib").glob("python3*/site-packages"))
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    program = "import propeller, ernie; print(propeller.__file__, ernie.__file__)"
    where = run(python, "-c", program, cwd=tmp_path)
    assert all(path.startswith(str(site)) for path in where.split())
    assert (site / "propeller/py.typed").exists() and (site / "ernie/py.typed").exists()
    (metadata,) = site.glob("ernie_propeller-*.dist-info")
    assert (metadata / "licenses/LICENSE").read_bytes() == (root / "LICENSE").read_bytes()

    run(sys.executable, root / "script/quickstart/make_reviews.py", tmp_path / "data", cwd=tmp_path)
    script = shutil.copy(root / "example/finetune_classifier.py", tmp_path / "mine.py")
    config = {"model_dir": str(tmp_path / "model"), "max_steps": 5}
    run(
        *(python, script, "--data_dir", tmp_path / "data", "--vocab_file", tmp_path / "data/vocab.txt"),
        *("--cache_dir", tmp_path / "cache", "--max_seqlen", 32, "--run_config", json.dumps(config)),
        *("--hparam", root / "script/quickstart/ernie_config.json", "--hparam", '{"hidden_size": 16}'),
        cwd=tmp_path,
    )
    bundle = tmp_path / "model/best/inference"
    predict = (python, script, "--do_predict", "--format", "jsonl", "--bundle", bundle)
    answers = run(*predict, cwd=tmp_path, input="hotel was good\n服务很差\n").splitlines()
    assert [json.loads(answer)["label"] in ("0", "1") for answer in answers] == [True, True]
