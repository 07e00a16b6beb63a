"""The encoder against Transformers' outputs, its own layers against Paddle's, and its export."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from ernie.config import ACTIVATIONS, ErnieConfig
from ernie.layers import Dropout, Linear
from ernie.modeling import ClassificationHead, ErnieModel
from ernie.pretrained import save_pretrained_state
from ernie.tokenizing import WordPieceTokenizer, load_tokenizer
from propeller.errors import CheckpointError, ConfigError
from propeller.paddle.runtime import paddle

F = paddle.nn.functional
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}


@pytest.fixture(autouse=True)
def _seeded():
    paddle.seed(7)


@pytest.fixture(params=["bert_tiny", "ernie_tiny"])
def golden(request, root):
    """A Transformers folder, its inputs and the outputs that Transformers gave for them."""
    folder = root / "tests/data" / request.param
    with np.load(folder / "golden.npz") as file:
        arrays = dict(file)
    outputs = {name: arrays.pop(name) for name in ("hidden", "pooled")}
    return folder, {name: paddle.to_tensor(array) for name, array in arrays.items()}, outputs


def ids(*rows):
    return paddle.to_tensor(np.array(rows, np.int64))


def difference(tensor, array):
    return float(np.abs(tensor.numpy() - np.asarray(array)).max())


def check_outputs(output, expected):
    assert len(output.hidden) == len(expected["hidden"])
    for hidden, array in zip(output.hidden, expected["hidden"], strict=True):
        assert difference(hidden, array) < 1e-5
    assert difference(output.sequence, expected["hidden"][-1]) < 1e-5
    assert difference(output.pooled, expected["pooled"]) < 1e-5


def test_same_outputs_as_transformers(golden):
    folder, inputs, expected = golden
    model = ErnieModel.from_pretrained(folder)
    assert not model.training
    check_outputs(model(**inputs, output_hidden=True), expected)


def test_same_outputs_while_training_without_dropout(golden):
    folder, inputs, expected = golden
    model = ErnieModel.from_pretrained(folder)
    for layer in model.sublayers():
        if isinstance(layer, Dropout):
            layer.p = 0.0
    model.train()
    check_outputs(model(**inputs, output_hidden=True), expected)


@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
def test_any_type_of_mask(golden, kind):
    folder, inputs, expected = golden
    inputs["attention_mask"] = inputs["attention_mask"].astype(kind)
    check_outputs(ErnieModel.from_pretrained(folder)(**inputs, output_hidden=True), expected)


def test_output_is_sequence_and_pooled_unless_more_is_asked_for(golden):
    folder, inputs, expected = golden
    sequence_output, pooled_output = ErnieModel.from_pretrained(folder)(**inputs)
    assert list(sequence_output.shape) == list(expected["hidden"][-1].shape)
    assert list(pooled_output.shape) == [sequence_output.shape[0], sequence_output.shape[2]]


@pytest.fixture
def small():
    model = ErnieModel(ErnieConfig(**SMALL, pad_token_id=3))
    model.eval()
    return model


def test_padding_changes_nothing(small):
    short = small(ids([5, 6, 7]))
    padded = small(ids([5, 6, 7, 3, 3], [8, 9, 10, 11, 12]))
    assert difference(padded.sequence[0, :3], short.sequence[0]) < 1e-6
    assert difference(padded.pooled[:1], short.pooled) < 1e-6


def test_defaults_of_the_optional_inputs(small):
    rows = ids([5, 6, 7, 3], [8, 9, 10, 11])
    spelt_out = small(
        rows,
        token_type_ids=paddle.zeros_like(rows),
        attention_mask=ids([1, 1, 1, 0], [1, 1, 1, 1]),
        position_ids=ids([0, 1, 2, 3], [0, 1, 2, 3]),
    )
    assert difference(small(rows).sequence, spelt_out.sequence) == 0
    assert difference(small(rows, token_type_ids=paddle.ones_like(rows)).sequence, spelt_out.sequence) > 1e-3
    assert (
        difference(small(rows, position_ids=ids([3, 2, 1, 0], [0, 1, 2, 3])).sequence, spelt_out.sequence)
        > 1e-3
    )


def test_the_configured_task_type_is_the_default():
    model = ErnieModel(ErnieConfig(**SMALL, use_task_id=True, task_id=2))
    model.eval()
    rows = ids([5, 6, 7])
    output = model(rows).sequence
    assert difference(model(rows, task_type_ids=ids([2, 2, 2])).sequence, output) == 0
    assert difference(model(rows, task_type_ids=ids([0, 0, 0])).sequence, output) > 1e-3


def test_a_row_of_padding_stays_a_number(small):
    assert np.isfinite(small(ids([3, 3, 3], [5, 6, 7])).sequence.numpy()).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_runs(name):
    output = ErnieModel(ErnieConfig(**SMALL, hidden_act=name))(ids([5, 6, 7]))
    assert output.sequence.shape == [1, 3, 16]


def test_bad_shapes(small):
    with pytest.raises(ConfigError, match=r"positions for 12"):
        small(paddle.ones([1, 13], "int64"))
    with pytest.raises(ConfigError, match=r"\[batch_size, seq_len\], got shape \[3\]"):
        small(ids(5, 6, 7))
    with pytest.raises(ConfigError, match=r"\[1, 3\], but an input beside it has \[1, 2\]"):
        small(ids([5, 6, 7]), attention_mask=ids([1, 1]))


def test_new_weights_are_as_berts():
    model = ErnieModel(ErnieConfig(**{**SMALL, "vocab_size": 2000}, initializer_range=0.05))
    for name, parameter in model.named_parameters():
        values = parameter.numpy()
        if name.endswith("bias"):
            assert not values.any()
        elif "norm" in name:
            assert (values == 1).all()
        else:
            assert np.abs(values).max() <= 0.1 + 1e-6
            assert 0.03 < values.std() < 0.06
    assert 0.043 < model.embeddings.word.weight.numpy().std() < 0.045  # 0.88 x 0.05: cut at two deviations


def test_save_and_load(small, tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "é", "É", "a"]
    cased = WordPieceTokenizer(
        {word: index for index, word in enumerate(words)},
        do_lower_case=False,
        tokenize_chinese_chars=False,
        added_tokens={"<url>": 7},
    )
    small.save_pretrained(tmp_path / "own", tokenizer=cased)
    loaded = ErnieModel.from_pretrained(tmp_path / "own")
    assert loaded.config == small.config
    rows = ids([5, 6, 7])
    assert difference(loaded(rows).sequence, small(rows).sequence) == 0
    tokenizer = load_tokenizer(tmp_path / "own")
    assert tokenizer.fingerprint == cased.fingerprint
    assert tokenizer.encode("É é <url> A").input_ids.tolist() == [2, 5, 4, 7, 1, 3]


def test_save_without_a_tokenizer(small, tmp_path):
    small.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ernie_config.json", "model.safetensors"]


def test_a_model_without_pooler_has_to_be_asked_for(small, tmp_path, caplog):
    state = {name: tensor.numpy() for name, tensor in small.state_dict().items()}
    pooler = {name for name in state if name.startswith("pooler.")}
    save_pretrained_state(tmp_path, small.config, {name: state[name] for name in state.keys() - pooler})
    with pytest.raises(CheckpointError, match=r"pooler.weight is missing, pooler.bias is missing\."):
        ErnieModel.from_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "ernie"):
        loaded = ErnieModel.from_pretrained(tmp_path, new=["pooler.*"])
    assert caplog.messages == [
        f"{len(state) - 2} parameters loaded; new: pooler.weight, pooler.bias; left over: none"
    ]
    for name, tensor in loaded.state_dict().items():
        assert np.array_equal(tensor.numpy(), state[name]) == (name != "pooler.weight"), name


def test_layers_of_the_file_that_the_model_lacks_are_logged(small, tmp_path, caplog):
    small.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "ernie_config.json").read_text("utf-8"))
    (tmp_path / "ernie_config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with caplog.at_level(logging.INFO, "ernie"):
        ErnieModel.from_pretrained(tmp_path)
    (message,) = caplog.messages
    assert "new: none; left over: layers.1." in message
    assert message.count("layers.1.") == 10 and message.endswith("and 2 more")


class Wrapper(paddle.nn.Layer):
    """What an export wraps: one input of any batch and length, three outputs."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = ClassificationHead(encoder.config, 3)

    def forward(self, input_ids):
        output = self.encoder(input_ids, output_hidden=True)
        return output.pooled, output.hidden[1], self.head(output.pooled)


def test_the_same_numbers_from_the_inference_engine(golden, tmp_path):
    import paddle.inference as engine

    wrapper = Wrapper(ErnieModel.from_pretrained(golden[0]))
    wrapper.encoder.recompute = True  # concerns training alone
    wrapper.eval()
    batches = [np.array([[5, 6, 7, 0, 0], [8, 9, 10, 11, 0]]), np.array([[12, 13]])]
    expected = [[output.numpy() for output in wrapper(paddle.to_tensor(batch))] for batch in batches]
    spec = [paddle.static.InputSpec([None, None], "int64", "input_ids")]
    static = paddle.jit.to_static(wrapper, input_spec=spec, full_graph=True)
    paddle.jit.save(static, str(tmp_path / "model"))
    config = engine.Config(str(tmp_path / "model.json"), str(tmp_path / "model.pdiparams"))
    config.disable_gpu()
    config.disable_glog_info()
    config.enable_mkldnn()
    predictor = engine.create_predictor(config)
    for batch, outputs in zip(batches, expected, strict=True):
        predictor.get_input_handle("input_ids").copy_from_cpu(batch)
        predictor.run()
        for name, array in zip(predictor.get_output_names(), outputs, strict=True):
            np.testing.assert_allclose(predictor.get_output_handle(name).copy_to_cpu(), array, atol=1e-5)


def test_head(small):
    head = ClassificationHead(small.config, 1)
    assert head(small(ids([5, 6, 7], [8, 9, 3])).pooled).shape == [2, 1]
    with pytest.raises(ConfigError, match="num_labels must be at least 1"):
        ClassificationHead(small.config, 0)


def test_it_learns_with_dropout():
    model, rows = ErnieModel(ErnieConfig(**SMALL)), paddle.randint(1, 50, [16, 6])
    head, labels = ClassificationHead(model.config, 2), paddle.arange(16) % 2
    optimizer = paddle.optimizer.AdamW(2e-3, parameters=[*model.parameters(), *head.parameters()])
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(head(model(rows).pooled), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.3 * losses[0]


@pytest.mark.parametrize("shape", [[6, 5], [2, 3, 5]])
def test_linear_has_paddles_gradients(shape):
    layer, reference = Linear(5, 4, 0.5), paddle.nn.Linear(5, 4)
    reference.set_state_dict(layer.state_dict())
    data, factor = paddle.randn(shape), paddle.randn([*shape[:-1], 4])
    gradients = []
    for module in (layer, reference):
        x = data.clone()
        x.stop_gradient = False
        (module(x) * factor).sum().backward()
        gradients.append([x.grad.numpy(), module.weight.grad.numpy(), module.bias.grad.numpy()])
    for own, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_get_no_gradient():
    model = ErnieModel(ErnieConfig(**SMALL))
    layer = model.layers[0]
    for parameter in (*model.embeddings.parameters(), *layer.parameters()):
        parameter.stop_gradient = True
    layer.ffn.up.bias.stop_gradient = False
    model(ids([5, 6, 7])).pooled.sum().backward()
    assert layer.ffn.up.weight.grad is None
    assert model.embeddings.word.weight.grad is None
    assert layer.ffn.up.bias.grad is not None
    assert model.layers[1].ffn.up.weight.grad is not None


def trained_twice(recompute, frozen):
    """Loss, gradients summed over two batches, and what both generators give afterwards."""
    paddle.seed(7)
    np.random.seed(7)
    model = ErnieModel(ErnieConfig(**{**SMALL, "num_hidden_layers": 3}))
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = name.startswith(frozen)
    model.recompute = recompute
    losses = []
    for rows in ([[5, 6, 7, 0], [8, 9, 10, 11]], [[12, 13, 14]]):
        output = model(ids(*rows), output_hidden=True)
        loss = output.pooled.square().sum() + output.hidden[1].sum()
        loss.backward()
        losses.append(loss.item())
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return losses, gradients, (paddle.rand([1]).item(), np.random.rand())


@pytest.mark.parametrize(
    "frozen",
    [(), ("embeddings.",), ("embeddings.", "layers.0.", "layers.1.attention.")],
    ids=["none", "embeddings", "layers"],
)
def test_recomputed_gradients_are_the_same_bits(frozen):
    losses, gradients, after = trained_twice(False, frozen)
    again = trained_twice(True, frozen)
    assert again[0] == losses and again[2] == after
    assert again[1].keys() == gradients.keys() and gradients
    assert not any(name.startswith(frozen) for name in gradients)
    for name, array in gradients.items():
        np.testing.assert_array_equal(again[1][name], array, err_msg=name)


@pytest.mark.parametrize(
    ("recompute", "training", "frozen", "runs"),
    [
        (True, True, (), [2, 2]),
        (True, True, ("embeddings.",), [1, 2]),  # Paddle would log a warning at every step
        (True, True, ("embeddings.", "layers.0."), [1, 1]),
        (False, True, (), [1, 1]),
        (True, False, (), [1, 1]),
    ],
    ids=["on", "frozen-embeddings", "frozen-layer", "off", "evaluation"],
)
def test_layers_run_once_more_only_where_it_helps(recompute, training, frozen, runs):
    model = ErnieModel(ErnieConfig(**SMALL))
    model.recompute = recompute
    model.train() if training else model.eval()
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = bool(frozen) and name.startswith(frozen)
    calls = [0, 0]

    def count(index):
        calls[index] += 1

    for index, layer in enumerate(model.layers):
        layer.register_forward_post_hook(lambda *_, index=index: count(index))
    model(ids([5, 6, 7])).pooled.sum().backward()
    assert calls == runs
    calls[:] = [0, 0]
    with paddle.no_grad():
        model(ids([5, 6, 7]))
    assert calls == [1, 1]


def masked(layer, data):
    x = data.clone()
    x.stop_gradient = False
    y = layer(x)
    y.sum().backward()
    return y.numpy(), x.grad.numpy()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_rate_scale_and_gradient(p):
    kept, gradient = masked(Dropout(p), paddle.ones([403, 501]))
    assert np.unique(kept).size == 2
    assert abs((kept == 0).mean() - p) < 4 * (p * (1 - p) / kept.size) ** 0.5
    assert kept.max() == pytest.approx(1 / (1 - p), rel=1e-4)
    np.testing.assert_array_equal(gradient, kept)
    for axis in (0, 1):  # no pattern along rows or columns
        assert (kept == 0).mean(axis).std() < 1.2 * (p * (1 - p) / kept.shape[axis]) ** 0.5


def test_dropout_follows_paddles_seed():
    layer, data = Dropout(0.5), paddle.ones([40])
    paddle.seed(1)
    first, second = masked(layer, data)[0], masked(layer, data)[0]
    paddle.seed(1)
    np.testing.assert_array_equal(masked(layer, data)[0], first)
    assert (first != second).any()


def test_dropout_that_does_nothing():
    x = paddle.ones([4])
    assert Dropout(0.0)(x) is x
    layer = Dropout(0.5)
    layer.eval()
    assert layer(x) is x


def test_dropout_of_everything_and_of_what_needs_no_gradient():
    assert not masked(Dropout(1.0), paddle.ones([40]))[0].any()
    assert set(np.unique(Dropout(0.5)(paddle.ones([200])).numpy())) == {0.0, 2.0}
