"""Runs of several ranks: the same result as one, whatever the batches and however a run ends in between."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal

import numpy as np
import pytest

SIZES = [2, 3]
# The largest difference of a weight (seen: 1e-6): sums of float32 are made in another order.
NEAR = 1e-5
# Where `rank_jobs` can hold a save.
PLACES = ("weights", "manifest", "sync", "rename", "renamed", "removal", "half removed")

# Each is compared with one rank that takes its batches whole: the part of its name before " in ".
VARIANTS = {
    "padded": {},
    "padded in 2": {"config": {"micro_batches": 2}},
    "padded in 4": {"config": {"micro_batches": 4}},
    "mean loss": {"hparams": {"loss": "mean"}},
    "mean loss in 4": {"hparams": {"loss": "mean"}, "config": {"micro_batches": 4}},
    "tokens": {"data": {"kind": "tokens"}, "hparams": {"loss": "words"}},
    "tokens in 2": {
        "data": {"kind": "tokens"}, "hparams": {"loss": "words"}, "config": {"micro_batches": 2}
    },
    "bucket": {"data": {"kind": "bucket"}, "hparams": {"loss": "words"}},
    "bucket in 4": {
        "data": {"kind": "bucket"}, "hparams": {"loss": "words"}, "config": {"micro_batches": 4}
    },
    "uneven": {"data": {"kind": "uneven", "count": 41}},
    "uneven in 4": {"data": {"kind": "uneven", "count": 41}, "config": {"micro_batches": 4}},
    "one row": {"data": {"kind": "uneven", "count": 33}},
    "one row in 2": {"data": {"kind": "uneven", "count": 33}, "config": {"micro_batches": 2}},
    "weighted": {"data": {"kind": "in order"}, "hparams": {"loss": "weighted"}},
    "weighted in 2": {
        "data": {"kind": "in order"}, "hparams": {"loss": "weighted"}, "config": {"micro_batches": 2}
    },
    "fgm": {"fgm": True},
    "fgm in 2": {"fgm": True, "config": {"micro_batches": 2}},
    "fgm, one row": {"fgm": True, "data": {"kind": "uneven", "count": 33}},
    "frozen": {"hparams": {"freeze": True}},
    "partly used": {"data": {"kind": "in order"}, "hparams": {"odd": True}},
    "average": {"config": {"ema_decay": 0.9}},
    "average in 2": {"config": {"ema_decay": 0.9, "micro_batches": 2}},
}  # fmt: skip

# Of three ranks, those in which that matters.
WITH_THREE = ("tokens in 2", "uneven in 4", "one row", "fgm, one row")


@pytest.fixture(scope="module")
def trained(fork_ranks, tmp_path_factory):
    """What all variants gave: rank 0's folder, the results and the logs of all ranks, by number of ranks."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    for size in (1, *SIZES):
        own = folder / f"of {size}"
        chosen = {name: variant for name, variant in VARIANTS.items() if size < 3 or name in WITH_THREE}
        with fork_ranks(
            folder / f"logs of {size}", size, "train_all", folder=str(own), variants=chosen
        ) as ranks:
            found[size] = (own, ranks.results(), [ranks.log(rank) for rank in range(size)])
    return found


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


class TestAsOneRank:
    @pytest.mark.parametrize(
        ("name", "size"),
        [(name, size) for size in (1, 2) for name in VARIANTS] + [(n, 3) for n in WITH_THREE],
    )
    def test_the_same_weights(self, trained, name, size):
        alone = trained[1][1][0][name.partition(" in ")[0]]
        results = [of_rank[name] for of_rank in trained[size][1]]
        assert largest_difference(alone["weights"], results[0]["weights"]) < NEAR
        np.testing.assert_allclose(results[0]["losses"], alone["losses"], rtol=NEAR)
        assert results[0]["examples"] == alone["examples"], "of the whole batch"
        for other in results[1:]:
            assert largest_difference(results[0]["weights"], other["weights"]) == 0, "ranks never part ways"
            assert other["losses"] == [], "hooks are rank 0's"

    def test_the_variants_are_not_all_the_same(self, trained):
        found = trained[2][1][0]
        names = [name for name in VARIANTS if " in " not in name and name not in ("mean loss", "average")]
        for first, second in itertools.combinations(names, 2):
            assert largest_difference(found[first]["weights"], found[second]["weights"]) > 100 * NEAR
        assert 0 < largest_difference(found["padded"]["weights"], found["average"]["weights"])
        assert {1} == {found["one row"]["examples"][step] for step in (2, 5, 8)}

    @pytest.mark.parametrize("size", SIZES)
    def test_only_rank_0_writes(self, trained, size):
        folder, results, _ = trained[size]
        for number in range(len(results[0])):
            assert [path.name for path in (folder / str(number)).iterdir()] == ["rank0"]

    def test_parameters_that_only_one_rank_uses_are_reported_once(self, trained):
        """They are no reason to hang, or to part ways; those that no rank uses are none to say anything."""
        for log in trained[2][2]:
            lines = [line for line in log.splitlines() if "was not used by some ranks" in line]
            assert ["odd.weight" in lines[0], "odd.bias" in lines[1], len(lines)] == [True, True, 2]
        assert "was not used" not in trained[1][2][0]


# Examples, in batches of 16, and eval_max_steps.
EVALUATIONS = [(100, None), (40, None), (16, None), (3, None), (100, 3), (100, 1), (0, None)]


@pytest.fixture(scope="module")
def evaluated(fork_ranks, tmp_path_factory):
    """The results of all ranks, by number of ranks."""
    folder = tmp_path_factory.mktemp("evaluated")
    found = {}
    for size in (1, *SIZES):
        with fork_ranks(folder / str(size), size, "evaluate_all", cases=EVALUATIONS) as ranks:
            found[size] = ranks.results()
    return found


def test_a_batch_norm_has_the_means_of_rank_0(start_ranks, tmp_path):
    """Each rank has its own while it trains; what is evaluated and saved is one model."""
    config = {"max_steps": 6, "eval_steps": 2, "save_steps": 3}
    ranks = start_ranks(
        2, "train", model_dir=str(tmp_path / "run"), hparams={"batch_norm": True}, **config
    )
    first, second = (found["weights"] for found in ranks.results())
    assert any("_mean" in name for name in first)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)


class TestEvaluation:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("case", range(len(EVALUATIONS)), ids=str)
    def test_the_same_as_of_one_rank(self, evaluated, size, case):
        alone = evaluated[1][0][case]
        for of_rank in evaluated[size]:
            found = of_rank[case]
            if isinstance(alone, str):
                assert found == alone
                assert found.startswith("The evaluation data gave no batch.")
            else:
                assert found == evaluated[size][0][case], "the same on all, to the bit"
                summed = {name: pytest.approx(alone[name], rel=1e-12) for name in ("loss", "pearson")}
                assert found == {**alone, **summed}

    def test_a_limit_counts_the_batches_of_all(self, evaluated):
        assert [evaluated[3][0][case]["n"] for case in range(6)] == [100, 40, 16, 3, 48, 16]


def test_ranks_draw_different_dropout_masks_and_a_resume_the_same(start_ranks, tmp_path):
    def masks(folder, **config):
        ranks = start_ranks(2, "train", model_dir=str(tmp_path / folder), hparams={"dropout": 0.5}, **config)
        return [found["masks"] for found in ranks.results()]

    whole = masks("whole", max_steps=6)
    drawn = [tuple(mask) for of_rank in whole for mask in of_rank]
    assert len(drawn) == len(set(drawn)) == 12
    parts = [masks("parts", max_steps=6, run_steps=3) for _ in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


class TestStopping:
    def test_a_hook_of_rank_0_stops_all(self, start_ranks, tmp_path):
        found = start_ranks(
            3, "train", model_dir=str(tmp_path / "run"), act=("step_end", 5, "enough")
        ).results()
        assert [of_rank["step"] for of_rank in found] == [5, 5, 5]
        assert (tmp_path / "run/checkpoints/step_00000005").is_dir()

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_signal_to_one_rank_stops_all(self, start_ranks, tmp_path, rank):
        """However often it comes: a launcher repeats it until all have ended."""
        again = ("train_end", None, "SIGTERM")
        ranks = start_ranks(2, "train", model_dir=str(tmp_path / "run"), max_steps=100_000, act=again)
        ranks.next(0, "step")
        os.kill(ranks.processes[rank].pid, signal.SIGTERM)
        assert ranks.codes() == [143, 143], ranks.log(rank)
        (saved,) = (tmp_path / "run/checkpoints").iterdir()
        step = int(saved.name.removeprefix("step_"))
        for of_rank in range(2):
            assert f"Stopped by SIGTERM at step {step}; the checkpoint is saved." in ranks.log(of_rank)


class TestFailing:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_data_that_one_rank_cannot_read(self, start_ranks, tmp_path, rank):
        ranks = start_ranks(3, "train", model_dir=str(tmp_path / "run"), broken=(rank, 7))
        assert ranks.codes() == [1, 1, 1]
        said = "train.tsv:7: a label is 7; expected 0 or 1"
        for other in range(3):
            last = ranks.log(other).splitlines()[-1]
            assert last == ("error: " if other == rank else f"error: rank {rank} failed: ") + said

    @pytest.mark.parametrize("victim", [0, 1])
    def test_a_rank_that_is_killed(self, start_ranks, tmp_path, victim):
        ranks = start_ranks(2, "train", model_dir=str(tmp_path / "run"), max_steps=100_000)
        while ranks.next(0, "step") < 5:
            pass
        ranks.processes[victim].kill()
        codes = ranks.codes()
        assert (codes[victim], codes[1 - victim]) == (-9, 1)
        last = ranks.log(1 - victim).splitlines()[-1]
        assert last.startswith(f"error: rank {victim} ended without a word, as if it was killed.")

    def test_an_export_that_fails_costs_no_steps(self, start_ranks, tmp_path):
        ranks = start_ranks(2, "train", model_dir=str(tmp_path / "run"), export=True, eval_steps=2)
        assert ranks.codes() == [1, 1]
        assert ranks.log(0).splitlines()[-1] == "error: no room for the export"
        assert ranks.log(1).splitlines()[-1] == "error: rank 0 failed: no room for the export"
        assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000004"]

    def test_a_second_start_while_the_first_lives(self, start_ranks, tmp_path):
        arguments = {"model_dir": str(tmp_path / "run"), "act": ("step_end", 3, "wait")}
        first = start_ranks(2, "train", **arguments)
        pid = first.next(0, "held")
        second = start_ranks(2, "train", **arguments)
        assert second.codes() == [1, 1]
        for rank in range(2):
            assert f"run is in use by process {pid}." in second.log(rank)


class TestResuming:
    def test_bit_for_bit(self, start_ranks, tmp_path):
        arguments = {
            "max_steps": 60,
            "save_steps": 25,
            "log_steps": 5,
            "hparams": {"dropout": 0.1},
            "data": {"kind": "bucket"},
        }
        whole = start_ranks(2, "train", model_dir=str(tmp_path / "whole"), **arguments).results()
        arguments["model_dir"] = str(tmp_path / "parts")
        killed = start_ranks(2, "train", **arguments)
        while killed.next(0, "step") < 30:
            pass
        killed.processes[0].kill()
        assert killed.codes() == [-9, 1]
        parts = start_ranks(2, "train", **arguments)
        for rank, found in enumerate(parts.results()):
            assert len(found["seen"]) == 35, "from step 25 on"
            assert (found["step"], found["examples"]) == (whole[rank]["step"], whole[rank]["examples"])
            assert largest_difference(found["weights"], whole[rank]["weights"]) == 0
        assert_same_run(tmp_path / "whole", tmp_path / "parts")

    def test_with_another_number_of_ranks(self, start_ranks, tmp_path):
        """Every example still comes once an epoch, which is 15 steps here."""
        arguments = {"max_steps": 60, "data": {"kind": "uneven", "count": 240}}
        (whole,) = start_ranks(1, "train", model_dir=str(tmp_path / "whole"), **arguments).results()
        arguments["model_dir"] = str(tmp_path / "parts")
        steps = []
        for size in (2, 1, 3):
            found = start_ranks(size, "train", run_steps=20, **arguments).results()
            for parts in zip(*[of_rank["seen"] for of_rank in found], strict=True):
                assert max(map(len, parts)) - min(map(len, parts)) <= 1, "evenly dealt out"
                steps.append(sorted(itertools.chain(*parts)))
        assert steps == [sorted(step) for step in whole["seen"]]
        for first in range(0, 60, 15):
            assert sorted(itertools.chain(*steps[first : first + 15])) == list(range(240))
        assert largest_difference(found[0]["weights"], whole["weights"]) < NEAR


def assert_same_run(first, second):
    """Compares the last checkpoints byte by byte, and the losses on the way."""
    folders = [max((run / "checkpoints").iterdir()) for run in (first, second)]
    assert folders[0].name == folders[1].name
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
    shown = []
    for run in (first, second):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        shown.append([(line["event"], line["step"], line["loss"]) for line in lines])
    assert shown[0] == shown[1]


def moments(count, size, seed):
    """When and how ranks are killed: at all the places of a save, after random steps and random times."""
    rng = random.Random(seed)
    hows = list(itertools.islice(itertools.cycle([*PLACES, "seconds", "step", "seconds"]), count))
    rng.shuffle(hows)
    for how in hows:
        rank = rng.randrange(size) if how in ("seconds", "step") else 0  # rank 0 saves
        yield rank, how, rng.uniform(0.0, 0.1) if how == "seconds" else rng.randint(1, 4)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, 10),
        (2, 4),
        pytest.param(1, 20, marks=pytest.mark.slow),
        pytest.param(2, 10, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_again_and_again(start_ranks, tmp_path, size, count):
    arguments = {
        "max_steps": 30 * count, "save_steps": 5, "eval_steps": 7, "log_steps": 1, "max_ckpt": 2,
        "hparams": {"dropout": 0.1}, "data": {"kind": "bucket"},
    }  # fmt: skip
    whole = start_ranks(size, "train", model_dir=str(tmp_path / "whole"), **arguments).results()
    arguments["model_dir"] = str(tmp_path / "killed")
    for rank, how, when in moments(count, size, seed=size):
        ranks = start_ranks(size, "train", kill=(rank, how, when), **arguments)
        if how != "seconds":
            for _ in range(when if how == "step" else 1):
                ranks.next(0, "step" if how == "step" else "held")
            ranks.processes[rank].kill()
        codes = ranks.codes()
        assert codes[rank] == -9, (how, when, codes, ranks.log(rank))
    found = start_ranks(size, "train", **arguments).results()
    for rank in range(size):
        assert largest_difference(found[rank]["weights"], whole[rank]["weights"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
