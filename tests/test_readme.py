"""Runs every code block of the README, in order, on tiny data and a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WORDS = {"1": ["good", "friendly", "great"], "0": ["bad", "awful", "never"]}


def make_data(folder: Path) -> None:
    rng = random.Random(0)
    folder.mkdir()
    for name, rows in (("train", 80), ("dev", 20), ("test", 20)):
        lines = ["label\ttext_a"]
        for number in range(rows):
            label = rng.choice("01")
            lines.append(f"{label}\ta {rng.choice(WORDS[label])} place {number % 10}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def make_task_data(folder: Path) -> None:
    """Label sequences, questions about texts, and ranked candidates, of the same few words."""
    rng = random.Random(1)
    names, towns = ["anna", "peter"], ["oslo", "rome"]
    (folder / "ner").mkdir(parents=True)
    (folder / "mrc").mkdir()
    (folder / "ranking").mkdir()
    for name, rows in (("train", 40), ("dev", 10)):
        people = [(rng.choice(names), rng.choice(towns)) for _ in range(rows)]
        lines = [f"{who} went to {town}\tB-PER O O B-LOC" for who, town in people]
        (folder / "ner" / f"{name}.tsv").write_text("text_a\tlabel\n" + "\n".join(lines) + "\n", "utf-8")
        questions = [
            {
                "context": f"{who} went to {town}",
                "qas": [
                    {
                        "id": str(number),
                        "question": "where is it",
                        "answers": [{"text": town, "answer_start": len(f"{who} went to ")}],
                    }
                ],
            }
            for number, (who, town) in enumerate(people)
        ]
        squad = {"version": "1.1", "data": [{"title": "towns", "paragraphs": questions}]}
        (folder / "mrc" / f"{name}.json").write_text(json.dumps(squad), "utf-8")
        lines = ["qid\ttext_a\ttext_b\tlabel"]
        for number, (who, town) in enumerate(people):
            lines.append(f"{number}\twhere is {who}\t{who} went to {town}\t1")
            lines.append(f"{number}\twhere is {who}\ta friendly place\t0")
        (folder / "ranking" / f"{name}.tsv").write_text("\n".join(lines) + "\n", "utf-8")


def make_model(folder: Path) -> None:
    from ernie import ErnieConfig, ErnieModel, load_tokenizer

    words = [word for words in WORDS.values() for word in words]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "place", "again", *words, *"0123456789"]
    vocabulary += ["anna", "peter", "went", "to", "oslo", "rome", "where", "is", "it", "here"]
    config = ErnieConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    source = folder.parent / "source_vocab.txt"
    source.write_text("\n".join(vocabulary) + "\n", "utf-8")
    ErnieModel(config).save_pretrained(folder, tokenizer=load_tokenizer(None, vocab_file=source))


@contextlib.contextmanager
def servers_ended(folder: Path) -> Iterator[None]:
    """Kills the servers that a block started and no later block ended."""
    try:
        yield
    finally:
        for file in folder.glob("*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.timeout(1800)  # each block has a limit of its own
def test_blocks_run(tmp_path: Path, root: Path) -> None:
    make_data(tmp_path / "data")
    make_task_data(tmp_path / "tasks")
    make_model(tmp_path / "model")
    (tmp_path / "example").symlink_to(root / "example")
    environment = {
        **os.environ,
        "DATA": str(tmp_path / "data"),
        "MODEL": str(tmp_path / "model"),
        "NER": str(tmp_path / "tasks" / "ner"),
        "MRC": str(tmp_path / "tasks" / "mrc"),
        "RANKING": str(tmp_path / "tasks" / "ranking"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(root),
    }
    blocks = BLOCK.findall((root / "README.md").read_text("utf-8"))
    assert len(blocks) >= 6
    before = {path.name for path in tmp_path.iterdir()}
    with servers_ended(tmp_path / "output"):
        for language, code in blocks:
            command = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}[language]
            done = subprocess.run(
                [*command, code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
            )
            logs = "".join(log.read_text("utf-8") for log in (tmp_path / "output").glob("*.log"))
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}\n{logs}"
    rows = (tmp_path / "output/answers.tsv").read_text("utf-8").splitlines()
    assert [len(row.split("\t")) for row in rows] == [2, 2]
    assert {path.name for path in tmp_path.iterdir()} - before == {"output"}  # which git ignores


def test_every_other_command_names_a_file_that_is_there(root: Path) -> None:
    text = (root / "README.md").read_text("utf-8")
    for path in re.findall(r"(?:script|example)/[\w/.]+\.(?:sh|py|md)", text):
        assert (root / path).is_file(), path
