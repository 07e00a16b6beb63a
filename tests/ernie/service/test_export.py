"""Pretrained folder -> bundle of embeddings: what is in it, and the cache that keeps it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ernie.service.export import EncoderExport, encoder_bundle
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.pooling import EncoderOptions
from ernie.tokenizing import load_tokenizer
from propeller.atomic import lock_file
from propeller.bundle import ArraySpec, read_bundle, write_bundle, write_probe
from propeller.errors import CheckpointError, ConfigError, ExportError
from propeller.paddle.inference import Predictor

MEAN = EncoderOptions(pooling="mean", normalize=True, dimensions=6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bundle(bert_folder, cache):
    """What a server gets: made by a process of its own."""
    return encoder_bundle(bert_folder, MEAN, cache)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_bundle(bundle, bert_folder):
    read = read_bundle(bundle)
    assert [(spec.name, spec.axes) for spec in read.outputs] == [("embeddings", ("batch", 6))]
    assert [spec.max_value for spec in read.inputs] == [59, 1]
    assert read.axis_limits == {"seq_len": 20}
    processor = read.processor()
    assert processor.settings.pooling == "mean" and processor.settings.encode_layer == "layer2"
    assert read.metadata["processor"]["settings"]["tokenizer"] == load_tokenizer(bert_folder).fingerprint
    examples = processor.prepare([{"text_a": "the cat sat"}])
    arrays = {spec.name: examples[0][spec.name][None] for spec in read.inputs}
    answers = processor.finish(Predictor(read).predict(arrays))
    assert np.linalg.norm(answers[0]["embedding"]) == pytest.approx(1, abs=1e-5)


def test_taken_from_the_cache(bundle, bert_folder, cache):
    before = (bundle / "bundle.json").stat()
    assert encoder_bundle(bert_folder, MEAN, cache) == bundle
    after = (bundle / "bundle.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with (bundle / "bundle.json").open() as file, pytest.raises(BlockingIOError):
        lock_file(file, wait=False)
    assert bundle.parent == cache / "encoders"


def test_a_bundle_is_taken_as_it_is(bundle, cache):
    assert encoder_bundle(bundle) == bundle
    assert encoder_bundle(bundle, MEAN) == bundle
    with pytest.raises(ConfigError, match="max_seqlen 9 is asked for, but the bundle .* exported with 20"):
        encoder_bundle(bundle, dataclasses.replace(MEAN, max_seqlen=9))
    with pytest.raises(ConfigError, match="normalize False is asked for"):
        encoder_bundle(bundle, EncoderOptions(normalize=False))


def test_a_damaged_bundle_is_refused(bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    (copy / "vocab.txt").write_text("cut")
    with pytest.raises(ExportError, match=r"damaged: .*vocab\.txt"):
        encoder_bundle(copy)


def write_other_bundle(folder, processor):
    for name in ("model.json", "model.pdiparams"):
        (folder / name).write_bytes(b"")
    spec = ArraySpec("x", "float32", ("batch",))
    write_probe(folder, {"x": np.zeros(1, np.float32)}, {"x": np.zeros(1, np.float32)})
    write_bundle(folder, inputs=[spec], outputs=[spec], processor=processor, metrics={}, metadata={})


@pytest.mark.parametrize("named", ["classification", "nothing but arrays"])
def test_a_bundle_of_something_else(bert_folder, tmp_path, named):
    processor = None
    if named == "classification":
        tokenizer = load_tokenizer(bert_folder)
        processor = ClassificationProcessor(tokenizer, ["a", "b"], max_seqlen=8, pair=False)
    write_other_bundle(tmp_path, processor)
    with pytest.raises(ExportError, match=f"is a bundle of {named}, not of embeddings"):
        encoder_bundle(tmp_path)


def test_a_damaged_export_is_made_anew(bundle, bert_folder, cache):
    """As is what a process left that was killed while it wrote."""
    (bundle / "model.pdiparams").write_bytes(b"cut")
    left = bundle.with_name(f".{bundle.name}.killed")
    left.mkdir()
    (left / "model.json").write_text("half")
    export = EncoderExport(bert_folder, MEAN, cache)
    assert not export.is_whole()
    export.make()
    assert read_bundle(bundle).folder == bundle.resolve()
    assert not left.exists()


def test_the_newest_exports_are_kept(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ernie.service.export._KEPT", 3)
    names = [f"{number:032x}" for number in range(5)]
    for age, name in enumerate([*names, "notes"]):
        folder = tmp_path / "encoders" / name
        folder.mkdir(parents=True)
        (folder / "bundle.json").write_text("{}")
        os.utime(folder, (100 - age, 100 - age))
    code = "import sys; from ernie.service.export import _hold; from pathlib import Path; "
    code += "_hold(Path(sys.argv[1])); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "encoders" / names[3])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runs:
        runs.stdout.readline()
        os.utime(tmp_path / "encoders" / names[3], (0, 0))
        export = EncoderExport(bert_folder, MEAN, tmp_path)
        export.make()
        runs.communicate(b"\n")
    kept = {path.name for path in (tmp_path / "encoders").iterdir() if path.is_dir()}
    assert kept == {export.folder.name, names[0], names[1], names[3], "notes"}


def test_two_at_once(bert_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "ernie.service.export",
        "-m",
        str(bert_folder),
        "--cache_dir",
        str(tmp_path),
    ]
    runs = [
        subprocess.Popen([*command, "--max_seqlen=8"], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = {run.communicate(timeout=120)[0].splitlines()[-1] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    (folder,) = told
    assert read_bundle(folder).axis_limits == {"seq_len": 8}
    assert {path.name for path in (tmp_path / "encoders").iterdir()} == {
        read_bundle(folder).folder.name,
        f"{read_bundle(folder).folder.name}.lock",
    }


def place(folder, options=MEAN):
    return EncoderExport(folder, options, None).folder


def test_the_place_changes_with_what_changes_answers(bert_folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(bert_folder, copy)
    assert place(copy) == place(bert_folder)
    assert place(
        copy, EncoderOptions(pooling="mean", normalize=True, dimensions=6, encode_layer="layer-1")
    ) == place(copy)
    places = {place(copy), place(copy, dataclasses.replace(MEAN, max_seqlen=9))}
    weights = load_file(copy / "model.safetensors")
    weights["pooler.dense.bias"] = weights["pooler.dense.bias"] + 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    places.add(place(copy))
    (copy / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    places.add(place(copy))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    places.add(place(copy))
    monkeypatch.setattr("ernie.service.export.__version__", "0.0.0")
    places.add(place(copy))
    assert len(places) == 6


def test_the_users_cache_folder(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert place(bert_folder).parent == tmp_path / "propeller" / "encoders"


def test_errors_of_the_other_process_reach_the_user(bert_folder, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(bert_folder, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in weights.items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=rf"^{folder} has no weights of a pooler") as caught:
        encoder_bundle(folder, None, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    cut = {name: array for name, array in kept.items() if "layer.0" not in name}
    save_file(cut, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="^The weights do not fit the model"):
        encoder_bundle(folder, MEAN, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "encoders").iterdir() if path.is_dir()]


def test_what_shows_before_any_export(bert_folder, sentence_folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder. Nothing is downloaded"):
        encoder_bundle(tmp_path / "none")
    with pytest.raises(ConfigError, match="layer9.* is not there"):
        encoder_bundle(bert_folder, EncoderOptions(encode_layer="layer9"))
    folder = sentence_folder(sentence_bert_config={"do_lower_case": True})
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(ConfigError, match="do_lower_case .* but its tokenizer keeps capitals"):
        encoder_bundle(folder)
    (folder / "tokenizer_config.json").write_text('{"pad_token": "[UNK]", "unk_token": "[PAD]"}')
    with pytest.raises(ConfigError, match="pads with id 1, the model with pad_token_id 0"):
        encoder_bundle(folder)
    (folder / "tokenizer_config.json").unlink()
    with (folder / "vocab.txt").open("a") as file:
        file.writelines(f"w{number}\n" for number in range(50))
    with pytest.raises(ConfigError, match="has 70 entries, the model only 60"):
        encoder_bundle(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written .* --cache-dir DIR"):
        EncoderExport(bert_folder, MEAN, tmp_path / "file").make()


def test_no_paddle_on_this_side(bundle, bert_folder, cache):
    code = f"""
import sys
from ernie.service.export import EncoderOptions, encoder_bundle
options = EncoderOptions(pooling="mean", normalize=True, dimensions=6)
print(encoder_bundle({str(bert_folder)!r}, options, {str(cache)!r}))
assert "paddle" not in sys.modules
"""
    done = run_python(code)
    assert (done.returncode, done.stdout.strip()) == (0, str(bundle)), done.stderr
