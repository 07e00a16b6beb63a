"""The public files as they are, where they are at hand."""

from __future__ import annotations

import numpy as np
import pytest

from propeller.data import Dataset, FeatureColumns, LabelColumn, RawColumn

TEXT_A = ("sentence", "sentence1", "#1 String")
TEXT_B = ("sentence2", "#2 String")
COLA = ["_", "label", "_", "text_a"]


def columns(label=None, *, file_columns=None):
    return FeatureColumns(
        [
            RawColumn("text_a", aliases=TEXT_A),
            RawColumn("text_b", aliases=TEXT_B, optional=True),
            label or LabelColumn("label", aliases=("Quality", "score"), optional=True),
        ],
        file_columns=file_columns,
    )


ENTAILMENT = LabelColumn("label", ["entailment", "not_entailment"])
SCORE = LabelColumn("label", dtype="float32", aliases=("score",))


@pytest.mark.parametrize(
    "path, table, rows, names",
    [
        ("chnsenticorp/train.tsv", columns(), 9600, {"text_a", "label"}),
        ("lcqmc/dev.tsv", columns(), 8802, {"text_a", "text_b", "label"}),
        ("glue/SST-2/train.tsv.gz", columns(), 67349, {"text_a", "label"}),
        ("glue/SST-2/test.tsv", columns(), 1821, {"text_a"}),
        ("glue/MRPC/train.tsv", columns(), 3667, {"text_a", "text_b", "label"}),
        ("glue/RTE/dev.tsv", columns(ENTAILMENT), 277, {"text_a", "text_b", "label"}),
        ("glue/STS-B/train.tsv", columns(SCORE), 5749, {"text_a", "text_b", "label"}),
        ("glue/CoLA/train.tsv", columns(file_columns=COLA), 8551, {"text_a", "label"}),
        ("glue/CoLA/test.tsv", columns(file_columns=COLA), 1063, {"text_a"}),
        ("wikiqa/train.tsv", columns(), 8672, {"text_a", "text_b", "label"}),
    ],
)
def test_files_are_read_as_they_are(real_data, path, table, rows, names):
    examples = list(table.read(real_data / path))
    assert len(examples) == rows
    assert all(example.keys() == names for example in examples)
    assert all(example["text_a"] for example in examples)


def test_the_first_and_last_rows_of_mrpc(real_data):
    dataset = columns().build_dataset("train", data_dir=real_data / "glue" / "MRPC")
    assert dataset[0]["text_a"].startswith('Amrozi accused his brother , whom he called " the witness " ,')
    assert (dataset[0]["label"], len(dataset)) == (1, 3667)


@pytest.mark.parametrize(
    "path, split", [("chnsenticorp/train.tsv", list), ("glue/SST-2/train.tsv.gz", str.split)]
)
@pytest.mark.parametrize("options", [{"batch_size": 32}, {"max_tokens": 4096}])
def test_padding_stays_below_a_tenth(real_data, path, split, options):
    """Characters or words stand for tokens; cut at 256 as in the usual recipes."""
    lengths = [min(256, len(split(example["text_a"])) + 2) for example in columns().read(real_data / path)]
    dataset = Dataset.from_list([{"ids": np.ones(length, np.int64)} for length in lengths])
    batches = [batch["ids"] for batch in dataset.shuffle().bucket(**options)]
    total = sum(batch.size for batch in batches)
    assert sum(len(batch) for batch in batches) == len(lengths)
    assert 1 - sum(lengths) / total < 0.1
