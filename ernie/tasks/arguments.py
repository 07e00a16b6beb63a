"""The flags of the fine-tuning scripts, and the data files that they name."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from propeller.config import ArgumentParser
from propeller.data import split_files
from propeller.errors import ConfigError

# Of the data files in a folder; each also gzipped.
_ENDS = (".tsv", ".json", ".jsonl", ".txt")
_FILES_SHOWN = 20


def argument_parser(description: str) -> ArgumentParser:
    """The flags of every fine-tuning script."""
    parser = ArgumentParser(description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--verbose", action="store_true", help="log in detail")
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", help="folder with train, dev and test: folders, or train.tsv and so on")
    for name in ("train", "dev", "test"):
        data.add_argument(f"--{name}_set", metavar="FILE", help=f"the {name} file, in place of --data_dir")
    add_columns_argument(data)
    data.add_argument("--cache_dir", help="where prepared data is kept; default: the user's cache folder")
    model = parser.add_argument_group("model")
    model.add_argument("--warm_start_from", metavar="DIR", help="pretrained folder (own or Hugging Face)")
    add_tokenizer_arguments(model)
    model.add_argument(
        "--find_learning_rate", action="store_true", help="try rising rates on the data; trains nothing"
    )
    predict = parser.add_argument_group("prediction")
    predict.add_argument("--do_predict", action="store_true", help="answer the lines of standard input")
    predict.add_argument("--bundle", metavar="DIR", help="exported model; default: model_dir/best/inference")
    predict.add_argument("--format", choices=("tsv", "jsonl"), default="tsv", help="form of an output line")
    predict.add_argument("--strict", action="store_true", help="exit with 1 if a line was not answered")
    predict.add_argument("--bf16", action="store_true", help="predict in bfloat16 (CPU)")
    predict.add_argument("--dev_predictions", metavar="FILE", help="dev with predictions, JSONL")
    return parser


def add_columns_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the flag that `column_names` reads."""
    parser.add_argument("--columns", help="a file's columns in order, as text_a,text_b,label; _ skips one")


def add_tokenizer_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the flags by which `finetuning.resolve_model` finds and makes a tokenizer."""
    parser.add_argument("--vocab_file", help="vocabulary; default: the warm-start folder's")
    parser.add_argument("--max_seqlen", type=int, default=128, help="tokens an example has at most")
    parser.add_argument("--do_lower_case", type=_boolean, default=None, help="if the folder says nothing")
    parser.add_argument("--sentence_piece_model", help="SentencePiece model (ERNIE-tiny)")
    parser.add_argument("--word_dict", help="word segmentation dictionary (ERNIE-tiny)")


def _boolean(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}") from None


@dataclasses.dataclass(frozen=True)
class DataFiles:
    """Where the sets of a task lie: a file, or a folder of parts, for each that is there."""

    train: Path
    dev: Path
    test: Path | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> DataFiles:
        """Finds them by `--train_set --dev_set --test_set`, else in `--data_dir`.

        There they are called `train`, `dev` and `test`, or as `load_dataset` knows the files of a data set.

        Raises:
            ConfigError: train or dev is missing, or a file that was named, or there are two of one name
                (`train/` and `train.tsv`); what was looked for is named, and what is there.
        """
        train, dev = (_locate(name, args) for name in ("train", "dev"))
        if train is None or dev is None:
            name = "train" if train is None else "dev"
            raise ConfigError(
                f"No {name} data: name it with --{name}_set FILE, or put {name}/ or {name}.tsv (or "
                f"{', '.join(_ENDS[1:])}; also with .gz) into --data_dir (now {_shown(args.data_dir)})."
            )
        return cls(train, dev, _locate("test", args))

    def items(self) -> list[tuple[str, Path]]:
        """Name and place of the sets that are there."""
        return [(name, path) for name, path in dataclasses.asdict(self).items() if path is not None]


def _locate(name: str, args: argparse.Namespace) -> Path | None:
    flag = getattr(args, f"{name}_set")
    if flag is not None:
        if not Path(flag).exists():
            raise ConfigError(f"--{name}_set {flag} does not exist.")
        return Path(flag)
    if args.data_dir is None:
        return None
    if not Path(args.data_dir).is_dir():
        raise ConfigError(f"--data_dir {args.data_dir} is no folder.")
    ends = ["", *(f"{end}{packed}" for end in _ENDS for packed in ("", ".gz"))]
    candidates = (Path(args.data_dir) / f"{name}{end}" for end in ends)
    found = [path for path in candidates if path.exists()] or split_files(name, args.data_dir)
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise ConfigError(f"{args.data_dir} holds {names}; remove all but one, or name it by --{name}_set.")
    return found[0] if found else None


def _shown(folder: str | None) -> str:
    """A folder, and what is in it."""
    if folder is None:
        return "None"
    names = sorted(path.name for path in Path(folder).iterdir() if path.name[0] != ".")
    more = f" and {len(names) - _FILES_SHOWN} more" if len(names) > _FILES_SHOWN else ""
    return f"{folder}, which holds {', '.join(names[:_FILES_SHOWN]) or 'nothing'}{more}"


def column_names(args: argparse.Namespace) -> list[str] | None:
    """What `--columns` says."""
    return [name.strip() for name in args.columns.split(",")] if args.columns else None
