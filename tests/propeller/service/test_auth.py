"""Keys: real sockets, and every way in which a folder of keys can be wrong."""

from __future__ import annotations

import contextlib
import logging
import shutil
import stat
import subprocess
import sys

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from propeller.errors import ConfigError
from propeller.service import auth
from propeller.service.auth import Authenticator, make_client_keys, make_keys, secure_client, secure_server

WAIT_MS = 10_000
ACCEPTED = zmq.Event.HANDSHAKE_SUCCEEDED
REFUSED = {
    zmq.Event.HANDSHAKE_FAILED_AUTH,
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of keys that no test changes."""
    folder = tmp_path_factory.mktemp("made") / "keys"
    make_keys(folder)
    return folder


@pytest.fixture
def keys(made, tmp_path):
    """A folder of keys of the test's own."""
    return shutil.copytree(made, tmp_path / "keys")


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


class Server:
    """A secured ROUTER that tells how each handshake with it ended."""

    def __init__(self, context, folder, role="client"):
        self.socket = context.socket(zmq.ROUTER)
        self.socket.linger = 0
        secure_server(self.socket, folder, role)
        self.monitor = self.socket.get_monitor_socket(ACCEPTED | sum(REFUSED))
        self.endpoint = f"tcp://127.0.0.1:{self.socket.bind_to_random_port('tcp://127.0.0.1')}"

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()

    def handshake(self):
        assert self.monitor.poll(WAIT_MS), "no handshake came to an end"
        return recv_monitor_message(self.monitor)["event"]

    def receive(self):
        assert self.socket.poll(WAIT_MS), "nothing arrived"
        return self.socket.recv_multipart()[1]


class Client:
    """A DEALER that says `text` to a server, and does not knock again if it is refused."""

    def __init__(self, context, endpoint, text, secure=None):
        self.socket = context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.reconnect_ivl = 60_000
        if secure is not None:
            secure(self.socket)
        self.socket.connect(endpoint)
        with contextlib.suppress(zmq.Again):  # ZeroMQ has given up already: it was refused
            self.socket.send(text, zmq.NOBLOCK)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.socket.close()


def by_key(folder, role="client"):
    return lambda socket: secure_client(socket, folder, role)


def of_another_server(tmp_path):
    """Whole and well made, but not of this server: the server's key is right, the client's unknown to it."""
    other = tmp_path / "other"
    make_keys(other)
    return other


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder(made):
    files = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    pairs = {f"{name}{end}" for name in ("server", "client", "worker") for end in (".key", ".key_secret")}
    assert files == pairs | {"clients/client.key", "workers/worker.key"}
    assert [mode(path) for path in (made, made / "clients", made / "workers")] == [0o700] * 3
    assert {mode(path) for path in made.glob("*.key_secret")} == {0o600}
    assert (made / "clients/client.key").read_bytes() == (made / "client.key").read_bytes()
    assert b"secret" not in (made / "clients/client.key").read_bytes()
    assert len({path.read_bytes() for path in made.glob("*.key_secret")}) == 3


def test_the_right_key_passes(context, made, tmp_path):
    there = tmp_path / "client's machine"
    there.mkdir()
    for name in ("server.key", "client.key_secret"):
        shutil.copy(made / name, there / name)
    with Authenticator(context, made), Server(context, made) as server:
        with Client(context, server.endpoint, b"hello", by_key(there)):
            assert server.handshake() == ACCEPTED
            assert server.receive() == b"hello"


def without_a_key(made, tmp_path):
    return None


def with_an_unknown_key(made, tmp_path):
    folder = of_another_server(tmp_path)
    shutil.copy(made / "server.key", folder / "server.key")
    return by_key(folder)


def for_another_server(made, tmp_path):
    folder = of_another_server(tmp_path)
    shutil.copy(made / "client.key_secret", folder / "client.key_secret")
    return by_key(folder)


def with_a_workers_key(made, tmp_path):
    return by_key(made, "worker")


def by_password(made, tmp_path):
    def secure(socket):
        socket.plain_username, socket.plain_password = b"client", b"client"

    return secure


@pytest.mark.parametrize(
    "stranger",
    [without_a_key, with_an_unknown_key, for_another_server, with_a_workers_key, by_password],
    ids=lambda stranger: stranger.__name__,
)
def test_strangers_are_refused(context, made, tmp_path, stranger):
    with Authenticator(context, made), Server(context, made) as server:
        with Client(context, server.endpoint, b"stranger", stranger(made, tmp_path)):
            assert server.handshake() in REFUSED
            with Client(context, server.endpoint, b"good", by_key(made)):
                assert server.handshake() == ACCEPTED
                assert server.receive() == b"good"
                assert not server.socket.poll(0), "the stranger's message arrived"


def test_a_client_is_no_worker(context, made):
    with Authenticator(context, made), Server(context, made, "worker") as server:
        with Client(context, server.endpoint, b"client", by_key(made)):
            assert server.handshake() in REFUSED
        with Client(context, server.endpoint, b"worker", by_key(made, "worker")):
            assert server.handshake() == ACCEPTED
            assert server.receive() == b"worker"


def test_without_an_authenticator_nobody_is_let_in(context, made):
    with Server(context, made) as server:
        with Client(context, server.endpoint, b"too early", by_key(made)):
            assert server.handshake() in REFUSED
        with Authenticator(context, made):
            with Client(context, server.endpoint, b"good", by_key(made)):
                assert server.handshake() == ACCEPTED
                assert server.receive() == b"good"


def test_a_client_is_added_while_the_server_runs(context, keys, tmp_path):
    with Authenticator(context, keys) as authenticator, Server(context, keys) as server:
        secret = make_client_keys(keys, "search.2")
        assert secret == keys / "search.2.key_secret" and mode(secret) == 0o600
        assert sorted(path.name for path in (keys / "clients").iterdir()) == ["client.key", "search.2.key"]
        there = tmp_path / "there"
        there.mkdir()
        shutil.copy(keys / "server.key", there)
        shutil.copy(secret, there / "client.key_secret")
        with Client(context, server.endpoint, b"before", by_key(there)):
            assert server.handshake() in REFUSED
        authenticator.reload()
        with Client(context, server.endpoint, b"after", by_key(there)):
            assert server.handshake() == ACCEPTED
            assert server.receive() == b"after"
        (keys / "clients/search.2.key").unlink()
        authenticator.reload()
        with Client(context, server.endpoint, b"taken out", by_key(there)):
            assert server.handshake() in REFUSED


def test_a_reload_that_fails_changes_nothing(context, keys):
    with Authenticator(context, keys) as authenticator, Server(context, keys) as server:
        (keys / "clients/client.key").unlink()
        (keys / "workers/half.key").write_text("metadata\ncurve\n")
        with pytest.raises(ConfigError, match=r"half\.key cannot be read as a key \(No public key found"):
            authenticator.reload()
        with Client(context, server.endpoint, b"still in", by_key(keys)):
            assert server.handshake() == ACCEPTED


def test_keys_are_never_overwritten(keys):
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="not empty, and keys are never overwritten.*--client NAME"):
        make_keys(keys)
    with pytest.raises(ConfigError, match=r"server\.key_secret is already there.*take another name"):
        make_client_keys(keys, "server")
    assert {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match="is not empty"):
        make_keys(keys / "server.key")


def test_an_empty_folder_will_do(tmp_path):
    tmp_path.chmod(0o755)
    folder = tmp_path / "empty"
    folder.mkdir(0o755)
    make_keys(folder)
    assert mode(folder) == 0o700 and (folder / "server.key_secret").exists()


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a b", "a/b", "x" * 65, "ein\n"])
def test_names_of_clients(keys, name):
    before = sorted(keys.rglob("*"))
    with pytest.raises(ConfigError, match="The client is called .*; expected 1 to 64 letters"):
        make_client_keys(keys, name)
    assert sorted(keys.rglob("*")) == before


@pytest.mark.parametrize(
    ("secure", "name"),
    [
        (secure_server, "server.key_secret"),
        (secure_client, "server.key"),
        (secure_client, "client.key_secret"),
        (lambda socket, folder: secure_client(socket, folder, "worker"), "worker.key_secret"),
    ],
    ids=["server", "server's public", "client", "worker"],
)
def test_missing_and_damaged_files(context, keys, secure, name):
    with context.socket(zmq.DEALER) as socket:
        text = (keys / name).read_text()
        for content, problem in [
            ("metadata\n", r"cannot be read as a key \(No public key found in .*\)"),
            ('curve\n    public-key = "abc"\n', "holds something that is no key of 40 characters"),
            ("public-key\n", "cannot be read as a key"),
        ]:
            (keys / name).write_text(content)
            with pytest.raises(ConfigError, match=f"{name} {problem}.*make new keys in a new folder"):
                secure(socket, keys)
        if name.endswith("_secret"):
            (keys / name).write_text("".join(line for line in text.splitlines(True) if "secret-" not in line))
            with pytest.raises(
                ConfigError, match=f"{name} has a public key only; expected the secret one too"
            ):
                secure(socket, keys)
        (keys / name).unlink()
        with pytest.raises(ConfigError, match=f"{name} is missing. `propeller-server keys DIR` makes it"):
            secure(socket, keys)
        shutil.rmtree(keys)
        with pytest.raises(
            ConfigError, match=f"folder of keys {keys} is missing; `propeller-server keys {keys}`"
        ):
            secure(socket, keys)


@pytest.mark.parametrize("name", ["clients", "workers"])
def test_a_folder_of_the_allowed_is_missing(context, keys, name):
    shutil.rmtree(keys / name)
    with pytest.raises(ConfigError, match=f"keys/{name} is missing: it holds the public keys"):
        Authenticator(context, keys)
    if name == "clients":
        with pytest.raises(ConfigError, match="keys/clients is missing"):
            make_client_keys(keys, "search")


def test_what_is_open_to_all_is_warned_of(context, keys, caplog):
    with context.socket(zmq.DEALER) as socket, caplog.at_level(logging.WARNING, "propeller"):
        secure_client(socket, keys)
        (keys / "client.key_secret").chmod(0o640)
        secure_client(socket, keys)
        Authenticator(context, keys)
        assert caplog.messages == []
        (keys / "client.key_secret").chmod(0o644)
        secure_client(socket, keys)
        (keys / "clients").chmod(0o777)
        (keys / "workers/worker.key").unlink()
        Authenticator(context, keys)
    assert caplog.messages == [
        f"{keys}/client.key_secret can be read or written by everybody on this machine; `chmod 600` it",
        f"{keys}/clients can be written by everybody, who can so let in whom they like",
        f"{keys}/workers holds no *.key: no worker will be let in",
    ]


def test_libzmq_without_curve(context, made, tmp_path, monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with context.socket(zmq.DEALER) as socket:
        for call in (
            lambda: make_keys(tmp_path / "keys"),
            lambda: make_client_keys(made, "search"),
            lambda: secure_server(socket, made),
            lambda: secure_client(socket, made),
            lambda: Authenticator(context, made),
        ):
            with pytest.raises(ConfigError, match="built without CURVE.*pip install"):
                call()
    assert not (tmp_path / "keys").exists()


def test_a_client_does_not_load_asyncio(root):
    code = f"import sys, {auth.__name__}; print('asyncio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60, check=True
    )
    assert done.stdout == "False\n"
