"""Public data sets by name, for `load_dataset`: local files in their original form, fields as in PaddleNLP.

    from ernie.datasets import load_dataset

    train_ds, dev_ds = load_dataset("glue", name="cola", splits=("train", "dev"), data_root="/data")

Labels are ids: positions in the dataset's `label_list`. Where that is None they are what the file has.

| name | an example |
|---|---|
| chnsenticorp, thuc | text, label |
| tnews | sentence, label |
| lcqmc | query, title, label |
| bq, afqmc, ocnli | sentence1, sentence2, label |
| xnli | premise, hypothesis, label |
| glue, by `name` | sentence, or sentence1 and sentence2; labels |
| msra_ner, weibo_ner, conll | tokens, labels |
| squad, cmrc2018, drcd, dureader | id, question, context, answers, answer_starts, is_impossible |
| wikiqa, dbqa | qid, text_a, text_b, label |

An example of a file without labels has none. The files are read as the tasks of this package read them, so
that what these say about malformed rows and missing gold labels holds here, too. Answers stay as the file has
them, also where they do not stand at their `answer_start`; -1 says that the file names no place.

Source: the documentation of PaddleNLP's data sets, for the names of fields and the order of labels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie.tasks.classification_files import Layout, read_classification
from ernie.tasks.glue import TASKS, Task
from ernie.tasks.mrc_files import read_mrc
from ernie.tasks.ner_files import read_ner
from ernie.tasks.ranking_files import read_ranking
from propeller.data import Dataset, DatasetReader, IterDataset, MapDataset, load_dataset
from propeller.errors import DataError, did_you_mean
from propeller.processor import Raw

__all__ = ["READERS", "IterDataset", "MapDataset", "load_dataset"]

_SPLITS: Mapping[str, Sequence[str]] = {"train": ["train"], "dev": ["dev"], "test": ["test"]}
_BINARY = ("0", "1")
_TNEWS_CODES = tuple(str(code) for code in range(100, 117) if code not in (105, 111))
_MSRA = ("B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "O")
_WEIBO = tuple(
    f"{place}-{kind}.{form}"
    for kind in ("PER", "ORG", "GPE", "LOC")
    for form in ("NAM", "NOM")
    for place in "BI"
) + ("O",)


def _label_id(label: Any, labels: Sequence[str] | None) -> Any:
    """A label's id, or that of each of several; as it is where there is no list of them."""
    if labels is None:
        return label
    if isinstance(label, list):
        return [_label_id(one, labels) for one in label]
    try:
        return labels.index(label)
    except ValueError:
        raise DataError(
            f"unknown label {label!r:.80}.{did_you_mean(label, labels)} Known are: {', '.join(labels)}."
        ) from None


def _sentences(raw: Raw, *, fields: Mapping[str, str], labels: Sequence[str] | None) -> dict[str, Any]:
    example = {name: raw[field] for field, name in fields.items() if field in raw}
    if (name := fields["label"]) in example:
        example[name] = _label_id(example[name], labels)
    return example


def _number(raw: Raw, *, fields: Mapping[str, str]) -> dict[str, Any]:
    """As `_sentences`, with a number for a label."""
    example = _sentences(raw, fields=fields, labels=None)
    name = fields["label"]
    return {**example, name: float(example[name])} if name in example else example


def _read_sentences(
    path: Path, split: str, *, layout: Layout, convert: Callable[[Raw], dict[str, Any]]
) -> Dataset:
    return read_classification(path, layout, labelled=not split.startswith("test")).map(convert)


def _classification(
    files: Mapping[str, Sequence[str]],
    fields: Mapping[str, str],
    labels: Sequence[str] | None,
    layout: Layout | None = None,
) -> DatasetReader:
    convert = functools.partial(_sentences, fields=fields, labels=labels)
    pair = "text_b" in fields
    read = functools.partial(_read_sentences, layout=layout or Layout(pair=pair), convert=convert)
    return DatasetReader(read, files, labels)


def _glue(task: Task) -> DatasetReader:
    pair = task.layout.pair
    fields = {"text_a": "sentence1", "text_b": "sentence2"} if pair else {"text_a": "sentence"}
    fields["label"] = "labels"
    files = _files([task.folder, f"glue/{task.folder}"], task.files or _SPLITS)
    if task.labels is not None:
        return _classification(files, fields, task.labels, task.layout)
    convert = functools.partial(_number, fields=fields)
    return DatasetReader(functools.partial(_read_sentences, layout=task.layout, convert=convert), files)


def _tagged(raw: Raw, *, labels: Sequence[str] | None) -> dict[str, Any]:
    return {"tokens": raw["units"], "labels": _label_id(raw["labels"], labels)}


def _read_tagged(path: Path, split: str, *, labels: Sequence[str] | None) -> Dataset:
    return read_ner(path, labels=labels).map(functools.partial(_tagged, labels=labels))


def _tagging(files: Mapping[str, Sequence[str]], labels: Sequence[str] | None) -> DatasetReader:
    return DatasetReader(functools.partial(_read_tagged, labels=labels), files, labels)


def _question(raw: Raw) -> dict[str, Any]:
    found = {name: raw[name] for name in ("id", "question", "context")}
    answers = raw["answers"]
    return {
        **found,
        "answers": [answer["text"] for answer in answers],
        "answer_starts": [answer["answer_start"] for answer in answers],
        "is_impossible": raw["is_impossible"],
    }


def _read_questions(path: Path, split: str) -> Dataset:
    return read_mrc(path, mend=False).map(_question)


def _candidate(raw: Raw) -> dict[str, Any]:
    return {name: raw[name] for name in ("qid", "text_a", "text_b", "label") if name in raw}


def _read_candidates(path: Path, split: str) -> Dataset:
    return read_ranking(path, labelled=not split.startswith("test")).map(_candidate)


def _files(
    folders: Sequence[str], stems: Mapping[str, Sequence[str]], end: str = ".tsv"
) -> dict[str, Sequence[str]]:
    """Split -> where a file of it may lie in the data root."""
    return {
        split: [f"{folder}/{stem}{end}" for folder in folders for stem in found]
        for split, found in stems.items()
    }


_TEXT = {"text_a": "text", "label": "label"}
_PAIR = {"text_a": "sentence1", "text_b": "sentence2", "label": "label"}

_AFQMC = _classification(_files(["afqmc", "afqmc_public"], _SPLITS, ".json"), _PAIR, _BINARY)
_BQ = _classification(_files(["bq", "BQ", "bq_corpus"], _SPLITS), _PAIR, _BINARY)
_DBQA = DatasetReader(_read_candidates, _files(["dbqa", "nlpcc-dbqa", "nlpcc_dbqa"], _SPLITS))
_DUREADER = DatasetReader(
    _read_questions,
    _files(["dureader", "dureader_robust", "dureader_robust-data", "dureader_checklist"], _SPLITS, ".json"),
)
_OCNLI = _classification(
    _files(["ocnli", "ocnli_public"], {**_SPLITS, "train": ["train", "train.50k"]}, ".json"),
    _PAIR,
    ("entailment", "contradiction", "neutral"),
)
_THUC = _classification(_files(["thuc", "THUC", "thucnews", "THUCNews"], _SPLITS), _TEXT, None)
_TNEWS = _classification(
    _files(["tnews", "tnews_public"], {**_SPLITS, "test": ["test", "test1.1", "test1.0"]}, ".json"),
    {"text_a": "sentence", "label": "label"},
    _TNEWS_CODES,
)

READERS: dict[str, DatasetReader | Mapping[str, DatasetReader]] = {
    "afqmc": _AFQMC,
    "bq": _BQ,
    "bq_corpus": _BQ,
    "chnsenticorp": _classification(_files(["chnsenticorp", "ChnSentiCorp"], _SPLITS), _TEXT, _BINARY),
    "clue": {"afqmc": _AFQMC, "ocnli": _OCNLI, "tnews": _TNEWS},
    "cmrc2018": DatasetReader(
        _read_questions,
        _files(["cmrc2018"], {split: [f"cmrc2018_{split}", split] for split in (*_SPLITS, "trial")}, ".json"),
    ),
    "conll": _tagging(
        {
            split: [f"{folder}/{name}" for folder in ("conll", "conll2003", "conll03") for name in names]
            for split, names in {
                "train": ("train.txt", "eng.train"),
                "dev": ("dev.txt", "valid.txt", "eng.testa"),
                "test": ("test.txt", "eng.testb"),
            }.items()
        },
        None,
    ),
    "dbqa": _DBQA,
    "drcd": DatasetReader(
        _read_questions,
        _files(
            ["drcd", "DRCD"],
            {"train": ["DRCD_training", "train"], "dev": ["DRCD_dev", "dev"], "test": ["DRCD_test", "test"]},
            ".json",
        ),
    ),
    "dureader": _DUREADER,
    "dureader_robust": _DUREADER,
    "glue": {name: _glue(task) for name, task in TASKS.items() if name != "xnli"},
    "lcqmc": _classification(
        _files(["lcqmc", "LCQMC"], _SPLITS),
        {"text_a": "query", "text_b": "title", "label": "label"},
        _BINARY,
    ),
    "msra_ner": _tagging(_files(["msra_ner", "MSRA_NER"], _SPLITS), _MSRA),
    "nlpcc_dbqa": _DBQA,
    "ocnli": _OCNLI,
    "squad": DatasetReader(
        _read_questions,
        _files(
            ["squad", "SQuAD"],
            {
                "train": ["train-v1.1", "train-v2.0", "train"],
                "dev": ["dev-v1.1", "dev-v2.0", "dev"],
                "train_v1": ["train-v1.1"],
                "dev_v1": ["dev-v1.1"],
                "train_v2": ["train-v2.0"],
                "dev_v2": ["dev-v2.0"],
            },
            ".json",
        ),
    ),
    "thuc": _THUC,
    "thucnews": _THUC,
    "tnews": _TNEWS,
    "weibo_ner": _tagging(
        {split: [f"weibo_ner/weiboNER_2nd_conll.{split}", f"weibo_ner/{split}.txt"] for split in _SPLITS},
        _WEIBO,
    ),
    "wikiqa": DatasetReader(
        _read_candidates,
        {
            split: [f"wikiqa/{split}.tsv", f"WikiQA/{split}.tsv", f"WikiQACorpus/WikiQA-{split}.tsv"]
            for split in _SPLITS
        },
    ),
    "xnli": _classification(
        _files(["xnli", "XNLI"], TASKS["xnli"].files or _SPLITS),
        {"text_a": "premise", "text_b": "hypothesis", "label": "label"},
        TASKS["xnli"].labels,
        TASKS["xnli"].layout,
    ),
}
"""What `load_dataset` knows by name: the entry point of this package."""
