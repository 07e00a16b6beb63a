"""Streams of inputs: order, errors in their place, padding that leaks nowhere, lines as they come."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest

from propeller import lines
from propeller import processor as processors
from propeller.bundle import ArraySpec
from propeller.errors import DataError, PropellerError
from propeller.metrics import Metric
from propeller.paddle import Predictor, stream
from propeller.paddle.runtime import paddle
from propeller.paddle.train.exporter import export_bundle
from propeller.processor import Processor
from propeller.types import HParams, RunConfig, RunMode


class Numbers(Processor):
    """`3 4 5` are ids. A 13 cannot be prepared, a word cannot be read."""

    name = "numbers"
    fingerprint = "numbers"

    def __init__(self):
        self.chunks: list[int] = []

    def prepare(self, raws):
        self.chunks.append(len(raws))
        for raw in raws:
            if 13 in raw["ids"]:
                raise DataError("13 is unlucky")
        return [{"input_ids": np.array(raw["ids"], np.int64), "other": 1} for raw in raws]

    def finish(self, outputs):
        return [{"logits": row.tolist()} for row in outputs["logits"]]

    def parse(self, line):
        cells = line.split(" ")
        if not all(cell.isdecimal() for cell in cells):
            raise DataError(f"expected numbers,\tfound\n{line}")
        return {"ids": [int(cell) for cell in cells]}

    def format(self, raw, answer):
        return " ".join(f"{value:.6g}" for value in answer["logits"])

    def metrics(self) -> dict[str, Metric]:
        return {}

    def save(self, folder) -> dict[str, Any]:
        return {}

    @classmethod
    def load(cls, folder, settings):
        return cls()


@dataclasses.dataclass
class _Bundle:
    inputs: tuple[ArraySpec, ...] = (ArraySpec("input_ids", "int64", ("batch", "seq_len"), pad_value=7),)


class Sums:
    """A predictor whose answer is the first id, their sum and how many there are; padding is 7."""

    bundle = _Bundle()

    def __init__(self):
        self.shapes: list[tuple[int, ...]] = []

    def predict(self, arrays):
        assert list(arrays) == ["input_ids"]
        ids = arrays["input_ids"]
        self.shapes.append(ids.shape)
        real = ids != 7
        return {"logits": np.stack([ids[:, 0], (ids * real).sum(1), real.sum(1)], axis=1).astype(np.float32)}


@pytest.fixture
def processor():
    return Numbers()


@pytest.fixture
def predictor():
    return Sums()


BAD = 77


class _BrokenTask(Numbers):
    """Fails on `BAD` at one step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def prepare(self, raws):
        self._fail("windows", any(BAD in raw["ids"] for raw in raws))
        return super().prepare(raws)

    def finish(self, outputs):
        is_bad = outputs["logits"][:, 0] == BAD
        self._fail("finish", is_bad.any())
        answers = super().finish(outputs)
        return answers if self.step != "fewer" or not is_bad.any() else answers[1:]

    def join(self, raw, examples, parts):
        self._fail("join", BAD in raw["ids"])
        return super().join(raw, examples, parts)

    def parse(self, line):
        self._fail("parse", line == str(BAD))
        return super().parse(line)

    def format(self, raw, answer):
        self._fail("format", BAD in raw["ids"])
        return super().format(raw, answer)

    def _fail(self, step, is_bad):
        if self.step == step and is_bad:
            raise LookupError(step)


class _BrokenModel(Sums):
    """Fails on `BAD` where the step is `predict`."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def predict(self, arrays):
        if self.step == "predict" and (arrays["input_ids"] == BAD).any():
            raise LookupError("predict")
        return super().predict(arrays)


class Blocks:
    """A source that gives what a generator yields, a block at a time."""

    def __init__(self, generator):
        self._generator = generator

    def read1(self, size):
        return next(self._generator, b"")


def make_raws(count, seed=0):
    rng = np.random.default_rng(seed)
    return [{"ids": [i + 100, *rng.integers(20, 50, rng.integers(0, 30)).tolist()]} for i in range(count)]


def expected(raws):
    return [{"logits": [raw["ids"][0], sum(raw["ids"]), len(raw["ids"])]} for raw in raws]


class TestAnswerAll:
    @pytest.mark.parametrize("count", [1, 2, 3, 5, 31, 32, 33, 100])
    def test_order_and_padding(self, predictor, processor, count):
        raws = make_raws(count)
        assert stream.answer_all(predictor, processor, raws) == expected(raws)
        lengths = sorted(len(raw["ids"]) for raw in raws)
        batches = [lengths[start : start + 32] for start in range(0, count, 32)]
        assert predictor.shapes == [(len(batch), max(batch)) for batch in batches]

    def test_like_lengths_come_together(self, predictor, processor):
        raws = make_raws(200)
        stream.answer_all(predictor, processor, raws)
        tokens = sum(len(raw["ids"]) for raw in raws)
        assert sum(rows * length for rows, length in predictor.shapes) < 1.2 * tokens

    def test_no_example(self, predictor, processor):
        assert stream.answer_all(predictor, processor, []) == []
        error = DataError("x")
        assert stream.answer_all(predictor, processor, [error]) == [error]
        assert predictor.shapes == []

    def test_one_that_cannot_be_prepared_harms_no_neighbour(self, predictor, processor):
        raws = make_raws(40)
        good = expected(raws)
        raws[17] = {"ids": [1, 13]}
        early = DataError("it could not even be read")
        raws[3] = early
        answers = stream.answer_all(predictor, processor, raws)
        assert answers[3] is early
        assert isinstance(answers[17], DataError) and str(answers[17]) == "13 is unlucky"
        for place in {*range(40)} - {3, 17}:
            assert answers[place] == good[place]

    @pytest.mark.parametrize("step", ["windows", "predict", "finish", "fewer", "join"])
    def test_whatever_is_raised_for_one_harms_no_neighbour(self, step, caplog, monkeypatch):
        """A bug is seen: the answer names it, the log has its traceback, once."""
        monkeypatch.setattr(processors, "_logged", set())
        raws = make_raws(70)
        wanted = expected(raws)
        for place in (3, 40):
            raws[place] = {"ids": [BAD]}
        answers = stream.answer_all(_BrokenModel(step), _BrokenTask(step), raws)
        for place, answer in enumerate(answers):
            if place not in (3, 40):
                assert answer == wanted[place]
            elif step == "fewer":
                assert "gave 0 answers for 1 rows; expected one for each" in str(answer)
            else:
                assert str(answer) == f"This input could not be answered (LookupError: {step})."
                assert isinstance(answer, DataError) and isinstance(answer.__cause__, LookupError)
        assert [record.exc_info[0] for record in caplog.records] == [LookupError] * (step != "fewer")

    @pytest.mark.parametrize("window", [{"other": 1}, {"input_ids": None}, {"input_ids": [[1], []]}, "abc"])
    def test_windows_that_are_not_what_the_model_takes(self, predictor, processor, window, monkeypatch):
        prepare = processor.prepare

        def odd(raws):
            return [window if BAD in raw["ids"] else prepare([raw])[0] for raw in raws]

        monkeypatch.setattr(processor, "prepare", odd)
        raws = [*make_raws(3), {"ids": [BAD]}, *make_raws(3)]
        answers = stream.answer_all(predictor, processor, raws)
        assert isinstance(answers.pop(3), PropellerError) and answers == expected(make_raws(3)) * 2

    def test_real_predictor_equals_the_live_model(self, processor, toy, tmp_path):
        paddle.seed(5)
        model = toy(HParams(), RunMode.PREDICT, RunConfig())
        model.mode = RunMode.PREDICT
        export_bundle(tmp_path, model, {"input_ids": np.ones((2, 4), np.int64)}, processor=None, metrics={})
        rng = np.random.default_rng(1)
        raws = [{"ids": rng.integers(20, 50, rng.integers(1, 30)).tolist()} for _ in range(45)]
        answers = stream.answer_all(Predictor(tmp_path), processor, raws)
        for raw, answer in zip(raws, answers, strict=True):
            alone = model({"input_ids": paddle.to_tensor([raw["ids"]])})["logits"].numpy()[0]
            np.testing.assert_allclose(answer["logits"], alone, atol=1e-4)


def test_answer_stream_goes_chunk_by_chunk(predictor, processor, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_ROWS", 50)
    raws = make_raws(120)
    asked = []

    def source():
        for raw in raws:
            asked.append(raw)
            yield raw

    answers = stream.answer_stream(predictor, processor, source())
    assert next(answers) == expected(raws)[0]
    assert len(asked) == 50
    assert [*answers] == expected(raws)[1:]
    assert processor.chunks == [50, 50, 20]


class TestReadLines:
    def chunks(self, processor, content):
        return list(stream.read_lines(io.BytesIO(content), processor))

    @pytest.mark.parametrize(
        ("content", "ids"),
        [
            (b"", []),
            (b"1", [[1]]),
            (b"1\n", [[1]]),
            (b"1\r\n2 3\r\n", [[1], [2, 3]]),
            (b"1\n\n2", [[1], None, [2]]),
            ("1\u2028\n2\x85\x0b\x0c\x1c\x1e\n3".encode(), [None, None, [3]]),
            (b"1\r2\n", [None]),
            (b"\xff\n1", [None, [1]]),
        ],
    )
    def test_what_ends_a_line(self, processor, content, ids):
        rows = [row for chunk in self.chunks(processor, content) for row in chunk]
        assert [None if isinstance(row, PropellerError) else row["ids"] for row in rows] == ids

    def test_a_line_that_is_not_utf8_is_named(self, processor):
        rows = [row for chunk in self.chunks(processor, b"1\n2\n3 \xe5\xa5\n") for row in chunk]
        assert str(rows[2]) == "line 3 is not UTF-8 (unexpected end of data at byte 2)"

    @pytest.mark.parametrize("size", [1, 3, 8, 100])
    def test_a_line_without_end_is_an_error_in_its_place(self, processor, monkeypatch, size):
        """Whatever the pieces are that the input comes in; of what is too long nothing is kept."""
        monkeypatch.setattr(lines, "MAX_LINE_BYTES", 10)
        monkeypatch.setattr(stream, "_BLOCK_BYTES", size)
        content = b"1\n" + b"2" * 10 + b"\n" + b"3" * 25 + b"\n\n4\n" + b"5" * 11
        rows = [row for chunk in self.chunks(processor, content) for row in chunk]
        said = [str(row) if isinstance(row, DataError) else row["ids"] for row in rows]
        assert said[:2] + said[4:5] == [[1], [2222222222], [4]]
        assert said[2] == "line 3 has 25 bytes; at most 10 are taken"
        assert said[3].startswith("expected numbers") and said[5].startswith("line 6 has 11 bytes")
        assert len(said) == 6

    def test_memory_is_bounded_whatever_comes(self, processor):
        def endless():
            for _ in range(4 * lines.MAX_LINE_BYTES // len(block)):
                yield block

        block = b"x" * (1 << 20)
        tracemalloc.start()
        try:
            (chunk,) = stream.read_lines(Blocks(endless()), processor)
            assert tracemalloc.get_traced_memory()[1] < 3 * lines.MAX_LINE_BYTES
        finally:
            tracemalloc.stop()
        assert "has 16777216 bytes" in str(chunk[0])

    def test_chunks_are_bounded(self, processor, monkeypatch):
        monkeypatch.setattr(stream, "CHUNK_ROWS", 64)
        chunks = self.chunks(processor, b"".join(b"%d\n" % i for i in range(1000)))
        assert [row["ids"][0] for chunk in chunks for row in chunk] == list(range(1000))
        assert max(map(len, chunks)) <= 64

    def test_reads_no_further_ahead_than_a_chunk(self, processor, monkeypatch):
        monkeypatch.setattr(stream, "CHUNK_ROWS", 16)
        taken = []

        def endless():
            while True:
                taken.append(1)
                yield b"1\n"

        lines = stream.read_lines(Blocks(endless()), processor)
        next(lines)
        next(lines)
        # Two chunks, a full queue, and one line in the reader's hand.
        assert len(taken) <= 2 * 16 + stream._READ_AHEAD_BLOCKS + 1
        lines.close()

    def test_a_line_is_given_out_while_the_next_is_awaited(self, processor):
        ours, theirs = os.pipe()
        with open(ours, "rb") as source, open(theirs, "wb", buffering=0) as target:
            chunks = stream.read_lines(source, processor)
            for number in range(3):
                target.write(b"%d\n" % number)
                assert next(chunks) == [{"ids": [number]}]
            target.write(b"7 8")
            target.close()
            assert next(chunks) == [{"ids": [7, 8]}]
            assert next(chunks, None) is None

    def test_a_broken_source_is_an_error_after_what_was_read(self, processor):
        def broken():
            yield b"1\n"
            raise OSError(5, "Input/output error")

        lines = stream.read_lines(Blocks(broken()), processor)
        rows = []
        with pytest.raises(DataError, match="cannot be read any further: .*Input/output error"):
            for chunk in lines:
                rows += chunk
        assert rows == [{"ids": [1]}]


class TestPredictLines:
    def predict(self, predictor, processor, content, write):
        target = io.StringIO()
        errors = stream.predict_lines(
            predictor, io.BytesIO(content), target, processor=processor, write=write
        )
        return target.getvalue(), errors

    def test_text(self, predictor, processor):
        content = b"1 2 3\nword\n\xff\n5 13\n4"
        out, errors = self.predict(predictor, processor, content, stream.format_text(processor))
        assert errors == 3
        assert out.split("\n") == [
            "1 6 3",
            "#error\texpected numbers, found word",  # on one line, in two cells
            "#error\tline 3 is not UTF-8 (invalid start byte at byte 0)",
            "#error\t13 is unlucky",
            "4 4 1",
            "",
        ]

    def test_json_lines(self, predictor, processor):
        out, errors = self.predict(predictor, processor, "1\n\u2028".encode(), stream.format_jsonl)
        assert errors == 1
        assert out == '{"logits": [1.0, 1.0, 1.0]}\n{"error": "expected numbers,\\tfound\\n\u2028"}\n'

    @pytest.mark.parametrize("step", ["parse", "windows", "format"])
    def test_whatever_is_raised_for_a_line_stands_in_its_place(self, predictor, step, caplog, monkeypatch):
        monkeypatch.setattr(processors, "_logged", set())
        processor = _BrokenTask(step)
        out, errors = self.predict(predictor, processor, b"1\n77\n2\n77\n", stream.format_text(processor))
        problem = f"#error\tThis input could not be answered (LookupError: {step})."
        assert (out.splitlines(), errors) == (["1 1 1", problem, "2 2 1", problem], 2)
        assert [record.exc_info[0] for record in caplog.records] == [LookupError]

    def test_an_answer_that_is_no_json(self, predictor, processor, monkeypatch):
        monkeypatch.setattr(processor, "finish", lambda outputs: [{"a": {1, 2}} for _ in outputs["logits"]])
        out, errors = self.predict(predictor, processor, b"1\n", stream.format_jsonl)
        assert errors == 1 and json.loads(out)["error"]

    def test_is_flushed_before_more_is_read(self, predictor, processor):
        """Somebody who waits for an answer before he asks again gets it."""
        ours, theirs = os.pipe()
        answered, answer = os.pipe()
        with (
            open(ours, "rb") as source,
            open(answer, "w", encoding="utf-8") as target,
            open(theirs, "wb", buffering=0) as questions,
            open(answered, encoding="utf-8") as answers,
        ):
            thread = threading.Thread(
                target=stream.predict_lines,
                args=(predictor, source, target),
                kwargs={"processor": processor, "write": stream.format_text(processor)},
            )
            thread.start()
            for number in range(3):
                questions.write(b"%d\n" % number)
                assert answers.readline() == f"{number} {number} 1\n"
            questions.close()
            thread.join(60)
            assert not thread.is_alive()


class _Picky(Sums):
    """Fails on every batch that holds a 31, as a model does on an id it does not have."""

    def predict(self, arrays):
        if (arrays["input_ids"] == 31).any():
            raise ValueError("id 31")
        return super().predict(arrays)


def test_a_batch_that_fails_is_answered_in_parts(processor):
    raws = [{"ids": [number]} for number in (1, 31, 2)]
    answers = stream.answer_all(_Picky(), processor, raws)
    assert isinstance(answers[1], DataError) and "id 31" in str(answers[1])
    assert not isinstance(answers[0], PropellerError) and not isinstance(answers[2], PropellerError)


class Cut(Numbers):
    """Windows of three ids, each with its place; `{"sums", "places", "name"}`. Joining 40 ids fails."""

    name = "cut"

    def prepare(self, raws):
        return [example for own in self.windows(raws) for example in own]

    def windows(self, raws):
        prepared = super().prepare(raws)
        return [
            [
                {"input_ids": example["input_ids"][at : at + 3], "place": at}
                for at in range(0, len(example["input_ids"]), 3)
            ]
            for example in prepared
        ]

    def join(self, raw, examples, parts):
        if len(raw["ids"]) == 40:
            return parts[100]
        return {
            "sums": [part["logits"][1] for part in parts],
            "places": [example["place"] for example in examples],
            "name": raw.get("name"),
        }

    def format(self, raw, answer):
        return f"{len(raw['ids'])} {sum(answer['sums']):.6g}"


class TestWindows:
    def expected(self, raws):
        return [
            {
                "sums": [sum(raw["ids"][at : at + 3]) for at in range(0, len(raw["ids"]), 3)],
                "places": [*range(0, len(raw["ids"]), 3)],
                "name": raw.get("name"),
            }
            for raw in raws
        ]

    @pytest.mark.parametrize("count", [1, 5, 100, 700])
    def test_each_answer_is_joined_of_its_own(self, predictor, count):
        raws = [{**raw, "name": str(place)} for place, raw in enumerate(make_raws(count))]
        assert stream.answer_all(predictor, Cut(), raws) == self.expected(raws)
        widths = [width for _, width in predictor.shapes]
        num_windows = sum(-(-len(raw["ids"]) // 3) for raw in raws)
        if num_windows <= stream.CHUNK_ROWS:  # all of them were sorted
            assert widths == sorted(widths) and len(widths) == -(-num_windows // stream.BATCH_ROWS)

    def test_few_windows_are_held_at_a_time(self, predictor, monkeypatch):
        monkeypatch.setattr(stream, "CHUNK_ROWS", 64)
        monkeypatch.setattr(stream, "_PREPARE_RAWS", 8)
        events, processor = [], Cut()
        windows, join = processor.windows, processor.join
        monkeypatch.setattr(processor, "windows", lambda raws: note(windows(raws)))
        monkeypatch.setattr(processor, "join", lambda *args: events.append(-len(args[2])) or join(*args))

        def note(found):
            events.append(sum(map(len, found)))
            return found

        raws = make_raws(300)
        assert stream.answer_all(predictor, processor, raws) == self.expected(raws)
        held = np.cumsum(events)
        assert held[-1] == 0 and held.max() < 64 + 8 * 10 and max(events) <= 8 * 10

    def test_a_join_that_fails_harms_no_neighbour(self, predictor):
        raws = make_raws(20)
        wanted = self.expected(raws)
        raws[7] = {"ids": [1] * 40}
        answers = stream.answer_all(predictor, Cut(), raws)
        assert isinstance(answers[7], DataError) and "(IndexError: list index" in str(answers[7])
        assert answers[:7] + answers[8:] == wanted[:7] + wanted[8:]

    def test_a_window_that_fails_fails_its_example_alone(self):
        raws = [{"ids": [1, 2, 3, 4]}, {"ids": [1, 1, 1, 31, 1, 1, 1]}, {"ids": [5]}]
        answers = stream.answer_all(_Picky(), Cut(), raws)
        assert isinstance(answers[1], DataError) and "id 31" in str(answers[1])
        assert [answers[0], answers[2]] == self.expected([raws[0], raws[2]])

    def test_lines_are_written_with_what_was_read(self, predictor):
        target, processor = io.StringIO(), Cut()
        lines = io.BytesIO(b"1 2 3 4 5\n13\n8\n")
        errors = stream.predict_lines(
            predictor, lines, target, processor=processor, write=stream.format_text(processor)
        )
        assert errors == 1
        assert target.getvalue() == "5 15\n#error\t13 is unlucky\n1 8\n"
