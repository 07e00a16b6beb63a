"""Tasks whose answers are joined of windows: pipeline, server and lines of standard input say the same."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from ernie import Pipeline
from ernie.config import ErnieConfig
from ernie.tasks.mrc import MrcProcessor
from ernie.tasks.mrc_model import MrcModel
from ernie.tasks.sequence_labeling import SequenceLabelingProcessor
from ernie.tasks.sequence_labeling_model import SequenceLabelingModel
from ernie.tokenizing import load_tokenizer
from propeller.data import pad_batch
from propeller.paddle import stream
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.train.exporter import export_bundle
from propeller.service import TextClient
from propeller.types import HParams, RunConfig, RunMode

PATIENCE_S = 60
WORDS = ("the", "hotel", "is", "good", "bad", "room", "a", "was", "who", "where", ",", "猫", "##s", "un")
TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def export(folder, processor, model_class, raws, **hparams):
    """Exports an untrained model of one layer."""
    config = ErnieConfig(
        vocab_size=len(processor.tokenizer.vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, initializer_range=0.5,
    )  # fmt: skip
    paddle.seed(5)
    given = HParams(hparams), RunMode.PREDICT, RunConfig()
    model = model_class(*given, config=config, processor=processor)
    examples = [window for own in processor.windows(raws) for window in own]
    inputs = [{spec.name: example[spec.name] for spec in model.inputs} for example in examples]
    columns = pad_batch(inputs, pad_values={spec.name: spec.pad_value for spec in model.inputs})
    folder.mkdir()
    export_bundle(folder, model, columns, processor=processor, metrics={})
    return folder


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    special = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in (*special, *WORDS)), "utf-8")
    tokenizer = load_tokenizer(None, vocab_file=folder / "vocab.txt")
    mrc = MrcProcessor(tokenizer, max_seqlen=24, doc_stride=8, max_query_length=6)
    ner = SequenceLabelingProcessor(tokenizer, TAGS, max_seqlen=12, scheme="BIO")
    few = [{"question": "who is", "context": "the hotel is good"}] * 2
    units = [{"units": ["the", "hotel"]}, {"units": ["bad"]}]
    return {
        "mrc": export(folder / "mrc", mrc, MrcModel, few),
        "ner": export(folder / "ner", ner, SequenceLabelingModel, units),
        "crf": export(folder / "crf", ner, SequenceLabelingModel, units, use_crf=True),
    }


@pytest.fixture(scope="module")
def server(start_server, bundles):
    words = [word for name, folder in bundles.items() for word in ("-m", f"{name}={folder}")]
    more = ("-p", 0, "--workers", 1, "--threads", 1, "--warmup-s", 0, "--max-batch-size", 8)
    return start_server(*words, *more).wait_ready()


def text(rng, longest):
    """Some words, now and then with what a tokenizer drops, splits or does not know."""
    odd = ["\u3000", "unhotels", "\x00", "Ünd", "\U0001f600", "é", "hotel猫"]
    return " ".join(rng.choice([*WORDS, *odd]) for _ in range(rng.integers(1, longest)))


def inputs_of(name, count):
    rng = np.random.default_rng(7)
    if name == "mrc":
        return [{"question": text(rng, 9), "context": text(rng, 80)} for _ in range(count)]
    return [{"units": text(rng, 60).split(" ")} for _ in range(count)]


def same(found, wanted):
    """Compares answers; numbers may differ by what batches of another shape make of them."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            same(found[key], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5)
    else:
        assert found == wanted


@pytest.mark.parametrize("name", ["mrc", "ner", "crf"])
def test_all_say_the_same(name, bundles, server):
    inputs = inputs_of(name, 120)
    answers = Pipeline(bundles[name], num_threads=1)(inputs)
    with TextClient(server.address, PATIENCE_S, name) as client:
        same(client(inputs), answers)
    predictor = Predictor(bundles[name], num_threads=1)
    processor = predictor.bundle.processor()
    alone = []
    for start in range(0, 20, 2):
        alone += stream.answer_all(predictor, processor, inputs[start : start + 2])
    same(alone, answers[:20])
    lines, target = io.BytesIO(), io.StringIO()
    for raw in inputs:
        line = json.dumps(raw) if name == "mrc" else "\x02".join(raw["units"])
        lines.write(f"{line}\n".encode())
    lines.seek(0)
    stream.predict_lines(predictor, lines, target, processor=processor, write=stream.format_jsonl)
    for line, answer, raw in zip(target.getvalue().splitlines(), answers, inputs, strict=True):
        if name == "mrc":
            same(json.loads(line), answer)
        else:  # \x02 is no part of the text, so the offsets are others
            assert json.loads(line)["tags"] == answer["tags"] and len(answer["tags"]) == len(raw["units"])


def test_several_windows_were_joined(bundles):
    for name, folder in bundles.items():
        counts = list(map(len, Pipeline(folder, num_threads=1).processor.windows(inputs_of(name, 120))))
        assert max(counts) > 3 and min(counts) == 1


def test_texts_alone(bundles, server):
    with TextClient(server.address, PATIENCE_S, "mrc") as client:
        wanted = client({"question": "who is", "context": "the hotel is good"})
        assert client(("who is", "the hotel is good")) == wanted
    with TextClient(server.address, PATIENCE_S, "ner") as client:
        assert client("the hotel is good") == client({"text_a": "the hotel is good"})
        assert len(client("the hotel is good")["tags"]) == 4
