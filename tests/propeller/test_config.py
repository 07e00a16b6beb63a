"""Flags, files and the environment -> RunConfig and HParams."""

from __future__ import annotations

import argparse
import json

import pytest

import propeller
from propeller.config import ArgumentParser, parse_config, parse_hparam, parse_runconfig
from propeller.errors import ConfigError
from propeller.types import HParams

# The flags of the older ERNIE scripts, word for word, as the shell hands them over.
OLD_RUN_CONFIG = """{
        "model_dir": "output",
        "max_steps": 3000,
        "save_steps": 100,
        "log_steps": 10,
        "max_ckpt": 1,
        "skip_steps": 0,
        "eval_steps": 100
    }"""
OLD_MODEL_HPARAM = """{ # model definition
        "sent_type_vocab_size": None,    # default term in official config
        "use_task_id": False,
        "task_id": 0,
        }"""
OLD_LEARN_HPARAM = """{ # learn
      "warmup_proportion":  0.1,
      "weight_decay": 0.01,
      "use_fp16": 0,
      "learning_rate": 0.00005,
      "num_label": 2,
      "batch_size": 32
    }"""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("PROPELLER_RUNCONFIG", raising=False)
    monkeypatch.delenv("PROPELLER_HPARAMS", raising=False)


def parse(*flags):
    return ArgumentParser().parse_args(list(flags))


def test_the_command_of_the_older_script(tmp_path):
    ernie_config = tmp_path / "ernie_config.json"
    ernie_config.write_text('{"hidden_size": 768, "num_label": 3, "sent_type_vocab_size": 4}', "utf-8")
    parser = ArgumentParser("a task")
    parser.add_argument("--data_dir")
    parser.add_argument("--max_seqlen", type=int)
    args = parser.parse_args(
        ["--data_dir", "d", "--max_seqlen", "128", "--run_config", OLD_RUN_CONFIG]
        + ["--hparam", str(ernie_config), "--hparam", OLD_MODEL_HPARAM, "--hparam", OLD_LEARN_HPARAM]
    )
    config, hparams = parse_runconfig(args), parse_hparam(args)
    assert args.max_seqlen == 128
    assert (config.model_dir, config.max_steps, config.save_steps) == ("output", 3000, 100)
    assert (config.log_steps, config.max_ckpt, config.skip_steps, config.eval_steps) == (10, 1, 0, 100)
    assert dict(hparams) == {
        "hidden_size": 768,
        "num_label": 2,
        "sent_type_vocab_size": None,
        "use_task_id": False,
        "task_id": 0,
        "warmup_proportion": 0.1,
        "weight_decay": 0.01,
        "use_fp16": 0,
        "learning_rate": 0.00005,
        "batch_size": 32,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1, "b": null, "c": true}', {"a": 1, "b": None, "c": True}),
        ("{'a': 1, 'b': None, 'c': True}", {"a": 1, "b": None, "c": True}),
        (
            "{'a': true, 'b': None, 'c': null, 'd': [false, -1.5e-3]}",
            {"a": True, "b": None, "c": None, "d": [False, -0.0015]},
        ),
        ("  {\n'中文': '值', # a comment with } and 'quotes'\n}\n", {"中文": "值"}),
        ("{'true': 'null'}", {"true": "null"}),
        ("{}", {}),
        ("{'nested': {'a': (1, 2)}}", {"nested": {"a": (1, 2)}}),
    ],
)
def test_json_and_literals(text, value):
    assert parse_config(text) == value


def test_a_file_of_either_style(tmp_path):
    file = tmp_path / "with blank.json"
    file.write_text('\ufeff{"a": "ä"}', "utf-8")
    assert parse_config(f" {file}\n") == {"a": "ä"}
    file.write_text("{'a': None}  # literal", "utf-8")
    assert parse_config(str(file)) == {"a": None}


@pytest.mark.parametrize(
    "text",
    [
        "{'a': __import__('os').system('touch %s')}",
        "{'a': open('%s', 'w')}",
        "{'a': [x for x in open('%s', 'w')]}",
        "{**open('%s', 'w').__dict__}",
        "{'a': f'{open(\"%s\", \"w\")}'}",
    ],
)
def test_no_code_is_executed(text, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(ConfigError, match="neither JSON .* nor a literal"):
        parse_config(text % trace)
    assert not trace.exists()


@pytest.mark.parametrize(
    "text",
    [
        "{'a': 1",
        "{'a': undefined}",
        "{'a': 1 + 1}",
        "{[1]: 2}",
        '{"a": ' + "1" * 5000 + "}",
        '{"a":' * 20_000,
        "{\x00}",
    ],
    ids=["cut", "name", "sum", "list-key", "huge-number", "deep", "zero-byte"],
)
def test_neither_json_nor_literal(text):
    with pytest.raises(ConfigError, match="--hparam is neither JSON") as caught:
        parse_config(text, what="--hparam")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["{1: 2}", "{'a', 'b'}", "{'a': 1}, {'b': 2}"])
def test_not_an_object_with_string_keys(text):
    with pytest.raises(ConfigError, match="must be an object with string keys"):
        parse_config(text)


def test_files_that_cannot_be_used(tmp_path):
    missing = tmp_path / "missing.json"
    with pytest.raises(
        ConfigError, match=r"--run_config '.*missing\.json' is neither .* nor a readable file"
    ):
        parse_runconfig(parse("--run_config", str(missing)))
    with pytest.raises(ConfigError, match="nor a readable file"):
        parse_config(str(tmp_path))
    with pytest.raises(ConfigError, match="nor a readable file"):
        parse_config("max_steps=3" * 1000)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="nor a readable file"):
        parse_config(str(binary))
    listing = tmp_path / "list.json"
    listing.write_text("[1, 2]", "utf-8")
    with pytest.raises(ConfigError, match=r"configuration file .*list\.json must be an object"):
        parse_config(str(listing))


def test_several_flags_are_joined_and_the_later_wins():
    args = parse("--hparam", '{"a": 1, "b": 1}', "--hparam", "{'b': 2}", "--hparam", '{"c": 3}')
    assert dict(parse_hparam(args)) == {"a": 1, "b": 2, "c": 3}
    assert dict(parse_hparam(args, {"a": 0, "d": 0})) == {"a": 1, "b": 2, "c": 3, "d": 0}
    config = parse_runconfig(parse("--run_config", '{"max_steps": 5}', "--run_config", '{"seed": 3}'))
    assert (config.max_steps, config.seed) == (5, 3)


def test_the_environment_is_the_fallback(monkeypatch, tmp_path):
    monkeypatch.setenv("PROPELLER_RUNCONFIG", '{"max_steps": 7, "seed": 7}')
    file = tmp_path / "h.json"
    file.write_text('{"a": 7, "b": 7}', "utf-8")
    monkeypatch.setenv("PROPELLER_HPARAMS", str(file))
    config = parse_runconfig(parse("--run_config", '{"seed": 8}'))
    assert (config.max_steps, config.seed) == (7, 8)
    assert dict(parse_hparam(parse("--hparam", "{'b': 8}"), {"c": 9})) == {"a": 7, "b": 8, "c": 9}
    monkeypatch.setenv("PROPELLER_RUNCONFIG", " ")
    assert parse_runconfig(parse()).max_steps is None


def test_nothing_given_is_the_default():
    assert parse_runconfig(parse()) == propeller.RunConfig()
    assert parse_hparam(parse()) == HParams()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_step": 3}, "Unknown run_config key 'max_step'. Did you mean 'max_steps'"),
        ({"zzz": 3}, r"Unknown run_config key 'zzz'\. Known keys: model_dir, max_steps"),
        ({"max_steps": "3"}, r"max_steps must be int or null, got '3' \(str\)"),
        ({"max_steps": 3.5}, "max_steps must be int or null, got 3.5"),
        ({"max_steps": True}, "max_steps must be int or null, got True"),
        ({"save_steps": None}, "save_steps must be int, got None"),
        ({"model_dir": 3}, "model_dir must be str, got 3"),
        ({"model_dir": ""}, "model_dir must name a folder"),
        ({"device": ["cpu"]}, "device must be str or null"),
        ({"max_steps": -1}, "max_steps must be at least 1, got -1"),
        ({"eval_steps": 0}, "eval_steps must be at least 1, got 0"),
        ({"run_steps": -5}, "run_steps must be at least 1, got -5"),
        ({"max_ckpt": 0}, "max_ckpt must be at least 1, got 0"),
        ({"skip_steps": -1}, "skip_steps must not be negative, got -1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"seed": 2**32}, r"seed must be below 2\*\*32, got 4294967296"),
    ],
)
def test_wrong_run_config_values(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_runconfig(parse("--run_config", json.dumps(values)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_seqlen", "many"], "argument --max_seqlen: invalid int value: 'many'"),
        (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag 1"),
        (["--hparam"], "argument --hparam: expected one argument"),
        (["--hpara", "{}"], "unrecognized arguments: --hpara"),
        (["--mode", "b"], "argument --mode: invalid choice"),
    ],
)
def test_wrong_flags_raise_and_do_not_exit(flags, message):
    parser = ArgumentParser("a task")
    parser.add_argument("--max_seqlen", type=int)
    parser.add_argument("--mode", choices=["a"])
    with pytest.raises(ConfigError, match=f"(?s){message}.*usage: "):
        parser.parse_args(flags)
    with pytest.raises(ValueError, match=message):  # for callers that know no propeller
        parser.parse_args(flags)


def test_help_names_the_environment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    assert "PROPELLER_RUNCONFIG" in capsys.readouterr().out


def test_switches_are_keys_of_the_run_configuration():
    config = parse_runconfig(parse("--profile", "--run_config", '{"profile": false, "max_steps": 5}'))
    assert (config.profile, config.check_numerics, config.max_steps) == (True, False, 5)
    assert parse_runconfig(parse("--check_numerics")).check_numerics
    assert parse_runconfig(parse("--run_config", '{"profile": true}')).profile, "no flag is no 'false'"


def test_flags_of_the_launch_stay_flags():
    args = parse("--nproc", "auto", "--restart")
    assert (args.nproc, args.restart) == ("auto", True)
    assert parse_runconfig(args) == propeller.RunConfig()
    assert (parse().nproc, parse().restart) == (None, False)


def test_a_parser_without_the_newer_flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("--run_config", action="append", default=[])
    args = parser.parse_args(["--run_config", '{"max_steps": 5}'])
    assert parse_runconfig(args).max_steps == 5
