"""Everything public is documented, for people and for tools."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def undocumented(path: Path) -> list[str]:
    """Public modules, classes, functions and methods without a docstring; overrides may rely on the base."""
    tree = ast.parse(path.read_text("utf-8"))
    missing = [] if ast.get_docstring(tree) else [str(path)]
    for node in tree.body:
        if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                missing.append(f"{path}:{node.lineno} {node.name}")
            own = isinstance(node, ast.ClassDef) and not node.bases
            for inner in node.body if own else []:
                public = isinstance(inner, DEFINITIONS) and not inner.name.startswith("_")
                if public and not ast.get_docstring(inner):
                    missing.append(f"{path}:{inner.lineno} {node.name}.{inner.name}")
    return missing


def test_everything_public_has_a_docstring(root: Path) -> None:
    files = [path for package in ("propeller", "ernie") for path in (root / package).rglob("*.py")]
    assert files
    assert [name for path in files for name in undocumented(path)] == []


@pytest.mark.parametrize(
    "package", ["propeller", "propeller.data", "propeller.paddle", "propeller.service", "ernie"]
)
def test_static_and_lazy_names_agree(package: str) -> None:
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    static = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert static == set(module.__all__)
