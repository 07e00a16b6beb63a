"""Fixtures that the tests of tasks and service share."""

from __future__ import annotations

import json
import shutil

import pytest

from ernie.vocabulary import SpecialTokens

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "a",
    "dog",
    "ran",
    "un",
    "##happy",
    "query",
    "passage",
    ":",
    ",",
    "猫",
)


@pytest.fixture(scope="session")
def bert_folder(root, tmp_path_factory):
    """A whole pretrained folder as Hugging Face has them: two layers, noise for weights, a few words."""
    folder = tmp_path_factory.mktemp("pretrained") / "bert"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(root / "tests" / "data" / "bert_tiny" / name, folder)
    (folder / "vocab.txt").write_text("\n".join([*SpecialTokens().names(), *WORDS]) + "\n", "utf-8")
    return folder


@pytest.fixture
def sentence_folder(bert_folder, tmp_path):
    """`make(modules=..., pooling=..., **files)`: that folder with sentence-transformers' files beside it."""

    def make(modules=("Transformer", "Pooling", "Normalize"), pooling=None, **files):
        folder = tmp_path / "sentence"
        shutil.copytree(bert_folder, folder, dirs_exist_ok=True)
        paths = ["" if kind == "Transformer" else f"{place}_{kind}" for place, kind in enumerate(modules)]
        listed = [
            {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for place, (kind, path) in enumerate(zip(modules, paths, strict=True))
        ]
        contents = {"modules": listed, "sentence_bert_config": {"max_seq_length": 12}, **files}
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content), "utf-8")
        if "Pooling" in modules:
            path = folder / paths[modules.index("Pooling")]
            path.mkdir(exist_ok=True)
            content = {"pooling_mode_mean_tokens": True} if pooling is None else pooling
            (path / "config.json").write_text(json.dumps(content), "utf-8")
        return folder

    return make
