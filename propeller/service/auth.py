"""Keys by which server, clients and workers of other hosts know one another: ZeroMQ's CURVE.

    server.key   server.key_secret   the server's own; everybody who connects needs a copy of `server.key`
    client.key   client.key_secret   for clients
    worker.key   worker.key_secret   for hosts that join with workers
    clients/*.key                    public keys that may ask for predictions
    workers/*.key                    public keys that may join and so see what clients send

That is the server's folder. A client's machine has `server.key` and `client.key_secret` in its own, a host
that joins has `server.key` and `worker.key_secret`.
"""

from __future__ import annotations

import logging
import re
import stat
import tempfile
from pathlib import Path
from typing import Any, Literal

import zmq
import zmq.auth

from propeller import atomic
from propeller.errors import ConfigError

log = logging.getLogger("propeller")

Role = Literal["client", "worker"]

_SERVER = "server"
_ROLES: tuple[Role, ...] = ("client", "worker")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
# A key of 32 bytes in Z85, which encodes them by these characters.
_KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


def make_keys(folder: str | Path) -> None:
    """Makes the server's folder with key pairs for the server, a client and a worker.

    The folder is readable by its owner alone. It appears whole, or not at all.

    Raises:
        ConfigError: the folder holds something already, or libzmq has no CURVE.
    """
    _check_curve()
    folder = Path(folder)
    exists = folder.exists()
    if exists and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is not empty, and keys are never overwritten: whoever has a copy would be locked out. "
            "Name a new folder. To add a client to this one give --client NAME."
        )
    with atomic.new_folder(folder, replace=exists) as new:
        new.chmod(0o700)
        for name in (_SERVER, *_ROLES):
            _make_pair(new, name)
        for role in _ROLES:
            allowed = new / f"{role}s"
            allowed.mkdir(0o700)
            (allowed / f"{role}.key").write_bytes((new / f"{role}.key").read_bytes())


def make_client_keys(folder: str | Path, name: str) -> Path:
    """Makes a key pair for one more client and lets it in, at the next start or reload of the server.

    Args:
        folder: the server's.
        name: what the files are called; letters, digits, `_`, `.` and `-`.

    Returns:
        The secret key, which belongs on the client's machine as `client.key_secret`.

    Raises:
        ConfigError: the folder is not one of `make_keys`, or the name cannot be used or is taken.
    """
    _check_curve()
    folder = Path(folder)
    allowed = _allowed_folder(folder, "client")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"The client is called {name!r:.80}; expected 1 to 64 letters, digits, '_', '.' or '-', the "
            "first a letter or digit."
        )
    targets = [folder / f"{name}.key_secret", folder / f"{name}.key", allowed / f"{name}.key"]
    for path in targets:
        if path.exists():
            raise ConfigError(f"{path} is already there, and keys are never overwritten: take another name.")
    with tempfile.TemporaryDirectory(dir=folder) as made:  # for its owner alone, whatever `folder` is like
        secret, public = _make_pair(Path(made), name)
        copy = Path(made) / "allowed"
        copy.write_bytes(public.read_bytes())
        # The client is let in last, when all else is in place.
        for source, target in zip((secret, public, copy), targets, strict=True):
            source.rename(target)
    return targets[0]


def secure_server(socket: zmq.Socket[Any], folder: str | Path, role: Role = "client") -> None:
    """Makes a socket take only connections by one of the keys that are allowed; call it before `bind`.

    Without a running `Authenticator` in the socket's context it takes none at all.

    Args:
        socket: any kind of socket.
        folder: the server's.
        role: whose connections it takes: those in `clients/`, or those in `workers/`.

    Raises:
        ConfigError: `server.key_secret` is missing or unusable, or libzmq has no CURVE.
    """
    _check_curve()
    socket.curve_publickey, socket.curve_secretkey = _secret_key(_file(folder, f"{_SERVER}.key_secret"))
    socket.curve_server = True
    socket.zap_domain = f"{role}s".encode()
    # libzmq otherwise lets every key in as long as there is no authenticator.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(socket: zmq.Socket[Any], folder: str | Path, role: Role = "client") -> None:
    """Makes a socket connect by key, and only to the server of `server.key`; call it before `connect`.

    Args:
        socket: any kind of socket.
        folder: holds `server.key`, and `client.key_secret` or `worker.key_secret`.
        role: which of these two.

    Raises:
        ConfigError: a file is missing or unusable, or libzmq has no CURVE.
    """
    _check_curve()
    server_key, _ = _load(_file(folder, f"{_SERVER}.key"))
    socket.curve_publickey, socket.curve_secretkey = _secret_key(_file(folder, f"{role}.key_secret"))
    socket.curve_serverkey = server_key


class Authenticator:
    """Decides, in a thread of its own, whose connections the secured sockets of a context take.

    A context manager that starts and stops it. A context has one at most; start it before sockets are bound.

    Args:
        context: of the sockets.
        folder: the server's.

    Raises:
        ConfigError: `clients/` is missing or holds a file that is no key, or libzmq has no CURVE.
    """

    def __init__(self, context: zmq.Context[Any], folder: str | Path):
        # Here, since clients, which have no use for it, should not wait for asyncio to load.
        from zmq.auth.thread import ThreadAuthenticator

        _check_curve()
        self._folder = Path(folder)
        self._thread = ThreadAuthenticator(context, log=logging.getLogger("propeller.auth"))
        self.reload()

    def __enter__(self) -> Authenticator:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the thread.

        Raises:
            zmq.ZMQError: the context has another one.
        """
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; connections that were let in stay, new ones are refused."""
        self._thread.stop()

    def reload(self) -> None:
        """Reads again who is allowed. A connection that stands stays, also one whose key was taken out.

        Raises:
            ConfigError: as above; those who were allowed before still are.
        """
        folders = {role: _allowed_folder(self._folder, role) for role in _ROLES}
        for role, folder in folders.items():
            files = sorted(folder.glob("*.key"))
            for file in files:
                _load(file)
            if not files:
                log.warning("%s holds no *.key: no %s will be let in", folder, role)
            if folder.stat().st_mode & stat.S_IWOTH:
                log.warning("%s can be written by everybody, who can so let in whom they like", folder)
        for role, folder in folders.items():
            self._thread.configure_curve(domain=f"{role}s", location=str(folder))


def _make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    public, secret = zmq.auth.create_certificates(folder, name)
    Path(secret).chmod(0o600)
    return Path(secret), Path(public)


def _check_curve() -> None:
    if not zmq.has("curve"):
        raise ConfigError(
            f"libzmq {zmq.zmq_version()} was built without CURVE, so keys cannot be used. Install pyzmq's "
            "own wheel, which has it: pip install --force-reinstall --only-binary pyzmq pyzmq."
        )


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(
            f"The folder of keys {folder} is missing; `propeller-server keys {folder}` makes it."
        )
    return folder


def _allowed_folder(folder: Path, role: Role) -> Path:
    allowed = _existing(folder) / f"{role}s"
    if not allowed.is_dir():
        raise ConfigError(
            f"{allowed} is missing: it holds the public keys of those who may connect. A server's folder is "
            "made by `propeller-server keys DIR`."
        )
    return allowed


def _file(folder: str | Path, name: str) -> Path:
    file = _existing(Path(folder)) / name
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing. `propeller-server keys DIR` makes it on the server's machine; copy it from "
            "there."
        )
    return file


def _load(file: Path) -> tuple[bytes, bytes | None]:
    """Reads a public key, and the secret one if it is there too."""
    try:
        public, secret = zmq.auth.load_certificate(file)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{file} cannot be read as a key ({error}). {_REMAKE}") from error
    if not all(_KEY.fullmatch(key) for key in (public, secret) if key is not None):
        raise ConfigError(f"{file} holds something that is no key of 40 characters. {_REMAKE}")
    return public, secret


_REMAKE = "Copy it again, or make new keys in a new folder by `propeller-server keys DIR`."


def _secret_key(file: Path) -> tuple[bytes, bytes]:
    public, secret = _load(file)
    if secret is None:
        raise ConfigError(f"{file} has a public key only; expected the secret one too. {_REMAKE}")
    if file.stat().st_mode & (stat.S_IROTH | stat.S_IWOTH):
        log.warning("%s can be read or written by everybody on this machine; `chmod 600` it", file)
    return public, secret
