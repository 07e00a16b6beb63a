from __future__ import annotations

import collections
import io
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie.tokenizing import SpecialTokens, load_tokenizer
from propeller.errors import CheckpointError, ConfigError, DataError

sentencepiece = pytest.importorskip("sentencepiece")
from ernie.subword import SentencePieceTokenizer, read_word_dict  # noqa: E402

WORDS = ["今天", "天气", "很好", "天气很好啊", "今天天气很好", "Hello", "is", "ab"]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def train(**options: Any) -> bytes:
    """A small model over words and blanks."""
    rng = random.Random(0)
    units = ["今天", "天气", "很好", "啊", "，", "。", "hello", "is", "good", "i̇s", "a", "b", "1"]
    lines = [" ".join(rng.choice(units) for _ in range(rng.randint(2, 9))) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, minloglevel=3,
        hard_vocab_limit=False, **options,
    )  # fmt: skip
    return model.getvalue()


MODEL = train()
PROCESSOR = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
PIECES = [PROCESSOR.id_to_piece(index) for index in range(PROCESSOR.get_piece_size())]
# As ERNIE-tiny's: numbers of its own, some of the pieces left out.
VOCAB = {token: index for index, token in enumerate([*SPECIAL, *sorted(PIECES)[5:]])}
TOKENIZER = SentencePieceTokenizer(MODEL, VOCAB, WORDS)


def by_definition(text: str) -> list[str]:
    """ERNIE-tiny's tokens: longest words of up to five characters, lower-cased, joined, cut into pieces."""
    words = []
    while text:
        size = next(size for size in (5, 4, 3, 2, 1) if size == 1 or text[:size] in WORDS)
        words.append(text[:size])
        text = text[size:]
    joined = " ".join(word.lower() for word in words if word != " ")
    return [piece if piece in VOCAB else "[UNK]" for piece in PROCESSOR.encode(joined, out_type=str)]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.text(st.sampled_from("今天气很好啊，。Helloisgab1 \t\u3000İΣ龘①é\u0301\x00😀")))
def test_tokens_are_those_of_the_definition(text: str) -> None:
    assert TOKENIZER.tokenize(text) == by_definition(text)
    for (begin, end), token in zip(offsets(text), TOKENIZER.tokenize(text), strict=True):
        assert 0 <= begin <= end <= len(text)
        if token.strip("▁").isalpha() and token.isascii() and "İ" not in text:
            assert text[begin:end].lower() == token.strip("▁")


def offsets(text: str) -> list[tuple[int, int]]:
    return [(begin, end) for begin, end in TOKENIZER.encode(text).offsets[1:-1].tolist()]


def test_words_are_cut_before_lower_casing() -> None:
    assert by_definition("今天天气很好啊") != by_definition("今天 天气 很好 啊")
    encoding = TOKENIZER.encode("Hello 今天，天气很好啊", "IS is", max_seqlen=64)
    tokens = TOKENIZER.convert_ids_to_tokens(encoding.input_ids)
    assert tokens[:2] == ["[CLS]", "▁hello"]
    assert encoding.offsets[1:3].tolist() == [[0, 5], [6, 8]]
    assert encoding.token_type_ids.tolist()[-3:] == [1, 1, 1]
    assert SentencePieceTokenizer(MODEL, VOCAB, WORDS, False).tokenize("IS is")[-1] == "▁is"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \u3000 ", []),
        ("今天  今天 ", [(0, 2), (4, 6)]),
        ("今天\ud800今天", [(0, 2), (2, 5)]),  # U+FFFD is a blank to the model
        ("İ今天", [(0, 1), (0, 1), (1, 3)]),
    ],
)
def test_offsets_point_into_the_original(text: str, expected: list[tuple[int, int]]) -> None:
    found = offsets(text)
    assert [row for row in found if row[0] < row[1]] == [row for row in expected if row[0] < row[1]]


def test_a_long_text() -> None:
    text = "今天天气很好 " * 3000
    encoding = TOKENIZER.encode(text, max_seqlen=16)
    assert len(encoding.input_ids) == 16
    assert encoding.num_tokens == len(by_definition(text)) + 2


def test_without_words_and_vocabulary_the_model_decides() -> None:
    tokenizer = SentencePieceTokenizer(train(pad_id=3), do_lower_case=False)
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert tokenizer.convert_ids_to_tokens(ids) == special
    assert tokenizer.encode("今天 龘").input_ids.tolist()[0::3] == [
        tokenizer.cls_token_id,
        tokenizer.unk_token_id,
    ]
    assert tokenizer.encode("今天 is").offsets[1:-1].tolist() == [[0, 2], [3, 5]]
    named = SentencePieceTokenizer(train(control_symbols=["[PAD]", "[CLS]", "[SEP]"]))
    assert named.convert_ids_to_tokens([named.cls_token_id, named.sep_token_id]) == ["[CLS]", "[SEP]"]


def test_units_stay_aligned() -> None:
    encoding = TOKENIZER.encode_units(["今天", " ", "is"])
    assert encoding.words is not None
    assert encoding.words.tolist() == [-1, 0, 2, -1]


def test_save_and_load(tmp_path: Path) -> None:
    text = "Hello 今天İ天气很好啊"
    for name, tokenizer in {
        "official": TOKENIZER,
        "cased": SentencePieceTokenizer(MODEL, VOCAB, WORDS, False),
        "words": SentencePieceTokenizer(MODEL, VOCAB),
        "own": SentencePieceTokenizer(train(pad_id=3), word_dict=WORDS),
        "special": SentencePieceTokenizer(MODEL, {**VOCAB, "<c>": 999}, special=SpecialTokens(cls="<c>")),
    }.items():
        tokenizer.save_pretrained(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert isinstance(loaded, SentencePieceTokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(text).input_ids.tolist() == tokenizer.encode(text).input_ids.tolist()
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(text).offsets.tolist() == tokenizer.encode(text).offsets.tolist()
    assert len({load_tokenizer(folder).fingerprint for folder in tmp_path.iterdir()}) == 5


def test_an_official_folder_and_the_flags(tmp_path: Path) -> None:
    folder = tmp_path / "subword"
    folder.mkdir()
    (folder / "spm_cased_simp_sampled.model").write_bytes(MODEL)
    (folder / "dict.wordseg.pickle").write_bytes(pickle.dumps(dict.fromkeys(WORDS, -1.5), protocol=2))
    vocab = "".join(f"{token}\t{index}\n" for token, index in VOCAB.items())
    (tmp_path / "vocab.txt").write_text(vocab, encoding="utf-8")
    assert load_tokenizer(tmp_path).fingerprint == TOKENIZER.fingerprint
    flags = {
        "vocab_file": tmp_path / "vocab.txt",
        "sentence_piece_model": folder / "spm_cased_simp_sampled.model",
        "word_dict": folder / "dict.wordseg.pickle",
    }
    assert load_tokenizer(None, **flags).fingerprint == TOKENIZER.fingerprint
    assert load_tokenizer(None, **flags, do_lower_case=False).fingerprint != TOKENIZER.fingerprint


def test_bad_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.*no readable SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "nowhere", VOCAB)
    (tmp_path / "bad").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="bad is no readable SentencePiece model"):
        SentencePieceTokenizer(tmp_path / "bad", VOCAB)
    with pytest.raises(ConfigError, match=r"SentencePiece model .* has no \[PAD\]"):
        SentencePieceTokenizer(MODEL)
    with pytest.raises(ConfigError, match=r"has no \[PAD\]"):
        SentencePieceTokenizer(MODEL, {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2})


@pytest.mark.parametrize("content", [dict.fromkeys(WORDS, -1.5), WORDS, tuple(WORDS), set(WORDS)])
def test_word_dictionaries(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "dict.pickle"
    path.write_bytes(pickle.dumps(content, protocol=2))
    assert read_word_dict(path) == set(WORDS)
    (tmp_path / "words.json").write_text(json.dumps(WORDS), encoding="utf-8")
    assert read_word_dict(tmp_path / "words.json") == set(WORDS)


def test_bad_word_dictionaries(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.* cannot be read"):
        read_word_dict(tmp_path / "nowhere")
    path = tmp_path / "dict.pickle"
    for content, message in ((3, "holds a int"), ("abc", "holds a str"), (["a", 3], "holds 3 where words")):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=message):
            read_word_dict(path)
    path.write_bytes(pickle.dumps(collections.Counter("ab")))
    with pytest.raises(CheckpointError, match=r"dict\.pickle names collections\.Counter"):
        read_word_dict(path)
    (tmp_path / "words.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="not JSON"):
        read_word_dict(tmp_path / "words.json")


def test_a_real_model(real_data: Path) -> None:
    path = real_data / "sentencepiece/cluecorpussmall_spm.model"
    tokenizer = SentencePieceTokenizer(path, do_lower_case=False)
    assert [
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
    ] == [0, 1, 2, 3]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    lines = (real_data / "raw_text/CLUECorpusSmall_bert_sampled.txt").read_text(encoding="utf-8").split("\n")
    for line, encoding in zip(lines[:300], tokenizer.encode_batch(lines[:300]), strict=True):
        assert encoding.input_ids[1:-1].tolist() == processor.encode(line)
        covered = [line[begin:end] for begin, end in encoding.offsets[1:-1].tolist()]
        assert "".join(covered) == "".join(line.split())
