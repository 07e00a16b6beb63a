"""Writes the golden files of `tests/ernie`: tiny Transformers models with their inputs and outputs.

Needs torch and transformers (see `requirements-peers.txt`). Run from the root of the repository; the same
versions give the same files:

    python script/bench/make_golden_bert.py tests/data
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, ErnieConfig, ErnieModel

SHAPE = {"num_hidden_layers": 2, "vocab_size": 60, "max_position_embeddings": 20}
BATCH, LENGTH = 3, 9


def make_random(model: torch.nn.Module) -> None:
    """Fills every parameter with noise, so that a wrong bias or norm shows, unlike in a fresh model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if "LayerNorm.weight" in name else noise)


def make_inputs(config: BertConfig | ErnieConfig, names: list[str]) -> dict[str, torch.Tensor]:
    """Ids of three rows, of which one is padded at its end and one has a hole in its mask."""
    generator = torch.Generator().manual_seed(1)

    def ids(limit: int) -> torch.Tensor:
        return torch.randint(1, limit, (BATCH, LENGTH), generator=generator)

    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, 5:] = 0
    mask[2, 3] = 0
    inputs = {"input_ids": ids(config.vocab_size), "attention_mask": mask}
    inputs["input_ids"][1, 5:] = config.pad_token_id
    inputs["token_type_ids"] = ids(config.type_vocab_size + 1) - 1
    inputs["position_ids"] = ids(config.max_position_embeddings)
    inputs["task_type_ids"] = ids(getattr(config, "task_type_vocab_size", 1) + 1) - 1
    return {name: inputs[name] for name in names}


def write(folder: Path, model: torch.nn.Module, names: list[str]) -> None:
    """Writes configuration, weights, inputs and outputs of one model."""
    make_random(model)
    model.eval()
    model.save_pretrained(folder)
    inputs = make_inputs(model.config, names)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    arrays["hidden"] = torch.stack(output.hidden_states).numpy()
    arrays["pooled"] = output.pooler_output.numpy()
    np.savez_compressed(folder / "golden.npz", **arrays)


def main(folder: Path) -> None:
    """Writes `bert_tiny` (safetensors and pickle) and `ernie_tiny` (safetensors) under `folder`."""
    bert = BertModel(BertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=64, **SHAPE))
    write(folder / "bert_tiny", bert, ["input_ids", "attention_mask", "token_type_ids"])
    torch.save(bert.state_dict(), folder / "bert_tiny" / "pytorch_model.bin")
    ernie = ErnieModel(
        ErnieConfig(
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_act="relu",
            layer_norm_eps=1e-5,
            use_task_id=True,
            task_type_vocab_size=4,
            **SHAPE,
        )
    )
    names = ["input_ids", "attention_mask", "token_type_ids", "position_ids", "task_type_ids"]
    write(folder / "ernie_tiny", ernie, names)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
