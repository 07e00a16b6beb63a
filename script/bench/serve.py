"""The encoder server beside infinity, sentence-transformers and the bare predictor; and what it endures.

    python script/bench/serve.py --model MODEL --data GLUE \\
        --infinity-python .venv-infinity/bin/python --sentence-transformers-python .venv-st/bin/python

`MODEL` is a sentence-transformers folder of a BERT. Parts, all of them unless named by `--parts`:

    equal       vectors beside those of sentence-transformers
    throughput  1, 4 and 32 clients with requests of 1, 8 and 64 texts
    latency     one short text at a time
    chaos       workers killed, the server restarted, bad messages, clients that vanish
    soak        full load for half an hour: memory, file handles, p99
    bulk        100,000 lines through stdin, killed and resumed

For the first three all contenders are up at the same time and take turns with the same texts, a turn each in
a round; what the idle ones cost is said. Clients run in a process of their own on the same machine, so what
they cost counts. "The bare predictor" runs the very batches that the server makes of the load, tokenised and
padded before the clock runs, in one process with all cores as threads and in a process a core; the faster one
counts. "Full" is the same with all texts waiting at once, which shows what batches lose to few texts in
flight. Run it on a machine with nothing else to do: torch falls to a tenth of its speed where two processes
share two cores, and others do not.

The exit status is 1 if a vector, an answer or a curve is not what was asked for; speeds are judged in print.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from serve_chaos import run_chaos
from serve_contenders import contenders
from serve_long import run_bulk, run_soak
from serve_speed import check_equal, measure_latency, measure_throughput
from serve_texts import read_texts

COMPARED, ENDURED = ("equal", "throughput", "latency"), ("chaos", "soak", "bulk")
# A smoke run: everything once, nothing that can be measured.
QUICK = {
    "clients": [1, 2],
    "rows": [1, 8],
    "rounds": 1,
    "texts": 32,
    "uncounted": 8,
    "requests": 200,
    "kill_every": 80,
    "soak_minutes": 2,
    "minute_s": 1.0,
    "threads": 4,
    "lines": 500,
}


def run(args: argparse.Namespace, folder: Path) -> bool:
    """Runs the parts that are asked for; returns whether all was right."""
    texts = read_texts(args.data)
    words = [len(text.split()) for text in texts]
    p50, p90 = np.percentile(words, [50, 90])
    print(f"{len(texts)} texts; words: median {p50:.0f}, 90th percentile {p90:.0f}, at most {max(words)}")
    reached = {}
    if set(COMPARED) & set(args.parts):
        with contenders(args, folder) as started:
            if "equal" in args.parts:
                reached["equal"] = check_equal(started, texts, _new(folder / "equal"))
            if "throughput" in args.parts:
                reached["throughput"] = measure_throughput(started, texts, _new(folder / "throughput"), args)
            if "latency" in args.parts:
                measure_latency(started, _new(folder / "latency"), args)
    if "chaos" in args.parts:
        reached["chaos"] = run_chaos(args, texts)
    if "soak" in args.parts:
        reached["soak"] = run_soak(args, texts)
    if "bulk" in args.parts:
        reached["bulk"] = run_bulk(args, texts, _new(folder / "bulk"))
    print()
    for part, right in reached.items():
        print(f"{part}: {'as asked for' if right else 'NOT as asked for'}")
    return all(reached.values())


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="sentence-transformers folder")
    add("--data", type=Path, help="the GLUE folder; without it texts are made up")
    add("--infinity-python", help="interpreter that has requirements-infinity.txt")
    add("--sentence-transformers-python", help="interpreter that has requirements-peers.txt")
    add("--parts", nargs="+", choices=[*COMPARED, *ENDURED], default=[*COMPARED, *ENDURED])
    add("--only", default="", help="part of the contenders' names, such as fp32; default: all")
    add("--quick", action="store_true", help="a smoke run: all once, nothing worth measuring")
    add("--rounds", type=int, default=3)
    add("--clients", type=int, nargs="+", default=[1, 4, 32])
    add("--rows", type=int, nargs="+", default=[1, 8, 64], help="texts a request")
    add("--texts", type=int, default=1024, help="texts of a turn, at least")
    add("--uncounted", type=int, default=256, help="texts before the clock runs")
    add("--in-flight-texts", type=int, default=32, help="at least so many are unanswered at any time")
    add("--requests", type=int, default=10_000, help="of the chaos run")
    add("--kill-every", type=int, default=500, help="requests of the chaos run")
    add("--bad-share", type=float, default=0.05, help="of the chaos run's requests")
    add("--threads", type=int, default=16, help="clients of chaos run and soak")
    add("--soak-minutes", type=int, default=30)
    add("--lines", type=int, default=100_000, help="of bulk encoding")
    parser.set_defaults(minute_s=60.0)
    args = parser.parse_args(argv)
    for name, value in QUICK.items() if args.quick else ():
        if getattr(args, name) == parser.get_default(name):
            setattr(args, name, value)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    counts = ("rounds", "texts", "in_flight_texts", "requests", "kill_every", "threads")
    for name in (*counts, "soak_minutes", "lines"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    for name in ("clients", "rows"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name} {min(getattr(args, name))}: expected at least 1")
    if not 0 <= args.bad_share <= 0.5:
        parser.error(f"--bad-share {args.bad_share}: expected 0 to 0.5")
    if not (args.model / "vocab.txt").is_file():
        parser.error(f"--model {args.model}: expected a folder with vocab.txt")
    if args.data is not None and not args.data.is_dir():
        parser.error(f"--data {args.data}: expected the GLUE folder")
    if sys.platform != "linux":
        parser.error("processes are watched by /proc, which is Linux's")


def main() -> None:
    """Parses the flags and runs all."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended, too
    with tempfile.TemporaryDirectory() as folder:
        try:
            reached = run(args, Path(folder))
        except RuntimeError as error:  # a process failed, and says why
            sys.exit(str(error))
        sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
