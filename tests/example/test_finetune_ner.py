"""`example/finetune_ner.py` as a user runs it: data files, flags, logs, standard input, bad input."""

from __future__ import annotations

import importlib.util
import json
import random
import re

import pytest

from ernie.tasks.entity_scores import entity_scores
from ernie.tasks.tagging import entities_of, tags_of
from propeller.bundle import read_bundle

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
FAST = {"learning_rate": 0.02, "batch_size": 8, "hidden_dropout_prob": 0.0, "initializer_range": 0.2}
EVALUATION = (
    r"\[dev evaluation\] loss: \d+\.\d{6}, f1: (\d\.\d{6}), precision: (\d\.\d{6}), "
    r"recall: (\d\.\d{6}), n: (\d+),"
)


def sentences(count, seed, *, length=8):
    """Units and tags (BIO): places are 酒店店..., persons 服务务..."""
    rng = random.Random(seed)
    for _ in range(count):
        units, tags = [], []
        while len(units) < length:
            kind, begin, rest = rng.choice([("LOC", "酒", "店"), ("PER", "服", "务")])
            inside = rng.randint(0, 2)
            units += [rng.choice("家好的差"), begin, *(rest * inside)]
            tags += ["O", f"B-{kind}", *[f"I-{kind}"] * inside]
        yield units, tags


def tsv_rows(found, joint="\x02"):
    return ["text_a\tlabel", *(f"{joint.join(units)}\t{joint.join(tags)}" for units, tags in found)]


@pytest.fixture(scope="module")
def script(root):
    """The script as a module, which `call` runs."""
    path = root / "example" / "finetune_ner.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path, write):
    """A folder as MSRA's."""
    for seed, (name, count) in enumerate({"train": 60, "dev": 20}.items()):
        write(tmp_path / "data" / f"{name}.tsv", *tsv_rows(sentences(count, seed)))
    return tmp_path / "data"


@pytest.fixture
def finetune(call, workplace, tmp_path):
    """`finetune(*flags, max_steps=, hparam=)` trains a small model from nothing."""

    def run(*flags, max_steps=2, hparam=()):
        config = {"model_dir": str(tmp_path / "output"), "max_steps": max_steps, "device": "cpu"}
        hparams = {**SIZES, **FAST, **dict(hparam)}
        return call(
            "--vocab_file", workplace / "vocab.txt", "--max_seqlen", 10, "--cache_dir", tmp_path / "cache",
            "--run_config", json.dumps(config), "--hparam", json.dumps(hparams), *flags,
        )  # fmt: skip

    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_that_tells_reads_the_data_for_its_report(script, finetune, data, monkeypatch, rank):
    reported = []
    monkeypatch.setenv("PADDLE_TRAINER_ID", str(rank))
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "2")
    monkeypatch.setattr(script, "report", lambda *_: reported.append(1))
    monkeypatch.setattr(script.finetuning, "fit", lambda *_, **__: None)
    assert finetune("--data_dir", data).code == 0
    assert len(reported) == (0 if rank else 2)


@pytest.fixture
def predict(call, tmp_path):
    """`predict(lines, *flags)` gives a line for each."""

    def run(lines, *flags):
        stdin = "".join(line + "\n" for line in lines).encode("utf-8")
        result = call("--do_predict", "--bundle", tmp_path / "output/best/inference", *flags, stdin=stdin)
        assert result.code == 0, result.err
        answers = result.out.split("\n")
        assert answers.pop() == "" and len(answers) == len(lines)
        return answers

    return run


@pytest.mark.parametrize("use_crf", [False, True])
def test_learns_evaluates_and_predicts(finetune, predict, data, tmp_path, use_crf):
    """Sentences are longer than the model: what is logged is what standard input gets from the bundle."""
    result = finetune(
        "--data_dir", data, "--dev_predictions", tmp_path / "dev.jsonl",
        max_steps=60, hparam={"use_crf": use_crf},
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "labels (BIO): O, B-LOC, B-PER, I-LOC, I-PER" in result.err
    report = r"dev: 20 texts in (\d+) windows of up to 10 tokens; unknown tokens: 0.00%"
    (windows,) = re.findall(report, result.err)
    (found,) = re.findall(EVALUATION, result.err)
    assert found[3] == windows and int(windows) > 20
    assert float(found[0]) > 0.9

    raws = list(sentences(20, 1))
    lines = predict(["\x02".join(units) for units, _ in raws])
    tags = [line.split("\x02") for line in lines]
    scores = entity_scores([gold for _, gold in raws], tags)
    for name, logged in zip(("f1", "precision", "recall"), found, strict=False):
        assert scores[name] == pytest.approx(float(logged), abs=1e-6)
    assert read_bundle(tmp_path / "output/best/inference").metrics["dev"]["f1"] == pytest.approx(scores["f1"])

    spaced = predict([" ".join(units) for units, _ in raws])
    assert [line.split(" ") for line in spaced] == tags
    kept = (tmp_path / "dev.jsonl").read_text("utf-8").splitlines()
    for (units, _), wanted, line in zip(raws, tags, kept, strict=True):
        row = json.loads(line)
        assert (row["units"], row["prediction"]["tags"]) == (units, wanted)
        text = "".join(units)
        entities = row["prediction"]["entities"]
        assert [text[each["start"] : each["end"]] for each in entities] == [each["text"] for each in entities]
        assert len(entities) == len(entities_of(wanted))


def test_columns_in_bmes_counted_strictly(finetune, predict, tmp_path, write):
    """A CoNLL file, whose form and scheme are recognised; free of separators a line is one unit."""
    for seed, name in enumerate(("train", "dev")):
        rows = []
        for units, tags in sentences(20, seed):
            bmes = tags_of(entities_of(tags), len(tags), "BMES")
            rows += [*(f"{unit} {tag}" for unit, tag in zip(units, bmes, strict=True)), ""]
        write(tmp_path / f"{name}.txt", *rows)
    result = finetune(
        "--train_set", tmp_path / "train.txt", "--dev_set", tmp_path / "dev.txt",
        "--score", "strict", "--doc_stride", 4,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "labels (BMES): O, B-LOC, B-PER, E-LOC, E-PER, M-LOC, M-PER, S-LOC, S-PER" in result.err
    settings = read_bundle(tmp_path / "output/best/inference").metadata["processor"]["settings"]
    assert (settings["scheme"], settings["score"], settings["doc_stride"]) == ("BMES", "strict", 4)
    assert settings["by_character"] is True
    lines = ["酒店好", "酒\x02店", "", "a  b", "好 " * 99]
    answers = map(json.loads, predict(lines, "--format", "jsonl"))
    assert [len(answer["tags"]) for answer in answers] == [1, 2, 1, 3, 100]


@pytest.mark.parametrize("flags", [(), ("--data_format", "json")])
def test_json_with_ids(finetune, predict, tmp_path, write, flags):
    """As Hugging Face's data sets; `label_map.json` has the names."""
    names = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    write(tmp_path / "data/label_map.json", json.dumps({name: i for i, name in enumerate(names)}))
    for seed, (name, count) in enumerate({"train": 60, "dev": 20}.items()):
        rows = [
            json.dumps({"tokens": units, "ner_tags": list(map(names.index, tags))})
            for units, tags in sentences(count, seed)
        ]
        write(tmp_path / "data" / f"{name}.jsonl", *rows)
    result = finetune("--data_dir", tmp_path / "data", *flags, max_steps=60)
    assert result.code == 0, result.err
    assert "labels (BIO): O, B-LOC, I-LOC, B-PER, I-PER" in result.err
    assert float(re.findall(EVALUATION, result.err)[0][0]) > 0.9
    units, tags = next(sentences(1, 1))
    assert predict([" ".join(units)]) == [" ".join(tags)]


def test_scheme_and_format_by_flags(finetune, tmp_path, write):
    """Labels of `label_map.json`, in its order; a file that would pass for one with positions."""
    rows = [*("酒1 I-LOC", "店2 O", ""), *("好1 O", "差2 I-LOC", "")]
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.tsv", *rows)
    labels = {"I-LOC": 0, "B-LOC": 1, "O": 2}
    write(tmp_path / "label_map.json", json.dumps(labels))
    result = finetune("--data_dir", tmp_path, "--scheme", "iob1", "--data_format", "conll")
    assert result.code == 0, result.err
    assert "labels (IOB1): I-LOC, B-LOC, O" in result.err
    assert "train: 2 texts in 2 windows of up to 10 tokens;" in result.err


def test_a_test_set_without_labels_is_left_out(finetune, data, write):
    write(data / "test.tsv", "text_a", *("\x02".join(units) for units, _ in sentences(3, 5)))
    result = finetune("--data_dir", data)
    assert result.code == 0, result.err
    assert "test has no labels and is left out" in result.err and "[test evaluation]" not in result.err
    write(data / "test.tsv", *tsv_rows(sentences(3, 5)))
    assert "[test evaluation]" in finetune("--data_dir", data, max_steps=4).err


def test_sentence_piece_vocabulary(finetune, predict, data, tmp_path, write):
    """As ERNIE-tiny's: pieces that begin a word have a mark."""
    special = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
    vocab = write(tmp_path / "vocab.txt", *special, *(f"\u2581{piece}" for piece in "家好的差酒店服务"))
    flag = "--use_sentence_piece_vocab"
    result = finetune("--data_dir", data, "--vocab_file", vocab, flag)
    assert result.code == 0, result.err
    assert result.err.count("unknown tokens: 0.00%") == 2
    assert len(predict(["家\x02酒\x02店"])[0].split("\x02")) == 3
    # Refused before it trains, but behind the report.
    frozen = {"freeze": "no.such.weight"}
    plain = finetune("--data_dir", data, "--vocab_file", vocab, flag, "False", hparam=frozen)
    assert plain.code == 2 and plain.err.count("unknown tokens: 0.00%") == 0
    assert "unknown tokens: 8" in plain.err


def test_the_bundle_of_another_task(call, bundle):
    result = call("--do_predict", "--bundle", bundle, stdin=b"a\n")
    assert result.code == 2 and result.out == ""
    assert "is a bundle of the task 'classification', not of 'sequence_labeling'" in result.err


BAD_FLAGS = {
    "near miss of a hyper-parameter": (["--hparam", '{"use_crff": 1}'], 2, "Did you mean 'use_crf'"),
    "no switch": (["--hparam", '{"use_crf": "yes"}'], 2, "use_crf must be true or false"),
    "no scheme": (["--scheme", "BIEO"], 2, "'BIEO' is no tagging scheme"),
    "no score": (["--score", "exact"], 2, "invalid choice: 'exact'"),
    "no stride": (["--doc_stride", "0"], 2, "doc_stride must be a whole number of at least 1"),
    "another vocabulary": (["--use_sentence_piece_vocab"], 2, "Leave --use_sentence_piece_vocab out"),
    "short": (["--max_seqlen", "2"], 2, "max_seqlen 2 leaves no room"),
}


@pytest.mark.parametrize(("flags", "code", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags(finetune, data, tmp_path, flags, code, message):
    result = finetune("--data_dir", data, *flags)
    assert (result.code, [message in error for error in result.errors]) == (code, [True]), result.err
    assert not (tmp_path / "output" / "checkpoints").exists()


BAD_ROWS = {
    "label count unlike units": ("酒\x02店\tO", "/dev.tsv:22: .*found 2 units .* and 1 labels"),
    "unknown label": ("酒\tB-ORG", "/dev.tsv:22: .*unknown label 'B-ORG'"),
    "no label": ("酒", "/dev.tsv:22: found 1 tab-separated cell"),
    "no tag": ("酒\tperson", "/dev.tsv:22: .*'person'"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(finetune, data, tmp_path, row, message):
    with open(data / "dev.tsv", "a", encoding="utf-8") as file:
        file.write(row + "\n")
    result = finetune("--data_dir", data)
    assert result.code == 1
    (error,) = result.errors
    assert re.search(message, error), error
    assert not (tmp_path / "output" / "checkpoints").exists()
