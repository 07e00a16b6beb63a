"""Package faces that load their names when they are used."""

from __future__ import annotations

import importlib
import sys
import types

import pytest

from propeller.lazy import attach


@pytest.fixture
def face(tmp_path, monkeypatch):
    """A package `face_of_test` whose part `face_of_test.part` says when it is loaded."""
    folder = tmp_path / "face_of_test"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from propeller.lazy import attach\n"
        "__getattr__, __dir__, __all__ = attach(\n"
        "    __name__, {'face_of_test.part': ['thing', 'missing']}, modules={'other': 'face_of_test.part'}\n"
        ")\n",
        "utf-8",
    )
    (folder / "part.py").write_text("thing = object()\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("face_of_test")
    for name in ("face_of_test", "face_of_test.part"):
        sys.modules.pop(name, None)


def test_a_name_is_loaded_when_it_is_used(face):
    assert "face_of_test.part" not in sys.modules
    assert dir(face) == sorted(face.__all__) == ["missing", "other", "thing"]
    assert "face_of_test.part" not in sys.modules
    thing = face.thing
    assert thing is sys.modules["face_of_test.part"].thing
    assert isinstance(face.other, types.ModuleType)
    assert vars(face)["thing"] is thing  # the second use costs no call


def test_unknown_names(face):
    with pytest.raises(AttributeError, match="module 'face_of_test' has no attribute 'absent'"):
        _ = face.absent
    with pytest.raises(AttributeError, match="missing"):
        _ = face.missing
    assert not hasattr(face, "__path_of_nothing__")


def test_every_name_that_the_packages_promise_is_there():
    for package in ("propeller", "propeller.paddle"):
        module = importlib.import_module(package)
        for name in module.__all__:
            assert getattr(module, name) is not None, f"{package}.{name}"


def test_attach_without_modules():
    getattribute, directory, public = attach("propeller", {"propeller.version": ["__version__"]})
    assert public == directory() == ["__version__"]
    assert getattribute("__version__") == importlib.import_module("propeller").__version__
