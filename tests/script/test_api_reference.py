"""The API reference has a page for every module, with what its docstrings say."""

from __future__ import annotations

import html
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference") / "api"
    done = subprocess.run(
        [sys.executable, root / "script/api_reference.py", folder],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Warning" not in done.stderr  # names and annotations that do not resolve
    return folder


def test_a_page_for_every_module(reference: Path, root: Path) -> None:
    expected = {"index.html"}
    for package in ("propeller", "ernie"):
        for path in (root / package).rglob("*.py"):
            name = path.parent if path.name == "__init__.py" else path
            expected.add(name.relative_to(root).with_suffix(".html").as_posix())
    assert {path.relative_to(reference).as_posix() for path in reference.rglob("*.html")} == expected


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("propeller.paddle.train.learner", "Learner"),
        ("propeller.paddle.train.model", "Model"),
        ("propeller.data.dataset", "Dataset"),
        ("ernie.modeling", "ErnieModel"),
        ("propeller.paddle", "Learner"),
        ("ernie", "ErnieModel"),
        ("ernie.tokenizing", "SentencePieceTokenizer"),
    ],
)
def test_names_with_their_docstrings(reference: Path, module: str, name: str) -> None:
    page = (reference / module.replace(".", "/")).with_suffix(".html").read_text("utf-8")
    doc = inspect.getdoc(getattr(importlib.import_module(module), name))
    assert doc
    assert f'id="{name}"' in page
    assert html.escape(doc.partition("\n")[0].partition("`")[0], quote=False) in page
