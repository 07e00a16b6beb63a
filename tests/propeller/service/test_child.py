"""Forked processes and the pipes to them."""

from __future__ import annotations

import sys

from propeller.errors import ExportError
from propeller.service.child import Child, describe, one_line


class TestChildren:
    def test_exit_codes(self):
        def exits(pipe):
            sys.exit(0)

        def raises(pipe):
            raise ValueError("on purpose")

        for main, code in ((lambda pipe: None, 0), (exits, 1), (raises, 1)):
            child = Child("test", main)
            assert child.hear() == b"" and child.bury() == code
        child = Child("test", lambda pipe: pipe.recv(1))
        child.kill()
        assert child.hear() == b""
        child.tell(b"too late")
        code = child.bury()
        assert describe(code) == "killed by signal 9 (SIGKILL)" and describe(3) == "exit status 3"

    def test_one_that_dies_with_words_unread(self):
        child = Child("test", lambda pipe: pipe.recv(1))
        child.tell(b"many words")
        assert child.hear() == b"" and child.bury() == 0


def test_one_line():
    assert one_line(ExportError("a\n  b")) == "a b"
    assert one_line(RuntimeError()) == "RuntimeError()"
    long = one_line(RuntimeError("x" * 500 + " the end"), 300)
    assert len(long) <= 300 and long.endswith("x the end (RuntimeError)")
