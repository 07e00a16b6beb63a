"""Package faces that load what they hand on only when it is used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, names: Mapping[str, Sequence[str]], modules: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Makes `__getattr__`, `__dir__` and `__all__` for a package's `__init__`.

    Args:
        package: the package's name.
        names: module -> the names it provides.
        modules: attribute -> the module it stands for.
    """
    where = {name: module for module, provided in names.items() for name in provided}
    modules = modules or {}
    public = sorted([*where, *modules])

    def __getattr__(name: str) -> Any:
        if name in where:
            value = getattr(importlib.import_module(where[name]), name)
        elif name in modules:
            value = importlib.import_module(modules[name])
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__, lambda: public, public
