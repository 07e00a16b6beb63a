"""ernie: ERNIE/BERT models, tokenizers and fine-tuning tasks on propeller.

Names are loaded when they are first used; tokenizers and processors need no Paddle.
"""

from typing import TYPE_CHECKING

from propeller.lazy import attach

if TYPE_CHECKING:
    from ernie.config import ErnieConfig as ErnieConfig
    from ernie.datasets import IterDataset as IterDataset
    from ernie.datasets import MapDataset as MapDataset
    from ernie.datasets import load_dataset as load_dataset
    from ernie.modeling import ErnieModel as ErnieModel
    from ernie.pipeline import Pipeline as Pipeline
    from ernie.tokenizing import SentencePieceTokenizer as SentencePieceTokenizer
    from ernie.tokenizing import Tokenizer as Tokenizer
    from ernie.tokenizing import WordPieceTokenizer as WordPieceTokenizer
    from ernie.tokenizing import load_tokenizer as load_tokenizer
    from propeller.version import __version__ as __version__

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ernie.config": ["ErnieConfig"],
        "ernie.datasets": ["IterDataset", "MapDataset", "load_dataset"],
        "ernie.modeling": ["ErnieModel"],
        "ernie.pipeline": ["Pipeline"],
        "ernie.tokenizing": ["SentencePieceTokenizer", "Tokenizer", "WordPieceTokenizer", "load_tokenizer"],
        "propeller.version": ["__version__"],
    },
)
