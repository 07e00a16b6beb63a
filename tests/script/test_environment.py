"""The shell scripts: environments that are made, mended, shared and numbered."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Stands in for Python: notes its arguments, makes environments that hold a copy of itself. Two installations
# at once fail, as they may with pip.
STUB = """#!/usr/bin/env bash
set -eu
echo "$*" >> "$CALLS"
case "$*" in
    "-m venv"*)
        target=${@: -1}
        mkdir -p "$target/bin"
        rm -f "$target"/.installed-*
        cp "$0" "$target/bin/python"
        touch "$target/pyvenv.cfg" ;;
    "-m pip install"*) mkdir "$CALLS.busy" && sort "$CALLS" > /dev/null && rmdir "$CALLS.busy" ;;
esac
"""
USE = 'set -eu; source script/environment.sh; use_environment "$1"'


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """A checkout with what the scripts need."""
    folder = tmp_path / "check out"
    scripts = ("script/environment.sh", "script/test_pythons.sh", "script/test_matrix.sh")
    for name in (*scripts, "pyproject.toml", "propeller/version.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, folder / name)
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture
def start(checkout: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts `use_environment` in the checkout."""

    def start(extra: str = "cpu", **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", USE, "bash", extra],
            cwd=checkout,
            env={"PATH": os.environ["PATH"], "PYTHON": "./python", "CALLS": "calls", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def calls(checkout: Path, start: Callable[..., subprocess.Popen[str]]) -> Callable[..., list[str]]:
    """Runs `use_environment` and returns how Python was called to make something."""

    def calls(*args: str, **environment: str) -> list[str]:
        (checkout / "calls").write_text("")
        process = start(*args, **environment)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        lines = (checkout / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(("-m venv", "-m pip install"))]

    return calls


def install(extra: str) -> str:
    return f"-m pip install --quiet --disable-pip-version-check --editable .[{extra}]"


def run_script(
    checkout: Path, script: str, test: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script that goes through several environments, with `test` in place of script/test.sh."""
    (checkout / "script/test.sh").write_text(test)
    return subprocess.run(
        ["bash", f"script/{script}.sh", "-k", "two words"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


SCRIPTS = ["quickstart", "test", "docs", "environment", "test_pythons", "test_matrix"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(root: Path, script: str) -> None:
    done = subprocess.run(["bash", "-n", root / f"script/{script}.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


class TestEnvironment:
    def test_made_once_for_each_extra(self, calls: Callable[..., list[str]], checkout: Path) -> None:
        assert calls() == ["-m venv .venv", install("cpu")]
        assert calls() == []
        assert calls("cpu,test") == [install("cpu,test")]
        with (checkout / "pyproject.toml").open("a") as file:
            file.write("# changed\n")
        assert calls() == [install("cpu")]

    def test_named(self, calls: Callable[..., list[str]], checkout: Path) -> None:
        assert calls(VENV="other/an environment")[0] == "-m venv other/an environment"
        assert (checkout / "other/an environment/.installed-cpu").exists()

    def test_with_a_version_of_paddle(self, calls: Callable[..., list[str]]) -> None:
        assert calls(PADDLE_VERSION="3.2.2") == ["-m venv .venv", f"{install('cpu')} paddlepaddle==3.2.2"]
        assert calls(PADDLE_VERSION="3.2.2") == []
        assert calls(PADDLE_VERSION="3.3.1") == [f"{install('cpu')} paddlepaddle==3.3.1"]
        assert calls() == [install("cpu")]

    def test_without_pip_it_is_made_anew(self, calls: Callable[..., list[str]], checkout: Path) -> None:
        calls()
        (checkout / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
        assert calls() == ["-m venv --clear .venv", install("cpu")]
        assert calls() == []

    def test_a_folder_that_is_none_is_not_cleared(
        self, calls: Callable[..., list[str]], checkout: Path
    ) -> None:
        (checkout / "mine").mkdir()
        assert calls(VENV="mine")[0] == "-m venv mine"

    @pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
    def test_several_at_once_install_once(
        self, start: Callable[..., subprocess.Popen[str]], checkout: Path
    ) -> None:
        processes = [start() for _ in range(4)]
        ends = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
        assert ends == [("", 0)] * 4
        assert (checkout / "calls").read_text().splitlines().count(install("cpu")) == 1

    def test_a_wrong_python_is_named(
        self, start: Callable[..., subprocess.Popen[str]], checkout: Path
    ) -> None:
        (checkout / "python").write_text("#!/bin/sh\n[ $1 = --version ] && echo Python 3.9.1\n")
        process = start()
        assert "Python 3.10 to 3.13 is needed; ./python is Python 3.9.1" in process.communicate(timeout=60)[1]
        assert process.returncode == 2


class TestPythons:
    def test_each_has_its_environment(self, checkout: Path) -> None:
        test = 'printf "%s|" "$PYTHON" "$VENV" "$@"; echo'
        done = run_script(checkout, "test_pythons", test, PYTHONS=sys.executable)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        assert done.returncode == 0, done.stderr
        _, ran, summary = done.stdout.splitlines()
        assert ran == f"{sys.executable}|.venv-{version}|-k|two words|"
        assert summary == f"== passed: {version}; failed: none"

    def test_a_failure_or_a_missing_python_fails(self, checkout: Path) -> None:
        assert run_script(checkout, "test_pythons", "exit 3", PYTHONS=sys.executable).returncode == 1
        done = run_script(checkout, "test_pythons", "exit 0", PYTHONS=f"{sys.executable} python3.99")
        assert done.returncode == 1
        assert done.stdout.endswith("failed: python3.99\n")


class TestMatrix:
    def test_each_version_has_its_environment(self, checkout: Path) -> None:
        done = run_script(checkout, "test_matrix", 'printf "%s|" "$PADDLE_VERSION" "$VENV" "$@"; echo')
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "== Paddle 3.2.2",
            "3.2.2|.venv-paddle-3.2.2|-k|two words|",
            "== Paddle 3.3.1",
            "3.3.1|.venv-paddle-3.3.1|-k|two words|",
            "== passed: 3.2.2 3.3.1; failed: none",
        ]

    def test_a_failure_fails_and_the_others_are_run(self, checkout: Path) -> None:
        done = run_script(checkout, "test_matrix", '[ "$PADDLE_VERSION" != 8.1 ]', PADDLES="8.1 9.2")
        assert done.returncode == 1
        assert done.stdout.endswith("== passed: 9.2; failed: 8.1\n")
