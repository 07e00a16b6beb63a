"""Searches a text file by meaning: embeds its lines with an encoder server, then answers queries.

    python example/semantic_search.py index --input lines.txt --index index
    python example/semantic_search.py query --index index "somewhere quiet to sleep" -k 5
    cat queries | python example/semantic_search.py query --index index

Needs a running encoder server (`python -m ernie.service.encoder_server -m MODEL`) and no Paddle. The nearest
are found by numpy, exactly; `--backend faiss` or `hnswlib` uses that library where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ernie.service.client import ErnieClient
from propeller import atomic, cli
from propeller.errors import ConfigError, DataError, ServerError
from propeller.lines import line_text

log = logging.getLogger("ernie")


def main() -> int:
    """Makes an index, or searches one; returns the exit code."""
    args = _parser().parse_args()
    cli.setup_logging()
    with ErnieClient(host=args.host, port=args.port, timeout=60.0) as client:
        if args.command == "index":
            return index(client, args.input, args.index)
        queries = [args.text] if args.text else texts(sys.stdin.buffer)
        search(client, args.index, queries, args.k, args.backend)
        return 0


def index(client: ErnieClient, source: Path, folder: Path) -> int:
    """Writes the lines, their vectors (float32, of length 1) and by which model these were made.

    A line that is no text is named, and kept as an empty one, so that the others keep their numbers.

    Returns:
        The exit code.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "index.json").is_file():
        raise ConfigError(f"{folder} is there already and no index; name another place for it.")
    encoder = client.encoder()
    if encoder.per_token:
        raise ConfigError("The server gives a vector for each token; start it with --pooling cls or mean.")
    with atomic.new_folder(folder, replace=True) as target:
        count = errors = 0
        with (
            open(source, "rb") as stream,
            open(target / "vectors.f32", "wb") as vectors,
            open(target / "lines.txt", "wb") as kept,
        ):
            found_texts = texts(stream)
            while chunk := list(itertools.islice(found_texts, 4096)):
                errors += chunk.count(None)
                lines = [text or "" for text in chunk]
                found = client.encode(lines, prompt="passage").embeddings
                found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
                vectors.write(found.astype("<f4").tobytes())
                kept.write("".join(f"{line}\n" for line in lines).encode())
                count += len(lines)
        if client.encoder().bundle != encoder.bundle:
            raise ServerError("The server has taken over another model meanwhile; make the index again.")
        made_by = {"model": encoder.bundle, "dim": encoder.dim}
        (target / "index.json").write_text(atomic.to_json(made_by) + "\n", "utf-8")
    print(f"{count} lines in {folder}, {errors} of them not read", file=sys.stderr)
    return 1 if errors else 0


def texts(stream: BinaryIO) -> Iterator[str | None]:
    """The lines of a stream; None, and an error in the log, in the place of one that is no text."""
    for number, line in enumerate(stream, 1):
        text = line_text(line.removesuffix(b"\n"), len(line))
        if isinstance(text, DataError):
            log.error("line %d: %s", number, text)
        yield None if isinstance(text, DataError) else text


def search(client: ErnieClient, folder: Path, queries: Iterable[str | None], k: int, backend: str) -> None:
    """Prints the k nearest lines to each query: rank, cosine, its number, the line; then a blank one."""
    if k < 1:
        raise ConfigError(f"-k is {k}; expected at least 1.")
    try:
        made_by = json.loads((folder / "index.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is no index ({error}); make one with the command index.") from error
    if client.encoder().bundle != made_by["model"]:
        raise ConfigError(f"{folder} was made by another model than the server's; make it again.")
    lines = (folder / "lines.txt").read_bytes().decode("utf-8").split("\n")[:-1]
    vectors = np.fromfile(folder / "vectors.f32", "<f4").reshape(-1, made_by["dim"])
    nearest = BACKENDS[backend](vectors)
    for query in queries:
        if query is None:
            print(flush=True)
            continue
        vector = client.encode([query], prompt="query").embeddings
        vector = vector / np.maximum(np.linalg.norm(vector), 1e-12)
        places, cosines = nearest(vector, min(k, len(lines))) if lines else ((), ())
        for rank, (line, cosine) in enumerate(zip(places, cosines, strict=True), 1):
            print(f"{rank}\t{cosine:.4f}\t{line + 1}\t{lines[line]}")
        print(flush=True)


def with_numpy(vectors: np.ndarray) -> Any:
    """Compares with all lines: 10 ms for 100,000 of them, 384 numbers each."""

    def nearest(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        cosines = vectors @ query[0]
        best = np.argpartition(-cosines, k - 1)[:k]
        best = best[np.argsort(-cosines[best], kind="stable")]
        return best, cosines[best]

    return nearest


def with_faiss(vectors: np.ndarray) -> Any:
    """Exact as well."""
    found = _imported("faiss", "faiss-cpu").IndexFlatIP(vectors.shape[1])
    found.add(vectors)
    return lambda query, k: tuple(rows[0] for rows in reversed(found.search(query, k)))


def with_hnswlib(vectors: np.ndarray) -> Any:
    """Approximate, for millions of lines."""
    found = _imported("hnswlib", "hnswlib").Index(space="ip", dim=vectors.shape[1])
    found.init_index(max_elements=len(vectors), ef_construction=200, M=16)
    found.add_items(vectors)

    def nearest(query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found.set_ef(max(50, 2 * k))
        places, distances = found.knn_query(query, k)
        return places[0], 1.0 - distances[0]

    return nearest


BACKENDS = {"numpy": with_numpy, "faiss": with_faiss, "hnswlib": with_hnswlib}


def _imported(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--backend {name} needs it: pip install {package}") from error


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--index", type=Path, required=True, help="folder of the index")
    common.add_argument("--host", default="localhost", help="where the encoder server runs")
    common.add_argument("--port", type=int, default=8888, help="its port")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("index", parents=[common], help="make an index of a file")
    making.add_argument("--input", type=Path, required=True, help="UTF-8 text, a passage a line")
    asking = commands.add_parser("query", parents=[common], help="search it")
    asking.add_argument("text", nargs="?", help="what to look for; default: each line of standard input")
    asking.add_argument("-k", type=int, default=5, help="how many lines to show")
    asking.add_argument("--backend", choices=BACKENDS, default="numpy", help="what finds the nearest")
    return parser


if __name__ == "__main__":
    cli.run(main)
