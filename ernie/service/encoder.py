"""What is served: the encoder behind a server's `spec`, and a tokenizer of the client's own that fits it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie.tasks.pooling import PROMPTS
from ernie.tokenizing import Tokenizer, WordPieceTokenizer, load_tokenizer
from propeller.errors import ConfigError, ServerError

OUTPUT = "embeddings"

# A server can take over another bundle while clients work. They notice within this time.
_FRESH_S = 10.0
_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """What the server's `spec` says of the encoder that it serves.

    Attributes:
        model: what the server calls it.
        bundle: hash of the export: equal ones give the same vectors.
        dim: size of a vector.
        per_token: whether there is a vector for each token, not for each text.
        max_seqlen: tokens that a text is cut to, special ones included.
        normalized: whether vectors have the length 1.
        fingerprint: of its tokenizer.
        prompts: what goes before a text that is sent as `query` or `passage`, or as neither: None.
        pad_values: by name of the input.
    """

    model: str
    bundle: str
    dim: int
    per_token: bool
    max_seqlen: int
    normalized: bool
    fingerprint: str
    prompts: Mapping[str | None, str]
    pad_values: Mapping[str, int]

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Encoder:
        """Reads the result of `InferenceClient.spec`.

        Raises:
            ConfigError: the model is no encoder.
        """
        processor = spec.get("processor") or {}
        outputs = {output["name"]: output for output in spec["outputs"]}
        if processor.get("name") != "embedding" or OUTPUT not in outputs:
            raise ConfigError(
                f"The server's model {spec['model']!r} is no encoder but a {processor.get('name') or 'bare'} "
                "model. Name the one to use by model=..., or start an encoder server: "
                "python -m ernie.service.encoder_server -m MODEL."
            )
        settings, axes = processor["settings"], outputs[OUTPUT]["axes"]
        return cls(
            model=spec["model"],
            bundle=spec["bundle"],
            dim=axes[-1],
            per_token=len(axes) == 3,
            max_seqlen=settings["max_seqlen"],
            normalized=settings["normalize"],
            fingerprint=settings["tokenizer"],
            prompts={
                None: settings["default_prefix"],
                **{name: settings[f"{name}_prefix"] for name in PROMPTS},
            },
            pad_values={given["name"]: given["pad_value"] for given in spec["inputs"]},
        )


def check_prompt(prompt: str | None) -> None:
    """Refuses the name of a prompt that does not exist.

    Raises:
        ConfigError: it is neither None nor one of `PROMPTS`.
    """
    if prompt is not None and prompt not in PROMPTS:
        raise ConfigError(
            f"prompt is {prompt!r}; expected {' or '.join(map(repr, PROMPTS))}, or None for none."
        )


class Served:
    """The encoder as of late, and the client's tokenizer for it.

    Args:
        vocab: a `vocab.txt`, a tokenizer's folder, a tokenizer; None to let the server tokenise.
        max_seqlen: what texts are cut to, at most; None for what the encoder takes. Only with a `vocab`.

    Attributes:
        tokenizer: fits the encoder once `update` has seen that; None if the server tokenises.
        max_seqlen: as given.

    Raises:
        ConfigError: the vocabulary cannot be read or used, or `max_seqlen` comes without one.
        DataError: a line of it is wrong.
    """

    def __init__(self, vocab: str | Path | Tokenizer | None = None, max_seqlen: int | None = None):
        if vocab is None and max_seqlen is not None:
            raise ConfigError(
                "max_seqlen needs a vocabulary here: without one the server cuts texts, to the length that "
                "it was started with (--max_seqlen)."
            )
        # A vocab.txt by itself does not say how text is normalised; then what the server does is done.
        self._settings_known = not isinstance(vocab, str | Path) or Path(vocab).is_dir()
        self.tokenizer = _tokenizer_of(vocab)
        self.max_seqlen = max_seqlen
        self._encoder: Encoder | None = None
        self._until = 0.0

    def fresh(self) -> Encoder | None:
        """The encoder; None if the server has to be asked (again)."""
        return self._encoder if time.monotonic() < self._until else None

    def check_same(self, encoder: Encoder, spec: Mapping[str, Any]) -> None:
        """Makes sure, after several requests, that one model has answered them all.

        Args:
            encoder: what was served when they began.
            spec: what is served now.

        Raises:
            ServerError: it is another one.
        """
        now = self.update(spec)
        if now.bundle != encoder.bundle:
            raise ServerError(
                f"The server has taken over another model meanwhile: {now.bundle[:12]}, where the call began "
                f"with {encoder.bundle[:12]}. Vectors of two models do not belong together; call again."
            )

    def update(self, spec: Mapping[str, Any]) -> Encoder:
        """Takes what the server says of itself.

        Raises:
            ConfigError: it serves no encoder, or one with another tokenizer or of a shorter length.
        """
        encoder = Encoder.from_spec(spec)
        if self.tokenizer is not None:
            self.tokenizer = _fitting(self.tokenizer, encoder, self._settings_known)
        if self.max_seqlen is not None and self.max_seqlen > encoder.max_seqlen:
            raise ConfigError(
                f"max_seqlen is {self.max_seqlen}, but the server's model {encoder.model!r} takes "
                f"{encoder.max_seqlen} tokens."
            )
        self._encoder, self._until = encoder, time.monotonic() + _FRESH_S
        return encoder


def _tokenizer_of(vocab: str | Path | Tokenizer | None) -> Tokenizer | None:
    if vocab is None or isinstance(vocab, Tokenizer):
        return vocab
    return load_tokenizer(vocab) if Path(vocab).is_dir() else WordPieceTokenizer(vocab)


def _fitting(tokenizer: Tokenizer, encoder: Encoder, settings_known: bool) -> Tokenizer:
    """The tokenizer, or the same vocabulary with the encoder's settings if its own were not given.

    Raises:
        ConfigError: they do not fit; says whether it is the vocabulary or a setting.
    """
    if tokenizer.fingerprint == encoder.fingerprint:
        return tokenizer
    found = _with_settings_of(tokenizer, encoder) if isinstance(tokenizer, WordPieceTokenizer) else None
    if found is None:
        raise ConfigError(
            f"The client's tokenizer is not that of the server's model {encoder.model!r}: another "
            f"vocabulary, or other special or added tokens (fingerprint {tokenizer.fingerprint[:12]}, the "
            f"server's is {encoder.fingerprint[:12]}). Give the model's own folder or vocab.txt, or "
            "none, and the server tokenises."
        )
    if not settings_known:
        return found
    own, served = _settings(tokenizer), _settings(found)
    differ = [
        f"{name} is {own[name]} here and {served[name]} there" for name in own if own[name] != served[name]
    ]
    raise ConfigError(
        f"The client's tokenizer has the vocabulary of the server's model {encoder.model!r}, but "
        f"{', '.join(differ)}. Give the model's own folder, its vocab.txt alone, or none."
    )


def _with_settings_of(tokenizer: WordPieceTokenizer, encoder: Encoder) -> WordPieceTokenizer | None:
    """The same vocabulary under the settings that have the encoder's fingerprint; None if none have."""
    for lower, strip, chinese in itertools.product((True, False), repeat=3):
        other = WordPieceTokenizer(
            tokenizer.vocab, lower, strip_accents=strip, tokenize_chinese_chars=chinese
        )
        if other.fingerprint == encoder.fingerprint:
            return other
    return None


def _settings(tokenizer: Any) -> dict[str, bool]:
    settings = {name: getattr(tokenizer, name) for name in _SETTINGS}
    if settings["strip_accents"] is None:  # which means: if lower-cased
        settings["strip_accents"] = settings["do_lower_case"]
    return settings
