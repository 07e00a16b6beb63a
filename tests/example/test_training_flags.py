"""How the fine-tuning script trains: several processes, methods, switches, what a resume refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def newest_weights(folder):
    return load_file(sorted(folder.glob("checkpoints/step_*"))[-1] / "model.safetensors")


def assert_close(first, second, limit):
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_allclose(array, second[name], rtol=0, atol=limit, err_msg=name)


def test_all_cores_and_the_launcher_give_the_weights_of_one_process(finetune, shell, workplace, tmp_path):
    """The flags are the same; `batch_size` is the whole one under --nproc, a rank's under the launcher."""
    one = finetune(run_config={"max_steps": 8}, hparam=NO_DROPOUT)
    assert one.code == 0, one.err
    flags = (
        "--data_dir", workplace / "data" / "chnsenticorp", "--vocab_file", workplace / "vocab.txt",
        "--max_seqlen", 32, "--cache_dir", tmp_path / "cache",
    )  # fmt: skip
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    for name, start, batch_size in (
        ("nproc", '"$PYTHON" "$EXAMPLE" --nproc 2 "$@"', 8),
        (
            "launcher",
            '"$PYTHON" -m paddle.distributed.launch --nproc_per_node 2 --log_dir logs "$EXAMPLE" "$@"',
            4,
        ),
    ):
        config = {"model_dir": str(tmp_path / name), "max_steps": 8}
        hparams = {**sizes, **NO_DROPOUT, "learning_rate": 0.01, "batch_size": batch_size}
        result = shell(
            start, *flags, "--run_config", json.dumps(config), "--hparam", json.dumps(hparams), cwd=tmp_path
        )
        assert result.code == 0, result.err + result.out
        assert "[rank 0] [dev evaluation] loss: " in result.err + result.out
        assert_close(newest_weights(tmp_path / "output"), newest_weights(tmp_path / name), 1e-5)
        assert (tmp_path / name / "best/inference/bundle.json").exists()
        # And on in one process, with the same batches.
        more = {"model_dir": str(tmp_path / name), "max_steps": 9}
        resumed = finetune(run_config=more, hparam={**NO_DROPOUT, "batch_size": batch_size})
        assert resumed.code == 0 and "changed since this run was last started: ranks: 2 -> 1" in resumed.err


def test_everything_at_once(finetune, tmp_path):
    hparams = {"layer_decay": 0.8, "freeze": "encoder.embeddings.*", "r_drop": 1.0, "recompute": True}
    config = {"max_steps": 4, "micro_batches": 2, "ema_decay": 0.9}
    result = finetune("--profile", run_config=config, hparam=hparams)
    assert result.code == 0, result.err
    assert "outside the model" in result.err
    assert (tmp_path / "output/profile/trace.json").exists()
    result = finetune("--restart", run_config=config, hparam={**hparams, "freeze": [], "fgm_epsilon": 0.5})
    assert result.code == 0, result.err
    assert (tmp_path / "output.1/checkpoints/step_00000004").is_dir()


def test_numerics_are_checked_and_the_best_is_exported(finetune, tmp_path):
    result = finetune("--check_numerics")
    assert result.code == 0, result.err
    assert (tmp_path / "output/best/inference/bundle.json").exists()


def test_find_learning_rate_prints_and_leaves_nothing(finetune, tmp_path):
    result = finetune("--find_learning_rate", run_config={"max_steps": None})
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].split() == ["rate", "loss"]
    assert 1e-8 < float(lines[-1].removeprefix("suggested learning rate: ")) < 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "bucket: batch_size 8 -> 4"),
        ({"num_attention_heads": 4}, "num_attention_heads: 2 -> 4"),
        ({"hidden_size": 8}, "hidden_size: 16 -> 8"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused(finetune, tmp_path, changes, message):
    assert finetune().code == 0
    before = (tmp_path / "output/run.json").read_bytes()
    result = finetune(run_config={"max_steps": 4}, hparam=changes)
    assert result.code == 2 and len(result.errors) == 1
    assert message in result.errors[0]
    assert (tmp_path / "output/run.json").read_bytes() == before


def test_other_data_is_refused(finetune, workplace, tmp_path, write):
    source = workplace / "data/chnsenticorp"
    rows = (source / "train.tsv").read_text("utf-8").splitlines()
    dev = source / "dev.tsv"
    for number, lines in enumerate((rows, [*rows[:-1], "1\t好好"])):
        train = write(tmp_path / "train.tsv", *lines)
        result = finetune("--train_set", train, "--dev_set", dev, run_config={"max_steps": 2 + number})
        assert result.code == (0, 2)[number], result.err
    assert "training data or its batches (records: sha256" in result.errors[0]
    assert "--restart" in result.errors[0]


def test_a_default_that_is_given_later_has_not_changed(finetune):
    assert finetune().code == 0
    result = finetune(run_config={"max_steps": 3}, hparam={"warmup_proportion": 0.1, "weight_decay": 0.02})
    changed = [line.partition("started: ")[2] for line in result.err.splitlines() if "changed since" in line]
    assert changed == ["run_config.max_steps: 2 -> 3", "hparams.weight_decay: 0.01 -> 0.02"]


@pytest.mark.parametrize(
    ("flags", "hparams", "message"),
    [
        (("--nproc", "0"), {}, "--nproc is '0'; expected auto, or a number"),
        ((), {"layer_decay": 0}, "layer_decay"),
        ((), {"freeze": "encoder.nothing.*"}, "encoder.nothing.*"),
        (("--train_set", "none"), {"batch_size": 0}, "batch_size must be"),  # before the data are looked at
        ((), {"fgm_epsilon": -1}, "fgm_epsilon"),
        ((), {"r_drop": 1, **NO_DROPOUT}, "dropout"),
    ],
)
def test_bad_values(finetune, flags, hparams, message):
    result = finetune(*flags, hparam=hparams)
    assert result.code == 2
    (error,) = result.errors
    assert message in error


def test_the_older_launcher_is_understood(finetune, monkeypatch):
    monkeypatch.setenv("PROPELLER_DISCONFIG", '{"cluster": {"chief": ["127.0.0.1:6170"]}}')
    result = finetune()
    assert result.code == 2
    assert result.errors == ["error: PROPELLER_DISCONFIG: task is missing; expected an object."]
    cluster = {"cluster": {"chief": ["127.0.0.1:6170"]}, "task": {"type": "chief", "index": 0}}
    monkeypatch.setenv("PROPELLER_DISCONFIG", json.dumps(cluster))  # a cluster of one is a plain run
    assert finetune().code == 0
