"""Write aside, sync, swap; locks; manifests."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys

import pytest

from propeller import atomic, manifest
from propeller.errors import CheckpointError, PropellerError


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


def test_lock_of_another_process_ends_with_it(tmp_path, root):
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, pathlib; from propeller.atomic import FolderLock\n"
         "with FolderLock(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
         str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PropellerError, match=rf"in use by process {holder.pid}\. Wait for it, stop it"):
            atomic.FolderLock(tmp_path).__enter__()
        holder.kill()
    with atomic.FolderLock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_lock_in_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(PropellerError, match=f"{folder} cannot be made or written: "):
            atomic.FolderLock(folder).__enter__()


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "b.txt").write_text("text")
    manifest.write(tmp_path, paddle="3")
    return tmp_path


def test_manifest_lists_and_verifies(listed):
    read = manifest.verify(listed)
    assert read["format_version"] == 1 and read["paddle"] == "3"
    assert read["files"] == {
        "a.bin": {"bytes": 10, "sha256": hashlib.sha256(b"0123456789").hexdigest()},
        "b.txt": {"bytes": 4, "sha256": hashlib.sha256(b"text").hexdigest()},
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.bin").unlink(), r"a\.bin is missing"),
        (lambda folder: (folder / "a.bin").write_bytes(b"012345678"), r"a\.bin has 9 bytes where 10 were"),
        (lambda folder: (folder / "a.bin").write_bytes(b"0123456780"), r"a\.bin is damaged: .* sha256"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format'), r"manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"manifest\.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 1}'), "cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"format_version": 2, "files": {}}'),
         "has checkpoint format 2, this release reads 1"),
    ],
    ids=["missing", "cut", "flipped", "no-manifest", "cut-manifest", "no-object", "no-files", "newer"],
)  # fmt: skip
def test_manifest_names_the_damage(listed, damage, message):
    damage(listed)
    with pytest.raises(CheckpointError, match=message):
        manifest.verify(listed)
