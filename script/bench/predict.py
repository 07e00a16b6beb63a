"""Prediction from standard input beside the bare predictor on the same batches, and its memory.

    python script/bench/predict.py --bundle output/best/inference --text lines.txt --lines 200000

"Bare" is `Predictor.predict` on the very batches that the stream makes of the same lines, already read,
tokenised and padded; "stream" is all from bytes to written answers. The two take turns over pieces of the
input, so that the machine's moods hit both. `--text` is repeated until there are enough lines. Memory is the
peak of a real `--do_predict` process after a tenth of the lines and after all.
"""

from __future__ import annotations

import argparse
import io
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from propeller.bundle import read_bundle
from propeller.paddle import stream
from propeller.paddle.inference import Predictor

PIECE_ROWS = 5 * stream.CHUNK_ROWS
SCRIPT = Path(__file__).resolve().parents[2] / "example/finetune_classifier.py"


class Recorder:
    """Stands in for a predictor and keeps the batches it is given."""

    def __init__(self, predictor: Predictor):
        self._predictor, self.bundle = predictor, predictor.bundle
        self.batches: list[dict] = []

    def predict(self, arrays: dict) -> dict:
        """Keeps the batch and runs it."""
        self.batches.append(arrays)
        return self._predictor.predict(arrays)


def compare_speed(bundle_folder: Path, lines: list[bytes]) -> None:
    """Prints the speed of both and the ratio, piece by piece."""
    bundle = read_bundle(bundle_folder)
    processor = bundle.processor()
    predictor = Predictor(bundle)
    ratios, seconds = [], {"bare": 0.0, "stream": 0.0}
    for start in range(0, len(lines), PIECE_ROWS):
        piece = lines[start : start + PIECE_ROWS]
        recorder = Recorder(predictor)
        write = stream.format_text(processor)

        def answer(piece: list[bytes], with_: object) -> float:
            began = time.perf_counter()
            source, target = io.BytesIO(b"".join(piece)), io.StringIO()
            stream.predict_lines(with_, source, target, processor=processor, write=write)  # noqa: B023
            return time.perf_counter() - began

        answer(piece, recorder)  # also prepares every shape once
        began = time.perf_counter()
        for batch in recorder.batches:
            predictor.predict(batch)
        bare = time.perf_counter() - began
        whole = answer(piece, predictor)
        ratios.append(bare / whole)
        seconds["bare"] += bare
        seconds["stream"] += whole
    for name, total in seconds.items():
        print(f"{name}: {len(lines) / total:.0f} lines/s")
    whole = seconds["bare"] / seconds["stream"]
    print(f"stream / bare speed: {whole:.3f} (median piece {statistics.median(ratios):.3f})")


def peak_memory(bundle_folder: Path, lines: list[bytes]) -> float:
    """Peak memory in MB of a process that predicts these lines."""
    program = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    with tempfile.TemporaryFile() as source:
        source.writelines(lines)
        source.seek(0)
        done = subprocess.run(
            [sys.executable, "-c", program, SCRIPT, "--do_predict", "--bundle", bundle_folder],
            stdin=source,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return int(done.stderr.split()[-1]) / unit


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lines", type=int, default=200_000)
    args = parser.parse_args()
    given = args.text.read_bytes().splitlines(keepends=True)
    lines = list(itertools.islice(itertools.cycle(given), args.lines))
    compare_speed(args.bundle, lines)
    few, all_ = peak_memory(args.bundle, lines[: len(lines) // 10]), peak_memory(args.bundle, lines)
    print(f"peak memory: {few:.0f} MB after {len(lines) // 10} lines, {all_:.0f} MB after {len(lines)}")


if __name__ == "__main__":
    main()
