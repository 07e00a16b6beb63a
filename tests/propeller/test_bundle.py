"""Bundles: written, read, checked, without Paddle."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from propeller import bundle, processor
from propeller.bundle import ArraySpec, read_bundle, write_bundle, write_probe
from propeller.errors import ConfigError, ExportError
from propeller.processor import Processor, register_processor

INPUTS = (
    ArraySpec("input_ids", "int64", ("batch", "seq_len"), 1, max_value=99),
    ArraySpec("weight", "float32", ("batch",)),
)
OUTPUTS = (ArraySpec("logits", "float32", ("batch", 2)),)
PROBE = (
    {"input_ids": np.array([[5, 6]]), "weight": np.array([0.5], np.float32)},
    {"logits": np.array([[0.1, 0.9]], np.float32)},
)


class Labels(Processor):
    """Keeps its labels in a file and its greeting among the settings."""

    name = "labels"

    def __init__(self, labels, greeting):
        self.labels, self.greeting = labels, greeting

    def save(self, folder):
        (folder / "labels.txt").write_text("\n".join(self.labels), "utf-8")
        return {"greeting": self.greeting}

    @classmethod
    def load(cls, folder, settings):
        return cls((folder / "labels.txt").read_text("utf-8").split("\n"), settings["greeting"])

    def prepare(self, raws):
        return [dict(raw) for raw in raws]

    def finish(self, outputs):
        return [{"label": self.labels[row.argmax()]} for row in outputs["logits"]]

    def parse(self, line):
        return {"text": line}

    def format(self, raw, answer):
        return answer["label"]

    def metrics(self):
        return {}

    @property
    def fingerprint(self):
        return "1"


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(processor, "_registered", {})


@pytest.fixture
def folder(tmp_path):
    """A folder with a model (its files are opaque here) and a probe, not yet a bundle."""
    path = tmp_path / "version_1"
    path.mkdir()
    (path / "model.json").write_bytes(b"{}")
    (path / "model.pdiparams").write_bytes(bytes(100))
    write_probe(path, *PROBE)
    return path


def complete(folder, **changes):
    values = {
        "inputs": INPUTS,
        "outputs": OUTPUTS,
        "processor": Labels(["negativ", "好"], "hallo"),
        "metrics": {"dev": {"acc": 0.5, "auc": math.nan}},
        "metadata": {"max_seqlen": 128},
    }
    return write_bundle(folder, **{**values, **changes})


def test_what_was_written_is_read(folder, tmp_path):
    register_processor(Labels)
    written = complete(folder)
    link = tmp_path / "inference"
    link.symlink_to("version_1")
    read = read_bundle(link)
    assert read == written
    assert (read.inputs, read.outputs) == (INPUTS, OUTPUTS)
    assert read.folder == folder.resolve(), "a swap of the link must not change it halfway"
    assert read.metrics == {"dev": {"acc": 0.5, "auc": "NaN"}}
    assert read.metadata["max_seqlen"] == 128
    again = read.processor()
    assert (again.labels, again.greeting) == (["negativ", "好"], "hallo")
    for side, expected in zip(read.probe(), PROBE, strict=True):
        assert side.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(side[name], array)
            assert side[name].dtype == array.dtype


def rewrite(folder, **changes):
    file = folder / bundle.DESCRIPTION
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def test_limits_of_axes(folder):
    assert complete(folder).axis_limits == {}
    assert complete(folder, axis_limits={"seq_len": 512}).axis_limits == {"seq_len": 512}
    assert read_bundle(folder).axis_limits == {"seq_len": 512}
    values = json.loads((folder / bundle.DESCRIPTION).read_text("utf-8"))
    assert values.pop("axis_limits") == {"seq_len": 512}
    (folder / bundle.DESCRIPTION).write_text(json.dumps(values), "utf-8")
    assert read_bundle(folder).axis_limits == {}, "as bundles that were made before there were any"


@pytest.mark.parametrize("limits", [{"seqlen": 512}, {"seq_len": 0}, {"seq_len": "512"}, {"seq_len": True}])
def test_limits_that_make_no_sense(folder, limits):
    with pytest.raises(ExportError, match=r"axis limit 'seq_?len': .* axis of its inputs \(batch, seq_len\)"):
        complete(folder, axis_limits=limits)


def test_the_largest_id(folder):
    values = dict(complete(folder).metadata)
    assert [spec["max_value"] for spec in values["inputs"]] == [99, None]
    for spec in (*values["inputs"], *values["outputs"]):
        del spec["max_value"]
    rewrite(folder, **values)
    read = read_bundle(folder).inputs
    assert [spec.max_value for spec in read] == [None, None], "as bundles that were made before there was one"


@pytest.mark.parametrize("max_value", [-1, True, 5.0, "5", [5]])
def test_a_largest_id_that_makes_no_sense(folder, max_value):
    message = "'input_ids' has the max_value .*; expected a whole number of at least 0"
    with pytest.raises(ConfigError, match=message):
        ArraySpec("input_ids", "int64", ("batch",), max_value=max_value)
    inputs = complete(folder).metadata["inputs"]
    rewrite(folder, inputs=[{**inputs[0], "max_value": max_value}, inputs[1]])
    with pytest.raises(ExportError, match=rf"bundle\.json is not whole: .*{message}"):
        read_bundle(folder)


def test_only_integers_have_a_largest_id():
    with pytest.raises(ConfigError, match=r"only for integers \(it is float32\)"):
        ArraySpec("weight", "float32", ("batch",), max_value=1)


@pytest.mark.parametrize("name", [".nfs0000000000a1", ".DS_Store", ".gitattributes", "README.md", "LICENSE"])
def test_a_file_that_nothing_loads_does_no_harm(folder, name):
    complete(folder)
    (folder / name).write_text("", "utf-8")
    read_bundle(folder)


def test_a_file_that_was_put_there_later_is_refused(folder):
    complete(folder)
    (folder / "best.json").write_text("{}", "utf-8")
    read_bundle(folder)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}', "utf-8")
    for verify in (True, False):
        with pytest.raises(ExportError, match="holds tokenizer_config.json, which bundle.json does not list"):
            read_bundle(folder, verify=verify)


@pytest.mark.parametrize("name", ["model.json", "model.pdiparams", "probe.npz"])
def test_what_answers_depend_on_must_be_listed(folder, name):
    files = dict(complete(folder).metadata["files"])
    del files[name]
    rewrite(folder, files=files)
    with pytest.raises(ExportError, match=f"bundle.json lacks {name}"):
        read_bundle(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "sub/file"])
def test_a_listed_name_must_be_plain(folder, name):
    (folder.parent / "outside").write_text("text")
    rewrite(folder, files={**complete(folder).metadata["files"], name: {"bytes": 4, "sha256": "0"}})
    with pytest.raises(ExportError, match=rf"lists '{name}', which is no plain file name"):
        read_bundle(folder)


def test_the_hash_tells_bundles_apart(folder):
    first = complete(folder).hash
    assert complete(folder).hash == first
    (folder / "model.pdiparams").write_bytes(bytes(99) + b"1")
    assert complete(folder).hash != first


def test_a_processor_that_is_not_there(folder):
    read = complete(folder)
    with pytest.raises(ExportError, match="No processor is registered as 'labels'"):
        read.processor()
    with pytest.raises(ExportError, match="exported without a processor: it takes arrays only"):
        complete(folder, processor=None).processor()


@pytest.mark.parametrize("named", [{"name": "labels", "settings": {}}, {"name": "labels"}, {}, [1]])
def test_a_processor_with_incomplete_settings(folder, named):
    register_processor(Labels)
    complete(folder)
    rewrite(folder, processor=named)
    with pytest.raises(ExportError, match="processor of .* cannot be built .* Export the model again"):
        read_bundle(folder).processor()


@pytest.mark.parametrize("name", ["model.json", "model.pdiparams", "probe.npz", "labels.txt"])
def test_a_damaged_file_is_named(folder, name):
    complete(folder)
    file = folder / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ExportError, match=rf"is damaged: .*{name} is damaged.* Export the model again"):
        read_bundle(folder)
    read_bundle(folder, verify=False)
    file.write_bytes(data[:-1])
    with pytest.raises(
        ExportError, match=rf"{name} has {len(data) - 1} bytes where {len(data)} were written"
    ):
        read_bundle(folder)
    file.unlink()
    with pytest.raises(ExportError, match=rf"{name} is missing"):
        read_bundle(folder)


def test_no_bundle(tmp_path, folder):
    for path in (tmp_path / "absent", folder):
        with pytest.raises(ExportError, match="is no bundle: it has no bundle.json"):
            read_bundle(path)


def test_a_description_that_cannot_be_used(folder):
    complete(folder)
    file = folder / bundle.DESCRIPTION
    text = file.read_text("utf-8")
    for damaged in (text[:-20], "[]", "{}", "\ud800".encode("utf-8", "surrogatepass")):
        file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        with pytest.raises(ExportError, match=r"bundle\.json cannot be read"):
            read_bundle(folder)
    values = json.loads(text)
    file.write_text(json.dumps({**values, "format_version": 2}))
    with pytest.raises(ExportError, match="has bundle format 2; this release reads 1"):
        read_bundle(folder)
    for key, wrong in (
        ("inputs", None),
        ("outputs", [{"name": "x"}]),
        ("files", ["model.json"]),
        ("metrics", None),
    ):
        left = {**values, key: wrong}
        if wrong is None:
            del left[key]
        file.write_text(json.dumps(left))
        with pytest.raises(ExportError, match=r"bundle\.json is not whole"):
            read_bundle(folder)
