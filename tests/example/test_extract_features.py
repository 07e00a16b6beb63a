"""The script of the older `ernie_encoder.py`: files of features from a data set or standard input."""

from __future__ import annotations

import contextlib
import io
import logging
import sys

import numpy as np
import pytest

from propeller import cli


@pytest.fixture
def extract(root, workplace, monkeypatch, tmp_path):
    """`extract(*flags, stdin=b"")` runs the script in this process; returns code, log and the files."""
    source = (root / "example" / "extract_features.py").read_text("utf-8")

    def run(*flags, stdin=b"", model=workplace / "model"):
        output = tmp_path / "out"
        (tmp_path / "stdin").write_bytes(stdin)
        script = {"__name__": "extract_features", "__doc__": ""}
        exec(compile(source, "extract_features.py", "exec"), script)
        err = io.StringIO()
        loggers = [logging.getLogger(name) for name in ("propeller", "ernie")]
        before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
        try:
            with (
                monkeypatch.context() as patch,
                contextlib.redirect_stderr(err),
                open(tmp_path / "stdin", encoding="utf-8") as lines,
                pytest.raises(SystemExit) as stop,
            ):
                given = ["--warm_start_from", model, "--output_dir", output, "--max_seqlen", 16, *flags]
                patch.setattr(sys, "argv", ["extract_features.py", *map(str, given)])
                patch.setattr(sys, "stdin", lines)
                cli.run(script["main"])
        finally:
            for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
                logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate
        return stop.value.code, err.getvalue(), {path.stem: np.load(path) for path in output.glob("*.npy")}

    return run


def test_a_data_set(extract, workplace):
    code, log, found = extract("--data_set", workplace / "data" / "chnsenticorp" / "dev.tsv", "--layers", "0")
    assert code == 0, log
    assert found.keys() == {"cls_emb", "top_layer_emb", "lengths", "layer_0_emb"}
    tokens = found["lengths"].sum()
    assert found["cls_emb"].shape == (24, 16)
    assert found["top_layer_emb"].shape == found["layer_0_emb"].shape == (tokens, 16)
    assert f"24 texts, {tokens} tokens" in log


def test_standard_input_is_the_same(extract, workplace, tmp_path):
    rows = (workplace / "data" / "chnsenticorp" / "dev.tsv").read_text("utf-8").splitlines()[1:]
    texts = [row.split("\t")[1] for row in rows]
    (tmp_path / "pairs.tsv").write_text("".join(f"{text}\t{text[::-1]}\n" for text in texts), "utf-8")
    _, _, one = extract("--data_set", workplace / "data" / "chnsenticorp" / "dev.tsv")
    _, _, same = extract("--batch_size", 5, stdin="\n".join(texts).encode())
    assert one.keys() == same.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, same[name], atol=1e-5)
    _, _, pairs = extract("--data_set", tmp_path / "pairs.tsv")
    _, _, same = extract(stdin=(tmp_path / "pairs.tsv").read_bytes())
    np.testing.assert_allclose(pairs["cls_emb"], same["cls_emb"], atol=1e-5)
    assert (pairs["lengths"] > one["lengths"]).all()


def test_texts_that_are_cut_are_counted(extract):
    code, log, found = extract("--max_seqlen", 4, stdin="这家酒店好\n好\n".encode())
    assert code == 0
    assert found["lengths"].tolist() == [4, 3]
    assert "1 texts were cut to 4 tokens" in log


def test_lines_that_cannot_be_read(extract):
    lines = "好\n".encode() + b"\xff\nb\tc\td\na\n"
    code, log, found = extract("--layers", "0", "--batch_size", 1, stdin=lines)
    assert code == 1
    assert "line 2: the line is not UTF-8 (invalid start byte at byte 0)" in log
    assert "line 3: expected a text, or text_a<TAB>text_b, found 3 cells" in log
    assert "2 of 4 lines could not be read" in log
    assert np.isnan(found["cls_emb"]).all(axis=1).tolist() == [False, True, True, False]
    assert found["lengths"].tolist() == [3, 0, 0, 3]
    assert len(found["top_layer_emb"]) == len(found["layer_0_emb"]) == 6
    code, _, found = extract(stdin=b"\xff\n")
    assert code == 1 and found["top_layer_emb"].shape == (0, 16)


@pytest.mark.parametrize(
    ("flags", "stdin", "code", "message"),
    [
        (["--layers", "7"], b"a\n", 2, "layer '7' is not there; the model has 0 (embeddings), 1 to 1"),
        (["--batch_size", "0"], b"a\n", 2, "--batch_size is 0; expected at least 1"),
        (["--max_seqlen", "100"], b"a\n", 2, "beyond the 32 positions"),
        (["--data_set", "missing.tsv"], b"", 1, "missing.tsv"),
        ([], b"", 1, "there is no text"),
        (["--pooling", "sum"], b"a\n", 2, "invalid choice"),
    ],
)
def test_what_is_refused(extract, flags, stdin, code, message):
    found, log, files = extract(*flags, stdin=stdin)
    assert message in log
    assert found == code
    assert files == {}


def test_a_folder_without_a_pooler(extract, workplace, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in (workplace / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if not name.startswith("pooler.")},
        folder / "model.safetensors",
    )
    code, log, _ = extract(stdin=b"hotel\n", model=folder)
    assert code == 2
    assert "--pooling mean, cls or max" in log
    code, log, found = extract("--pooling", "cls", stdin=b"hotel\n", model=folder)
    assert code == 0, log
    np.testing.assert_array_equal(found["cls_emb"][0], found["top_layer_emb"][0])
