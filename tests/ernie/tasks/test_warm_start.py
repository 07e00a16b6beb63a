"""A fine-tuning's first weights: those of a pretrained folder, for the model of every task."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ernie.pretrained import load_pretrained_state
from ernie.tasks.classification import ClassificationProcessor
from ernie.tasks.classification_model import ClassificationModel
from ernie.tasks.dual_encoder import DualEncoderProcessor
from ernie.tasks.dual_encoder_model import DualEncoderModel
from ernie.tasks.finetuning import warm_start_setting
from ernie.tasks.mrc import MrcProcessor
from ernie.tasks.mrc_model import MrcModel
from ernie.tasks.pooling import EmbeddingSettings
from ernie.tasks.ranking import RankingProcessor
from ernie.tasks.ranking_model import RankingModel
from ernie.tasks.sequence_labeling import SequenceLabelingProcessor
from ernie.tasks.sequence_labeling_model import SequenceLabelingModel
from ernie.tokenizing import load_tokenizer
from propeller.errors import CheckpointError
from propeller.paddle.train.warm_start import warm_start
from propeller.types import HParams, RunConfig, RunMode

MEAN = EmbeddingSettings("layer2", "mean", normalize=True, dimensions=16, max_seqlen=12)
TASKS = {
    "classification": (
        ClassificationModel,
        lambda tokenizer: ClassificationProcessor(tokenizer, ["0", "1"], max_seqlen=12, pair=False),
    ),
    "sequence labelling": (
        SequenceLabelingModel,
        lambda tokenizer: SequenceLabelingProcessor(tokenizer, ["O", "B-X"], max_seqlen=12, scheme="bio"),
    ),
    "reading comprehension": (
        MrcModel,
        lambda tokenizer: MrcProcessor(tokenizer, max_seqlen=12, doc_stride=3, max_query_length=4),
    ),
    "ranking": (
        RankingModel,
        lambda tokenizer: RankingProcessor(tokenizer, max_seqlen=12, loss="pairwise"),
    ),
    "embeddings": (DualEncoderModel, lambda tokenizer: DualEncoderProcessor(tokenizer, MEAN)),
}


@pytest.fixture
def without_pooler(bert_folder, tmp_path):
    """The folder of a masked-word model, as Hugging Face has them: no tensor of a pooler."""
    folder = tmp_path / "masked"
    shutil.copytree(bert_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, folder / "model.safetensors")
    return folder


@pytest.fixture(params=TASKS)
def make(request):
    """`make(folder)` gives a task's model with the folder's sizes."""
    model_class, make_processor = TASKS[request.param]

    def build(folder):
        config, _ = load_pretrained_state(folder)
        processor = make_processor(load_tokenizer(folder))
        return model_class(
            HParams(), RunMode.TRAIN, RunConfig(max_steps=1), config=config, processor=processor
        )

    return build


def unlike(model, folder):
    """The names of the encoder's parameters that are not the folder's, after a warm start from there."""
    warm_start(model, warm_start_setting(str(folder)))
    _, state = load_pretrained_state(folder)
    own = {name: tensor.numpy() for name, tensor in model.encoder.state_dict().items()}
    return {name for name, array in own.items() if not np.array_equal(state.get(name), array)}


def test_every_task_takes_the_whole_encoder(make, bert_folder):
    assert unlike(make(bert_folder), bert_folder) == set()


def test_every_task_begins_without_a_pooler(make, without_pooler, caplog):
    with caplog.at_level("INFO"):
        assert unlike(make(without_pooler), without_pooler) == {"pooler.weight", "pooler.bias"}
    assert f"{without_pooler} has no pooler" in caplog.text
    assert "; new: encoder.pooler.weight, encoder.pooler.bias" in caplog.text


def test_whatever_else_is_missing_is_an_error(make, without_pooler):
    tensors = load_file(without_pooler / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("layer.1.output.dense.bias"))
    del tensors[name]
    save_file(tensors, without_pooler / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"failed: missing: encoder\.layers\.1\.[\w.]+\.bias\."):
        unlike(make(without_pooler), without_pooler)


def test_a_folder_is_read_only_when_needed(without_pooler):
    setting = warm_start_setting(str(without_pooler))
    shutil.rmtree(without_pooler)
    with pytest.raises(CheckpointError, match="is not a folder"):
        setting.source()


def test_no_folder():
    assert warm_start_setting(None) is None
