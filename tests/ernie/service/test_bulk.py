"""Bulk encoding: files and pipes, bad lines, runs that are killed."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ernie.service import bulk, vector_file
from ernie.service import lines as line_module
from propeller import atomic
from propeller import lines as limits
from propeller.errors import ConfigError, PropellerError, ServerError, Unavailable, WorkerDied

# Commits after every block, so that a kill finds something to go on with.
COMMAND = (
    "from ernie.service import bulk, vector_file; from propeller import cli; "
    "vector_file._COMMIT_S = 0.0; cli.run(bulk.main)"
)


def words(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in rng.integers(0, 200, rng.integers(0, 14))) for _ in range(count)]


def write_lines(path, lines):
    path.write_bytes(b"".join(line.encode() + b"\n" for line in lines))
    return path


def read_lines(path):
    return path.read_text("utf-8").splitlines()


def encode(toy, source, target, *flags):
    return bulk.main(["-i", str(source), "-o", str(target), "--port", str(toy.port), *flags])


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if ".part" in path.name)


@pytest.mark.parametrize("flags", [(), ("--batch_size", "7"), ("--vocab", "VOCAB"), ("--prompt", "query")])
def test_a_file(toy, tmp_path, flags):
    toy.tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = [str(tmp_path / "tokenizer" / "vocab.txt") if flag == "VOCAB" else flag for flag in flags]
    lines = words(500)
    source = write_lines(tmp_path / "in.txt", lines)
    assert encode(toy, source, tmp_path / "new" / "out.npy", *flags) == 0
    expected = toy.vectors(lines, "query" if "query" in flags else None)
    np.save(tmp_path / "expected.npy", expected)
    assert (tmp_path / "new" / "out.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
    assert leftovers(tmp_path / "new") == []


def test_json_lines(toy, tmp_path):
    lines = words(300)
    source = write_lines(tmp_path / "in.txt", lines)
    assert encode(toy, source, tmp_path / "out.jsonl") == 0
    rows = [json.loads(line)["embedding"] for line in read_lines(tmp_path / "out.jsonl")]
    np.testing.assert_array_equal(np.array(rows, dtype=np.float32), toy.vectors(lines))


def test_a_vector_for_each_token(toy_of, tmp_path):
    toy = toy_of(pooling="none")
    source = write_lines(tmp_path / "in.txt", ["w1 w2", ""])
    with pytest.raises(ConfigError, match="Use --format jsonl"):
        encode(toy, source, tmp_path / "out.npy")
    assert encode(toy, source, tmp_path / "out.jsonl") == 0
    first, second = ((json.loads(line)["embedding"]) for line in read_lines(tmp_path / "out.jsonl"))
    assert np.shape(first) == (4, 8) and np.shape(second) == (2, 8)


@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\n", b"a\n\nb", b"a\r\nb\r\n", b"\n\n"])
def test_one_row_for_each_line(toy, tmp_path, content):
    (tmp_path / "in.txt").write_bytes(content)
    assert encode(toy, tmp_path / "in.txt", tmp_path / "out.npy") == 0
    vectors = np.load(tmp_path / "out.npy")
    lines = content.decode().replace("\r", "").split("\n")
    lines = lines if lines[-1] else lines[:-1]
    assert vectors.shape == (len(lines), 8)
    if lines:
        np.testing.assert_array_equal(vectors, toy.vectors(lines))


BAD_LINES = (
    b"good",
    b"\xff\xfe",
    b"!bad",
    "\N{GRINNING FACE}".encode() * 300_000,
    b"never",
    b"!broken",
    b"!died",
)


@pytest.mark.parametrize("kind", ["npy", "jsonl"])
def test_bad_lines(toy, tmp_path, capsys, kind):
    (tmp_path / "in.txt").write_bytes(b"\n".join([*BAD_LINES, *[b"a"] * 20]) + b"\n")
    assert encode(toy, tmp_path / "in.txt", tmp_path / f"out.{kind}") == 1
    good = [0, 4, *range(7, 27)]
    expected = toy.vectors(["good", "never", *["a"] * 20])
    if kind == "npy":
        vectors = np.load(tmp_path / "out.npy")
        assert np.isnan(vectors).all(axis=1).nonzero()[0].tolist() == [1, 2, 3, 5, 6]
        np.testing.assert_array_equal(vectors[good], expected)
    else:
        rows = [json.loads(line) for line in read_lines(tmp_path / "out.jsonl")]
        assert [place for place, row in enumerate(rows) if "error" in row] == [1, 2, 3, 5, 6]
        np.testing.assert_array_equal(
            np.array([rows[place]["embedding"] for place in good], np.float32), expected
        )
    told = capsys.readouterr().err
    for text in (
        "line 2: the line is not UTF-8 (invalid start byte at byte 0)",
        "line 3: this text is refused",
        "line 4: texts[0] takes",
        "line 6: the model failed",
        "line 7: it died twice",
        "5 of 27 lines have no vector",
    ):
        assert text in told


@pytest.mark.parametrize(
    "error", [ServerError("the model failed"), WorkerDied("it died twice")], ids=["broken", "died"]
)
def test_a_server_that_fails_altogether(toy, tmp_path, monkeypatch, error):
    """That is no line's fault: the run stops, and goes on when the server works again."""
    monkeypatch.setattr(vector_file, "_COMMIT_S", 0.0)
    lines = words(100)
    lines[0] = "!bad"
    source = write_lines(tmp_path / "in.txt", lines)
    toy.hurdle = lambda: error if len(toy.requests) >= 8 else None
    with pytest.raises(type(error), match=str(error)):
        encode(toy, source, tmp_path / "out.jsonl", "--batch_size", "10")
    assert lines_kept(tmp_path / "out.jsonl") < 100
    toy.hurdle = lambda: None
    assert encode(toy, source, tmp_path / "out.jsonl") == 1
    rows = [json.loads(line) for line in read_lines(tmp_path / "out.jsonl")]
    assert [place for place, row in enumerate(rows) if "error" in row] == [0]


def test_lines_that_are_all_bad(toy, tmp_path):
    """That is their own fault, and the run goes on."""
    source = write_lines(tmp_path / "in.txt", ["!bad"] * 5 + ["a"])
    assert encode(toy, source, tmp_path / "out.npy", "--batch_size", "5") == 1
    assert np.isnan(np.load(tmp_path / "out.npy")).all(axis=1).tolist() == [True] * 5 + [False]


def test_many_bad_lines_are_counted(toy, tmp_path, capsys):
    (tmp_path / "in.txt").write_bytes(b"\xff\n" * 100)
    assert encode(toy, tmp_path / "in.txt", tmp_path / "out.npy") == 1
    told = capsys.readouterr().err
    assert told.count("not UTF-8") == 20 and "100 of 100 lines have no vector" in told


def test_a_line_without_end(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(line_module, "_READ_BYTES", 300)
    (tmp_path / "in.txt").write_bytes(b"a\n" + b"x" * 5000 + b"\nb\n" + b"y" * 1000 + b"\n" + b"z" * 1200)
    assert encode(toy, tmp_path / "in.txt", tmp_path / "out.jsonl") == 1
    rows = [json.loads(line) for line in read_lines(tmp_path / "out.jsonl")]
    assert [row.get("error") for row in rows] == [
        None,
        "the line has 5000 bytes; at most 1000 are taken",
        None,
        None,
        "the line has 1200 bytes; at most 1000 are taken",
    ]


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_positions_are_those_of_the_bytes(monkeypatch, size):
    """Whatever the pieces are that the input comes in."""
    monkeypatch.setattr(line_module, "_READ_BYTES", size)
    monkeypatch.setattr(limits, "MAX_LINE_BYTES", 10)
    data = b"one\r\ntwo\n\n" + b"x" * 25 + b"\n\xe4\xb8\xad\nlast"
    reader = line_module.LineReader(io.BufferedReader(io.BytesIO(data)), 2)
    lines = []
    for block in reader.blocks():
        assert 1 <= len(block.lines) <= 2
        lines += block.lines
        again = line_module.LineReader(io.BytesIO(data), 2)
        again.skip(block.position)
        rest = [str(line) for piece in again.blocks() for line in piece.lines]
        whole = ["one", "two", "", "the line has 25 bytes; at most 10 are taken", "中", "last"]
        assert [*map(str, lines), *rest] == whole
    assert block.position.num_bytes == len(data) and block.position.lines == 6


@pytest.mark.parametrize("kind", ["npy", "jsonl"])
def test_standard_streams(toy, root, kind):
    lines = words(200)
    done = subprocess.run(
        [sys.executable, "-m", "ernie.service.client", "--port", str(toy.port), "--format", kind],
        input="".join(f"{line}\n" for line in lines).encode(),
        capture_output=True,
        timeout=60,
        cwd=root,
        check=True,
    )
    if kind == "npy":
        vectors = np.load(io.BytesIO(done.stdout))
    else:
        vectors = np.array([json.loads(line)["embedding"] for line in done.stdout.splitlines()], np.float32)
    np.testing.assert_array_equal(vectors, toy.vectors(lines))
    assert done.stderr == b""


def test_who_types_gets_each_answer_at_once(toy, root):
    command = [sys.executable, "-m", "ernie.service.client", "--port", str(toy.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        for text in ("a friendly place", "never"):
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            row = json.loads(process.stdout.readline())["embedding"]
            np.testing.assert_array_equal(np.array([row], np.float32), toy.vectors([text]))
        process.stdin.close()
    assert process.returncode == 0


def start(toy, source, target, root, **options):
    flags = ["-o", str(target), "--port", str(toy.port), "--batch_size", "10"]
    flags += [] if source is None else ["-i", str(source)]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *flags], stdin=subprocess.PIPE, cwd=root, **options
    )


def lines_kept(target):
    try:
        return json.loads(target.with_name(f"{target.name}.part.json").read_text())["progress"]["position"][
            "lines"
        ]
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_killed_and_resumed(toy, tmp_path, root, name):
    """The same bytes as in one go, from a model whose vectors do not depend on the batch."""
    lines = words(1200)
    lines[5] = "!bad"
    source = write_lines(tmp_path / "in.txt", lines)
    assert encode(toy, source, tmp_path / f"whole_{name}") == 1
    for kept in (30, 500):
        with start(toy, source, tmp_path / name, root) as process:
            while lines_kept(tmp_path / name) < kept:
                assert process.poll() is None, "it was too quick to be killed"
            process.kill()
        assert not (tmp_path / name).exists()
    sent, before = len(toy.requests), lines_kept(tmp_path / name)
    with (tmp_path / f"{name}.part").open("ab") as part:
        part.write(b"half a row")
    (tmp_path / f".{name}.part.json.half").write_text("{")
    assert encode(toy, source, tmp_path / name) == 1, "the bad line counts, whichever run met it"
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole_{name}").read_bytes()
    assert leftovers(tmp_path) == []
    assert sum(rows for _, rows, _ in toy.requests[sent:]) == 1200 - before


def test_standard_input_killed_and_resumed(toy, tmp_path, root):
    lines = words(800)
    data = "".join(f"{line}\n" for line in lines).encode()
    target = tmp_path / "out.npy"
    with start(toy, None, target, root) as process:
        process.stdin.write(data[: len(data) // 2])
        process.stdin.flush()
        while lines_kept(target) < 200:
            time.sleep(0.01)
        process.kill()
    with start(toy, None, target, root) as process:
        process.communicate(data, timeout=60)
    assert process.returncode == 0
    np.testing.assert_array_equal(np.load(target), toy.vectors(lines))


def test_interrupted_while_it_waits_for_input(toy, tmp_path, root):
    target = tmp_path / "out.npy"
    with start(toy, None, target, root, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"a\nb\n")
        process.stdin.flush()
        while lines_kept(target) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
        told = process.stderr.read()
        assert b"Fatal" not in told and b"stopped; the same command goes on behind line 2" in told


def test_how_far_it_is_without_a_terminal(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bulk, "_LOG_S", 0.0)
    source = write_lines(tmp_path / "in.txt", ["w1"] * 30)
    assert encode(toy, source, tmp_path / "out.npy", "--batch_size", "10") == 0
    told = capsys.readouterr().err
    for text in ("10 lines, 33% of the input", "30 lines, 100% of the input", f"30 lines in {tmp_path}"):
        assert text in told


@pytest.fixture
def unfinished(toy, tmp_path, monkeypatch):
    """A run that stopped at its 60th of 100 lines, since the server was gone."""
    monkeypatch.setattr(vector_file, "_COMMIT_S", 0.0)
    lines = words(100)
    lines[59] = "!late"
    source = write_lines(tmp_path / "in.txt", lines)
    with pytest.raises(PropellerError, match="too late"):
        encode(toy, source, tmp_path / "out.npy", "--batch_size", "10")
    assert lines_kept(tmp_path / "out.npy") == 50
    return tmp_path / "out.npy"


def test_what_stopped_a_run_is_said(toy, unfinished, capsys):
    with pytest.raises(PropellerError, match="too late"):
        encode(toy, unfinished.with_name("in.txt"), unfinished, "--batch_size", "10")
    told = capsys.readouterr().err
    assert "going on behind line 50" in told
    assert "stopped; the same command goes on behind line 50" in told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "query"), "prompt was None, is 'query'"),
        (("--format", "jsonl"), "format was 'npy', is 'jsonl'"),
        (("--vocab", "VOCAB", "--max_seqlen", "5"), "max_seqlen was None, is 5"),
    ],
)
def test_other_options_are_refused(toy, unfinished, tmp_path, flags, message):
    toy.tokenizer.save_pretrained(tmp_path)
    flags = [str(tmp_path) if flag == "VOCAB" else flag for flag in flags]
    with pytest.raises(ConfigError, match=message):
        encode(toy, tmp_path / "in.txt", unfinished, *flags)
    assert lines_kept(unfinished) == 50


def test_another_model_is_refused(toy, unfinished, tmp_path):
    toy.bundle = "d" * 64
    with pytest.raises(ConfigError, match="model was 'bbbb.*is 'dddd"):
        encode(toy, tmp_path / "in.txt", unfinished)


def test_another_input_is_refused(toy, unfinished, tmp_path):
    lines = words(100)
    write_lines(tmp_path / "in.txt", ["other", *lines[1:]])
    with pytest.raises(ConfigError, match="its first .* bytes, 50 lines, have changed"):
        encode(toy, tmp_path / "in.txt", unfinished)
    write_lines(tmp_path / "in.txt", lines[:20])
    with pytest.raises(ConfigError, match="have changed"):
        encode(toy, tmp_path / "in.txt", unfinished)
    write_lines(tmp_path / "in.txt", lines)  # only what was not reached has changed
    assert encode(toy, tmp_path / "in.txt", unfinished) == 0
    np.testing.assert_array_equal(np.load(unfinished), toy.vectors(lines))


def test_restart(toy, unfinished, tmp_path):
    lines = ["other", *words(10)]
    write_lines(tmp_path / "in.txt", lines)
    assert encode(toy, tmp_path / "in.txt", unfinished, "--restart") == 0
    np.testing.assert_array_equal(np.load(unfinished), toy.vectors(lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "cannot be read"), ('{"version": 1}', "cannot be read"), (None, "or shorter than")],
)
def test_a_damaged_journal(toy, unfinished, tmp_path, content, message):
    if content is None:
        part = unfinished.with_name("out.npy.part")
        part.write_bytes(part.read_bytes()[:200])
    else:
        unfinished.with_name("out.npy.part.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        encode(toy, tmp_path / "in.txt", unfinished)


def test_a_model_that_is_taken_over(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(vector_file, "_COMMIT_S", 0.0)
    lines = words(100)
    lines[50] = "!takeover"
    source = write_lines(tmp_path / "in.txt", lines)
    with pytest.raises(ServerError, match="has taken over another model: cccccccccccc, .* bbbbbbbbbbbb"):
        encode(toy, source, tmp_path / "out.npy", "--batch_size", "10")
    assert lines_kept(tmp_path / "out.npy") <= 50 and not (tmp_path / "out.npy").exists()


def test_two_at_once(toy, unfinished, tmp_path, root):
    with start(toy, None, unfinished.with_name("other.npy"), root) as process:
        process.stdin.write(b"a\n" * 10)
        process.stdin.flush()
        while not lines_kept(unfinished.with_name("other.npy")):
            time.sleep(0.01)
        with pytest.raises(PropellerError, match="being written by another process"):
            encode(toy, tmp_path / "in.txt", unfinished.with_name("other.npy"))
        process.communicate(timeout=60)
    assert np.load(unfinished.with_name("other.npy")).shape == (10, 8)


@pytest.mark.skipif(os.name == "nt", reason="has no locks")
def test_nobody_comes_between_the_last_row_and_the_name(toy, tmp_path, monkeypatch):
    source, target = write_lines(tmp_path / "in.txt", words(10)), tmp_path / "out.npy"
    rename, told = os.replace, []

    def replace(old, new):
        if str(new) == str(target):
            with pytest.raises(PropellerError, match="being written by another process") as caught:
                encode(toy, source, target)
            told.append(caught.value)
        rename(old, new)

    monkeypatch.setattr(os, "replace", replace)
    assert encode(toy, source, target) == 0
    assert told and np.load(target).shape == (10, 8)


def test_who_comes_too_late_leaves_a_whole_file_alone(toy, tmp_path, monkeypatch):
    source, target = write_lines(tmp_path / "in.txt", words(10)), tmp_path / "out.npy"
    lock = atomic.lock_file

    def finished_by_another(file, wait):
        os.replace(tmp_path / "out.npy.part", target)
        lock(file, wait=wait)

    (tmp_path / "out.npy.part").write_bytes(b"whole")
    monkeypatch.setattr(atomic, "lock_file", finished_by_another)
    with pytest.raises(PropellerError, match="being written by another process"):
        encode(toy, source, target)
    assert target.read_bytes() == b"whole"


def test_the_input_is_not_written_over(toy, tmp_path):
    source = write_lines(tmp_path / "in.txt", ["w1"])
    (tmp_path / "link.npy").symlink_to(source)
    for target in (source, tmp_path / "link.npy"):
        with pytest.raises(ConfigError, match="is the input; write the vectors to another file"):
            encode(toy, source, target)
    assert source.read_text() == "w1\n"


@pytest.mark.parametrize("kind", ["npy", "jsonl"])
def test_a_named_pipe_is_written_and_not_replaced(toy, tmp_path, kind):
    lines = words(30)
    source, target = write_lines(tmp_path / "in.txt", lines), tmp_path / f"out.{kind}"
    os.mkfifo(target)
    with ThreadPoolExecutor() as threads:
        read = threads.submit(target.read_bytes)
        assert encode(toy, source, target) == 0
        assert stat.S_ISFIFO(target.stat().st_mode)
        content = read.result(60)
    if kind == "npy":
        np.testing.assert_array_equal(np.load(io.BytesIO(content)), toy.vectors(lines))
    else:
        assert len(content.splitlines()) == 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", target.name]
    with pytest.raises(ConfigError, match="--restart is for an output file"):
        encode(toy, source, target, "--restart")
    with pytest.raises(ConfigError, match=r"The output .* cannot be written \(Is a directory\)"):
        encode(toy, source, tmp_path)


def test_what_a_link_leads_to_gets_the_rows(toy, tmp_path):
    lines = words(3)
    source, link = write_lines(tmp_path / "in.txt", lines), tmp_path / "link.npy"
    (tmp_path / "there").mkdir()
    link.symlink_to("there/out.npy")
    for _ in range(2):  # it is not there, and it is
        assert encode(toy, source, link) == 0
        assert link.is_symlink()
        np.testing.assert_array_equal(np.load(tmp_path / "there" / "out.npy"), toy.vectors(lines))
    assert os.listdir(tmp_path / "there") == ["out.npy"]


def test_nobody_there(tmp_path, toy):
    source = write_lines(tmp_path / "in.txt", ["a"])
    with pytest.raises(Unavailable):
        bulk.main(["-i", str(source), "-o", str(tmp_path / "out.npy"), "--port", "1", "--timeout", "0.1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-i", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--batch_size", "0"), "--batch_size is 0"),
        (("--max_seqlen", "5"), "needs a vocabulary"),
        (("-i", "in.txt", "--restart"), "--restart is for an output file"),
    ],
)
def test_flags(toy, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "in.txt", ["a"])
    with pytest.raises(ConfigError, match=message):
        bulk.main([*flags, "--port", str(toy.port)])
