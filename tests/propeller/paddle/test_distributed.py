"""Ranks that reach one another: what they exchange, and what one hears when another is gone."""

from __future__ import annotations

import numpy as np
import pytest

from propeller.errors import ConfigError
from propeller.paddle import distributed
from propeller.paddle.distributed import Ranks
from propeller.paddle.runtime import paddle

SIZES = [2, 3]


@pytest.mark.parametrize("size", SIZES)
def test_exchanges(start_ranks, size):
    """All ranks get the same, to the bit."""
    results = start_ranks(size, "exchange_values").results()
    for rank, found in enumerate(results):
        assert found["self"] == (rank, size, rank == 0, True)
        expected = np.zeros(3)
        for other in range(size):  # in this order
            expected += [0.1 * (other + 1), 1e16 if other == 0 else 1.0, -1e16 * (other == size - 1)]
        np.testing.assert_array_equal(found["sum"], expected)
        assert found["max"] == [size - 1, 0, 2**62 + size - 1]
        assert found["broadcast"] == {"of": 0, "text": "größe", "nothing": None}
        for other, arrays in enumerate(found["gather"]):
            assert (arrays["rows"].shape, arrays["rows"].dtype) == ((other, 3), np.int64)
            assert (arrays["none"].shape, arrays["none"].dtype) == ((0, 4), np.float32)
            np.testing.assert_array_equal(arrays["turned"], np.arange(6.0).reshape(2, 3).T + other)
            assert arrays["yes"].tolist() == [other == 1]
        values = [[[1.5] * 2] * 3, 2.5, [3] * 4, [[0, 3], [1, 4], [2, 5]]]
        for tensor, value in zip(found["tensors"], values, strict=True):
            np.testing.assert_array_equal(tensor, value)
        assert found["sum_tensor"].tolist() == [sum(range(size + 1))] * 2
        assert found["its argument"].tolist() == [rank + 1] * 2


SHAPES = [[4], [], [2, 3], [5], [1], [3, 3]]
NONE_MISSING = [[], [], []]
EVERY_ROW = None
CASES = {
    "one piece": (1 << 20, 1000, SHAPES, NONE_MISSING, EVERY_ROW),
    "a piece each": (1, 1000, SHAPES, NONE_MISSING, EVERY_ROW),
    "borders between": (24, 1000, SHAPES, NONE_MISSING, EVERY_ROW),
    "one that is larger": (40, 1000, [[4], [100], [4], [4]], NONE_MISSING, EVERY_ROW),
    "missing": (24, 1000, SHAPES, [[0, 2], [2, 3], [1, 5]], EVERY_ROW),
    "tables": (24, 8, [[9, 3], [4], [20, 5], [7, 2]], NONE_MISSING, [[0, 3], [3, 4], [6]]),
    "tables alone": (24, 8, [[9, 3], [20, 5]], NONE_MISSING, [[8], [], []]),
    "untouched tables": (24, 8, [[9, 3], [4]], NONE_MISSING, [[], [], []]),
    "missing tables": (24, 8, [[9, 3], [4], [20, 5]], [[0], [2], [0, 1]], [[1, 2], [2, 8], [0]]),
    "whole tables": (24, 8, [[9, 3], [8, 1]], NONE_MISSING, EVERY_ROW),
}


@pytest.mark.parametrize("size", SIZES)
def test_gradients(start_ranks, size):
    from rank_exchanges import gradients

    results = start_ranks(size, "sum_gradients", cases=list(CASES.values())).results()
    for number, (name, (_, _, shapes, missing, touched)) in enumerate(CASES.items()):
        of_ranks = [gradients(rank, shapes, missing, touched) for rank in range(size)]
        for rank in range(size):
            for place, shape in enumerate(shapes):
                expected = np.zeros(shape, np.float32)
                for of_rank in of_ranks:
                    expected += 0 if of_rank[place] is None else of_rank[place]
                found = results[rank][number][place]
                assert (found.shape, found.dtype) == (tuple(shape), np.float32), name
                np.testing.assert_array_equal(found, expected * 0.125, f"{name}, {place}, rank {rank}")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_fails_while_others_sum(start_ranks, victim):
    """What the others raise is why it failed, not that a connection was closed."""
    ranks = start_ranks(3, "fail_in_the_middle", victim=victim, how="raise")
    assert ranks.codes() == [1, 1, 1]
    assert ranks.log(victim).endswith("error: train.tsv:3: a label is 7\n")
    for rank in {0, 1, 2} - {victim}:
        assert ranks.log(rank).endswith(f"error: rank {victim} failed: train.tsv:3: a label is 7\n")


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_while_others_sum(start_ranks, victim):
    ranks = start_ranks(3, "fail_in_the_middle", victim=victim, how="kill")
    codes = ranks.codes()
    assert codes.pop(victim) == -9 and codes == [1, 1]
    for rank in {0, 1, 2} - {victim}:
        assert f"error: rank {victim} ended without a word, as if it was killed." in ranks.log(rank)


@pytest.mark.slow
def test_a_wait_that_is_longer_than_gloo_s(start_ranks):
    assert start_ranks(2, "wait_long", seconds=35).results() == [[2.0] * 3] * 2


class TestAlone:
    def test_nothing_to_exchange(self):
        ranks = Ranks()
        arrays = {"rows": np.arange(3)}
        assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
        ranks.wait()
        ranks.fail(ValueError("alone"))
        assert ranks.sum([1.5, 2]).tolist() == [1.5, 2]
        assert ranks.max([3, -4]) == [3, -4]
        assert ranks.gather(arrays)[0]["rows"] is arrays["rows"]
        assert ranks.broadcast({"any": "value"}) == {"any": "value"}
        tensor = paddle.ones([2])
        ranks.broadcast_tensors([tensor])
        assert ranks.sum_tensor(tensor).tolist() == [1, 1] and ranks.sum_tensor(tensor) is not tensor

    def test_gradients_are_divided(self):
        parameter = paddle.create_parameter([2], "float32")
        parameter.grad = paddle.to_tensor([2.0, -4.0])
        Ranks().sum_gradients([parameter], 0.25)
        assert parameter.grad.tolist() == [0.5, -1.0]


def test_ranks_must_have_the_same_and_a_failure_is_told(start_ranks):
    ranks = start_ranks(2, "same_or_not")
    for rank in range(2):
        assert ranks.next(rank, "differ") == "Seeds of rank 1 differ from those of rank 0. Give all the same."
    assert ranks.codes() == [1, 1]
    assert "error: rank 1 failed: rank 1 cannot make its model" in ranks.log(0)


class TestJoin:
    @pytest.fixture(autouse=True)
    def _anew(self):
        distributed._joined.clear()
        yield
        distributed._joined.clear()

    def test_without_a_launcher(self, monkeypatch):
        for name in ("PADDLE_TRAINER_ID", "PADDLE_TRAINERS_NUM"):
            monkeypatch.delenv(name, raising=False)
        assert distributed.join().size == 1
        assert distributed.join() is distributed.join()

    @pytest.mark.parametrize(
        ("rank", "device", "message"),
        [
            ("0", "gpu:1", "device 'gpu:1' names one card, but there are 2 ranks: leave out its number"),
            ("2", None, "PADDLE_TRAINER_ID is '2' and PADDLE_TRAINERS_NUM is '2'"),
        ],
    )
    def test_wrong(self, monkeypatch, rank, device, message):
        monkeypatch.setenv("PADDLE_TRAINER_ID", rank)
        monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
        with pytest.raises(ConfigError, match=message):
            distributed.join(device)
