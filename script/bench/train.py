"""Speed and memory of fine-tuning, side by side with Transformers' and PaddleNLP's Trainers.

    python script/bench/train.py --data GLUE --peer output/peer/sst2_seed0 \\
        --transformers-python .venv-peers/bin/python --paddlenlp-python .venv-paddlenlp/bin/python

`--peer` is a folder of `peer_transformers.py`: its `init/` is the model that all train, its `batches.json`
the order of the examples, SST-2 of `--data`. All get the same token ids, and batches padded to their longest.
A round gives every trainer the same steps, one trainer after the other, each in a fresh process; the order is
reversed from round to round, so that the machine's moods hit all alike. The first steps of a process are not
counted. What is printed are medians over the rounds; ratios are taken within a round.

Where propeller makes "own batches", it groups examples of like length out of all, as its scripts do; these
are other batches than the baseline's, so give them many steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train_job import Job, Report, read_report

from ernie.tasks.classification import ClassificationProcessor
from ernie.tokenizing import load_tokenizer
from propeller.cores import available_cores

HERE = Path(__file__).resolve().parent
BASELINE = "Transformers fp32"
NUM_ROWS, MAX_SEQLEN = 10_000, 128
# What decides on threads and kernels is the trainer's own choice, or named with it.
CLEANED = ("OMP_", "MKL_", "KMP_", "GLOG_", "FLAGS_", "PADDLE_", "PROPELLER_")

Examples = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """One contender.

    Attributes:
        name: as the table shows it.
        command: what is run, without `--job` and `--out`.
        environment: set for it.
        own_batches: whether it makes its batches from all examples by itself.
    """

    name: str
    command: Sequence[str]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    own_batches: bool = False


def find_trainers(args: argparse.Namespace, logs: Path) -> list[Trainer]:
    """The contenders whose interpreters are given; says which are left out."""
    cores = {"OMP_NUM_THREADS": str(available_cores())}
    trainers = []
    for ranks in sorted({1, args.ranks}):
        launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", str(ranks), "--log_dir", str(logs)]
        command = [sys.executable, *(launch if ranks > 1 else []), str(HERE / "train_propeller.py")]
        name = f"propeller, {ranks} ranks" if ranks > 1 else "propeller"
        trainers.append(Trainer(name, command))
        if args.seq_len is None:  # where all are of one length there is nothing to group
            trainers.append(Trainer(f"{name}, own batches", [*command, "--own-batches"], own_batches=True))
    if args.transformers_python:
        command = [args.transformers_python, str(HERE / "train_transformers.py")]
        trainers.append(Trainer(BASELINE, command, cores))
        trainers.append(Trainer("Transformers bf16", [*command, "--bf16"], cores))
    else:
        print("left out: Transformers, for want of --transformers-python")
    if args.paddlenlp_python:
        command = [args.paddlenlp_python, str(HERE / "train_paddlenlp.py")]
        mkl = {"MKL_DEBUG_CPU_TYPE": "5"}
        trainers.append(Trainer("PaddleNLP as installed", command))
        trainers.append(Trainer("PaddleNLP, MKL_DEBUG_CPU_TYPE=5", command, mkl))
        trainers.append(Trainer("PaddleNLP, the same, all cores", command, {**mkl, **cores}))
    else:
        print("left out: PaddleNLP, for want of --paddlenlp-python")
    left = [trainer for trainer in trainers if args.only in trainer.name or trainer.name == BASELINE]
    if not left:
        raise SystemExit(f"--only {args.only!r}: expected a part of one of {[t.name for t in trainers]}")
    return left


def read_examples(data: Path, peer: Path, seq_len: int | None) -> Examples:
    """The tokenised examples in the order of the peer's batches.

    Args:
        data: the GLUE folder.
        peer: a folder of `peer_transformers.py`.
        seq_len: cuts the running text into examples of this length, in place of sentences.
    """
    init = peer / "init"
    processor = ClassificationProcessor(load_tokenizer(init), ["0", "1"], max_seqlen=MAX_SEQLEN, pair=False)
    rows = processor.prepare(list(itertools.islice(processor.read(data / "SST-2/train.tsv.gz"), NUM_ROWS)))
    order = itertools.chain.from_iterable(json.loads((peer / "batches.json").read_text()))
    encoded = [{"input_ids": row["input_ids"].tolist(), "label": int(row["label"])} for row in rows]
    examples = [encoded[row] for row in order]
    if seq_len is None:
        return examples
    first, last = examples[0]["input_ids"][0], examples[0]["input_ids"][-1]
    text = [token for example in examples for token in example["input_ids"][1:-1]]
    room = seq_len - 2
    return [
        {"input_ids": [first, *text[start : start + room], last], "label": number % 2}
        for number, start in enumerate(range(0, len(text) - room + 1, room))
    ]


def plan_round(examples: Examples, init: Path, number: int, args: argparse.Namespace) -> tuple[Job, Job]:
    """Returns the jobs of a round: the next examples in order, beginning anew after the last; and all."""
    num_steps = args.uncounted_steps + args.steps
    size = num_steps * args.batch_size
    all_ = Job(str(init), examples, args.batch_size, num_steps, args.uncounted_steps, seed=number)
    piece = list(itertools.islice(itertools.cycle(examples), number * size, (number + 1) * size))
    return dataclasses.replace(all_, examples=piece), all_


def run(trainer: Trainer, job: Job, folder: Path) -> Report:
    """Runs one trainer for one round.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    folder.mkdir()
    job.write(folder / "job.json")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(CLEANED)}
    done = subprocess.run(
        [*trainer.command, "--job", str(folder / "job.json"), "--out", str(folder / "report.json")],
        env={**clean, **trainer.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or not (folder / "report.json").exists():
        end = "\n".join(done.stdout.splitlines()[-15:])
        raise RuntimeError(f"{trainer.name} ended with {done.returncode}:\n{end}")
    return read_report(folder / "report.json", sorted(folder.glob("report.rank*")))


def median_ratio(values: Sequence[float], baseline: Sequence[float] | None) -> str:
    """The median of the ratios within each round."""
    if baseline is None:
        return "-"
    return f"{statistics.median(a / b for a, b in zip(values, baseline, strict=True)):.2f}"


def print_table(reports: dict[str, list[Report]]) -> None:
    """Prints Markdown: medians over the rounds, ratios within them."""
    base = reports.get(BASELINE)
    base_speeds = base and [report.examples / report.seconds for report in base]
    base_peaks = base and [report.peak_bytes for report in base]
    print(
        f"\n| trainer | examples/s (lowest to highest) | to {BASELINE} | tokens/s | padding | peak memory | "
        f"to {BASELINE} | mean loss |\n|---|---|---|---|---|---|---|---|"
    )
    for name, rounds in reports.items():
        speeds = [report.examples / report.seconds for report in rounds]
        peaks = [report.peak_bytes for report in rounds]
        cells = [
            name,
            f"{statistics.median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})",
            median_ratio(speeds, base_speeds),
            f"{statistics.median(report.tokens / report.seconds for report in rounds):.0f}",
            f"{1 - sum(r.tokens for r in rounds) / sum(r.cells for r in rounds):.1%}",
            f"{statistics.median(peaks) / (1 << 20):.0f} MB",
            median_ratio(peaks, base_peaks),
            f"{statistics.mean(report.loss for report in rounds):.4f}",
        ]
        print(f"| {' | '.join(cells)} |")


def link_init(source: Path, target: Path) -> Path:
    """Links the model's files into a folder that can be written: PaddleNLP writes beside what it reads."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).symlink_to(path.resolve())
    return target


def compare(args: argparse.Namespace, work: Path) -> int:
    """Runs all rounds and prints the table.

    Returns:
        The exit code: 1 if a trainer failed, or trained another model than the others.
    """
    trainers = find_trainers(args, work / "logs")
    init = link_init(args.peer / "init", work / "init")
    examples = read_examples(args.data, args.peer, args.seq_len)
    reports: dict[str, list[Report]] = {trainer.name: [] for trainer in trainers}
    failed = []
    for number in range(args.rounds):
        given, all_ = plan_round(examples, init, number, args)
        for place, trainer in enumerate(trainers[:: -1 if number % 2 else 1]):
            if trainer.name in failed:
                continue
            try:
                job = all_ if trainer.own_batches else given
                report = run(trainer, job, work / f"round{number}_{place}")
            except RuntimeError as error:
                print(error, file=sys.stderr)
                failed.append(trainer.name)
                del reports[trainer.name]
                continue
            reports[trainer.name].append(report)
            speed = f"{report.examples / report.seconds:.1f} examples/s"
            print(f"round {number + 1}/{args.rounds}, {trainer.name}: {speed} {report.versions}", flush=True)
    print_table(reports)
    if failed:
        print(f"\nfailed and left out: {', '.join(failed)}")
    sizes = {report.num_parameters for rounds in reports.values() for report in rounds}
    if len(sizes) > 1:
        print(f"\nnot the same model: {sorted(sizes)} parameters")
    return 1 if failed or len(sizes) > 1 else 0


def parse_args() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="the GLUE folder")
    parser.add_argument("--peer", type=Path, required=True, help="folder of peer_transformers.py, with init/")
    parser.add_argument("--transformers-python", help="interpreter that has requirements-peers.txt")
    parser.add_argument("--paddlenlp-python", help="interpreter that has requirements-paddlenlp.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="counted steps of a round")
    parser.add_argument("--uncounted-steps", type=int, default=5, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, help="running text cut into this length, not sentences")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of propeller where it has several")
    parser.add_argument("--only", default="", help="part of the names to run; the baseline runs in any case")
    args = parser.parse_args()
    for name, least in (("rounds", 1), ("steps", 1), ("uncounted_steps", 1), ("batch_size", 1), ("ranks", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    if args.seq_len is not None and not 3 <= args.seq_len <= 512:
        parser.error(f"--seq-len {args.seq_len}: expected 3 to 512")
    return args


def main() -> None:
    """Parses the flags and runs all."""
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(compare(args, Path(folder)))


if __name__ == "__main__":
    main()
