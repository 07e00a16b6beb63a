"""Converts a GLUE folder as it is downloaded to tables with a header: text_a, text_b for pairs, label.

    python script/en_glue/preprocess/convert.py GLUE_DATA [OUTPUT]

Each task keeps its folder, with train.tsv, dev.tsv and test.tsv; of MNLI, dev and test lie in m/ and mm/.
Labels stay as they are; test sets that have none get no such column. Rows that cannot be used are left
out of train and dev, and counted: malformed ones of QQP, pairs of MNLI without a gold label.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ernie.tasks.classification_files import read_classification, read_parts
from ernie.tasks.glue import TASKS, Task, set_files
from propeller import atomic, cli
from propeller.errors import ConfigError

log = logging.getLogger("ernie")

OUTPUT = "glue_data_processed"

# Where a set goes that is not called as its file.
_PLACES = {
    "dev_matched": "m/dev",
    "dev_mismatched": "mm/dev",
    "test_matched": "m/test",
    "test_mismatched": "mm/test",
    "ax": "diagnostic-full",
    "test_ax": "diagnostic",
}


def main() -> int:
    """Converts every task that is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("glue_data", type=Path, metavar="GLUE_DATA", help="the folder with CoLA/, MRPC/, ...")
    parser.add_argument("output", type=Path, nargs="?", default=OUTPUT, help=f"default: {OUTPUT}")
    args = parser.parse_args()
    cli.setup_logging()
    if not args.glue_data.is_dir():
        raise ConfigError(f"{args.glue_data} is no folder. Name the one that GLUE was downloaded to.")
    tasks = [task for task in TASKS.values() if task.submissions]
    found = {task: files for task in tasks if (files := set_files(task, args.glue_data / task.folder))}
    if not found:
        names = ", ".join(f"{task.folder}/" for task in tasks)
        raise ConfigError(f"{args.glue_data} holds no task; expected some of {names} with their .tsv files.")
    for task, files in found.items():
        for name, path in files.items():
            target = Path(args.output) / task.folder / f"{_PLACES.get(name, name)}.tsv"
            log.info("%s: %d rows", target, convert(task, path, target, labelled="test" not in name))
    missing = [task.folder for task in tasks if task not in found]
    if missing:
        log.info("not there: %s", ", ".join(missing))
    return 0


def convert(task: Task, path: Path, target: Path, *, labelled: bool) -> int:
    """Converts one set.

    Args:
        task: how it is laid out.
        path: its file.
        target: what to write.
        labelled: whether its rows must have labels.

    Returns:
        The number of rows.

    Raises:
        DataError: a row cannot be read; it names file and line.
    """
    rows = 0
    with atomic.new_file(target) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as out:
        for raw in read_parts(path, lambda part: read_classification(part, task.layout, labelled=labelled)):
            if not rows:
                out.write("\t".join(raw) + "\n")
            out.write("\t".join(raw.values()) + "\n")
            rows += 1
    return rows


if __name__ == "__main__":
    cli.run(main)
