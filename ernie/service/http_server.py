"""OpenAI-compatible HTTP in front of an encoder server, in a process of its own; needs the extra `[http]`.

    ERNIE_API_KEY=... python -m ernie.service.http_server --server tcp://localhost:8888 --port 8080

`openai_api.py` says what it answers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from propeller import cli
from propeller.errors import ConfigError
from propeller.service.settings import is_loopback

KEY_VARIABLE = "ERNIE_API_KEY"
TIMEOUT_S = 30.0
# The server that has started the front gives it 10 seconds to end.
_DRAIN_S = 8


def command(
    host: str,
    port: int,
    *,
    model: str | None = None,
    curve_keys: str | None = None,
    timeout: float = TIMEOUT_S,
    insecure: bool = False,
) -> list[str]:
    """The command line by which a server starts its front.

    Args:
        host: the address to listen on.
        port: the port.
        model: which of the server's models; None for its first.
        curve_keys: folder of the keys that the front shows the server.
        timeout: seconds that a request may take.
        insecure: allow an address beyond this host without an API key.

    Returns:
        Its arguments; `{address}` in them stands for the server's own, `{metrics}` for that of its metrics,
        such as `http://127.0.0.1:9000`.
    """
    arguments = [sys.executable, "-m", "ernie.service.http_server", "--server", "{address}"]
    arguments += ["--host", host, "--port", str(port), "--metrics", "{metrics}/metrics"]
    arguments += ["--timeout", str(timeout), "--lifeline"]
    if model is not None:
        arguments += ["--model", model]
    if curve_keys is not None:
        arguments += ["--curve-keys", curve_keys]
    return [*arguments, "--insecure"] if insecure else arguments


def check_exposure(host: str, *, insecure: bool) -> None:
    """Refuses to listen beyond this host when everybody would be let in.

    Raises:
        ConfigError: `host` is no loopback address, there is no API key in the environment, and that is not
            said to be meant.
    """
    if not (is_loopback(host) or insecure or os.environ.get(KEY_VARIABLE)):
        raise ConfigError(
            f"HTTP on {host} can be reached by others and there is no API key. Put one into the environment "
            f"variable {KEY_VARIABLE}, listen on 127.0.0.1, or say --insecure."
        )


def check_free(host: str, port: int) -> None:
    """Refuses an address that cannot be listened on, before anything is started for it.

    Raises:
        ConfigError: the port is taken, or the address is none of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host.strip("[]"), port), family=family):
            pass
    except OSError as error:
        raise ConfigError(f"HTTP cannot listen on {host}, port {port}: {error}. Take another.") from error


def check_installed() -> None:
    """Refuses to start without the extra `[http]`; loads nothing.

    Raises:
        ConfigError: a part of it is missing.
    """
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"HTTP needs {name}, which is not installed here: pip install 'ernie-propeller[http]'"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the front until SIGTERM or Ctrl-C, and lets the requests at hand finish."""
    args = _parser().parse_args(argv)
    check_exposure(args.host, insecure=args.insecure)
    check_installed()
    if args.lifeline:
        threading.Thread(target=_end_with_input, name="lifeline", daemon=True).start()
    import uvicorn

    from ernie.service.openai_api import make_app
    from propeller.service.client import AsyncInferenceClient

    cli.setup_logging()
    # Uvicorn ends by raising the signal again that it got, once it has answered what it had.
    signal.signal(signal.SIGTERM, _exit)

    def connect() -> AsyncInferenceClient:
        return AsyncInferenceClient(
            args.server, timeout=args.timeout, model=args.model, curve_keys=args.curve_keys
        )

    app = make_app(connect, os.environ.get(KEY_VARIABLE) or None, args.metrics or None)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=_DRAIN_S,
    )
    return 0


def _end_with_input() -> None:
    """Ends the process as SIGTERM does once standard input is at its end: who started it is gone."""
    # By its number: Python cannot end while a thread that it does not wait for is reading from `sys.stdin`.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _exit(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", default="tcp://localhost:8888", help="address of the encoder server")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on")
    parser.add_argument("--metrics", default="", help="URL of the server's metrics, shown at /metrics")
    parser.add_argument("--model", help="which of the server's models; its first by default")
    parser.add_argument("--curve-keys", help="folder of the keys that the server wants to see")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_S,
        help="seconds that a request may take, a wait for room in the queue included",
    )
    parser.add_argument("--insecure", action="store_true", help="listen beyond this host without an API key")
    parser.add_argument("--lifeline", action="store_true", help="end when standard input does")
    return parser


if __name__ == "__main__":
    cli.run(main)
