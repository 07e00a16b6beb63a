"""What fine-tuning scripts share: flags, files, the model's configuration, batches, the length of a run."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import shutil
import types
from pathlib import Path

import numpy as np
import pytest

from ernie.config import ErnieConfig
from ernie.pretrained import save_pretrained_state
from ernie.tasks.arguments import DataFiles, argument_parser
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.finetuning import (
    batch_size,
    batched,
    check_hparams,
    count_steps,
    resolve_model,
    step_batch_size,
    with_max_steps,
    with_precision,
)
from ernie.tasks.training import Training
from ernie.tokenizing import load_tokenizer
from propeller.config import parse_hparam
from propeller.data import Dataset
from propeller.errors import ConfigError
from propeller.paddle import distributed
from propeller.paddle.distributed import Ranks
from propeller.types import HParams, RunConfig

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "good", "bad", "Good"]
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}

# As Google's Chinese BERT has it; keys of its pooler stand beside the encoder's.
BERT_FILE = {
    "attention_probs_dropout_prob": 0.1, "directionality": "bidi", "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 512, "num_attention_heads": 12, "num_hidden_layers": 12,
    "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128, "pooler_type": "first_token_transform", "type_vocab_size": 2,
    "vocab_size": 21128,
}  # fmt: skip
TRANSFORMERS_KEYS = {"architectures": ["BertModel"], "bos_token_id": None, "use_cache": True, "id2label": {}}


def parse(*flags):
    return argument_parser("A script.").parse_args([str(flag) for flag in flags])


@pytest.fixture
def vocab_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    return path


@pytest.fixture
def pretrained(tmp_path, vocab_file):
    """A folder of a configuration, a vocabulary and one tensor."""
    folder = tmp_path / "pretrained"
    config = ErnieConfig(vocab_size=len(VOCABULARY), **SIZES)
    state = {"embeddings.word.weight": np.ones((len(VOCABULARY), 8), np.float32)}
    save_pretrained_state(folder, config, state)
    shutil.copy(vocab_file, folder / "vocab.txt")
    return folder


class TestFlags:
    def test_defaults(self):
        args = parse()
        assert (args.max_seqlen, args.format, args.do_predict, args.strict) == (128, "tsv", False, False)
        assert args.do_lower_case is None and args.columns is None and args.bundle is None

    @pytest.mark.parametrize(
        ("text", "value"), [("true", True), ("False", False), ("1", True), ("no", False)]
    )
    def test_do_lower_case(self, text, value):
        assert parse("--do_lower_case", text).do_lower_case is value

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--do_lower_case", "maybe"), "expected true or false, got 'maybe'"),
            (("--max_seqlen", "long"), "invalid int value: 'long'"),
            (("--format", "csv"), "invalid choice: 'csv'"),
            (("--data", "x"), "unrecognized arguments"),  # no abbreviations: the next release may add another
        ],
    )
    def test_wrong(self, flags, message):
        with pytest.raises(ConfigError, match=message):
            parse(*flags)


class TestDataFiles:
    def test_in_a_folder(self, tmp_path):
        (tmp_path / "train").mkdir()
        for name in ("dev.tsv", "test.tsv.gz"):
            (tmp_path / name).touch()
        files = DataFiles.of(parse("--data_dir", tmp_path))
        assert files.items() == [
            ("train", tmp_path / "train"),
            ("dev", tmp_path / "dev.tsv"),
            ("test", tmp_path / "test.tsv.gz"),
        ]

    @pytest.mark.parametrize(
        "names",
        [
            ("cmrc2018_train.json.gz", "cmrc2018_dev.json.gz"),
            ("weiboNER_2nd_conll.train", "weiboNER_2nd_conll.dev", "weiboNER_2nd_conll.test"),
            ("train-v2.0.json", "dev-v2.0.json"),
            ("eng.train", "eng.testa", "eng.testb"),
        ],
    )
    def test_as_they_are_downloaded(self, tmp_path, names):
        for name in (*names, "README.md"):
            (tmp_path / name).touch()
        found = DataFiles.of(parse("--data_dir", tmp_path)).items()
        assert found == [
            (name, tmp_path / file) for name, file in zip(("train", "dev", "test"), names, strict=False)
        ]
        (tmp_path / "train.tsv").touch()
        assert DataFiles.of(parse("--data_dir", tmp_path)).train == tmp_path / "train.tsv"

    def test_a_flag_wins_and_test_may_be_missing(self, tmp_path):
        for name in ("train.tsv", "dev.tsv", "other"):
            (tmp_path / name).touch()
        files = DataFiles.of(parse("--data_dir", tmp_path, "--dev_set", tmp_path / "other"))
        assert files.items() == [("train", tmp_path / "train.tsv"), ("dev", tmp_path / "other")]

    @pytest.mark.parametrize(
        ("there", "flags", "message"),
        [
            ([], [], r"No train data: .*--train_set FILE.*train/ or train.tsv .*\(now None\)"),
            (["train.tsv"], ["--data_dir", "."], r"No dev data: .*dev/ .*\(now \., which holds train.tsv\)"),
            ([], ["--data_dir", "."], r"No train data: .*\(now \., which holds nothing\)"),
            ([f"f{i:02}" for i in range(22)], ["--data_dir", "."], r"holds f00, .*, f19 and 2 more\)"),
            (
                [f"{name}.json" for name in ("cmrc2018_train", "DRCD_training")],
                ["--data_dir", "."],
                "holds DRCD_training.json and cmrc2018_train.json; remove all but one",
            ),
            (["train.tsv"], ["--train_set", "train.tsv", "--dev_set", "d"], "--dev_set d does not exist"),
            (["dev.tsv", "train.tsv", "train.tsv.gz"], ["--data_dir", "."], "train.tsv and train.tsv.gz"),
        ],
    )
    def test_missing_or_ambiguous(self, tmp_path, monkeypatch, there, flags, message):
        monkeypatch.chdir(tmp_path)
        for name in there:
            Path(name).touch()
        with pytest.raises(ConfigError, match=message):
            DataFiles.of(parse(*flags))


class TestHparams:
    @pytest.mark.parametrize(
        "given",
        [
            BERT_FILE,
            {**BERT_FILE, **TRANSFORMERS_KEYS, "pad_token_id": 0, "model_type": "bert"},
            {"sent_type_vocab_size": None, "use_task_id": False, "task_id": 0},
            {"batch_size": 8192, "in_tokens": True, "num_epochs": 3, "num_label": 2, "use_fp16": 0},
        ],
        ids=["BERT", "Transformers", "ERNIE", "data"],
    )
    def test_keys_of_model_files_and_older_scripts_pass(self, given):
        check_hparams(HParams(given), Training.keys())

    def test_the_users_own_are_listed(self, caplog):
        with caplog.at_level(logging.INFO, "ernie"):
            check_hparams(HParams(mine=1, learning_rate=1e-3, gamma=2), ["learning_rate"])
        assert caplog.messages == ["hyper-parameters not used: gamma, mine"]

    @pytest.mark.parametrize(
        ("slip", "meant"),
        [
            ("learning_rat", "learning_rate"),
            ("num_labels", "num_label"),
            ("batchsize", "batch_size"),
            ("hiden_size", "hidden_size"),
            ("num_layers", None),
        ],
    )
    def test_slips(self, slip, meant):
        # Also where the right one was given: the slip may be meant to override it.
        for given in ({slip: 1}, {slip: 1, "learning_rate": 1, "num_label": 2, "batch_size": 3}):
            if meant is None:
                check_hparams(HParams(given), ["learning_rate"])
            else:
                with pytest.raises(ConfigError, match=f"{slip!r}. Did you mean {meant!r}"):
                    check_hparams(HParams(given), ["learning_rate"])


class TestPrecision:
    @pytest.mark.parametrize(
        ("given", "before", "after"),
        [
            ({}, "fp32", "fp32"),
            ({"use_fp16": 0}, "fp32", "fp32"),
            ({"use_fp16": False}, "bf16", "bf16"),
            ({"use_fp16": None}, "fp16", "fp16"),
            ({"use_fp16": 1}, "fp32", "fp16"),
            ({"use_fp16": True}, "fp32", "fp16"),
            ({"use_fp16": True}, "fp16", "fp16"),
        ],
    )
    def test_older_switch(self, given, before, after):
        run_config = RunConfig(precision=before, max_steps=7)
        assert with_precision(run_config, HParams(given)) == RunConfig(precision=after, max_steps=7)

    @pytest.mark.parametrize(
        ("use_fp16", "precision", "message"),
        [
            (True, "bf16", "use_fp16 is set in --hparam, but precision is 'bf16' in --run_config"),
            ("true", "fp32", "use_fp16 must be true or false, got 'true'"),
            (2, "fp32", "use_fp16 must be true or false, got 2"),
        ],
    )
    def test_wrong(self, use_fp16, precision, message):
        with pytest.raises(ConfigError, match=message):
            with_precision(RunConfig(precision=precision), HParams(use_fp16=use_fp16))


class TestResolveModel:
    def test_new_model_takes_its_size_from_the_vocabulary(self, vocab_file):
        config, tokenizer = resolve_model(
            parse("--vocab_file", vocab_file, "--max_seqlen", 16), HParams(SIZES)
        )
        assert (config.vocab_size, config.hidden_size, config.pad_token_id) == (8, 8, 0)
        assert tokenizer.tokenize("GOOD") == ["good"]

    def test_folder_alone(self, pretrained):
        config, tokenizer = resolve_model(
            parse("--warm_start_from", pretrained, "--max_seqlen", 9), HParams()
        )
        assert config == ErnieConfig(vocab_size=8, **SIZES)
        assert tokenizer.vocab_size == 8

    def test_hparams_win_over_the_folder(self, pretrained):
        hparams = HParams(hidden_dropout_prob=0.3, learning_rate=1, mine=2, sent_type_vocab_size=None)
        config, _ = resolve_model(parse("--warm_start_from", pretrained, "--max_seqlen", 9), hparams)
        assert config == ErnieConfig(vocab_size=8, hidden_dropout_prob=0.3, **SIZES)

    def test_smaller_vocabulary_is_none_of_our_business(self, pretrained, tmp_path):
        small = tmp_path / "small.txt"
        small.write_text("\n".join(VOCABULARY[:6]) + "\n", "utf-8")
        flags = ("--warm_start_from", pretrained, "--vocab_file", small, "--max_seqlen", 9)
        config, tokenizer = resolve_model(parse(*flags), HParams())
        assert (config.vocab_size, tokenizer.vocab_size) == (8, 6)

    def test_do_lower_case(self, vocab_file):
        flags = ("--vocab_file", vocab_file, "--max_seqlen", 9, "--do_lower_case", "false")
        _, tokenizer = resolve_model(parse(*flags), HParams(SIZES))
        assert tokenizer.tokenize("Good good GOOD") == ["Good", "good", "[UNK]"]

    @pytest.mark.parametrize(
        ("flags", "hparams", "message"),
        [
            ((), {}, "No vocabulary: name --vocab_file, or a folder"),
            (("--vocab_file", "VOCAB"), {**SIZES, "vocab_size": 7}, "has 8 entries, the model only 7"),
            (("--vocab_file", "VOCAB"), SIZES, "--max_seqlen 128 is beyond the 16 positions"),
            (("--vocab_file", "VOCAB"), {"hidden_size": 8}, "configuration lacks num_hidden_layers"),
            (("--vocab_file", "VOCAB"), {**SIZES, "pad_token_id": 4}, "pads with id 0, .*pad_token_id 4"),
            (("--vocab_file", "VOCAB"), {**SIZES, "num_attention_heads": 3}, "cannot be split"),
        ],
    )
    def test_wrong(self, vocab_file, flags, hparams, message):
        flags = [vocab_file if flag == "VOCAB" else flag for flag in flags]
        with pytest.raises(ConfigError, match=message):
            resolve_model(parse(*flags), HParams(hparams))

    def test_vocabulary_that_pads_otherwise(self, pretrained, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text("\n".join(["[UNK]", *VOCABULARY[1:4], "[PAD]"]) + "\n", "utf-8")
        flags = ("--warm_start_from", pretrained, "--vocab_file", other, "--max_seqlen", 9)
        with pytest.raises(ConfigError, match="The vocabulary pads with id 4, the model with pad_token_id 0"):
            resolve_model(parse(*flags), HParams())


class TestBatches:
    @pytest.fixture
    def processor(self, vocab_file):
        tokenizer = load_tokenizer(None, vocab_file=vocab_file)
        return ClassificationProcessor(tokenizer, ["0", "1"], max_seqlen=16, pair=False)

    @pytest.fixture
    def dataset(self, processor):
        raws = [{"text_a": "good " * (1 + i % 13), "label": i % 2} for i in range(50)]
        return Dataset.from_list(processor.prepare(raws))

    def test_evaluation_sees_every_example_once(self, dataset, processor):
        batches = list(batched(dataset, HParams(), processor, size=8, train=False))
        assert sum(len(batch["label"]) for batch in batches) == 50
        assert max(len(batch["label"]) for batch in batches) == 8
        found = sorted(int((row != 0).sum()) for batch in batches for row in batch["input_ids"])
        assert found == sorted(3 + i % 13 for i in range(50))

    def test_training_goes_on_and_is_shuffled(self, dataset, processor):
        batches = batched(dataset, HParams(), processor, size=8, train=True)
        lengths = []
        for batch in batches:
            lengths.append(batch["input_ids"].shape[1])
            if len(lengths) == 20:
                break
        assert len(set(lengths)) > 1

    def test_tokens(self, dataset, processor):
        batches = list(batched(dataset, HParams(in_tokens=True), processor, size=64, train=False))
        assert sum(len(batch["label"]) for batch in batches) == 50
        assert max(batch["input_ids"].size for batch in batches) <= 64

    @pytest.mark.parametrize("size", [0, -1, 2.5, "8", True, None])
    def test_wrong_size(self, size):
        with pytest.raises(ConfigError, match="batch_size must be a whole number of at least 1"):
            batch_size(HParams(batch_size=size))

    @pytest.fixture
    def of_ranks(self, monkeypatch, tmp_path):
        """The batch of a step for so many ranks, which --nproc started or not."""

        def find(ranks, *, nproc=False, restart=False, size=8):
            monkeypatch.setattr(distributed, "_joined", [Ranks(size=ranks)])
            monkeypatch.delenv("PROPELLER_WHOLE_BATCH", raising=False)
            if nproc:
                monkeypatch.setenv("PROPELLER_WHOLE_BATCH", "1")
            config = RunConfig(model_dir=str(tmp_path / "run"))
            return step_batch_size(HParams(batch_size=size), config, restart=restart)

        return find

    def test_the_batch_of_several_ranks(self, of_ranks):
        """Of each rank under a launcher, as in the older scripts; the whole one under --nproc."""
        assert of_ranks(4) == 32 and of_ranks(1) == 8
        assert of_ranks(4, nproc=True) == 8

    def test_a_run_keeps_its_batch(self, of_ranks, tmp_path):
        model_dir = tmp_path / "run"
        before = {"hparams": {"batch_size": 8, "step_batch_size": 16}}
        model_dir.mkdir()
        (model_dir / "run.json").write_text(json.dumps(before))
        assert of_ranks(1) == 8, "there is no checkpoint: it begins anew"
        (model_dir / "checkpoints/step_00000010").mkdir(parents=True)
        assert [of_ranks(1), of_ranks(4), of_ranks(4, nproc=True)] == [16, 16, 16]
        assert of_ranks(4, restart=True) == 32
        assert of_ranks(2, size=4) == 8, "what the user changes is changed, and then refused"

    def test_an_epoch_has_every_example_once(self, processor):
        """Also where the pool of the length groups is larger than the data."""
        examples = [{"input_ids": np.ones(1 + n % 7, np.int64), "row": n} for n in range(70)]
        dataset = batched(Dataset.from_list(examples), HParams(), processor, size=8, train=True)
        with contextlib.closing(dataset.iterate()) as batches:
            taken = list(itertools.islice(batches, 18))
        for epoch in (0, 1):
            rows = [int(row) for batch, _ in taken[9 * epoch : 9 * epoch + 9] for row in batch["row"]]
            assert sorted(rows) == list(range(70))
        assert [dataset.epoch(position) for _, position in taken] == [0] * 9 + [1] * 9


class TestMaxSteps:
    @pytest.mark.parametrize(
        ("num_epochs", "size", "steps"), [(1, 10, 10), (3, 32, 12), (0.5, 10, 5), (1, 32, 4)]
    )
    def test_from_epochs(self, num_epochs, size, steps):
        hparams = HParams(num_epochs=num_epochs)
        examples = Dataset.from_list([{"input_ids": np.zeros(3, np.int64)}] * 100)
        count = functools.partial(count_steps, examples, hparams, None, size=size)
        assert with_max_steps(RunConfig(), hparams, count).max_steps == steps

    def test_from_epochs_of_batches_of_tokens(self):
        hparams = HParams(num_epochs=3, in_tokens=True)
        lengths = [10, 10, 10, 30, 25, 5]  # of 32 tokens: 5 + 10, 10 + 10, 25, 30
        examples = Dataset.from_list([{"input_ids": np.zeros(length, np.int64)} for length in lengths])
        processor = types.SimpleNamespace(pad_values={})
        count = functools.partial(count_steps, examples, hparams, processor, size=32)
        assert count() == 4
        assert with_max_steps(RunConfig(), hparams, count).max_steps == 12

    def test_given_steps_win(self):
        config = RunConfig(max_steps=7)
        assert with_max_steps(config, HParams(num_epochs=100), lambda: 1 // 0) is config

    @pytest.mark.parametrize(
        ("hparams", "message"),
        [
            ({}, "How long to train"),
            ({"num_epochs": 0}, "num_epochs must be a number above 0, got 0"),
            ({"num_epochs": "3"}, "num_epochs must be a number above 0, got '3'"),
            ({"num_epochs": float("nan")}, "num_epochs must be a number above 0, got nan"),
        ],
    )
    def test_cannot_be_told(self, hparams, message):
        with pytest.raises(ConfigError, match=message):
            with_max_steps(RunConfig(), HParams(hparams), lambda: 4)


def test_bert_file_and_flags_make_a_configuration(tmp_path, vocab_file):
    """`--hparam bert_config.json` alone describes a model: the older way."""
    (tmp_path / "bert_config.json").write_text(json.dumps(BERT_FILE), "utf-8")
    args = parse(
        "--vocab_file", vocab_file, "--hparam", tmp_path / "bert_config.json", "--hparam", "{'mine': 1}"
    )
    hparams = parse_hparam(args)
    check_hparams(hparams, [])
    config, _ = resolve_model(args, hparams)
    assert (config.hidden_size, config.layer_norm_eps, config.vocab_size) == (768, 1e-12, 21128)
