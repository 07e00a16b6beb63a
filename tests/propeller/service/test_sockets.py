"""The private folder of a server, and what is done about those that killed servers have left."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from propeller.service.settings import ServerSettings
from propeller.service.sockets import Sockets

SETTINGS = ServerSettings({"m": Path("bundle")}, port=0)
KILLED = """
import os, signal
from pathlib import Path
from propeller.service.settings import ServerSettings
from propeller.service.sockets import Sockets
sockets = Sockets(ServerSettings({"m": Path("bundle")}, port=0), local_clients=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def private(monkeypatch):
    """Where private folders are made; its path is short enough for sockets."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def open_and_close():
    with contextlib.closing(Sockets(SETTINGS)):
        pass


@pytest.fixture
def left(private, root):
    """The folder of a server that was killed."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env={"TMPDIR": str(private), "PYTHONPATH": str(root)}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (folder,) = private.iterdir()
    assert {path.name for path in folder.iterdir()} == {"lock", "clients", "workers"}
    return folder


def test_what_a_killed_server_left_is_removed(private, left):
    with contextlib.closing(Sockets(SETTINGS)):
        (own,) = private.iterdir()
        assert own != left and own.stat().st_mode & 0o777 == 0o700
        open_and_close()
        assert own.exists(), "it is in use"
    assert not list(private.iterdir())


@pytest.mark.parametrize("name", ["propeller-project", "propeller-server-project"])
def test_folders_of_others_stay(private, name):
    (private / name).mkdir(mode=0o700)
    for file in ("lock", "clients", "thesis.txt"):
        (private / name / file).write_text("years of work")
        os.utime(private / name / file, (1, 1))
    open_and_close()
    assert len(list((private / name).iterdir())) == 3


def test_what_is_not_only_a_servers_stays(private, left):
    """Readable by others, a link, or with a file in it that no server has made."""
    open_to_all = shutil.copytree(left, private / f"{left.name}1", ignore=shutil.ignore_patterns("[cw]*"))
    open_to_all.chmod(0o755)
    elsewhere = left.rename(private / "elsewhere")
    left.symlink_to(elsewhere)
    more = shutil.copytree(open_to_all, private / f"{left.name}2")
    more.chmod(0o700)
    (more / "thesis.txt").write_text("years of work")
    open_and_close()
    assert (open_to_all / "lock").exists() and (elsewhere / "lock").exists() and left.is_symlink()
    assert [path.name for path in more.iterdir()] == ["thesis.txt"]
