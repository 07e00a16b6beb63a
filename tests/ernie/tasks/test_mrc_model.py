"""The model of reading comprehension: logits, loss, export."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from ernie.config import ErnieConfig
from ernie.tasks.mrc import IGNORED, MrcProcessor
from ernie.tasks.mrc_model import MrcModel
from ernie.tokenizing import SpecialTokens, WordPieceTokenizer
from propeller.data import pad_batch
from propeller.errors import ConfigError
from propeller.paddle.inference import Predictor
from propeller.paddle.runtime import paddle
from propeller.paddle.stream import answer_stream
from propeller.paddle.train.exporter import export_bundle
from propeller.paddle.train.model import Batch, run_loss
from propeller.types import HParams, RunConfig, RunMode

WORDS = ("the", "cat", "sat", "on", "mat", "where", "?")
RAWS = [
    {
        "id": str(number),
        "question": "where ?",
        "context": context,
        "answers": [{"text": "mat", "answer_start": context.index("mat")}],
        "is_impossible": False,
    }
    for number, context in enumerate(["the cat sat on the mat", "mat", "[PAD] the mat [SEP] sat [PAD]"])
]


@pytest.fixture(scope="module")
def processor():
    # [PAD] stands last, so that padding with 0 shows.
    names = SpecialTokens().names()
    vocab = [*sorted(names, key=lambda name: name == "[PAD]"), *WORDS]
    tokenizer = WordPieceTokenizer({token: index for index, token in enumerate(vocab)})
    return MrcProcessor(tokenizer, max_seqlen=10, doc_stride=3, max_query_length=4)


@pytest.fixture(scope="module")
def make(processor):
    """`make(mode, **sizes)` gives a model."""

    def build(mode=RunMode.PREDICT, hparams=(), **sizes):
        paddle.seed(3)
        given = {
            "vocab_size": processor.tokenizer.vocab_size,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 16,
            "initializer_range": 0.5,
            "pad_token_id": processor.tokenizer.pad_token_id,
        }
        config = ErnieConfig(**{**given, **sizes})
        model = MrcModel(
            HParams(dict(hparams)), mode, RunConfig(max_steps=9), config=config, processor=processor
        )
        model.mode = mode
        return model

    return build


def batch_of(model, processor, raws, **changes):
    batch = pad_batch(processor.prepare(raws), pad_values=processor.pad_values)
    return Batch.of(model, {**batch, **changes})


def test_outputs_do_not_depend_on_neighbours_and_padding(make, processor):
    model = make()
    together = model(batch_of(model, processor, RAWS).features)
    row = 0
    for example in processor.prepare(RAWS):
        alone = model(Batch.of(model, pad_batch([example])).features)
        length = len(example["input_ids"])
        for name, output in alone.items():
            np.testing.assert_allclose(together[name].numpy()[row, :length], output.numpy()[0], atol=1e-5)
        assert not together["in_context"].numpy()[row, length:].any()
        assert (together["start_logits"].numpy()[row, length:] == -1e4).all()
        row += 1


def test_context_is_what_answers_are_made_of(make, processor):
    """Also where a text says `[SEP]` or `[PAD]`."""
    model = make()
    found = model(batch_of(model, processor, RAWS).features)["in_context"].numpy()
    windows = [window for windows in processor.windows(RAWS) for window in windows]
    assert len(windows) == len(found) == 5
    for row, window in zip(found, windows, strict=True):
        places = np.flatnonzero(row)
        assert places.tolist() == list(range(window["context_begin"], len(window["input_ids"]) - 1))


def test_loss_is_the_mean_of_both_cross_entropies(make, processor):
    model = make(RunMode.EVAL)
    batch = batch_of(model, processor, RAWS)
    predictions = model(batch.features)
    total, weight = run_loss(model, predictions, batch)
    rows = range(5)
    starts, ends = (log_softmax(predictions[name].numpy().astype(np.float64), axis=-1)
                    for name in ("start_logits", "end_logits"))  # fmt: skip
    labels = {name: tensor.numpy() for name, tensor in batch.labels.items()}
    expected = -(starts[rows, labels["start_position"]] + ends[rows, labels["end_position"]]).sum() / 2
    assert weight == 5
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_rows_without_a_place_do_not_count(make, processor):
    model = make(RunMode.EVAL)
    whole = batch_of(model, processor, RAWS[:2])
    nowhere = [{**RAWS[2], "answers": [{"text": "dog", "answer_start": -1}]}]
    more = batch_of(model, processor, [*RAWS[:2], *nowhere])
    assert more.labels["start_position"].numpy().tolist()[-2:] == [IGNORED] * 2
    (total, weight), (total_more, weight_more) = (
        run_loss(model, model(batch.features), batch) for batch in (whole, more)
    )
    assert weight == weight_more == 3
    assert total_more.item() == pytest.approx(total.item(), rel=1e-5)


def test_head_is_new_in_a_warm_start(make):
    names = [name for name in make().state_dict() if not name.startswith("encoder.")]
    assert names == ["head.weight", "head.bias"]


def test_wrong_settings(make):
    with pytest.raises(ConfigError, match="type_vocab_size 1; reading comprehension needs 2"):
        make(type_vocab_size=1)
    with pytest.raises(ConfigError, match="the task 'mrc' has no R-Drop"):
        make(hparams={"r_drop": 1.0})


def test_export_answers_from_texts_alone(make, processor, tmp_path):
    model = make()
    columns = pad_batch(processor.prepare(RAWS), pad_values=processor.pad_values)
    tmp_path.joinpath("bundle").mkdir()
    export_bundle(tmp_path / "bundle", model, columns, processor=processor, metrics={})
    predictor = Predictor(tmp_path / "bundle")
    assert predictor.bundle.ignores_padding
    assert [spec.axes for spec in predictor.bundle.outputs] == [("batch", "seq_len")] * 3
    loaded = predictor.bundle.processor()
    answers = list(answer_stream(predictor, loaded, RAWS))
    for raw, answer in zip(RAWS, answers, strict=True):
        assert answer["text"] == raw["context"][answer["start"] : answer["end"]] != ""
        windows = processor.windows([raw])[0]
        outputs = {
            name: tensor.numpy() for name, tensor in model(batch_of(model, processor, [raw]).features).items()
        }
        expected = processor.join(raw, windows, processor.finish(outputs))
        assert answer["text"] == expected["text"]
        assert answer["score"] == pytest.approx(expected["score"], abs=1e-4)
