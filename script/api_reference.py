"""Writes the API reference: one page for each module of the two packages, with pdoc.

    python script/api_reference.py FOLDER

Needs what the modules import, Paddle included, since pdoc reads them loaded.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import pdoc

PACKAGES = ("propeller", "ernie")


def modules() -> list[str]:
    """Names of all modules, packages before what is in them."""
    found = []
    for package in PACKAGES:
        inner = pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        found += [package, *(info.name for info in inner)]
    return found


def load_names(name: str) -> None:
    """Puts lazy names, and named tuples' constructors, into their module: pdoc looks for names only there."""
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        setattr(module, public, getattr(module, public))
    for value in vars(module).values():
        if isinstance(value, type) and hasattr(value, "_fields"):
            value.__new__.__module__ = value.__module__


def write(folder: Path) -> None:
    """Writes all pages, an index and the search."""
    wanted, covered = [], set()
    for name in modules():
        load_names(name)
        if name not in covered:  # from a package pdoc goes on to its public submodules by itself
            wanted.append(name)
            covered.update(pdoc.extract.walk_specs([name]))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*wanted, output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
