"""How the CMRC2018 evaluation cuts a text."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ernie.tasks.mixed_segments import remove_ignored, segments


# What NLTK 3.10 makes of the words between the Chinese characters.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  北京ABC是 new York", "北 京 abc 是 new york"),
        ("2017-12，《ω-force》。", "201712ωforce"),
        ("1890–1895年…", "1890 – 1895 年 …"),
        ("3,000 人 a,b, 4.5%", "3,000 人 a , b , 4.5 %"),
        ("foo bar.", "foo bar ."),
        ("foo bar.)  ", "foo bar . )"),
        ("a dog ran. it sat. Dr. who", "a dog ran . it sat . dr. who"),
        ("the u.s. navy. and i.e. more", "the u.s. navy . and i.e . more"),
        ("a. bar c. dar j. q", "a. bar c. dar j. q"),
        ("2. foo 3. 4 and 7.", "2. foo 3 . 4 and 7 ."),
        ("no. 5 is", "no . 5 is"),
        ("foo.(bar) foo.bar x", "foo . ( bar ) foo.bar x"),
        ("(foo etc.). more", "( foo etc. ) . more"),
        ("wait... what?! yes..", "wait ... what ? ! yes .."),
        ("newcomen's. israel", "newcomen 's . israel"),
        ('he said. "go" on', "he said . `` go '' on"),
        ('学名：""）是', "学 名 `` `` 是"),
        ('name""是', "name '' '' 是"),
        ("say ''x''", "say `` x ''"),
        (
            "don't cannot gonna john's 'hello dogs' 's we'll",
            "do n't can not gon na john 's ' hello dogs ' 's we 'll",
        ),
        ("a&b; c@d #1 $5 [x] {y} <z>", "a & b ; c @ d # 1 $ 5 [ x ] { y } < z >"),
        ("，。", ""),
        ("", ""),
    ],
)
def test_segments(text, expected):
    assert segments(text) == expected.split()


def test_remove_ignored():
    assert remove_ignored(" 《A-b c》。") == "ab c"


def without_quotes(text):
    """Quotation marks come out as NLTK writes them, which tells opening from closing ones."""
    return re.sub(r"[\s\"'`]", "", text)


@settings(derandomize=True, deadline=None)
@given(st.text() | st.text("ab.,'北。 \"1?)") | st.text("a.' "))
@example("\ud800'''" + "." * 5)
def test_no_character_is_lost(text):
    assert without_quotes("".join(segments(text))) == without_quotes(remove_ignored(text))


def test_long_texts_take_no_time():
    for text in ("a." * 50_000, "a. " * 50_000, "'" * 50_000, "." * 50_000, "a.)" * 50_000, ". " * 50_000):
        assert segments(text)


def test_real_answers_keep_their_characters(real_data):
    content = (real_data / "cmrc2018" / "cmrc2018_trial.json").read_text("utf-8")
    for article in json.loads(content)["data"]:
        for paragraph in article["paragraphs"]:
            cut = "".join(segments(paragraph["context"]))
            assert without_quotes(cut) == without_quotes(remove_ignored(paragraph["context"]))
