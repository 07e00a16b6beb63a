"""ernie: ERNIE/BERT models, tokenizers and fine-tuning tasks on propeller.

Names are loaded when they are first used; tokenizers and processors need no Paddle.
"""

from propeller.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ernie.config": ["ErnieConfig"],
        "ernie.modeling": ["ErnieModel"],
        "ernie.tokenizing": ["SentencePieceTokenizer", "Tokenizer", "WordPieceTokenizer", "load_tokenizer"],
        "propeller.version": ["__version__"],
    },
)
