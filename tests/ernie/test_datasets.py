"""Data sets by name: their original files, tiny ones, come out with the fields PaddleNLP gives them."""

from __future__ import annotations

import functools
import gzip
import json

import pytest

from ernie.datasets import READERS, IterDataset, MapDataset, load_dataset
from propeller.errors import ConfigError, DataError

SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Rollo came to Rouen. Rouen is old.",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Who?",
                            "answers": [{"text": "Rollo", "answer_start": 0}],
                            "is_impossible": False,
                        },
                        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
                        {
                            "id": "3",
                            "question": "Where?",  # stands twice, not at 3
                            "answers": [{"text": "Rouen", "answer_start": 3}],
                            "is_impossible": False,
                        },
                    ],
                }
            ],
        }
    ],
}
FIRST_QUESTION = {
    "id": "1",
    "question": "Who?",
    "context": "Rollo came to Rouen. Rouen is old.",
    "answers": ["Rollo"],
    "answer_starts": [0],
    "is_impossible": False,
}
WEIBO = "科0\tO\n技1\tO\n李0\tB-PER.NAM\n开1\tI-PER.NAM\n\n好0\tO\n"

# name, sub-name, split, file in the data root, its text, the first example
CASES = [
    (
        "chnsenticorp",
        None,
        "train",
        "chnsenticorp/train.tsv",
        "label\ttext_a\n1\t好\n",
        {"text": "好", "label": 1},
    ),
    (
        "chnsenticorp",
        None,
        "dev",
        "ChnSentiCorp/dev.tsv",
        "qid\tlabel\ttext_a\n0\t1\t好\n",
        {"text": "好", "label": 1},
    ),
    ("chnsenticorp", None, "test", "chnsenticorp/test.tsv", "qid\ttext_a\n0\t好\n", {"text": "好"}),
    ("lcqmc", None, "train", "lcqmc/train.tsv", "a\tb\t1\n", {"query": "a", "title": "b", "label": 1}),
    ("bq", None, "dev", "bq_corpus/dev.tsv", "a\tb\t0\n", {"sentence1": "a", "sentence2": "b", "label": 0}),
    (
        "xnli",
        None,
        "train",
        "XNLI/multinli.train.zh.tsv",
        "premise\thypo\tlabel\na\tb\tcontradictory\n",
        {"premise": "a", "hypothesis": "b", "label": 0},
    ),
    ("thuc", None, "train", "THUC/train.tsv", "label\ttext_a\n体育\ta\n", {"text": "a", "label": "体育"}),
    (
        "clue",
        "tnews",
        "train",
        "tnews_public/train.json",
        '{"label": "108", "label_desc": "news_edu", "sentence": "a", "keywords": ""}\n',
        {"sentence": "a", "label": 7},
    ),
    (
        "afqmc",
        None,
        "dev",
        "afqmc/dev.json",
        '{"sentence1": "a", "sentence2": "b", "label": "1"}\n',
        {"sentence1": "a", "sentence2": "b", "label": 1},
    ),
    (
        "ocnli",
        None,
        "train",
        "ocnli/train.50k.json",
        '{"sentence1": "a", "sentence2": "b", "label": "-"}\n'
        '{"sentence1": "a", "sentence2": "b", "label": "neutral"}\n',
        {"sentence1": "a", "sentence2": "b", "label": 2},
    ),
    ("glue", "cola", "train", "CoLA/train.tsv", "gj04\t1\t\ta b.\n", {"sentence": "a b.", "labels": 1}),
    ("glue", "cola", "test", "glue/CoLA/test.tsv", "index\tsentence\n0\ta\n", {"sentence": "a"}),
    (
        "glue",
        "sts-b",
        "dev",
        "STS-B/dev.tsv",
        "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.800\n",
        {"sentence1": "a", "sentence2": "b", "labels": 3.8},
    ),
    (
        "glue",
        "mnli",
        "dev_matched",
        "MNLI/dev_matched.tsv",
        "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n",
        {"sentence1": "a", "sentence2": "b", "labels": 2},
    ),
    (
        "msra_ner",
        None,
        "train",
        "msra_ner/train.tsv",
        "text_a\tlabel\n李\x02来\tB-PER\x02O\n",
        {"tokens": ["李", "来"], "labels": [0, 6]},
    ),
    (
        "weibo_ner",
        None,
        "dev",
        "weibo_ner/weiboNER_2nd_conll.dev",
        WEIBO,
        {"tokens": list("科技李开"), "labels": [16, 16, 0, 1]},
    ),
    (
        "conll",
        None,
        "dev",
        "conll2003/valid.txt",
        "-DOCSTART- -X- -X- O\n\nU.N. NNP I-NP I-ORG\nsays VB I-VP O\n",
        {"tokens": ["U.N.", "says"], "labels": ["I-ORG", "O"]},
    ),
    ("squad", None, "train_v2", "squad/train-v2.0.json", json.dumps(SQUAD), FIRST_QUESTION),
    ("cmrc2018", None, "dev", "cmrc2018/cmrc2018_dev.json", json.dumps(SQUAD), FIRST_QUESTION),
    ("drcd", None, "train", "drcd/DRCD_training.json", json.dumps(SQUAD), FIRST_QUESTION),
    ("dureader", None, "dev", "dureader_robust-data/dev.json", json.dumps(SQUAD), FIRST_QUESTION),
    (
        "wikiqa",
        None,
        "test",
        "wikiqa/test.tsv",
        "qid\ttext_a\ttext_b\tlabel\n7\ta\tb\t1\n",
        {"qid": "7", "text_a": "a", "text_b": "b", "label": 1},
    ),
    (
        "dbqa",
        None,
        "train",
        "nlpcc-dbqa/train.tsv",
        "qid\ttext_a\ttext_b\tlabel\n7\ta\tb\t0\n",
        {"qid": "7", "text_a": "a", "text_b": "b", "label": 0},
    ),
]


@pytest.mark.parametrize(
    ("name", "part", "split", "file", "text", "example"), CASES, ids=[f"{c[1] or c[0]}-{c[2]}" for c in CASES]
)
@pytest.mark.parametrize("lazy", [False, True])
def test_original_files(tmp_path, name, part, split, file, text, example, lazy):
    path = tmp_path / f"{file}.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(text.encode()))
    found = load_dataset(name, name=part, splits=split, data_root=tmp_path, lazy=lazy)
    assert type(found) is (IterDataset if lazy else MapDataset)
    assert next(iter(found)) == example
    named = load_dataset(name, part, data_files=path, splits=[split])
    assert list(named) == list(found)
    if lazy:
        entries = list(found.iterate())
        assert [item for item, _ in found.iterate(entries[0][1])] == [item for item, _ in entries[1:]]


def test_every_data_set_has_been_tried():
    tried = {case[0] for case in CASES} | {"tnews", "bq_corpus", "dureader_robust", "nlpcc_dbqa", "thucnews"}
    assert READERS.keys() == tried


def test_label_lists():
    assert READERS["chnsenticorp"].label_list == ("0", "1")
    assert len(READERS["tnews"].label_list) == 15
    assert READERS["msra_ner"].label_list[-1] == READERS["weibo_ner"].label_list[-1] == "O"
    assert len(set(READERS["weibo_ner"].label_list)) == 17
    assert READERS["glue"]["sts-b"].label_list is None
    assert READERS["glue"]["rte"].label_list == ("entailment", "not_entailment")


def test_questions_are_as_the_file_has_them(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SQUAD))
    train, dev = load_dataset("squad", data_files=[tmp_path / "a.json"] * 2, splits=["train", "dev"])
    assert list(train) == list(dev)
    assert [example["answer_starts"] for example in train] == [[0], [], [3]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lcqmc", "a\tb\t1\na\tb\t2\n", ":2: unknown label '2'. Known are: 0, 1"),
        ("lcqmc", "a\tb\t1\na\tb\n", ":2: found 2 tab-separated cells"),
        ("lcqmc", "", "is empty"),
        ("msra_ner", "text_a\tlabel\n李\x02来\tB-PER\x02B-PEA\n", ":2: "),
        ("afqmc", '{"sentence1": "a", "sentence2": "b", "label": "0"}\n{"sentence1"\n', ":2: "),
        ("squad", '{"data": [', "a.txt"),
        ("wikiqa", "qid\ttext_a\ttext_b\tlabel\n7\ta\tb\tx\n", ":2: "),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load_dataset(name, data_files=path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no data set 'chnsenticorps'. Did you mean 'chnsenticorp'"):
        load_dataset("chnsenticorps", splits="train")
    with pytest.raises(DataError, match=r"there is no chnsenticorp/dev.tsv or ChnSentiCorp/dev.tsv"):
        load_dataset("chnsenticorp", splits="dev", data_root=tmp_path)


@pytest.mark.parametrize("batched", [False, True])
def test_the_guide_for_a_pair_task(tmp_path, bert_folder, batched):
    """The chain of PaddleNLP's guide, LCQMC to batches, by this package's names."""
    from ernie import load_tokenizer
    from propeller.data import Dict, Pad, Stack

    (tmp_path / "train.tsv").write_text("the cat\ta dog\t1\nmat\tmat\t0\n")
    tokenizer = load_tokenizer(bert_folder)

    def convert_example(example, tokenizer):
        encoded = tokenizer(text=example["query"], text_pair=example["title"])
        encoded["label"] = [example["label"]]
        return encoded

    def convert_examples(examples, tokenizer):
        queries = [example["query"] for example in examples]
        titles = [example["title"] for example in examples]
        encoded = tokenizer(text=queries, text_pair=titles, return_dict=False)
        for place in range(len(encoded)):
            encoded[place]["label"] = [examples[place]["label"]]
        return encoded

    train_ds = load_dataset("lcqmc", data_files=tmp_path / "train.tsv")
    assert train_ds.data[:1] == [{"query": "the cat", "title": "a dog", "label": 1}]
    convert = functools.partial(convert_examples if batched else convert_example, tokenizer=tokenizer)
    train_ds.map(convert, batched=batched)
    batchify = Dict(
        {
            "input_ids": Pad(axis=0, pad_val=tokenizer.pad_token_id),
            "token_type_ids": Pad(axis=0, pad_val=tokenizer.pad_token_type_id),
            "label": Stack(dtype="int64"),
        }
    )
    input_ids, token_type_ids, label = batchify(train_ds.data)
    first, second = (tokenizer.encode(*pair) for pair in (("the cat", "a dog"), ("mat", "mat")))
    padding = [0] * (len(first.input_ids) - len(second.input_ids))
    assert input_ids.tolist() == [first.input_ids.tolist(), second.input_ids.tolist() + padding]
    assert token_type_ids.tolist() == [
        first.token_type_ids.tolist(),
        second.token_type_ids.tolist() + padding,
    ]
    assert label.tolist() == [[1], [0]]


@pytest.mark.parametrize(
    ("name", "part", "splits", "sizes", "examples"),
    [
        ("chnsenticorp", None, ("train", "dev", "test"), (9600, 1200, 1200), {}),
        (
            "lcqmc",
            None,
            ("dev", "test"),
            (8802, 12500),
            {0: {"label": 1, "query": "开初婚未育证明怎么弄？", "title": "初婚未育情况证明怎么开？"}},
        ),
        ("glue", "cola", ("train", "dev", "test"), (8551, 1043, 1063), {}),
        ("glue", "mrpc", ("train", "dev", "test"), (3667, 408, 1725), {}),
        ("msra_ner", None, ("dev", "test"), (2318, 4636), {}),
        ("weibo_ner", None, ("train", "dev", "test"), (1350, 270, 270), {}),
        ("cmrc2018", None, ("train", "dev", "trial"), (10142, 3219, 1002), {}),
        ("wikiqa", None, ("train", "dev", "test"), (8672, 1130, 2351), {}),
    ],
)
def test_real_files(real_data, name, part, splits, sizes, examples):
    found = load_dataset(name, name=part, splits=splits, data_root=real_data)
    assert tuple(map(len, found)) == sizes
    for index, example in examples.items():
        assert found[0][index] == example
