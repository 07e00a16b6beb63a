"""A tokenizer is called as PaddleNLP's guides call theirs."""

from __future__ import annotations

import pytest

from ernie.tokenizing import SpecialTokens, WordPieceTokenizer
from propeller.errors import ConfigError, DataError

PAD, UNK, CLS, SEP = range(4)
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"天气不错", SpecialTokens().mask]
FINE, WEATHER = [4, 5], [6, 7]


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer({token: index for index, token in enumerate(TOKENS)})


def test_a_text_and_a_pair(tokenizer):
    whole = {"input_ids": [CLS, *FINE, *WEATHER, SEP], "token_type_ids": [0] * 6}
    assert tokenizer(text="天气不错") == tokenizer("天气不错") == whole
    assert tokenizer(text="天气", text_pair="不错") == {
        "input_ids": [CLS, *FINE, SEP, *WEATHER, SEP],
        "token_type_ids": [0, 0, 0, 0, 1, 1, 1],
    }


def test_lists(tokenizer):
    found = tokenizer(text=["天气", "不"], text_pair=["不错", "天"], return_dict=False)
    assert found == [tokenizer("天气", "不错"), tokenizer("不", "天")]
    assert tokenizer(["天气", "不"], return_dict=True) == {
        "input_ids": [[CLS, *FINE, SEP], [CLS, WEATHER[0], SEP]],
        "token_type_ids": [[0] * 4, [0] * 3],
    }
    assert tokenizer([]) == []


def test_a_length(tokenizer):
    assert tokenizer("天气不错", max_seq_len=4)["input_ids"] == [CLS, *FINE, SEP]
    (short, long) = tokenizer(["天", "天气不错"], max_seq_len=5, pad_to_max_seq_len=True)
    assert short == {"input_ids": [CLS, FINE[0], SEP, PAD, PAD], "token_type_ids": [0] * 5}
    assert long["input_ids"] == [CLS, *FINE, WEATHER[0], SEP]


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (["天"], {"pad_to_max_seq_len": True}, ConfigError, "max_seq_len is not; expected both"),
        (["天"], {"max_seq_len": 1}, ConfigError, "leaves no room for the 2 special tokens"),
        ([["天"], ["气", "气"]], {}, ConfigError, "1 texts came with 2 pairs"),
        ([["天"], "气"], {}, ConfigError, "One string came where a list"),
        (["天", ["气"]], {}, DataError, "expected a string"),
    ],
)
def test_wrong_calls(tokenizer, args, options, error, message):
    with pytest.raises(error, match=message):
        tokenizer(*args, **options)
