"""The quickstart's data and its table of results."""

from __future__ import annotations

import collections
import filecmp
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from ernie.tokenizing import load_tokenizer

SIZES = {"train": 4000, "dev": 800, "test": 800}


def run(script, *args):
    return subprocess.run(
        [sys.executable, script, *map(str, args)], capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def scripts(root):
    return root / "script" / "quickstart"


@pytest.fixture(scope="module")
def reviews(scripts, tmp_path_factory):
    """What `make_reviews.py` writes."""
    folder = tmp_path_factory.mktemp("reviews") / "made" / "by_itself"
    done = run(scripts / "make_reviews.py", folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def rows(reviews):
    """Pairs of label and text by file."""
    lines = {name: (reviews / f"{name}.tsv").read_text("utf-8").split("\n") for name in SIZES}
    assert all(found[0] == "label\ttext_a" and found[-1] == "" for found in lines.values())
    return {name: [tuple(line.split("\t")) for line in found[1:-1]] for name, found in lines.items()}


@pytest.mark.parametrize(("flag", "code", "text"), [("--help", 0, "Everything"), ("-x", 2, "got -x")])
def test_flags_of_the_whole(root, tmp_path, flag, code, text):
    done = subprocess.run(
        ["bash", root / "script/quickstart.sh", flag],
        env={**os.environ, "QUICKSTART_DIR": str(tmp_path / "out")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code and text in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


class TestReviews:
    def test_same_seed_same_files(self, scripts, reviews, tmp_path):
        names = sorted(path.name for path in reviews.iterdir())
        assert names == ["dev.tsv", "test.tsv", "train.tsv", "vocab.txt"]
        assert run(scripts / "make_reviews.py", tmp_path / "again").returncode == 0
        assert run(scripts / "make_reviews.py", tmp_path / "other", "--seed", 8).returncode == 0
        assert filecmp.cmpfiles(reviews, tmp_path / "again", names, shallow=False) == (names, [], [])
        assert not filecmp.cmpfiles(reviews, tmp_path / "other", names[:3], shallow=False)[0]

    def test_sizes_and_labels(self, rows):
        assert {name: len(found) for name, found in rows.items()} == SIZES
        for name, found in rows.items():
            assert {len(row) for row in found} == {2}, name
            share = sum(label == "1" for label, _ in found) / len(found)
            assert {label for label, _ in found} == {"0", "1"} and 0.45 < share < 0.55, name

    def test_no_text_twice(self, rows):
        texts = [text for found in rows.values() for _, text in found]
        assert len(set(texts)) == len(texts) == sum(SIZES.values())
        assert all(text.strip() == text and text for text in texts)

    def test_both_languages(self, rows):
        for found in rows.values():
            english = sum(text.isascii() for _, text in found) / len(found)
            assert 0.4 < english < 0.6

    def test_vocabulary_covers_all(self, reviews, rows):
        tokenizer = load_tokenizer(None, vocab_file=reviews / "vocab.txt")
        assert tokenizer.pad_token_id == 0
        for name, found in rows.items():
            encodings = tokenizer.encode_batch([text for _, text in found])
            ids = np.concatenate([encoding.input_ids for encoding in encodings])
            assert (ids == tokenizer.unk_token_id).mean() < 0.01, name
            assert max(encoding.num_tokens for encoding in encodings) <= 64, name

    def test_a_word_alone_does_not_tell(self, rows):
        """Negation and `but` leave a vote of the words well behind what can be known."""
        counts = collections.defaultdict(lambda: [1, 1])
        for label, text in rows["train"]:
            for piece in set(text.lower().split() if text.isascii() else text):
                counts[piece][int(label)] += 1
        right = 0
        for label, text in rows["dev"]:
            pieces = set(text.lower().split() if text.isascii() else text)
            score = sum(np.log(counts[piece][1] / counts[piece][0]) for piece in pieces)
            right += (score > 0) == (label == "1")
        assert 0.6 < right / len(rows["dev"]) < 0.85


class TestResults:
    @pytest.fixture
    def output(self, tmp_path):
        """What the quickstart leaves: 4 dev and 5 test rows, answers of which 4 are right."""
        (tmp_path / "data").mkdir()
        (tmp_path / "data/dev.tsv").write_text("label\ttext_a\n1\ta\n1\tb\n1\tc\n0\td\n", "utf-8")
        (tmp_path / "data/test.tsv").write_text(
            "label\ttext_a\n1\ta\n0\tb\n0\tc\u2028\n0\td\n1\te\n", "utf-8"
        )
        answers = [json.dumps({"label": label}) for label in "10001"]
        answers[3] = json.dumps({"label": "1"})
        (tmp_path / "output.jsonl").write_text("\n".join(answers) + "\n", "utf-8")
        return tmp_path

    def describe(self, output, accuracy):
        folder = output / "model/best/inference"
        folder.mkdir(parents=True)
        metrics = {"dev": {"acc": accuracy}, "test": {"acc": 0.8}}
        (folder / "bundle.json").write_text(json.dumps({"metrics": metrics}), "utf-8")

    def test_table(self, scripts, output):
        self.describe(output, 1.0)
        done = run(scripts / "results.py", output)
        assert (done.returncode, done.stderr) == (0, "")
        head, *table, where = done.stdout.splitlines()
        assert head.split() == ["dev", "accuracy", "test", "accuracy"]
        assert [line.split()[-2:] for line in table] == [
            ["75.0%", "60.0%"],
            ["100.0%", "80.0%"],
            ["stdin", "80.0%"],
        ]
        assert where == f"exported to {output}/model/best/inference"
        assert len({len(line) for line in [head, *table]}) == 1

    def test_no_better_than_the_majority_fails(self, scripts, output):
        self.describe(output, 0.75)
        assert run(scripts / "results.py", output).returncode == 1

    def test_a_lost_line_fails(self, scripts, output):
        self.describe(output, 1.0)
        (output / "output.jsonl").write_text('{"label": "1"}\n', "utf-8")
        assert run(scripts / "results.py", output).returncode != 0


class TestFolder:
    # Stands in for the training and the prediction: what matters is which folders it is told.
    EXAMPLE = """
import json, sys
from pathlib import Path
import propeller
args, _ = (parser := propeller.ArgumentParser()).parse_known_args()
if "--do_predict" in sys.argv:
    assert Path(sys.argv[sys.argv.index("--bundle") + 1], "bundle.json").exists()
    for line in sys.stdin:
        print(json.dumps({"label": "1"}))
else:
    config = propeller.parse_runconfig(args)
    folder = Path(config.model_dir) / "best/inference"
    folder.mkdir(parents=True)
    metrics = {"dev": {"acc": config.max_steps / 1000}, "test": {"acc": 0.5}}
    (folder / "bundle.json").write_text(json.dumps({"metrics": metrics}))
"""

    @pytest.mark.parametrize("name", ["plain", 'an "odd" \\ folder, isn\'t it? $HOME', "評論"])
    def test_any_name_will_do(self, root, tmp_path, name):
        checkout = tmp_path / "checkout"
        shutil.copytree(root / "script/quickstart", checkout / "script/quickstart")
        shutil.copy(root / "script/quickstart.sh", checkout / "script")
        (checkout / "script/environment.sh").write_text("use_environment() { VENV=../environment; }\n")
        (checkout / "example").mkdir()
        (checkout / "example/finetune_classifier.py").write_text(self.EXAMPLE)
        python = tmp_path / "environment/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        done = subprocess.run(
            ["bash", "checkout/script/quickstart.sh"],
            cwd=tmp_path,
            env={**os.environ, "QUICKSTART_DIR": f"made/{name}", "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"exported to {tmp_path}/made/{name}/model/best/inference\n" in done.stdout
        assert "75.0%" in done.stdout  # max_steps, from the other --run_config
        assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [name]
        assert len((tmp_path / "made" / name / "output.jsonl").read_text().splitlines()) == SIZES["test"]
