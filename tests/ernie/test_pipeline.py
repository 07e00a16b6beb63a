"""One line for an answer: one input, lists, streams, bad inputs; the same as prediction of lines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ernie import Pipeline
from ernie.config import ErnieConfig
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_model import ClassificationModel
from ernie.tasks.predicting import write_predictions
from ernie.tokenizing import load_tokenizer
from propeller import processor as processors
from propeller.bundle import read_bundle
from propeller.data import pad_batch
from propeller.errors import BadRequest, ConfigError, DataError, ExportError
from propeller.paddle import ArraySpec, Model, Predictor, stream
from propeller.paddle.runtime import paddle
from propeller.paddle.train.exporter import export_bundle
from propeller.processor import Processor, register_processor
from propeller.service.layout import Layout
from propeller.service.wire import Request
from propeller.types import HParams, RunConfig, RunMode

TEXTS = ["the cat sat", "a dog ran on the mat", "", "un\x00happy", "猫 " * 40, "\ud800", "\u1680"]


@pytest.fixture(scope="module")
def folder(bert_folder, tmp_path_factory):
    """A bundle: a classifier of two labels, of one layer."""
    tokenizer = load_tokenizer(bert_folder)
    processor = ClassificationProcessor(tokenizer, ["no", "yes"], max_seqlen=16, pair=True)
    config = ErnieConfig(
        vocab_size=len(tokenizer.vocab), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    paddle.seed(5)
    model = ClassificationModel(HParams(), RunMode.PREDICT, RunConfig(), config=config, processor=processor)
    examples = processor.prepare([{"text_a": "the cat sat", "text_b": text} for text in ("a mat", "dog")])
    columns = pad_batch(examples, pad_values=processor.pad_values)
    folder = tmp_path_factory.mktemp("bundle")
    export_bundle(folder, model, columns, processor=processor, metrics={})
    return folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline(folder, num_threads=1)


def pairs(count):
    words = ["the", "cat", "sat", "on", "mat", "a", "dog", "ran"]
    return [(" ".join(words[i % 8 :][: 1 + i % 5]), words[i % 7]) for i in range(count)]


class TestAnswers:
    def test_one_input(self, pipeline):
        answer = pipeline(("the cat sat", "dog"))
        assert answer["label"] in ("no", "yes") and answer["probability"] > 0.5
        assert pipeline({"text_a": "the cat sat", "text_b": "dog"}) == answer

    def test_lists_and_what_can_be_iterated(self, pipeline):
        inputs = [(text, "dog") for text in TEXTS]
        answers = pipeline(inputs)
        assert len(answers) == len(TEXTS) and len({answer["probability"] for answer in answers}) > 3
        for given in (iter(inputs), [list(pair) for pair in inputs]):
            assert pipeline(given) == answers
        assert pipeline([]) == []

    def test_lines_of_standard_input_are_answered_alike(self, pipeline, folder):
        inputs, target = pairs(150), io.StringIO()
        lines = io.BytesIO("".join(f"{a}\t{b}\n" for a, b in inputs).encode())
        predictor = Predictor(folder, num_threads=1)
        processor = predictor.bundle.processor()
        stream.predict_lines(predictor, lines, target, processor=processor, write=stream.format_jsonl)
        answers = pipeline(inputs)
        for answer, line in zip(answers, target.getvalue().splitlines(), strict=True):
            np.testing.assert_allclose(answer["probability"], json.loads(line)["probability"], atol=1e-6)
            assert answer["label"] == json.loads(line)["label"]

    def test_several_threads(self, pipeline):
        inputs = pairs(40)
        wanted = [answer["probability"] for answer in pipeline(inputs)]
        with ThreadPoolExecutor(4) as pool:
            for answers in pool.map(pipeline, [inputs] * 12):
                np.testing.assert_allclose([a["probability"] for a in answers], wanted, atol=1e-6)

    def test_a_bundle_that_was_read(self, folder, pipeline):
        read = read_bundle(folder)
        other = Pipeline(read, device="cpu", bf16=False)
        assert other.bundle is read and other.processor.labels == ["no", "yes"]
        assert other(("cat", "dog"))["label"] == pipeline(("cat", "dog"))["label"]


class TestStreams:
    def test_the_first_answers_come_soon_and_chunks_grow(self, pipeline, monkeypatch):
        read, inputs = [], pairs(32 + 64 + 128 + 5)

        def source():
            for number, pair in enumerate(inputs):
                read.append(number)
                yield pair

        answers = pipeline.stream(source())
        assert not read
        found = [next(answers)]
        assert len(read) == 32
        found += [next(answers) for _ in range(32)]
        assert len(read) == 32 + 64
        found += answers
        wanted = [answer["probability"] for answer in pipeline(inputs)]
        np.testing.assert_allclose([answer["probability"] for answer in found], wanted, atol=1e-6)

    def test_chunks_have_an_end(self, pipeline, monkeypatch):
        sizes = []

        def count(raws):
            sizes.append(len(raws))
            return [{}] * len(raws)

        monkeypatch.setattr(pipeline, "_answer_all", count)
        answers = pipeline.stream(("a", "b") for _ in range(10_000))
        assert sum(1 for _ in answers) == 10_000
        assert sizes == [32, 64, 128, 256, 512, 1024, 2048, 2048, 2048, 1840]

    @pytest.mark.parametrize("one", ["a text", {"text_a": "x"}])
    def test_a_stream_of_one_input(self, pipeline, one):
        with pytest.raises(DataError, match="Expected several inputs, got one .*write .input."):
            pipeline.stream(one)

    @pytest.mark.parametrize("none", [5, b"bytes", None])
    def test_what_is_no_input(self, pipeline, none):
        for call in (pipeline, pipeline.stream):
            with pytest.raises(DataError, match=f"Expected inputs, got {type(none).__name__}; an input is"):
                call(none)


BAD = [
    (5, "An input is int; expected a text, a tuple of two texts, or a dict"),
    ({"text_b": "x"}, "text_a"),
    (("a", "b", "c"), "An input is tuple"),
    (None, "An input is NoneType"),
]


class TestBadInputs:
    @pytest.mark.parametrize(("bad", "words"), BAD)
    def test_the_place_of_a_bad_input_is_named(self, pipeline, bad, words):
        with pytest.raises(DataError, match=rf"^inputs\[40\]: .*{words}"):
            pipeline([*pairs(40), bad, 7])
        answers = pipeline.stream([*pairs(40), bad])
        assert len([next(answers) for _ in range(40)]) == 40
        with pytest.raises(DataError, match=rf"^inputs\[40\]: .*{words}"):
            next(answers)

    def test_errors_in_their_place(self, pipeline):
        inputs = pairs(60)
        wanted = pipeline(inputs)
        for place, (bad, _) in zip((0, 17, 18, 59), BAD, strict=True):
            inputs[place] = bad
        for found in (pipeline(inputs, return_errors=True), [*pipeline.stream(inputs, return_errors=True)]):
            for place, answer in enumerate(found):
                if place in (0, 17, 18, 59):
                    assert isinstance(answer, DataError)
                else:
                    assert answer["probability"] == pytest.approx(wanted[place]["probability"], abs=1e-6)

    def test_one_text_for_a_model_of_pairs(self, pipeline, folder):
        """As the server and standard input have it; so has a pair for a model of single texts, below."""
        (line,) = stream.read_lines(io.BytesIO(b"the cat"), pipeline.processor)
        assert "expected text_a<TAB>text_b, found 1 cells" in str(line[0])
        layout = Layout("pairs", pipeline.bundle)
        problem = "the text 'text_b' is missing; the example has 'text_a'"
        for given in ("the cat", ("the cat",), {"text_a": "the cat"}):
            with pytest.raises(DataError, match=problem) as ours:
                pipeline(given)
            with pytest.raises(BadRequest, match=problem) as servers:
                layout.prepare(Request("r1", raws=[given]))
            assert str(ours.value) == str(servers.value)

    def test_a_pair_for_a_model_of_single_texts(self, pipeline, monkeypatch):
        monkeypatch.setattr(pipeline.processor, "pair", False)
        (line,) = stream.read_lines(io.BytesIO(b"the cat\tdog"), pipeline.processor)
        assert "expected one text without a tab, found 2 cells" in str(line[0])
        for given in (("the cat", "dog"), {"text_a": "the cat", "text_b": "dog"}):
            with pytest.raises(DataError, match="^The model takes one text, .*: text_b is 'dog'"):
                pipeline(given)
        with pytest.raises(DataError, match=r"^inputs\[1\]: The model takes one text"):
            pipeline(["the cat", ("the cat", "dog")])
        assert pipeline("the cat") == pipeline({"text_a": "the cat", "text_b": None})

    def test_what_no_task_foresaw(self, pipeline, monkeypatch):
        """The input is named, and what was raised is its cause."""
        monkeypatch.setattr(
            pipeline.processor, "raw_of", lambda value: {"text_a": value[0].strip(), "text_b": "dog"}
        )
        good, *bad = pipeline([("a",), (5,), ()], return_errors=True)
        assert good["label"] in ("no", "yes") and [type(answer) for answer in bad] == [DataError] * 2
        with pytest.raises(DataError, match=r"^inputs\[1\]: .*AttributeError: 'int' object") as caught:
            list(pipeline.stream([("a",), (5,)]))
        assert isinstance(caught.value.__cause__.__cause__, AttributeError)

    def test_one_bad_input(self, pipeline):
        with pytest.raises(DataError, match="^(?!inputs)"):
            pipeline({"text_b": "x"})
        assert isinstance(pipeline({"text_b": "x"}, return_errors=True), DataError)


class TestBundles:
    def test_no_bundle(self, tmp_path):
        with pytest.raises(ExportError, match="is no bundle"):
            Pipeline(tmp_path)

    def test_no_processor(self, tmp_path):
        _export(tmp_path, None)
        with pytest.raises(ExportError, match="without a processor"):
            Pipeline(tmp_path)

    def test_no_such_device(self, folder):
        with pytest.raises(ConfigError, match="device 'tpu:7' cannot be used"):
            Pipeline(folder, device="tpu:7")


class Sum(Model):
    """The sum of ids."""

    inputs = (ArraySpec("ids", "int64", ("batch", "seq_len")),)

    def __init__(self, *args):
        super().__init__(*args)
        self.weight = self.create_parameter([1], default_initializer=paddle.nn.initializer.Constant(1.0))

    def forward(self, features):
        return {"total": (features["ids"].astype("float32") * self.weight).sum(axis=1)}

    def loss(self, predictions, labels):
        raise NotImplementedError

    optimizer = loss


class Lengths(Processor):
    """How many letters a text has, by windows of five words."""

    name = "pipeline_lengths"
    fingerprint = "1"

    def prepare(self, raws):
        return [window for own in self.windows(raws) for window in own]

    def windows(self, raws):
        texts = [raw["text_a"].split(" ") for raw in raws]
        return [
            [
                {"ids": np.array([len(word) for word in words[at : at + 5]]), "at": at}
                for at in range(0, len(words), 5)
            ]
            for words in texts
        ]

    def finish(self, outputs):
        return [{"letters": round(total)} for total in outputs["total"].tolist()]

    def join(self, raw, examples, parts):
        if raw.get("fail"):
            raise LookupError("no answer")
        letters = sum(part["letters"] for part in parts)
        return {"text": raw["text_a"], "letters": letters, "at": [example["at"] for example in examples]}

    parse = format = finish

    def metrics(self):
        return {}

    def save(self, folder):
        return {}

    @classmethod
    def load(cls, folder, settings):
        return cls()


def _export(folder, processor):
    model = Sum(HParams(), RunMode.PREDICT, RunConfig())
    columns = {"ids": np.arange(1, 13, dtype=np.int64).reshape(3, 4)}
    export_bundle(folder, model, columns, processor=processor, metrics={})


def test_a_task_with_windows(tmp_path, monkeypatch):
    monkeypatch.setitem(processors._registered, Lengths.name, Lengths)
    _export(tmp_path, register_processor(Lengths)())
    pipeline = Pipeline(tmp_path, num_threads=1)
    texts = [" ".join(["x" * (1 + (i * j) % 7) for j in range(1, 2 + i % 23)]) for i in range(300)]
    answers = pipeline(texts)
    assert [answer["text"] for answer in answers] == texts
    assert [answer["letters"] for answer in answers] == [len(text.replace(" ", "")) for text in texts]
    assert [answer["at"] for answer in answers] == [[*range(0, 1 + t.count(" "), 5)] for t in texts]
    assert [*pipeline.stream(texts)] == answers
    with pytest.raises(DataError, match=r"inputs\[1\]: .* not be answered \(LookupError: no answer\)"):
        pipeline(["x", {"text_a": "x", "fail": True}])


def test_its_name_costs_no_paddle(root):
    code = "import sys\nfrom ernie import Pipeline\nassert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=root)


def test_predictions_of_half_a_character_are_written(folder, tmp_path):
    raws = [{"text_a": "the \ud83d cat", "text_b": "dog"}, {"text_a": "猫", "text_b": "dog"}]
    write_predictions(str(tmp_path / "out.jsonl"), folder, raws)
    text = (tmp_path / "out.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["text_a"] for line in lines] == ["the \ud83d cat", "猫"] and "猫" in text
    assert all(line["prediction"]["label"] in ("no", "yes") for line in lines)
