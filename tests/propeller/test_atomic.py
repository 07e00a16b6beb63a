"""Write aside, sync, swap; locks; manifests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from propeller import atomic, manifest
from propeller.errors import CheckpointError, ConfigError, PropellerError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "target"
    with atomic.new_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert folder.parent == target.parent, "a rename is atomic only within one file system"
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert names(target.parent) == ["target"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode, "not the private mode of a temporary folder"


def test_new_folder_leaves_nothing_behind_an_error(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt), atomic.new_folder(target) as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_new_folder_does_not_replace(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").write_text("x")
    with pytest.raises(FileExistsError, match="target is already there"), atomic.new_folder(target):
        pytest.fail("must not get here")
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_a_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("old")
    rename, failures = Path.rename, [OSError(errno.EIO, "Input/output error")]

    def failing(self, new):
        if new == target and failures:
            raise failures.pop()
        return rename(self, new)

    monkeypatch.setattr(Path, "rename", failing)
    for content in ("old", "new"):
        expected = contextlib.nullcontext() if content == "new" else pytest.raises(OSError, match="/output")
        with expected, atomic.new_folder(target, replace=True) as folder:
            (folder / "file").write_text("new")
        assert (target / "file").read_text() == content
        assert names(tmp_path) == ["target"]


def test_modes_are_those_that_the_umask_gives(tmp_path, monkeypatch):
    """Without a change of it, which other threads would work under."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
        atomic.write_text(tmp_path / "file", "x")
        with atomic.new_folder(tmp_path / "folder"):
            pass
    finally:
        monkeypatch.undo()
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder")]
    assert modes == [0o640, 0o750]


def test_what_a_link_leads_to_gets_the_content(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    for name in ("file", "new"):
        link = tmp_path / name
        link.symlink_to(Path("there") / name)
        atomic.write_text(link, "content")
        assert link.is_symlink() and (tmp_path / "there" / name).read_text() == "content"
    assert names(tmp_path) == ["file", "new", "there"] and names(tmp_path / "there") == ["file", "new"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_written_and_not_replaced(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(KeyboardInterrupt), atomic.new_file(fifo) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with ThreadPoolExecutor() as threads:
        read = threads.submit(fifo.read_text)
        atomic.write_text(fifo, "content")
        assert stat.S_ISFIFO(fifo.stat().st_mode)
        assert read.result(60) == "content"
    assert names(tmp_path) == ["fifo"]


def test_write_text_replaces_in_one_rename(tmp_path):
    file = tmp_path / "new" / "file"
    atomic.write_text(file, "one\n")
    atomic.write_text(file, "zwei ü\n")
    assert file.read_bytes() == "zwei ü\n".encode()
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(file, "half" * 10_000 + "\ud800")
    assert file.read_bytes() == "zwei ü\n".encode()
    assert names(file.parent) == ["file"]
    (tmp_path / "plain").write_text("")
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_new_file_replaces_in_one_rename(tmp_path):
    target = tmp_path / "new" / "file"
    for data in (b"one", b"two"):
        with atomic.new_file(target) as temporary:
            assert temporary.parent == target.parent
            temporary.unlink()  # as a library does that writes aside by itself
            temporary.write_bytes(data)
            temporary.chmod(0o600)
            assert not target.exists() or target.read_bytes() == b"one"
        assert target.read_bytes() == data
    with pytest.raises(KeyboardInterrupt), atomic.new_file(target) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"two"
    assert names(target.parent) == ["file"]
    (tmp_path / "plain").write_text("")
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_sha256_of_more_than_one_piece(tmp_path):
    file = tmp_path / "file"
    data = bytes(range(256)) * 5000
    file.write_bytes(data)
    assert len(data) > 1 << 20
    assert atomic.sha256(file) == hashlib.sha256(data).hexdigest()


def test_swap_link(tmp_path):
    for version in ("one", "two"):
        (tmp_path / ".versions" / version).mkdir(parents=True)
        (tmp_path / ".versions" / version / "file").write_text(version)
        atomic.swap_link(tmp_path / "link", tmp_path / ".versions" / version)
        assert (tmp_path / "link" / "file").read_text() == version
    assert not os.readlink(tmp_path / "link").startswith("/"), "the folder can be moved"
    assert names(tmp_path) == [".versions", "link"]


def test_json_spells_out_what_is_not_finite():
    value = {"a": [math.nan, math.inf, (-math.inf, 1.5)], "b": "NaN", "中": None, "n": 3, "t": True}
    text = atomic.to_json(value)
    assert "中" in text
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == {"a": ["NaN", "Infinity", ["-Infinity", 1.5]], "b": "NaN", "中": None, "n": 3, "t": True}
    assert [float(read["a"][1]), float(read["a"][2][0])] == [math.inf, -math.inf]
    assert math.isnan(float(read["a"][0]))
    assert json.loads(atomic.to_json(0.1 + 0.2)) == 0.1 + 0.2


def test_json_of_numpy_and_paths():
    value = {
        "int": np.int64(3),
        "floats": (np.float32(0.5), np.float64(np.nan), np.array([1.5, -np.inf])),
        "bool": np.True_,
        "table": np.arange(4).reshape(2, 2),
        "scalar": np.array(7, np.int8),
        "path": Path("model") / "vocab.txt",
        np.int64(2): {Path("x"): 1},
    }
    assert json.loads(atomic.to_json(value)) == {
        "int": 3,
        "floats": [0.5, "NaN", [1.5, "-Infinity"]],
        "bool": True,
        "table": [[0, 1], [2, 3]],
        "scalar": 7,
        "path": os.path.join("model", "vocab.txt"),
        "2": {"x": 1},
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {"b": {1, 2}}]}, r"^a\[1\]\.b is \{1, 2\} \(set\), which JSON has no place for"),
        (len, r"^The value is <built-in function len> \(builtin_function_or_method\)"),
        ({"hparams": {"model": b"x"}}, r"^hparams\.model is b'x' \(bytes\)"),
        ({"since": np.datetime64("2020-01-01")}, r"^since is .* \(date\)"),
        ({"exact": np.longdouble(1)}, r"^exact is .* \(longdouble\)"),
        ({"a": {(1, 2): 3}}, r"^a has the key \(1, 2\) \(tuple\); JSON's keys are text"),
    ],
)
def test_json_names_what_it_cannot_hold(value, message):
    with pytest.raises(ConfigError, match=message):
        atomic.to_json(value)


def test_lock_keeps_a_second_one_out(tmp_path):
    folder = tmp_path / "run"
    with atomic.FolderLock(folder):
        with pytest.raises(PropellerError, match=rf"run is in use by process {os.getpid()}\b"):
            atomic.FolderLock(folder).__enter__()
        with atomic.FolderLock(tmp_path / "other"):
            pass
    with pytest.raises(ZeroDivisionError), atomic.FolderLock(folder):
        raise ZeroDivisionError
    with atomic.FolderLock(folder):  # also after an error
        pass


@contextlib.contextmanager
def held(folder, root):
    """Another process that holds the lock of a folder."""
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, pathlib; from propeller.atomic import FolderLock\n"
         "with FolderLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
         str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip
    with holder:
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_lock_of_another_process_ends_with_it(tmp_path, root):
    with held(tmp_path, root) as holder:
        with pytest.raises(PropellerError, match=rf"in use by process {holder.pid}\. Wait for it, stop it"):
            atomic.FolderLock(tmp_path).__enter__()
    with atomic.FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_lock_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PropellerError, match=f"{folder} cannot be made or written: "):
            atomic.FolderLock(folder).__enter__()


@pytest.mark.skipif(atomic.fcntl is None, reason="there are no locks")
def test_lock_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", flock)
    with pytest.raises(PropellerError, match=r"cannot be locked: .*No locks available.* Choose a model_dir"):
        atomic.FolderLock(tmp_path).__enter__()


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "b.txt").write_text("text")
    manifest.write(tmp_path, paddle="3")
    return tmp_path


def test_manifest_lists_and_verifies(listed):
    read = manifest.verify(listed)
    assert read["format_version"] == 2 and read["paddle"] == "3"
    assert read["files"] == {
        "a.bin": {"bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()},
        "b.txt": {"bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()},
    }


@pytest.mark.parametrize("name", ["../outside", "sub/file", "/etc/hostname", "..", "."])
def test_manifest_names_plain_files_only(listed, name):
    path = listed / "manifest.json"
    read = json.loads(path.read_text("utf-8"))
    for target in (listed / "sub/file", listed.parent / "outside"):
        target.parent.mkdir(exist_ok=True)
        target.write_text("text")
    path.write_text(json.dumps({**read, "files": {name: read["files"]["b.txt"]}}))
    with pytest.raises(CheckpointError, match=rf"lists '{name}', which is no plain file name"):
        manifest.verify(listed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").unlink(), r"a\.bin is missing"),
        (lambda folder: (folder / "a.bin").write_bytes(b"012345678"), r"a\.bin has 9 bytes where 10 were"),
        (lambda folder: (folder / "a.bin").write_bytes(b"0123456780"), r"a\.bin is damaged: .* sha256"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format'), r"manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 2}'), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 2, "files": {"a.bin": 1}}'),
         r"manifest\.json is not whole"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 1, "files": {}}'),
         "has checkpoint format 1, this release reads 2"),
    ],
    ids=["missing", "cut", "flipped", "no-manifest", "cut-manifest", "no-object", "no-files", "no-entry",
         "older"],
)  # fmt: skip
def test_manifest_names_the_damage(listed, damage, message):
    damage(listed)
    with pytest.raises(CheckpointError, match=message):
        manifest.verify(listed)


def test_checkpoints_are_listed_by_step(tmp_path):
    assert manifest.list_checkpoints(tmp_path) == {}
    folder = tmp_path / "checkpoints"
    listed = ["step_00000003", "step_00000020", "step_00000020.new", "step_100000000", "step_00000001.new"]
    for name in [*listed, ".step_00000004.x1y2z3", "step_5", "step_00000006.old", "step_00000007.new.new"]:
        (folder / name).mkdir(parents=True)
    (folder / "step_00000008").write_text("in the way")
    found = manifest.list_checkpoints(str(tmp_path))
    assert [*found.items()] == [
        (1, folder / "step_00000001.new"),
        (3, folder / "step_00000003"),
        (20, folder / "step_00000020.new"),
        (100000000, folder / "step_100000000"),
    ]


def test_set_aside_takes_the_first_free_name(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (tmp_path / "run.2").write_text("in the way")
    (tmp_path / "run.3").symlink_to("nowhere")
    for expected in ("run.1", "run.4"):
        run.mkdir()
        (run / "file").write_text(expected)
        assert atomic.set_aside(run) == tmp_path / expected
        assert not run.exists()
        assert (tmp_path / expected / "file").read_text() == expected
    run.mkdir()
    (run / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert atomic.set_aside(Path("run")) == tmp_path / "run.5"


def test_set_aside_of_nothing(tmp_path):
    run = tmp_path / "run"
    assert atomic.set_aside(run) is None
    assert not run.exists()
    run.mkdir()
    assert atomic.set_aside(run) is None
    with atomic.FolderLock(run):
        pass
    assert names(run) == [".lock"]
    assert atomic.set_aside(run) is None
    assert names(tmp_path) == ["run"]


@pytest.mark.skipif(atomic.fcntl is None, reason="there are no locks")
def test_set_aside_leaves_a_folder_in_use(tmp_path, root):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("x")
    with held(tmp_path / "run", root) as holder:
        with pytest.raises(PropellerError, match=rf"in use by process {holder.pid}\."):
            atomic.set_aside(tmp_path / "run")
    assert names(tmp_path) == ["run"]
    assert atomic.set_aside(tmp_path / "run") == tmp_path / "run.1"


def test_set_aside_of_what_cannot_be_renamed(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "inner").mkdir(parents=True)
    monkeypatch.chdir(run / "inner")
    for folder in (run, Path("..")):
        with pytest.raises(
            PropellerError, match=r"run cannot be moved to .*run\.1: it is, or holds, the cur"
        ):
            atomic.set_aside(folder)
    monkeypatch.chdir(tmp_path)

    def rename(self, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(
        PropellerError, match=r"busy\. Move what is in it yourself, or choose another model_dir"
    ):
        atomic.set_aside(run)
    assert (run / "inner").is_dir()
