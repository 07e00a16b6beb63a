"""The encoder server's command: its flags, what it hands on to the server, and one real run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from ernie.service import encoder_server, http_server
from ernie.service.export import encoder_bundle
from ernie.tasks.pooling import EncoderOptions
from propeller.bundle import read_bundle
from propeller.errors import ConfigError
from propeller.service.client import InferenceClient
from propeller.tools import start_server

MEAN = EncoderOptions(pooling="mean", normalize=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bundle(bert_folder, cache):
    return encoder_bundle(bert_folder, MEAN, cache)


@pytest.fixture
def command(bert_folder, cache, bundle, monkeypatch):
    """`command(*flags)` runs the command up to the server; returns its settings and the companion."""
    served = []
    monkeypatch.setenv(http_server.KEY_VARIABLE, "")  # so that it is put back, whatever a test leaves
    monkeypatch.delenv(http_server.KEY_VARIABLE)
    monkeypatch.setattr(
        "propeller.service.server.serve",
        lambda settings, companion=(): served.append((settings, companion)) or 0,
    )

    def run(*flags, model=bert_folder):
        argv = ["-m", str(model), "--pooling", "mean", "--normalize", "--cache_dir", str(cache), *flags]
        assert encoder_server._main(argv) == 0
        return served.pop()

    return run


def test_a_folder_becomes_a_bundle(command, bundle):
    settings, companion = command("-p", "9000", "--workers", "3", "--bf16")
    assert settings.models == {"encoder": bundle}
    assert (settings.port, settings.num_workers, settings.bf16) == (9000, 3, True)
    assert not companion


@pytest.mark.parametrize(
    "flags",
    [
        ("--encode_layer", "layer-2", "--max_seqlen", "9", "--query_prefix", "query : ", "--no-normalize"),
        ("--encode-layer=layer-2", "--max-seqlen=9", "--query-prefix=query : ", "--no_normalize"),
    ],
)
def test_both_spellings(command, flags):
    settings, _ = command(*flags)
    found = read_bundle(settings.models["encoder"]).processor().settings
    assert (found.encode_layer, found.max_seqlen, found.query_prefix) == ("layer1", 9, "query : ")
    assert (found.pooling, found.normalize) == ("mean", False)


def test_several_models(command, bundle, bert_folder, tmp_path):
    link = tmp_path / "a=b"
    link.symlink_to(bundle)
    settings, _ = command("-m", f"second={bert_folder}", model=link)
    assert settings.models == {"encoder": link, "second": bundle}
    with pytest.raises(ConfigError, match="there is a model 'encoder' already"):
        command("-m", str(bert_folder))


def test_http(command, tmp_path, monkeypatch):
    _, companion = command("--http-port", "8080", "-v")
    assert companion == http_server.command("127.0.0.1", 8080)
    key = tmp_path / "key"
    key.write_text("secret\n")
    _, companion = command("--http_port=8080", "--http-bind", "0.0.0.0", "--api-key-file", str(key))
    assert companion == http_server.command("0.0.0.0", 8080)
    assert "secret" not in " ".join(companion)
    assert os.environ[http_server.KEY_VARIABLE] == "secret"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--http-bind", "0.0.0.0"), "--http-bind is of no use without --http-port"),
        (("--api-key-file", "k"), "--api-key-file is of no use without --http-port"),
        (("--http-port", "8080", "-p", "8080"), "--http-port and --port are both 8080"),
        (("--http-port", "0"), "--http-port is 0; expected a number from 1 to 65535"),
        (("--http-port", "8080", "--http-bind", "0.0.0.0"), "there is no API key"),
        (("--http-port", "8080", "--api-key-file", "/no/file"), "--api-key-file /no/file cannot be read"),
        (("--http-port", "8080", "--join", "tcp://host:1"), "--http-port with --join"),
        (("--port", "99999999"), "port is 99999999"),
        (("--encode_layer", "layer9"), "'layer9' is not there. The model has pooler and layer1 to layer2"),
        (("--poling", "mean"), "unrecognized arguments: --poling"),
        (("--max-seqlen", "many"), "--max-seqlen: invalid int value"),
    ],
)
def test_wrong_flags(command, flags, message):
    with pytest.raises(ConfigError, match=message):
        command(*flags)


def test_a_port_that_is_taken(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"HTTP cannot listen on 127.0.0.1, port {port}: .* in use"):
            command("--http-port", str(port))


def test_http_without_the_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ConfigError, match="HTTP needs fastapi, which is not installed here"):
        command("--http-port", "8080")


@pytest.mark.parametrize("content", ["", "two\nlines", "schlüssel"])
def test_keys_that_no_header_can_hold(command, tmp_path, content):
    (tmp_path / "key").write_text(content, "utf-8")
    with pytest.raises(ConfigError, match="must hold one line of printable ASCII characters"):
        command("--http-port", "8080", "--api-key-file", str(tmp_path / "key"))


def test_a_join_goes_to_the_workers_side(bert_folder, cache, bundle, monkeypatch):
    started = []
    monkeypatch.setattr(start_server, "start", lambda args, models: started.append((args.join, models)) or 0)
    flags = ["-m", str(bert_folder), "--pooling=mean", "--normalize", f"--cache-dir={cache}"]
    assert encoder_server._main([*flags, "--join", "tcp://host:1"]) == 0
    assert started == [("tcp://host:1", {"encoder": bundle})]


def run_by_path(root, tmp_path, *flags):
    """Runs the script as its users do, from elsewhere and with nothing on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [sys.executable, str(root / "ernie" / "service" / "encoder_server.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    )


def test_run_by_its_path(root, tmp_path):
    done = run_by_path(root, tmp_path, "--help")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    assert "--encode-layer" in out
    done = run_by_path(root, tmp_path, "-m", str(tmp_path / "none"))
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'none'} is not a folder."), err


def test_serves_embeddings(root, tmp_path, bundle):
    server = run_by_path(root, tmp_path, "-m", str(bundle), "-p", "0", "--workers", "1", "--warmup-s", "0")
    try:
        ready = server.stdout.readline().split()
        assert ready[:1] == ["READY"], server.stderr.read()
        with InferenceClient(ready[1], timeout=30) as client:
            (vector,) = client.outputs([{"text_a": "the cat"}])["embeddings"]
            assert client.spec()["model"] == "encoder"
            assert client.answers([{"text_a": "the cat"}]) == [{"embedding": vector.tolist()}]
        assert vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    finally:
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
    assert server.returncode == 0, err
