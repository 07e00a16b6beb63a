"""Flags of the server: what they mean, and what is refused. The server itself is tested elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import zmq

from propeller import cli
from propeller.errors import ConfigError, ServiceError
from propeller.service.settings import (
    ServerSettings,
    WorkerGroup,
    default_workers,
    is_loopback,
    tcp_address,
    worker_plan,
)
from propeller.tools import start_server

MODELS = {"default": Path("bundle")}


@pytest.fixture
def run(monkeypatch):
    """Runs the command with a server that notes its settings; returns exit code and notes."""
    monkeypatch.setattr(cli, "setup_logging", lambda level: None)
    notes = []
    for name, function in [
        ("server", lambda settings: notes.append(("serve", settings)) or 3),
        ("join", lambda address, settings: notes.append(("join", address, settings)) or 4),
    ]:
        module = types.ModuleType(name)
        setattr(module, {"server": "serve"}.get(name, name), function)
        monkeypatch.setitem(sys.modules, f"propeller.service.{name}", module)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            start_server.main(words)
        return stop.value.code, notes

    return call


@pytest.fixture
def command(root):
    """Runs the command in a process of its own; returns exit code, standard output and standard error."""

    def call(*words):
        done = subprocess.run(
            [sys.executable, "-m", "propeller.tools.start_server", *map(str, words)],
            capture_output=True, text=True, cwd=root, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return call


def settings(*words, models=MODELS):
    parser = start_server.ServerParser()
    start_server.add_arguments(parser)
    return start_server.settings_from(parser.parse_args(words), models)


def test_the_short_form(run):
    code, notes = run("-m", "model_dir/best/inference", "-p", "8889")
    assert code == 3
    assert notes == [("serve", ServerSettings({"default": Path("model_dir/best/inference")}, port=8889))]


def test_flags_have_the_defaults_of_the_settings():
    assert settings() == ServerSettings(MODELS)


def test_every_flag(tmp_path):
    given = settings(
        "--port", "0", "--bind", "0.0.0.0", "--workers", "3", "--threads=2", "--bf16",
        "--max-batch-tokens", "4096", "--max-batch-size", "32", "--max-wait-ms", "2.5", "--max-queue", "500",
        "--max-message-mb", "8", "--batch-timeout-s", "20", "--drain-s", "0", "--warmup-s", "1",
        "--curve-keys", "keys", "--metrics-port", "9100", "--metrics-bind", "::", "--worker-port", "8890",
        "--worker-bind", "0.0.0.0", "-v",
    )  # fmt: skip
    assert given == ServerSettings(
        MODELS, 0, "0.0.0.0", 3, 2, ("cpu",), True, 4096, 32, 2.5, 500, 8 << 20, 20.0, 0.0, 1.0,
        Path("keys"), False, 9100, "::", 8890, "0.0.0.0", True,
    )  # fmt: skip
    changed = dataclasses.asdict(given)
    defaults = dataclasses.asdict(ServerSettings(MODELS))
    assert {name for name in changed if changed[name] == defaults[name]} == {"models", "devices", "insecure"}
    assert settings("--workers", "auto", "--threads", "auto") == ServerSettings(MODELS)
    assert settings("--bind", "0.0.0.0", "--insecure").insecure


def test_underscores_as_in_older_commands():
    assert settings("--max_queue", "5", "--max_batch_size=7").max_queue_rows == 5
    given = settings("--max_batch_size=7", "--curve_keys", "my_keys", "--bind=a_b")
    assert (given.max_batch_size, given.curve_keys, given.bind) == (7, Path("my_keys"), "a_b")
    parser = start_server.ServerParser()
    parser.add_argument("--encode-layer")
    parser.add_argument("rest", nargs="*")
    args = parser.parse_args(["--encode_layer", "layer_3", "a_b", "--", "--c_d"])
    assert (args.encode_layer, args.rest) == ("layer_3", ["a_b", "--c_d"])


def test_models():
    assert start_server.models_from(["a", "b=c/d", "e=f=g"]) == {
        "default": Path("a"), "b": Path("c/d"), "e": Path("f=g")
    }  # fmt: skip
    assert list(start_server.models_from(["z=1", "a=2"])) == ["z", "a"]
    assert start_server.models_from(["./lr=1e-4/best"]) == {"default": Path("lr=1e-4/best")}
    assert start_server.models_from(["runs/lr=1/best"]) == {"default": Path("runs/lr=1/best")}
    with pytest.raises(
        ConfigError, match="--model b: there is a model 'default' already, a. Give each one a name"
    ):
        start_server.models_from(["a", "b"])
    with pytest.raises(ConfigError, match="--model x=2: there is a model 'x' already, 1"):
        start_server.models_from(["x=1", "x=2"])
    for text in ("", "x="):
        with pytest.raises(ConfigError, match="expected a folder, or name=folder"):
            start_server.models_from([text])


@pytest.mark.parametrize(
    ("text", "visible", "expected"),
    [
        ("cpu", 2, ("cpu",)),
        ("gpu", 2, ("gpu:0", "gpu:1")),
        ("gpu:1", 2, ("gpu:1",)),
        ("gpu:1,0", 2, ("gpu:1", "gpu:0")),
    ],
)
def test_devices(monkeypatch, text, visible, expected):
    monkeypatch.setattr(start_server, "visible_gpus", lambda: visible)
    assert start_server.devices_from(text) == expected
    assert settings("--device", text).devices == expected


@pytest.mark.parametrize(
    ("text", "visible", "problem"),
    [
        ("gpu", 0, "Paddle sees no card here.*CUDA_VISIBLE_DEVICES"),
        ("gpu:2", 2, "2 cards are visible: expected numbers from 0 to 1"),
        ("gpu:", 2, "expected cpu, gpu, or gpu: with numbers, such as gpu:0,1"),
        ("gpu:a", 2, "expected cpu, gpu, or"),
        ("gpu:-1", 2, "expected cpu, gpu, or"),
        ("cpu:0", 2, "expected cpu, gpu, or"),
        ("xpu", 2, "expected cpu, gpu, or"),
        ("gpu:0,0", 2, "expected at least one, and each once"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, text, visible, problem):
    monkeypatch.setattr(start_server, "visible_gpus", lambda: visible)
    with pytest.raises(ConfigError, match=problem):
        settings("--device", text)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--port", "65536"], "port is 65536; expected 0 to 65535"),
        (["--port", "-1"], "port is -1; expected a whole number of at least 0"),
        (["--port", "x"], "argument -p/--port: invalid int value: 'x'\nusage: "),
        (["--metrics-port", "8888"], "metrics_port and port are both 8888"),
        (["--workers", "0"], r"num_workers \(--workers\) is 0; expected a whole number of at least 1"),
        (["--workers", "two"], "'two' is neither auto nor a whole number"),
        (["--max-batch-size", "0"], "max_batch_size is 0"),
        (["--max-batch-tokens", "0"], "max_batch_tokens is 0"),
        (["--max-queue", "0"], r"max_queue_rows \(--max-queue\) is 0"),
        (["--max-wait-ms", "-1"], "max_wait_ms is -1.0; expected a finite number of at least 0"),
        (["--max-wait-ms", "nan"], "max_wait_ms is nan"),
        (["--drain-s", "inf"], "drain_s is inf; expected a finite number"),
        (["--batch-timeout-s", "0"], "batch_timeout_s is 0.0"),
        (["--max-message-mb", "0"], "max_message_bytes must be a whole number of at least 16384, got 0"),
        (["--max-message-mb", "4096"], "max_message_bytes is 4294967296; expected at most 2147483648"),
        (["--bind", " "], "bind is empty; expected an address"),
        (["--bind", "0.0.0.0"], "other machines can reach.*propeller-server keys DIR.*--insecure"),
        (["--bind", "*"], "other machines can reach"),
        (["--bind", "example.org"], "other machines can reach"),
        (["--insecure", "--curve-keys", "keys"], "insecure and curve_keys contradict each other"),
        (["--worker-port", "8890"], "worker_port lets other hosts join, which needs keys"),
        (["--worker-port", "8890", "--insecure"], "worker_port lets other hosts join, which needs keys"),
        (["--max-que", "5"], "unrecognized arguments: --max-que"),
    ],
)
def test_what_is_refused(words, problem):
    with pytest.raises(ConfigError, match=f"(?s){problem}"):
        settings(*words)


def test_settings_check_themselves():
    for changes, problem in [
        ({"models": {}}, "models is empty"),
        ({"models": {"a/b": Path("x")}}, "A model is called 'a/b'; expected 1 to 64 letters"),
        ({"models": {"": Path("x")}}, "A model is called ''"),
        ({"devices": ()}, "expected at least one"),
        ({"devices": ("gpu",)}, r"devices is \('gpu',\); expected"),
        ({"devices": ("cpu", "gpu:0")}, "expected .*'cpu'"),
        ({"devices": ("gpu:0",), "bf16": True}, "bf16 is for the CPU"),
        ({"num_workers": True}, r"num_workers \(--workers\) is True"),
        ({"max_queue_rows": None}, r"max_queue_rows .* is None"),
        ({"max_batch_size": 2.5}, "max_batch_size is 2.5; expected a whole number"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            ServerSettings(**{"models": MODELS, **changes})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_keys(host):
    assert is_loopback(host)
    assert ServerSettings(MODELS, bind=host).curve_keys is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "*", "eth0", "localhost.example.org", "127.1"])
def test_everything_else_does(host):
    assert not is_loopback(host)
    assert ServerSettings(MODELS, bind=host, curve_keys=Path("keys")).bind == host
    with pytest.raises(ConfigError, match="there are no keys"):
        ServerSettings(MODELS, bind=host)


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("127.0.0.1", 8888, "tcp://127.0.0.1:8888"),
        ("localhost", 0, "tcp://127.0.0.1:*"),
        ("*", 1, "tcp://*:1"),
        ("[::1]", 0, "tcp://[::1]:*"),
        ("::", 5, "tcp://[::]:5"),
    ],
)
def test_addresses(host, port, expected):
    assert tcp_address(host, port) == expected


def test_localhost_can_be_bound():
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(tcp_address("localhost", 0))
        assert re.fullmatch(rb"tcp://127\.0\.0\.1:\d+", socket.last_endpoint)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (1, (1, 1)),
        (2, (2, 1)),
        (3, (1, 2)),
        (4, (2, 2)),
        (8, (4, 2)),
        (9, (2, 4)),
        (16, (4, 4)),
        (64, (16, 4)),
    ],
)
def test_default_workers(cores, expected):
    assert default_workers(cores) == expected


@pytest.mark.parametrize(
    ("words", "cores", "expected"),
    [
        ([], 8, [("cpu", 4, 2)]),
        (["--workers", "3"], 8, [("cpu", 3, 2)]),
        (["--workers", "3"], 2, [("cpu", 3, 1)]),
        (["--threads", "4"], 8, [("cpu", 2, 4)]),
        (["--threads", "4"], 2, [("cpu", 1, 4)]),
        (["--workers", "5", "--threads", "6"], 2, [("cpu", 5, 6)]),
        (["--device", "gpu:1,0"], 8, [("gpu:1", 1, 1), ("gpu:0", 1, 1)]),
        (["--device", "gpu", "--workers", "2", "--threads", "3"], 8, [("gpu:0", 2, 3), ("gpu:1", 2, 3)]),
    ],
)
def test_worker_plan(monkeypatch, words, cores, expected):
    monkeypatch.setattr(start_server, "visible_gpus", lambda: 2)
    plan = worker_plan(settings(*words), cores)
    assert plan == expected and all(isinstance(group, WorkerGroup) for group in plan)


def test_join(run):
    code, notes = run(
        "-m", "bundle", "--join", "tcp://10.0.0.1:8890", "--curve-keys", "keys", "--workers", "2"
    )
    assert code == 4
    expected = ServerSettings(MODELS, num_workers=2, curve_keys=Path("keys"))
    assert notes == [("join", "tcp://10.0.0.1:8890", expected)]
    assert run("-m", "b", "--join", "tcp://[fe80::1]:1", "--curve-keys", "k")[1][1][1] == "tcp://[fe80::1]:1"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--join", "tcp://h:1"], "--join needs --curve-keys DIR"),
        (["--join", "h:8890", "--curve-keys", "k"], "--join is 'h:8890'; expected an address such as tcp://"),
        (["--join", "tcp://h:0", "--curve-keys", "k"], "--join is 'tcp://h:0'"),
        (["--join", "tcp://h:65536", "--curve-keys", "k"], "--join is 'tcp://h:65536'"),
        (["--join", "tcp://a b:1", "--curve-keys", "k"], "--join is 'tcp://a b:1'"),
        (
            ["--join", "tcp://h:1", "--curve-keys", "k", "--metrics-port", "9100"],
            "metrics_port is of no use with --join",
        ),
        (["--join", "tcp://h:1", "--curve-keys", "k", "--port", "9"], "port is of no use with --join"),
    ],
)
def test_join_that_cannot_be(run, capsys, words, problem):
    code, notes = run("-m", "bundle", *words)
    assert (code, notes) == (2, [])
    assert problem in capsys.readouterr().err


def test_an_error_of_the_server_becomes_a_line(run, capsys, monkeypatch):
    def serve(settings):
        raise ServiceError("the bundle is bad")

    monkeypatch.setattr(sys.modules["propeller.service.server"], "serve", serve)
    assert run("-m", "bundle")[0] == 1
    assert capsys.readouterr().err == "error: the bundle is bad\n"


def test_wrong_flags_end_with_one_message(command):
    code, output, errors = command("-m", "a", "-m", "b")
    assert (code, output) == (2, "") and errors.startswith("error: --model b: there is a model 'default'")
    code, output, errors = command()
    assert (code, output) == (2, "")
    assert errors.startswith(
        "error: the following arguments are required: -m/--model\nusage: propeller-server"
    )
    assert "Traceback" not in errors


def test_help(command):
    code, output, errors = command("--help")
    assert (code, errors) == (0, "")
    parser = argparse.ArgumentParser()
    start_server.add_arguments(parser)
    assert all(flag in output for action in parser._actions for flag in action.option_strings)
    assert "propeller-server keys DIR" in output


def test_keys(command, tmp_path):
    folder = tmp_path / "keys"
    code, output, errors = command("keys", folder)
    assert (code, errors) == (0, "")
    assert (folder / "server.key_secret").exists()
    assert f"--curve-keys {folder}" in output and "server.key and client.key_secret" in output
    code, output, errors = command("keys", folder)
    assert (code, output) == (2, "") and "never overwritten" in errors
    code, output, errors = command("keys", folder, "--client", "search")
    assert (code, errors) == (0, "")
    assert (folder / "clients/search.key").exists() and f"{folder}/search.key_secret as client" in output
    code, output, errors = command("keys", tmp_path / "absent", "--client", "search")
    assert (code, output) == (2, "") and "propeller-server keys" in errors


def commands_in(folder):
    """Every command line of the files for deployment."""
    unit = (folder / "propeller-server.service").read_text()
    found = [shlex.split(line)[1:] for line in re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)]
    manifest = (folder / "kubernetes.yaml").read_text()
    # As JSON, which YAML includes: yaml is no library that the project needs.
    lists = [json.loads(text) for text in re.findall(r"command:\s*(\[.*?\])", manifest, re.DOTALL)]
    found += [words[1:] for words in lists if words[0] == "propeller-server"]
    return found


def test_deployed_flags_are_understood(run, root):
    commands = commands_in(root / "script/deploy")
    assert len(commands) == 3
    assert [run(*words)[0] for words in commands] == [3, 3, 4]
    _, notes = run("-m", "x")
    assert {note[-1].port for note in notes} == {8888}


def test_deployed_servers_may_drain(run, root):
    folder = root / "script/deploy"
    for words in commands_in(folder):
        run(*words)
    _, notes = run("-m", "x")
    drain_s = max(note[-1].drain_s for note in notes)
    unit, manifest = ((folder / name).read_text() for name in ("propeller-server.service", "kubernetes.yaml"))
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    graces_s = re.findall(r"terminationGracePeriodSeconds: (\d+)", manifest)
    (sleep_s,) = re.findall(r'"sleep", "(\d+)"', manifest)
    assert len(graces_s) == 2
    assert min(map(int, [stop_s, *graces_s])) >= drain_s + int(sleep_s) + 5


def test_the_manifest_is_yaml(root):
    yaml = pytest.importorskip("yaml")
    found = list(yaml.safe_load_all((root / "script/deploy/kubernetes.yaml").read_text()))
    assert [(item["kind"], item["metadata"]["name"]) for item in found] == [
        ("Service", "propeller"),
        ("Service", "propeller-workers"),
        ("Deployment", "propeller-server"),
        ("Deployment", "propeller-worker"),
    ]
    ports = {
        port["name"]: port["containerPort"]
        for port in found[2]["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    assert ports == {"requests": 8888, "workers": 8890, "metrics": 9100}
