"""Files of sequence labelling, in every format."""

from __future__ import annotations

import gzip
import json

import pytest

from ernie.tasks.ner_files import NerTags, find_tags, has_labels, read_ner, split_units
from propeller.errors import ConfigError, DataError

JOINED = "text_a\tlabel\n海\x02钓\x02 \x02厦\x02门\tO\x02O\x02O\x02B-LOC\x02I-LOC\n好\tO\n"
SPACED = "text_a\tlabel\nin New York\tO B-LOC I-LOC\nhi\tO\n"
CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP I-ORG
rejects VBZ B-VP O
German JJ B-NP I-MISC

Peter NNP B-NP I-PER
Blackburn NNP I-NP I-PER
"""
TABBED = "New York\tB-LOC\n \tO\n\u3000\tO\n\nok\tO\n"
WEIBO = "科0\tO\n技1\tO\n30\tO\n\n李0\tB-PER.NAM\n开1\tI-PER.NAM\n110\tO\n"

EXPECTED = {
    JOINED: [
        (["海", "钓", " ", "厦", "门"], "O O O B-LOC I-LOC", "\x02"),
        (["好"], "O", ""),
    ],
    SPACED: [(["in", "New", "York"], "O B-LOC I-LOC", " "), (["hi"], "O", "")],
    CONLL: [
        (["EU", "rejects", "German"], "I-ORG O I-MISC", " "),
        (["Peter", "Blackburn"], "I-PER I-PER", " "),
    ],
    TABBED: [(["New York", " ", "\u3000"], "B-LOC O O", " "), (["ok"], "O", " ")],
    WEIBO: [
        (["科", "技", "3"], "O O O", ""),
        (["李", "开", "1"], "B-PER.NAM I-PER.NAM O", ""),
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(text, name="train.tsv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def plain(raws):
    return [(raw["units"], " ".join(raw["labels"]), raw["separator"]) for raw in raws]


class TestFormats:
    @pytest.mark.parametrize("text", EXPECTED, ids=["joined", "spaced", "conll", "tabbed", "weibo"])
    def test_recognised(self, write, text):
        dataset = read_ner(write(text))
        assert plain(dataset) == EXPECTED[text]
        assert plain(dataset) == EXPECTED[text]  # a second time

    @pytest.mark.parametrize("text", EXPECTED)
    @pytest.mark.parametrize(
        "encode",
        [
            lambda text: b"\xef\xbb\xbf" + text.encode(),
            lambda text: text.replace("\n", "\r\n").encode(),
            lambda text: gzip.compress(text.encode()),
            lambda text: text.rstrip("\n").encode(),
            lambda text: (text + "\n\n").encode(),
        ],
        ids=["byte order mark", "Windows", "gzip", "no line end", "empty lines"],
    )
    def test_bytes(self, write, text, encode):
        assert plain(read_ner(write(encode(text)))) == EXPECTED[text]

    @pytest.mark.parametrize("text", [JOINED, SPACED])
    def test_no_header(self, write, text):
        assert plain(read_ner(write(text.split("\n", 1)[1]))) == EXPECTED[text]

    def test_a_header_in_another_case(self, write):
        path = write("Text_A\tLabel\nhi\tO\n")
        assert plain(read_ner(path)) == [(["hi"], "O", "")] and has_labels(path)

    def test_header_in_another_order(self, write):
        text = "id\tlabels\ttext\n7\tO B-LOC\tin Rome\n"
        assert plain(read_ner(write(text))) == [(["in", "Rome"], "O B-LOC", " ")]

    def test_columns_of_tsv(self, write):
        path = write("O B-LOC\t7\tin Rome\n")
        assert plain(read_ner(path, columns=["label", "_", "text_a"])) == [(["in", "Rome"], "O B-LOC", " ")]

    def test_columns_of_conll(self, write):
        dataset = read_ner(write(CONLL), columns=["text_a", "_", "label", "_"])
        assert plain(dataset)[0] == (["EU", "rejects", "German"], "B-NP B-VP B-NP", " ")

    def test_format_overrides(self, write):
        path = write("a0\tO\nb1\tO\n")
        assert plain(read_ner(path)) == [(["a", "b"], "O O", "")]
        assert plain(read_ner(path, format="conll")) == [(["a0", "b1"], "O O", " ")]
        assert plain(read_ner(path, format="tsv")) == [(["a0"], "O", ""), (["b1"], "O", "")]

    def test_words_that_end_with_numbers(self, write):
        text = "A4\tO\nB0\tO\n\nC1\tO\n"
        assert plain(read_ner(write(text))) == [(["A4", "B0"], "O O", " "), (["C1"], "O", " ")]

    def test_a_header_of_words_is_none(self, write):
        assert plain(read_ner(write("text\tO\nlabel\tB-X\n"))) == [(["text", "label"], "O B-X", " ")]

    def test_documents_part_sentences(self, write):
        text = "a O\n-DOCSTART- O\nb O\n"
        assert plain(read_ner(write(text))) == [(["a"], "O", ""), (["b"], "O", "")]

    def test_spaces_around_a_line(self, write):
        assert plain(read_ner(write(" in  Rome \tO O O \n"))) == [(["in", "", "Rome"], "O O O", " ")]

    @pytest.mark.parametrize(
        ("line", "units", "separator"),
        [
            ("a\x02 \x02b", ["a", " ", "b"], "\x02"),
            ("a b", ["a", "b"], " "),
            ("ab", ["ab"], ""),
            ("", [""], ""),
        ],
    )
    def test_split_units(self, line, units, separator):
        assert split_units(line) == (units, separator)


LISTS = [
    {"tokens": ["in", "New", "York"], "ner_tags": ["O", "B-LOC", "I-LOC"]},
    {"tokens": ["hi"], "ner_tags": ["O"]},
]
CHARACTERS = [{"text": list("海钓"), "labels": ["O", "B-X"]}, {"text": ["好"], "labels": ["O"]}]
OF_LISTS = [(["in", "New", "York"], "O B-LOC I-LOC", " "), (["hi"], "O", " ")]
OF_CHARACTERS = [(["海", "钓"], "O B-X", ""), (["好"], "O", "")]


class TestJson:
    @pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.txt", "x"])
    @pytest.mark.parametrize(("rows", "expected"), [(LISTS, OF_LISTS), (CHARACTERS, OF_CHARACTERS)])
    def test_lists(self, write, name, rows, expected):
        path = write("\n".join(map(json.dumps, rows)) + "\n\n", name)
        assert plain(read_ner(path)) == expected and has_labels(path)

    def test_an_array(self, write):
        path = write(json.dumps(LISTS, indent=1), "x.json")
        assert plain(read_ner(path)) == plain(read_ner(path, format="json")) == OF_LISTS
        assert find_tags(path) == NerTags(["O", "B-LOC", "I-LOC"], "BIO", False)

    @pytest.mark.parametrize("text", [JOINED, SPACED])
    def test_texts(self, write, text):
        rows = [
            dict(zip(("text_a", "label"), line.split("\t"), strict=True)) for line in text.splitlines()[1:]
        ]
        assert plain(read_ner(write("\n".join(map(json.dumps, rows)), "x.jsonl"))) == EXPECTED[text]

    def test_ids_with_names(self, write):
        path = write('{"tokens": ["in", "Rome"], "ner_tags": [1, 0]}\n', "x.jsonl")
        assert plain(read_ner(path, labels=["B-LOC", "O"])) == [(["in", "Rome"], "O B-LOC", " ")]
        write('{"B-LOC": 0, "O": 1}', "label_map.json")
        assert find_tags(path).labels == ["B-LOC", "O"]

    def test_without_labels(self, write):
        assert not has_labels(write('{"tokens": ["in"]}\n{"tokens": ["in"], "ner_tags": null}\n', "x.jsonl"))

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"tokens": ["a"], "ner_tags": [3]}, "a label is the number 3; expected a tag.* label_map.json"),
            ({"tokens": ["a"], "ner_tags": [None]}, "a label is None; expected a tag, such as B-PER"),
            ({"tokens": ["a"], "ner_tags": [True]}, "a label is True"),
            ({"tokens": ["a"], "ner_tags": ["PER"]}, "'PER' is no tag"),
            ({"tokens": ["a", "b"], "ner_tags": ["O"]}, r"found 2 units \(a b\) and 1 labels \(O\)"),
            ({"tokens": ["a", 3], "ner_tags": ["O", "O"]}, r"the units are \['a', 3\]; expected texts"),
            ({"tokens": [], "ner_tags": []}, "the text is empty"),
            (
                {"words": ["a"], "ner_tags": ["O"]},
                "has no 'text_a' .or 'text', 'tokens'.; it has 'words', 'n",
            ),
            ({"tokens": ["a"]}, "the object has no 'label'"),
            ({"text": "a", "label": {"name": {}}}, "'label' is {'name': {}}; expected a list, or a text"),
        ],
    )
    def test_malformed(self, write, row, message):
        path = write("\n" + json.dumps(row), "x.jsonl")
        with pytest.raises(DataError, match=f"^{path}:2: .*{message}"):
            list(read_ner(path))

    def test_an_id_beyond_the_names(self, write):
        path = write('{"tokens": ["a"], "ner_tags": [2]}', "x.jsonl")
        with pytest.raises(DataError, match="x.jsonl:1: a label is the number 2, but there are 2 labels"):
            list(read_ner(path, labels=["O", "B-X"]))


class TestPositions:
    @pytest.mark.parametrize("text", EXPECTED)
    def test_goes_on_after_each_sentence(self, write, text):
        dataset = read_ner(write(text))
        entries = list(dataset.iterate())
        for count, (_, position) in enumerate(entries, start=1):
            again = json.loads(json.dumps(position))
            assert [raw for raw, _ in dataset.iterate(again)] == [raw for raw, _ in entries[count:]]

    def test_an_error_of_a_user_names_the_first_line_of_the_sentence(self, write):
        path = write(CONLL)
        seen = read_ner(path).map(lambda raw: raw["units"].index("EU"))
        with pytest.raises(DataError, match=rf"{path}:7: .*ValueError"):
            list(seen)

    def test_signature(self, write):
        path = write(WEIBO)
        assert read_ner(path).signature() == read_ner(path).signature()
        assert read_ner(path).signature() != read_ner(path, format="conll").signature()


MALFORMED = {
    "fewer labels": (
        "text_a\tlabel\na b\tO\n",
        r":2: found 2 units \(a b\) and 1 labels \(O\); expected one",
    ),
    "more labels": ("a\x02b\tO\x02O\nc\tO\x02O\n", r":2: found 1 units \(c\) and 2 labels \(O O\)"),
    "no text": ("a b\tO O\n\tO\n", r":2: the text is empty"),
    "no label column": ("text_a\ttag_ids\na b\tO O\n", r":1: the header has no column 'label'"),
    "one cell": ("a\x02b\n", r":1: found 1 tab-separated cell"),
    "a cell less": ("a b\tO O\nc d\n", r":2: found 1 tab-separated cell"),
    "no tag in tsv": ("a b\tO O\nc d\tO X-PER\n", r":2: 'X-PER' is no tag; expected O, or a letter"),
    "not UTF-8": (b"a b\tO O\n\xff b\tO O\n", r":2: byte 1 of the line is not UTF-8"),
    "empty": ("", r": is empty; expected at least one line"),
    "header alone": ("text_a\tlabel\n", r": is empty after 1 header line"),
    "blank lines": ("\n\n", r":1: there is no unit in the first 2 lines"),
    "one column": ("a\nb\n", r":1: found one column \('a'\); expected a unit and its tag"),
    "a column less": ("a NN O\nb O\n", r":2: found 2 columns parted by blanks \('b O'\); expected 3"),
    "a column more": ("a\tO\nb\tO\tO\n", r":2: found 3 columns parted by tabs"),
    "no unit": ("a\tO\n\tO\n", r":2: the unit is missing"),
    "no tag in conll": ("a O\nb NN\n", r":2: 'NN' is no tag"),
}


class TestErrors:
    @pytest.mark.parametrize(("text", "message"), MALFORMED.values(), ids=MALFORMED)
    def test_malformed(self, write, text, message):
        path = write(text)
        with pytest.raises(DataError, match=f"^{path}{message}"):
            list(read_ner(path))

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match="nothing.tsv: cannot be opened"):
            read_ner(tmp_path / "nothing.tsv")

    @pytest.mark.parametrize(("text", "line"), [(JOINED, 2), ("in O\n\nRome B-LOC\n", 3)])
    def test_unknown_label(self, write, text, line):
        path = write(text)
        expected = (
            rf"^{path}:{line}: unknown label 'B-LOC'; known are O, B-LOCATION\. Did you mean 'B-LOCATION'\?"
        )
        with pytest.raises(DataError, match=expected):
            list(read_ner(path, labels=["O", "B-LOCATION"]))

    def test_tag_of_another_scheme(self, write):
        path = write(WEIBO)
        with pytest.raises(DataError, match=f"^{path}:6: 'I-PER.NAM' is no tag of the scheme BMES"):
            list(read_ner(path, scheme="BMES"))

    def test_weibo_without_positions(self, write):
        path = write("a0\tO\nb\tO\n")
        with pytest.raises(DataError, match=f"^{path}:2: found the unit 'b'; expected .* such as 'b0'"):
            list(read_ner(path, format="weibo"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"format": "conl"},
                r"The format is 'conl'; expected tsv, conll, weibo, json. Did you mean 'conll'\?",
            ),
            ({"scheme": "BILOU"}, "'BILOU' is no tagging scheme"),
            ({"columns": ["text", "label"]}, r"The columns name 'text'; .* Did you mean 'text_a'\?"),
            ({"columns": ["text_a", "_"]}, "The columns are text_a, _; expected text_a and label once each"),
        ],
    )
    def test_arguments(self, write, arguments, message):
        with pytest.raises(ConfigError, match=message):
            read_ner(write("a O\n"), **arguments)


class TestFindTags:
    def test_of_the_data(self, write):
        assert find_tags(write(JOINED)) == NerTags(["O", "B-LOC", "I-LOC"], "BIO", True)
        assert find_tags(write(CONLL)) == NerTags(["O", "I-MISC", "I-ORG", "I-PER"], "IOB1", False)

    def test_flags(self, write):
        found = find_tags(write(CONLL), columns=["text_a", "_", "label", "_"], format="conll", scheme="iob2")
        assert found == NerTags(["B-NP", "B-VP", "I-NP"], "BIO", False)

    def test_label_map(self, write):
        labels = ["I-LOC", "O", "B-LOC", "B-ORG"]
        write(json.dumps({label: i for i, label in enumerate(labels)}), "label_map.json")
        assert find_tags(write(JOINED)).labels == labels

    def test_label_map_lacks_a_label(self, write):
        write('{"O": 0, "B-LOC": 1}', "label_map.json")
        path = write(JOINED)
        with pytest.raises(DataError, match=f"^{path}:2: unknown label 'I-LOC'; known are O, B-LOC"):
            find_tags(path)

    @pytest.mark.parametrize("text", ["{", "[]", '{"O": 1}', '{"O": "0"}'])
    def test_label_map_is_none(self, write, text):
        write(text, "label_map.json")
        with pytest.raises(ConfigError, match=r"label_map\.json (cannot be read as JSON|must be an object)"):
            find_tags(write(JOINED))

    def test_folder_of_parts(self, tmp_path, write):
        (tmp_path / "train").mkdir()
        write(JOINED, "train/part-0")
        write(JOINED.replace("LOC", "PER"), "train/part-1")
        assert find_tags(tmp_path / "train").labels == ["O", "B-LOC", "B-PER", "I-LOC", "I-PER"]

    def test_two_schemes(self, write):
        path = write("a B-X\nb M-X\nc I-X\n")
        with pytest.raises(ConfigError, match=f"^{path}: The tags have both I and M"):
            find_tags(path)


REAL = {
    "msra_ner/dev.tsv": (2318, 109870, {"\x02"}),
    "msra_ner/test.tsv": (4636, 219197, {"\x02"}),
    "msra_ner/train_from_dh_msra.tsv.gz": (47557, 2012162, {"\x02", ""}),
    "weibo_ner/weiboNER_2nd_conll.train": (1350, 73778, {""}),
    "weibo_ner/weiboNER_2nd_conll.dev": (270, 14509, {""}),
    "weibo_ner/weiboNER_2nd_conll.test": (270, 14842, {""}),
}


@pytest.mark.parametrize(
    ("text", "columns", "expected"),
    [
        *((text, None, True) for text in EXPECTED),
        ("text_a\n海\x02钓\n", None, False),
        ("qid\ttext_a\n1\tin New York\n", None, False),
        ("text_a\nin New York\n", None, False),
        ("海\x02钓\n\n好\n", None, False),
        ("海\n钓\n\n好\n", None, False),
        ("海\n钓\tO\n", None, True),  # one line that is wrong does not hide the others
        ("label\tO\n", None, True),
        ("1\t海\n", ["_", "text_a"], False),
        ("海\tO\n", ["text_a", "label"], True),
    ],
)
def test_whether_there_are_labels(write, text, columns, expected):
    assert has_labels(write(text), columns=columns) is expected


@pytest.mark.parametrize("name", REAL)
def test_real_data(real_data, name):
    sentences = units = 0
    separators = set()
    for raw in read_ner(real_data / name):
        assert len(raw["units"]) == len(raw["labels"])
        assert all(len(unit) == 1 or unit == "\ufffd\ufffd" for unit in raw["units"])
        sentences, units = sentences + 1, units + len(raw["units"])
        separators.add(raw["separator"])
    assert (sentences, units, separators) == REAL[name]


def test_tags_of_real_data(real_data):
    labels = list(json.loads((real_data / "msra_ner" / "label_map.json").read_text()))
    assert find_tags(real_data / "msra_ner" / "dev.tsv") == NerTags(labels, "BIO", True)
    train = find_tags(real_data / "weibo_ner" / "weiboNER_2nd_conll.train")
    assert (len(train.labels), train.labels[0], train.scheme) == (17, "O", "BIO")
    for name in ("dev", "test"):  # no label is unknown there
        path = real_data / "weibo_ner" / f"weiboNER_2nd_conll.{name}"
        assert len(list(read_ner(path, labels=train.labels, scheme=train.scheme))) == 270
