"""The search demo, as a process, against a server of toy embeddings."""

from __future__ import annotations

import importlib.util
import runpy
import subprocess
import sys

import numpy as np
import pytest

LINES = [
    "a friendly place",
    "never again",
    "good place",
    "",
    "bad w1 w2",
    "w3 w4 w5",
    "a\rb\N{LINE SEPARATOR}good",
]


@pytest.fixture
def toy(root):
    with runpy.run_path(str(root / "tests" / "ernie" / "service" / "toy_encoder.py"))[
        "ToyEncoder"
    ]() as server:
        yield server


@pytest.fixture
def demo(root, toy, tmp_path):
    """Runs a command of the demo in a folder that has `lines.txt`."""
    (tmp_path / "lines.txt").write_bytes("".join(f"{line}\r\n" for line in LINES).encode())

    def run(*arguments, given=None):
        command = [sys.executable, str(root / "example" / "semantic_search.py"), *arguments]
        flags = ["--index", str(tmp_path / "index"), "--port", str(toy.port)]
        given = None if given is None else given.encode()
        done = subprocess.run(
            [*command, *flags], input=given, capture_output=True, timeout=60, check=False, cwd=root
        )
        # Not as text, which would turn the "\r" within a line into its end.
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
        return done

    return run


@pytest.fixture
def indexed(demo, tmp_path):
    done = demo("index", "--input", str(tmp_path / "lines.txt"))
    assert done.returncode == 0 and "7 lines" in done.stderr
    return demo


def expected(toy, query, k):
    cosines = toy.vectors(LINES) @ toy.vectors([query], "query")[0]
    best = np.argsort(-cosines, kind="stable")[:k]
    return [
        [str(rank), f"{cosines[line]:.4f}", str(line + 1), LINES[line]] for rank, line in enumerate(best, 1)
    ]


def rows(text):
    return [line.split("\t") for line in text.split("\n")]


def test_a_query(toy, indexed):
    done = indexed("query", "good friendly place", "-k", "3")
    assert done.returncode == 0 and done.stderr == ""
    assert rows(done.stdout) == [*expected(toy, "good friendly place", 3), [""], [""]]


def test_queries_from_standard_input(toy, indexed):
    done = indexed("query", "-k", "100", given="never\nw4 w5\n")
    assert rows(done.stdout) == [*expected(toy, "never", 7), [""], *expected(toy, "w4 w5", 7), [""], [""]]


def test_an_index_is_replaced(toy, indexed, tmp_path):
    (tmp_path / "lines.txt").write_text("one line\n")
    indexed("index", "--input", str(tmp_path / "lines.txt"))
    assert indexed("query", "one line").stdout.count("\n") == 2


def test_a_folder_of_something_else_stays(demo, tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "thesis.txt").write_text("years of work")
    done = demo("index", "--input", str(tmp_path / "lines.txt"))
    assert done.returncode == 2 and "is there already and no index" in done.stderr
    assert (tmp_path / "index" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "index" / "thesis.txt").unlink()
    assert demo("index", "--input", str(tmp_path / "lines.txt")).returncode == 0


def test_a_model_that_is_taken_over(toy, demo, tmp_path):
    (tmp_path / "lines.txt").write_text("!takeover\n")
    done = demo("index", "--input", str(tmp_path / "lines.txt"))
    assert done.returncode == 1 and "another model meanwhile" in done.stderr
    assert not (tmp_path / "index").exists()


def test_lines_that_are_no_text(toy, demo, tmp_path):
    (tmp_path / "lines.txt").write_bytes(b"bad\n\xff\xfe bad\nnever again\n")
    done = demo("index", "--input", str(tmp_path / "lines.txt"))
    assert done.returncode == 1 and "3 lines in" in done.stderr and "1 of them not read" in done.stderr
    assert "line 2: the line is not UTF-8 (invalid start byte at byte 0)" in done.stderr
    assert rows(demo("query", "never again", "-k", "1").stdout)[0][2:] == ["3", "never again"]
    command = [sys.executable, "example/semantic_search.py", "query", "--index", str(tmp_path / "index")]
    found = subprocess.run(
        [*command, "--port", str(toy.port), "-k", "1"], input=b"\xff\nbad\n", capture_output=True, timeout=60
    )
    assert found.returncode == 0 and b"line 1: the line is not UTF-8" in found.stderr
    assert found.stdout.startswith(b"\n1\t")


def test_an_empty_file(indexed, tmp_path):
    (tmp_path / "lines.txt").write_text("")
    assert indexed("index", "--input", str(tmp_path / "lines.txt")).returncode == 0
    assert indexed("query", "one line").stdout == "\n"


def test_what_cannot_be_done(toy, indexed, tmp_path):
    done = indexed("index", "--input", "nowhere.txt")
    assert done.returncode == 1 and "nowhere.txt" in done.stderr
    done = indexed("query", "a", "-k", "0")
    assert done.returncode == 2 and "-k is 0" in done.stderr
    toy.bundle = "d" * 64
    done = indexed("query", "a")
    assert done.returncode == 2 and "was made by another model" in done.stderr
    (tmp_path / "index" / "index.json").unlink()
    done = indexed("query", "a")
    assert done.returncode == 2 and "is no index" in done.stderr


@pytest.mark.parametrize(("backend", "package"), [("faiss", "faiss-cpu"), ("hnswlib", "hnswlib")])
def test_other_backends(toy, indexed, backend, package):
    done = indexed("query", "good friendly place", "-k", "3", "--backend", backend)
    if importlib.util.find_spec(backend) is None:
        assert done.returncode == 2 and f"pip install {package}" in done.stderr
    else:
        assert rows(done.stdout)[:3] == expected(toy, "good friendly place", 3)
