"""Writes what an ERNIE/BERT encoder makes of texts: a vector for each text, and one for each token.

    python example/extract_features.py --warm_start_from MODEL --data_set dev.tsv --output_dir features
    cat lines | python example/extract_features.py --warm_start_from MODEL --layers 1,-2

Files in --output_dir: cls_emb.npy [texts, hidden], top_layer_emb.npy [tokens, hidden] with the tokens of all
texts one after the other, lengths.npy [texts] that says how many each has, and layer_N_emb.npy for --layers.
A data set is a file as for fine-tuning (text_a, text_b, label). Standard input: a text, or two with a tab
between, a line; one that cannot be read has NaN and no tokens, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from ernie.config import ErnieConfig
from ernie.tasks import finetuning
from ernie.tasks.arguments import add_columns_argument, add_tokenizer_arguments, column_names
from ernie.tasks.classification_files import Layout, read_classification
from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.pooling import EmbeddingSettings
from propeller import cli
from propeller.errors import ConfigError, DataError
from propeller.lines import line_text
from propeller.processor import Raw
from propeller.types import HParams

log = logging.getLogger("ernie")

MAX_SHOWN_ERRORS = 20


def main() -> int:
    """Extracts features; returns the exit code."""
    args = _parser().parse_args()
    cli.setup_logging()
    if args.batch_size < 1:
        raise ConfigError(f"--batch_size is {args.batch_size}; expected at least 1.")
    config, tokenizer = finetuning.resolve_model(args, HParams())
    processor = EmbeddingProcessor(tokenizer, settings(args, config))
    raws = read_stdin(processor) if args.data_set is None else read_file(args)

    from ernie.tasks.encoder import load_encoder
    from ernie.tasks.features import Extractor, layer_numbers, write_features
    from propeller.paddle.runtime import set_device

    layers = layer_numbers(args.layers, config.num_hidden_layers)
    set_device(args.device)
    model = load_encoder(args.warm_start_from, processor.settings).encoder
    extractor = Extractor(model, processor, layers=layers, batch_size=args.batch_size)
    bar = tqdm(raws, unit=" texts", disable=not sys.stderr.isatty())
    done = write_features(bar, extractor, args.output_dir)
    log.info("%d texts, %d tokens in %s", done.texts, done.tokens, args.output_dir)
    if done.truncated:
        log.warning("%d texts were cut to %d tokens (--max_seqlen)", done.truncated, args.max_seqlen)
    if done.errors:
        log.error("%d of %d lines could not be read", done.errors, done.texts)
    return 1 if done.errors else 0


def settings(args: argparse.Namespace, config: ErnieConfig) -> EmbeddingSettings:
    """How the vector of a text is made."""
    is_pooler = args.pooling == "pooler"
    return EmbeddingSettings(
        encode_layer="pooler" if is_pooler else f"layer{config.num_hidden_layers}",
        pooling=args.pooling,
        normalize=False,
        dimensions=config.hidden_size,
        max_seqlen=args.max_seqlen,
    )


def read_file(args: argparse.Namespace) -> Iterable[Raw]:
    """The rows of a file as for fine-tuning; labels may be missing."""
    names = column_names(args)
    return read_classification(
        args.data_set, Layout(cells=None if names is None else tuple(names)), labelled=False
    )


def read_stdin(processor: EmbeddingProcessor) -> Iterator[Raw | DataError]:
    """The lines of standard input; an error, which is logged with its line, in the place of what is no text.

    Raises:
        ConfigError: there is no standard input.
    """
    if sys.stdin is None:
        raise ConfigError("There is no standard input; name a file: --data_set FILE.")
    errors = 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        text = line_text(line.removesuffix(b"\n"), len(line))
        try:
            found = text if isinstance(text, DataError) else processor.parse(text)
        except DataError as error:
            found = error
        if isinstance(found, DataError):
            errors += 1
            if errors <= MAX_SHOWN_ERRORS:
                log.error("line %d: %s", number, found)
        yield found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--warm_start_from", metavar="DIR", required=True, help="pretrained folder (own or Hugging Face)")
    add_tokenizer_arguments(parser)
    add("--data_set", metavar="FILE", type=Path, help="the texts; default: lines of standard input")
    add_columns_argument(parser)
    add("--output_dir", metavar="DIR", type=Path, default=Path("embeddings"), help="default: embeddings")
    add(
        "--pooling",
        choices=("pooler", "cls", "mean", "max"),
        default="pooler",
        help="what cls_emb.npy holds; pooler, the default, as in the older script",
    )
    add("--layers", metavar="N,...", default="", help="more layers: 0 (embeddings), 1 to the last; -2, say")
    add("--batch_size", type=int, default=32, help="texts that go through the model at a time")
    add("--device", help="default: the best there is")
    return parser


if __name__ == "__main__":
    cli.run(main)
