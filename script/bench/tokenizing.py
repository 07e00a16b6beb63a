"""The WordPiece tokenizer beside Transformers' pure-Python one: equal ids, and how much faster.

    python -m venv peer && peer/bin/pip install "transformers<5" -e .
    peer/bin/python script/bench/tokenizing.py --data DATA_FOLDER
    peer/bin/python script/bench/tokenizing.py --golden tests/data/tokenizing_golden.json

Transformers 5 has no pure-Python tokenizer any more. Every line is tokenised by both, whole and cut to
two lengths; a line counts as unequal if any of the three is. The times are of whole lines, in batches that
alternate between the two; `ratio` is the median over the batches, `first` that of the first batch, for
which nothing is known yet of characters and words.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ernie.tokenizing import WordPieceTokenizer, read_vocab

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "the a un want ##want runn ##ing ##ed hello world cafe naive resume mask sep i do n t it s he llo"
    " 2020 19 ##99 aaaaaaaaaa ##aaaaaaaaaa ##bbbbbbbbbb"
    " ! ' \" # $ % & ( ) * + , - . / : ; < = > ? @ [ \\ ] ^ _ ` { | } ~"
    " 中 国 人 民 银 行 好 的 了 酒 店 龍 ，。 ， 。 ！ ？ 、 《 》 “ ” … — α β γ σ ##σ ς ##ς λ"
    " о к а ##к ##а н あ い ##い ア ##ア 😀 🚗 ##😀 € £ ① ﬁ ä ö ü ß é è ##é ##ä i̇ ı ᄀ ##ᅡ ##ᆨ 가 ##나"
)
POOLS = (
    "the want wanted running hello world hello, it's don't un".split(" ") + [" "] * 6,
    list("Café naïve RÉSUMÉ ÄÖÜäöüß İıŞş Ångström 2020 1999".split(" ")) + [" "] * 6,
    list("中国人民银行好的了酒店龍，。！？、《》“”…—豈更"),
    list("ΑΒΓΣΛαβγσςλ") + ["ΟΔΟΣ", "οδος", " "],
    list("ОКНАокна") + [" "],
    list("あいうアイウガがパぱ가나한국") + [" "],
    list("😀🚗👨‍👩‍👧🇨🇳✌🏽") + [" "],
    list(" \t\n\r\x00\x01\x1c\x7f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\u200d\ufeff\ufffd\u00ad"),
    list("\udc00\udfff") + ["ab", " ", "中"],
    list(SPECIAL) + ["[CLS", "]", "[[SEP]]", "[mask]", "ab", " "],
    list("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + ["ab", "1", " "],
    list("€£¥①②ﬁﬂ½²Ⅳ™№ﬀＡＢｃ１２") + [" "],
)
MARKS = ["e\u0301", "A\u030a", "n\u0303o", "\u0301", "\u0300\u0316", "あ\u3099", "क\u094d", "ש\u05b8", " "]


ROW = "{:<20} {:>6} {:>8} {:>7} {:>9} {:>9} {:>6} {:>6}"


class Set(NamedTuple):
    """Lines of one file, with a second text each if they are pairs."""

    name: str
    vocab: Path
    lower: bool
    texts: list[str]
    pairs: list[str] | None


def main() -> None:
    """Compares on real data, or writes the golden file."""
    parser = argparse.ArgumentParser(description="WordPiece here beside Transformers' pure-Python one.")
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--vocab_zh", type=Path, help="default: ERNIE 1.0's in the data folder")
    parser.add_argument("--vocab_en", type=Path, help="default: ERNIE 2.0's in the data folder")
    parser.add_argument("--lines", type=int, default=10_000, help="lines of each set at most")
    parser.add_argument("--golden", type=Path, help="write the golden file of the tests instead")
    args = parser.parse_args()
    if args.golden:
        write_golden(args.golden)
    elif args.data:
        print(ROW.format("set", "lines", "tokens", "unequal", "python", "here", "ratio", "first"))
        for one in sets(args):
            compare(one)
    else:
        parser.error("give --data or --golden")


def sets(args: argparse.Namespace) -> Iterator[Set]:
    """The real data, Chinese and English, single and in pairs."""
    zh = args.vocab_zh or args.data / "pretrain_demo/ernie/vocab.txt"
    en = args.vocab_en or args.data / "pretrain_demo/ernie/vocab_en.txt"
    count = args.lines
    chn = column(args.data / "chnsenticorp/train.tsv", 1, header=True)[:count]
    yield Set("ChnSentiCorp", zh, True, chn, None)
    raw = column(args.data / "raw_text/CLUECorpusSmall_bert_sampled.txt", 0)[:count]
    yield Set("raw text (zh)", zh, True, raw, None)
    lcqmc = args.data / "lcqmc/test.tsv"
    yield Set("LCQMC (pairs)", zh, True, column(lcqmc, 0)[:count], column(lcqmc, 1)[:count])
    sst = column(args.data / "glue/SST-2/train.tsv.gz", 0, header=True)[:count]
    yield Set("SST-2", en, True, sst, None)
    mrpc = args.data / "glue/MRPC/train.tsv"
    first, second = (column(mrpc, place, header=True)[:count] for place in (3, 4))
    yield Set("MRPC (pairs)", en, True, first, second)
    yield Set("MRPC (pairs, cased)", en, False, first, second)


def column(path: Path, place: int, header: bool = False) -> list[str]:
    """One column of a tab-separated file."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = data.decode("utf-8-sig").split("\n")[header:]
    return [line.rstrip("\r").split("\t")[place] for line in lines if line]


def reference(vocab: dict[str, int], lower: bool) -> Any:
    """Transformers' pure-Python tokenizer over this vocabulary."""
    from transformers import BertTokenizer, logging

    logging.set_verbosity_error()
    if not hasattr(BertTokenizer, "build_inputs_with_special_tokens"):
        raise SystemExit('This needs the pure-Python BertTokenizer: pip install "transformers<5".')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.txt"
        path.write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8", newline="\n")
        return BertTokenizer(str(path), do_lower_case=lower)


def compare(one: Set, batch: int = 500, lengths: tuple[int | None, ...] = (None, 128, 31)) -> None:
    """Prints how many lines come out unequal, and both speeds (texts/s, whole lines)."""
    vocab = read_vocab(one.vocab)
    slow, fast = reference(vocab, one.lower), WordPieceTokenizer(one.vocab, one.lower)
    unequal = tokens = 0
    times: list[tuple[float, float]] = []
    for start in range(0, len(one.texts), batch):
        texts = one.texts[start : start + batch]
        pairs = None if one.pairs is None else one.pairs[start : start + batch]
        wrong: set[int] = set()
        for length in lengths:
            limit = {} if length is None else {"truncation": "longest_first", "max_length": length}
            begin = time.perf_counter()
            expected = slow(texts, pairs, **limit)
            middle = time.perf_counter()
            found = fast.encode_batch(texts, pairs, max_seqlen=length)
            end = time.perf_counter()
            if length is None:
                times.append((middle - begin, end - middle))
                tokens += sum(len(row) for row in expected["input_ids"])
            for row, encoding in enumerate(found):
                same = encoding.input_ids.tolist() == expected["input_ids"][row]
                if not same or encoding.token_type_ids.tolist() != expected["token_type_ids"][row]:
                    wrong.add(row)
        unequal += len(wrong)
    python, here = (len(one.texts) / sum(column) for column in zip(*times, strict=True))
    ratio = statistics.median(slow / fast for slow, fast in times)
    first = times[0][0] / times[0][1]
    speeds = f"{python:.0f}/s", f"{here:.0f}/s", f"{ratio:.1f}", f"{first:.1f}"
    print(ROW.format(one.name, len(one.texts), tokens, unequal, *speeds))


def write_golden(path: Path, seed: int = 0) -> None:
    """Writes tricky texts with the ids that the pure-Python tokenizer gives them."""
    import transformers

    letters = [form for char in "abcdefghijklmnopqrstuvwxyz0123456789" for form in (char, f"##{char}")]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*SPECIAL, *WORDS.split(), *letters]))}
    rng = random.Random(seed)
    cases = []
    for lower in (True, False):
        tokenizer = reference(vocab, lower)
        # Cased, it composes accents, which neither BERT's own tokenizer nor the Rust library does.
        pools = [*POOLS, MARKS] if lower else POOLS
        for number in range(260):
            text, pair = _line(rng, pools), _line(rng, pools) if number % 2 else None
            length = rng.choice([None, 3, 8, 9, 16, 17])
            limit = {} if length is None else {"truncation": "longest_first", "max_length": length}
            expected = tokenizer(text, pair, **limit)
            cases.append([lower, text, pair, length, expected["input_ids"], sum(expected["token_type_ids"])])
    head = {
        "made by": "script/bench/tokenizing.py --golden",
        "reference": f"BertTokenizer of transformers {transformers.__version__}",
        "unicode": unicodedata.unidata_version,
        "columns": ["lower", "text", "pair", "max_seqlen", "input_ids", "tokens of type 1"],
        "vocab": list(vocab),
    }
    rows = ",\n".join(json.dumps(case) for case in cases)
    heads = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
    text = f'{{\n{heads},\n"cases": [\n{rows}\n]}}\n'
    path.write_text(text, encoding="utf-8")
    print(f"{len(cases)} cases in {path}")


def _line(rng: random.Random, pools: list[list[str]] | tuple[list[str], ...]) -> str:
    chosen = rng.sample(pools, rng.randint(1, 3))
    line = "".join(rng.choice(rng.choice(chosen)) for _ in range(rng.choice([0, 1, 5, 12, 25])))
    return line + rng.choice(["", "", "", "a" * 100, " " + "b" * 101])


if __name__ == "__main__":
    main()
