from __future__ import annotations

import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import ernie.wordpiece as wordpiece
from ernie.tokenizing import SpecialTokens, Tokenizer, WordPieceTokenizer, load_tokenizer, read_vocab
from propeller.errors import ConfigError, DataError

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "data/tokenizing_golden.json").read_text(encoding="utf-8")
)
VOCAB = {token: index for index, token in enumerate(GOLDEN["vocab"])}
TOKENIZERS = {lower: WordPieceTokenizer(VOCAB, lower) for lower in (True, False)}
TOKENIZER = TOKENIZERS[True]
ODD = "\x00 \t\n\u3000\u200d\ufeff\ufffd\u2028\xad\u0301\u302eéİßΣſﬁ中龍，。가あ😀👨‍👩‍👧[SEP]'-a1"


def library(tokenizer: WordPieceTokenizer) -> tokenizers.Tokenizer:
    """The Rust library set up as plainly as it gets."""
    vocab = dict(tokenizer.vocab)
    plain = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100)
    )
    plain.normalizer = tokenizers.normalizers.BertNormalizer(
        handle_chinese_chars=tokenizer.tokenize_chinese_chars,
        strip_accents=tokenizer.strip_accents,
        lowercase=tokenizer.do_lower_case,
    )
    plain.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    plain.add_special_tokens(list(SpecialTokens().names()))
    return plain


def assert_like_library(tokenizer: WordPieceTokenizer, texts: list[str]) -> None:
    expected = library(tokenizer).encode_batch(texts, add_special_tokens=False)
    for text, encoding, plain in zip(texts, tokenizer.encode_batch(texts), expected, strict=True):
        assert encoding.input_ids[1:-1].tolist() == plain.ids, repr(text)
        assert [tuple(row) for row in encoding.offsets[1:-1].tolist()] == plain.offsets, repr(text)


# ---- equality with the references


@pytest.mark.parametrize("lower", [True, False])
def test_equals_transformers_pure_python_tokenizer(lower: bool) -> None:
    cases = [case[1:] for case in GOLDEN["cases"] if case[0] == lower]
    assert len(cases) > 200
    for text, pair, max_seqlen, ids, num_second in cases:
        encoding = TOKENIZERS[lower].encode(text, pair, max_seqlen=max_seqlen)
        assert encoding.input_ids.tolist() == ids, (text, pair, max_seqlen)
        assert encoding.token_type_ids.tolist() == [0] * (len(ids) - num_second) + [1] * num_second


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from(ODD) | st.characters(exclude_categories=["Cs"]))),
    lower=st.booleans(),
)
def test_equals_the_library_on_any_text(texts: list[str], lower: bool) -> None:
    assert_like_library(TOKENIZERS[lower], texts)


@pytest.mark.parametrize("chinese", [True, False])
@pytest.mark.parametrize("strip", [None, True, False])
def test_equals_the_library_in_every_setting(strip: bool | None, chinese: bool) -> None:
    for lower in (True, False):
        tokenizer = WordPieceTokenizer(VOCAB, lower, strip_accents=strip, tokenize_chinese_chars=chinese)
        assert_like_library(tokenizer, ["Café 中国人民", "ÄÖ ΟΔΟΣ", ODD, ODD[::-1]])


def test_equals_the_library_on_every_character() -> None:
    points = [point for point in range(0x20000) if not 0xD800 <= point < 0xE000]
    texts = ["".join(f"a{chr(point)}b " for point in points[start::997]) for start in range(997)]
    assert_like_library(WordPieceTokenizer(VOCAB), texts)


def test_chunks_and_a_full_cache_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [case[1] for case in GOLDEN["cases"]] * 2
    expected = TOKENIZER.encode_batch(texts)
    monkeypatch.setattr(wordpiece, "_CHUNK_CHARS", 200)
    monkeypatch.setattr(wordpiece, "_CACHE_CHARS", 300)
    tokenizer = WordPieceTokenizer(VOCAB)
    for one, other in zip(tokenizer.encode_batch(texts), expected, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.offsets.tolist() == other.offsets.tolist()
    assert sum(map(len, tokenizer._cache)) < 2000


# ---- model inputs


def popped(first: int, second: int, room: int) -> tuple[int, int]:
    """BERT's definition: pop the longer one's last token, the second's if they are equal."""
    while first + second > room:
        if first > second:
            first -= 1
        else:
            second -= 1
    return first, second


@pytest.mark.parametrize("room", range(12))
def test_the_longer_text_is_cut_first(room: int) -> None:
    lengths = [(first, second) for first in range(9) for second in range(9)]
    texts = ["中" * first for first, _ in lengths]
    pairs = ["国" * second for _, second in lengths]
    for (first, second), encoding in zip(
        lengths, TOKENIZER.encode_batch(texts, pairs, max_seqlen=room + 3), strict=True
    ):
        kept = popped(first, second, room)
        tokens = TOKENIZER.convert_ids_to_tokens(encoding.input_ids)
        assert tokens == ["[CLS]", *"中" * kept[0], "[SEP]", *"国" * kept[1], "[SEP]"]
        assert encoding.num_tokens == first + second + 3
    for count, encoding in enumerate(TOKENIZER.encode_batch(["中" * 0, "中", "中中"], max_seqlen=3)):
        assert len(encoding.input_ids) == min(count, 1) + 2
        assert encoding.num_tokens == count + 2


def test_an_encoding() -> None:
    encoding = TOKENIZER.encode("Wanted: 中国!", "Hello [MASK]")
    tokens = TOKENIZER.convert_ids_to_tokens(encoding.input_ids)
    expected = "[CLS] want ##ed : 中 国 ! [SEP] hello [MASK] [SEP]".split(" ")
    assert tokens == expected
    assert encoding.token_type_ids.tolist() == [0] * 8 + [1] * 3
    assert encoding.offsets.tolist() == [
        [0, 0], [0, 4], [4, 6], [6, 7], [8, 9], [9, 10], [10, 11], [0, 0], [0, 5], [6, 12], [0, 0],
    ]  # fmt: skip
    assert (encoding.input_ids.dtype, encoding.token_type_ids.dtype) == (np.int64, np.int64)
    assert encoding.offsets.dtype == np.int32
    assert encoding.num_tokens == 11 and encoding.words is None


def test_ids_and_tokens() -> None:
    assert TOKENIZER.tokenize("Résumé, Wanted") == ["resume", ",", "want", "##ed"]
    ids = TOKENIZER.convert_tokens_to_ids(["want", "no such token", "[MASK]"])
    assert ids == [VOCAB["want"], TOKENIZER.unk_token_id, TOKENIZER.mask_token_id]
    assert TOKENIZER.convert_ids_to_tokens([*ids, 10**6, -1]) == ["want", "[UNK]", "[MASK]", "[UNK]", "[UNK]"]
    assert [
        TOKENIZER.pad_token_id,
        TOKENIZER.unk_token_id,
        TOKENIZER.cls_token_id,
        TOKENIZER.sep_token_id,
    ] == [0, 1, 2, 3]
    assert TOKENIZER.vocab_size == len(VOCAB) == len(TOKENIZER.vocab)
    with pytest.raises(TypeError):
        TOKENIZER.vocab["new"] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("", [], []),
        (" \n\u3000", [], []),
        ("\x00", [], []),
        ("a\x00b 中", ["a", "##b", "中"], [(0, 1), (2, 3), (4, 5)]),
        ("\ud800", [], []),
        ("中\udfff国\ud83d\ude00中", ["中", "国", "中"], [(0, 1), (2, 3), (5, 6)]),
        ("a\ud800b", ["a", "##b"], [(0, 1), (2, 3)]),
        ("👨‍👩‍👧 😀😀", ["[UNK]", "😀", "##😀"], [(0, 5), (6, 7), (7, 8)]),
        ("中" * 12_000, ["中"] * 12_000, [(place, place + 1) for place in range(12_000)]),
        ("b" * 100_000, ["[UNK]"], [(0, 100_000)]),
    ],
    ids=repr,
)
def test_texts_of_every_kind(text: str, tokens: list[str], offsets: list[tuple[int, int]]) -> None:
    encoding = TOKENIZER.encode(text)
    assert TOKENIZER.convert_ids_to_tokens(encoding.input_ids[1:-1]) == tokens
    assert [tuple(row) for row in encoding.offsets[1:-1].tolist()] == offsets
    assert TOKENIZER.tokenize(text) == tokens


def test_an_empty_batch() -> None:
    assert TOKENIZER.encode_batch([]) == []
    assert TOKENIZER.encode_batch([], [], max_seqlen=8) == []


def test_units_stay_aligned() -> None:
    units = ["Wanted", "", "\x00", "中国", "[SEP]", " ", "!"]
    encoding = TOKENIZER.encode_units(units)
    tokens = TOKENIZER.convert_ids_to_tokens(encoding.input_ids)
    assert tokens == ["[CLS]", "want", "##ed", "中", "国", "[SEP]", "!", "[SEP]"]
    assert encoding.words is not None and encoding.words.dtype == np.int32
    assert encoding.words.tolist() == [-1, 0, 0, 3, 3, 4, 6, -1]
    assert encoding.offsets.tolist() == [[0, 0], [0, 4], [4, 6], [0, 1], [1, 2], [0, 5], [0, 1], [0, 0]]
    cut = TOKENIZER.encode_units(units, max_seqlen=5)
    assert cut.words is not None and cut.words.tolist() == [-1, 0, 0, 3, -1]
    assert cut.num_tokens == encoding.num_tokens == 8
    none = TOKENIZER.encode_units([])
    assert none.words is not None and none.words.tolist() == [-1, -1]


@settings(deadline=None)
@given(st.lists(st.lists(st.text(max_size=6) | st.sampled_from(["中国", "", "\x00", "wanted"]), max_size=5)))
def test_units_of_several_texts(texts: list[list[str]]) -> None:
    """As each text alone."""
    for max_seqlen in (None, 4):
        together = TOKENIZER.encode_units_batch(texts, max_seqlen)
        assert len(together) == len(texts)
        for units, encoding in zip(texts, together, strict=True):
            alone = TOKENIZER.encode_units(units, max_seqlen)
            for name in ("input_ids", "token_type_ids", "offsets", "words"):
                found, wanted = getattr(encoding, name), getattr(alone, name)
                assert found.dtype == wanted.dtype and found.tolist() == wanted.tolist()
            assert (
                encoding.num_tokens == alone.num_tokens == 2 + sum(map(len, map(TOKENIZER.tokenize, units)))
            )


def test_bad_calls() -> None:
    with pytest.raises(ConfigError, match="max_seqlen 1 leaves no room for the 2 special tokens of a text"):
        TOKENIZER.encode("a", max_seqlen=1)
    with pytest.raises(ConfigError, match="max_seqlen 2 leaves no room for the 3 special tokens of a pair"):
        TOKENIZER.encode("a", "b", max_seqlen=2)
    with pytest.raises(ConfigError, match="0 leaves no room"):
        TOKENIZER.encode_units(["a"], max_seqlen=0)
    with pytest.raises(ConfigError, match="2 texts came with 1 pairs"):
        TOKENIZER.encode_batch(["a", "b"], ["c"])
    with pytest.raises(ConfigError, match="list of strings"):
        TOKENIZER.encode_batch("abc")
    with pytest.raises(DataError, match="Text 1 is 3; expected a string"):
        TOKENIZER.encode_batch(["a", 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="Text 0 is None"):
        TOKENIZER.encode_units([None])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="list of a text's units"):
        TOKENIZER.encode_units_batch([["a"], "ab"])


def test_threads_share_one_tokenizer() -> None:
    texts = [case[1] for case in GOLDEN["cases"]]
    expected = [encoding.input_ids.tolist() for encoding in TOKENIZER.encode_batch(texts)]
    tokenizer = WordPieceTokenizer(VOCAB)
    starts = [place * 37 % len(texts) for place in range(64)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: tokenizer.encode_batch(texts[start:] + texts[:start]), starts))
    for start, encodings in zip(starts, found, strict=True):
        assert [encoding.input_ids.tolist() for encoding in encodings] == expected[start:] + expected[:start]


def test_a_pickled_tokenizer_works_in_another_process() -> None:
    copy = pickle.loads(pickle.dumps(TOKENIZER))
    assert copy.encode("Wanted 中").input_ids.tolist() == TOKENIZER.encode("Wanted 中").input_ids.tolist()
    assert copy.fingerprint == TOKENIZER.fingerprint


def test_importing_it_loads_neither_paddle_nor_sentencepiece() -> None:
    code = "import sys, ernie.tokenizing; print(sorted({'paddle', 'sentencepiece'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- vocabularies

SPECIAL = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "vocab.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_both_forms_of_a_vocabulary(tmp_path: Path) -> None:
    assert read_vocab(written(tmp_path, "b\na\n\u2028\n")) == {"b": 0, "a": 1, "\u2028": 2}
    assert read_vocab(written(tmp_path, "b\t7\na\t0\n")) == {"b": 7, "a": 0}
    assert read_vocab(written(tmp_path, b"\xef\xbb\xbfb\r\na\r\n\r\n\n")) == {"b": 0, "a": 1}


def test_a_repeated_token_keeps_its_later_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path, "$\na\n$\n" + SPECIAL)
    assert read_vocab(path) == {"$": 2, "a": 1, "[PAD]": 3, "[UNK]": 4, "[CLS]": 5, "[SEP]": 6, "[MASK]": 7}
    assert "$" in caplog.text
    tokenizer = WordPieceTokenizer(path)
    assert (tokenizer.vocab_size, len(tokenizer.vocab)) == (8, 7)
    assert tokenizer.convert_ids_to_tokens([0]) == ["[UNK]"]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", None, "empty"),
        ("a\n\nb\n", 2, "empty line"),
        ("a\t0\n\t1\n", 2, "empty line or token"),
        ("a\nb\t1\n", 2, "tab in"),
        ("a\t0\nb\n", 2, "token<TAB>id"),
        ("a\t0\nb\tx\n", 2, "token<TAB>id"),
        ("a\t0\nb\t-1\n", 2, "token<TAB>id"),
        ("a\t0\nb\t1\t2\n", 2, "token<TAB>id"),
        ("a\t0\nb\t²\n", 2, "token<TAB>id"),
        ("a\t0\nb\t1\nc\t0\n", 3, "id 0 of 'c' is already taken in line 1"),
        (SPECIAL + "a\n[SEP]\n", 7, r"'\[SEP\]' stands already in line 4"),
        (b"a\n\xff\n", 2, "not UTF-8"),
    ],
)
def test_bad_vocabularies(tmp_path: Path, content: str | bytes, line: int | None, message: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_vocab(path)
    assert (caught.value.path, caught.value.line) == (path, line)


def test_vocabularies_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.txt cannot be read"):
        WordPieceTokenizer(tmp_path / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"vocab\.txt has no \[UNK\], \[SEP\] among its 3 tokens"):
        WordPieceTokenizer(written(tmp_path, "[PAD]\n[CLS]\na\n"))
    with pytest.raises(ConfigError, match="one id to several tokens"):
        WordPieceTokenizer({**VOCAB, "new": 0})
    with pytest.raises(ConfigError, match="empty or hold a tab"):
        WordPieceTokenizer({**VOCAB, "x\ny": len(VOCAB)})
    for index in (-1, 1.0, "1", True):
        with pytest.raises(ConfigError, match="whole numbers"):
            WordPieceTokenizer({**VOCAB, "new": index})  # type: ignore[dict-item]


def test_a_vocabulary_without_mask() -> None:
    vocab = {token: index for token, index in VOCAB.items() if token != "[MASK]"}
    tokenizer = WordPieceTokenizer(vocab)
    assert tokenizer.tokenize("[MASK]") == ["[", "mask", "]"]
    with pytest.raises(ConfigError, match=r"no \[MASK\]"):
        _ = tokenizer.mask_token_id


def test_fingerprints() -> None:
    assert TOKENIZER.fingerprint == FINGERPRINT
    same = WordPieceTokenizer(dict(reversed(VOCAB.items())), strip_accents=True)
    others = [
        WordPieceTokenizer(VOCAB, False),
        WordPieceTokenizer(VOCAB, strip_accents=False),
        WordPieceTokenizer(VOCAB, tokenize_chinese_chars=False),
        WordPieceTokenizer({**VOCAB, "new": len(VOCAB)}),
        WordPieceTokenizer(VOCAB, added_tokens={"want": VOCAB["want"]}),
    ]
    assert same.fingerprint == FINGERPRINT
    assert len({FINGERPRINT, *(tokenizer.fingerprint for tokenizer in others)}) == 6


FINGERPRINT = "d1613e073941f7e15d2119c6d8b3bf518d3f9a80e5823f548dba6e6e9a85a05a"

# ---- folders


def dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "tokenizer",
    [
        TOKENIZER,
        WordPieceTokenizer(VOCAB, False, strip_accents=True, tokenize_chinese_chars=False),
        WordPieceTokenizer({token: 3 * index for token, index in VOCAB.items()}),
        WordPieceTokenizer(
            VOCAB, added_tokens={"<e1>": 5000, "want": VOCAB["want"], "[MASK]": VOCAB["[MASK]"]}
        ),
        WordPieceTokenizer({**VOCAB, "<s>": 900, "<p>": 901}, special=SpecialTokens(cls="<s>", pad="<p>")),
    ],
    ids=["default", "cased", "gaps", "added", "special"],
)
def test_save_and_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    assert loaded.vocab == tokenizer.vocab
    assert loaded.fingerprint == tokenizer.fingerprint
    text = "Unwanted <e1> Café 中国 [MASK] <s>"
    assert loaded.encode(text).input_ids.tolist() == tokenizer.encode(text).input_ids.tolist()


def test_an_ernie_folder_and_the_flag(tmp_path: Path) -> None:
    written(tmp_path, "".join(f"{token}\t{index}\n" for token, index in VOCAB.items()))
    assert load_tokenizer(tmp_path).tokenize("WANT") == ["want"]
    assert load_tokenizer(tmp_path, do_lower_case=False).tokenize("WANT") == ["[UNK]"]
    assert load_tokenizer(tmp_path).fingerprint == FINGERPRINT
    assert load_tokenizer(None, vocab_file=tmp_path / "vocab.txt").fingerprint == FINGERPRINT


def test_the_folder_wins_over_the_flag(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    TOKENIZERS[False].save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, do_lower_case=True).tokenize("WANT") == ["[UNK]"]
    assert "the flag says otherwise" in caplog.text


def test_a_given_vocabulary_wins_over_the_folders(tmp_path: Path) -> None:
    TOKENIZERS[False].save_pretrained(tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(SPECIAL + "want\nWANT\n", encoding="utf-8")
    assert load_tokenizer(tmp_path, vocab_file=other).encode("WANT").input_ids.tolist() == [2, 6, 3]


def test_a_hugging_face_folder_of_version_4(tmp_path: Path) -> None:
    written(tmp_path, "".join(f"{token}\n" for token in VOCAB))
    dump(tmp_path / "special_tokens_map.json", {"cls_token": {"content": "hello"}, "sep_token": "world"})
    decoder = {"2": {"content": "[CLS]", "special": True}, "700": {"content": "<e1>", "special": False}}
    dump(tmp_path / "added_tokens.json", {"<e1>": 700})
    dump(
        tmp_path / "tokenizer_config.json",
        {
            "do_lower_case": False,
            "added_tokens_decoder": decoder,
            "sep_token": "[SEP]",
            "strip_accents": None,
        },
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("WANT<e1>[CLS]").input_ids.tolist()
    assert tokenizer.convert_ids_to_tokens(ids) == ["hello", "[UNK]", "<e1>", "[CLS]", "[SEP]"]
    assert tokenizer.vocab_size == 701


def whole_tokenizer(vocab: dict[str, int], **normalizer: Any) -> dict[str, Any]:
    plain = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    plain.normalizer = tokenizers.normalizers.BertNormalizer(**normalizer)
    plain.add_special_tokens([*SpecialTokens().names(), "<e1>"])
    content: dict[str, Any] = json.loads(plain.to_str())
    return content


def test_a_hugging_face_folder_of_version_5(tmp_path: Path) -> None:
    dump(tmp_path / "tokenizer.json", whole_tokenizer(VOCAB, lowercase=False, handle_chinese_chars=False))
    tokenizer = load_tokenizer(tmp_path, do_lower_case=True)
    assert isinstance(tokenizer, WordPieceTokenizer)
    assert (tokenizer.do_lower_case, tokenizer.tokenize_chinese_chars) == (False, False)
    assert tokenizer.tokenize("WANT want<e1>") == ["[UNK]", "want", "<e1>"]
    dump(tmp_path / "tokenizer_config.json", {"do_lower_case": True})
    assert load_tokenizer(tmp_path).tokenize("WANT") == ["want"]


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"No vocab\.txt or tokenizer\.json in a folder"):
        load_tokenizer(None)
    with pytest.raises(ConfigError, match=r"No vocab\.txt or tokenizer\.json in .*bad_folders"):
        load_tokenizer(tmp_path)
    written(tmp_path, "".join(f"{token}\n" for token in VOCAB))
    with pytest.raises(ConfigError, match="word dictionary is of no use"):
        load_tokenizer(tmp_path, word_dict=tmp_path / "words.json")
    config = tmp_path / "tokenizer_config.json"
    for content, message in (
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ('{"added_tokens_decoder": [1]}', "unlike"),
    ):
        config.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path)
    dump(config, {"do_lower_case": "yes"})
    with pytest.raises(ConfigError, match="do_lower_case is 'yes'"):
        load_tokenizer(tmp_path)
    dump(config, {"added_tokens_decoder": {"3": {"content": "[CLS]"}}})
    with pytest.raises(ConfigError, match="different models"):
        load_tokenizer(tmp_path)


def test_a_folder_of_another_kind_of_tokenizer(tmp_path: Path) -> None:
    dump(tmp_path / "tokenizer.json", json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()))
    with pytest.raises(ConfigError, match="is a BPE tokenizer; expected BERT's WordPiece"):
        load_tokenizer(tmp_path)
    dump(tmp_path / "tokenizer.json", whole_tokenizer(VOCAB) | {"normalizer": None})
    with pytest.raises(ConfigError, match="expected BERT's WordPiece"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "unk"),
    [
        ("pretrain_demo/ernie/vocab.txt", 17964, 17963),
        ("pretrain_demo/ernie/vocab_en.txt", 30522, 100),
        ("pretrain_demo/bert/vocab.txt", 21128, 100),
    ],
)
def test_official_vocabularies(real_data: Path, name: str, size: int, unk: int) -> None:
    tokenizer = WordPieceTokenizer(real_data / name)
    assert (tokenizer.vocab_size, len(tokenizer.vocab), tokenizer.unk_token_id) == (size, size, unk)
    lines = (real_data / "raw_text/CLUECorpusSmall_bert_sampled.txt").read_text(encoding="utf-8").split("\n")
    assert_like_library(tokenizer, lines[:500])


def test_pieces_are_those_of_an_encoding() -> None:
    texts = ["the cat", "", "unhappy \ud800 猫", "[SEP]"]
    pieces = TOKENIZER.pieces(texts)
    for place, encoding in enumerate(TOKENIZER.encode_batch(texts)):
        tokens = slice(pieces.splits[place], pieces.splits[place + 1])
        assert pieces.ids[tokens].tolist() == encoding.input_ids[1:-1].tolist()
        assert pieces.offsets[tokens].tolist() == encoding.offsets[1:-1].tolist()
    assert TOKENIZER.pieces([]).splits.tolist() == [0]
    with pytest.raises(DataError, match="Text 1 is 3"):
        TOKENIZER.pieces(["a", 3])  # type: ignore[list-item]
