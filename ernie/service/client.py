"""Clients of the encoder server; they need no Paddle.

    with ErnieClient("vocab.txt", host="localhost", port=8888) as client:
        vectors = client(["a friendly place", "never again"])       # float32 [2, dim]
        vectors = client(["a friendly place"], ["never again"])     # of a pair

    python -m ernie.service.client -i lines.txt -o vectors.npy      # see bulk.py

With a vocabulary, which must be the server's own, the client tokenises; without one it sends texts and the
server does. The vectors are the same. Either way every string has one: an empty text that of `[CLS] [SEP]`, a
long one that of its first `max_seqlen` tokens; control characters such as NUL are dropped, a lone surrogate
counts as U+FFFD. A text of more than a megabyte fits into no request, so it needs a vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ernie.service.calls import address_of, run, run_async
from ernie.service.encoder import Encoder, Served, check_prompt
from ernie.service.texts import Encoded, TextJob
from ernie.tokenizing import Tokenizer
from propeller import cli
from propeller.service.client import AsyncInferenceClient, InferenceClient

log = logging.getLogger("ernie")


class _Base:
    """What both clients share: how a call becomes a job, and what is said of its result."""

    def __init__(self, vocab: str | Path | Tokenizer | None, max_seqlen: int | None, prompt: str | None):
        check_prompt(prompt)
        self._served = Served(vocab, max_seqlen)
        self._prompt = prompt

    def _job(
        self,
        encoder: Encoder,
        texts: Iterable[str],
        texts_b: Iterable[str] | None,
        prompt: str | None,
        return_tokens: bool,
    ) -> TextJob:
        return TextJob(
            encoder,
            texts,
            texts_b,
            prompt=self._prompt if prompt is None else prompt,
            tokenizer=self._served.tokenizer,
            max_seqlen=self._served.max_seqlen,
            keep_tokens=return_tokens,
        )

    def _reported(self, encoder: Encoder, encoded: Encoded) -> Encoded:
        if encoded.truncated.any():
            log.warning(
                "%d of %d texts were cut to %d tokens; the longest has %d",
                encoded.truncated.sum(),
                len(encoded.truncated),
                self._served.max_seqlen or encoder.max_seqlen,
                encoded.num_tokens.max(),
            )
        return encoded


class ErnieClient(_Base):
    """Embeddings from an encoder server. May be used by many threads at once.

    It connects with the first call. That the tokenizer fits the server's is checked then, and again every few
    seconds, since a server can take over another model.

    Args:
        vocab: what to tokenise with: a `vocab.txt` (normalised as the server does it), a tokenizer's folder,
            a tokenizer. None lets the server tokenise.
        host: where the server runs.
        port: its port.
        timeout: seconds without an answer that end a call; None waits for ever. A call of many texts takes as
            long as it needs, while answers come.
        max_seqlen: cut texts to fewer tokens than the server does; needs a `vocab`.
        prompt: goes before each (first) text, for models that want that: `query` or `passage`; None puts
            there what the model wants where neither is said.
        curve_keys: folder of the client's keys.
        model: which of the server's models; None means its first.

    Raises:
        ConfigError: the vocabulary cannot be used, or an argument is wrong. Calls raise it where the server
            has another tokenizer or serves no encoder.
        DataError: a line of the vocabulary is wrong.
    """

    def __init__(
        self,
        vocab: str | Path | Tokenizer | None = None,
        host: str = "localhost",
        port: int = 8888,
        timeout: float | None = 10.0,
        *,
        max_seqlen: int | None = None,
        prompt: str | None = None,
        curve_keys: str | Path | None = None,
        model: str | None = None,
    ):
        super().__init__(vocab, max_seqlen, prompt)
        self._client = InferenceClient(
            address_of(host, port), timeout=timeout, model=model, curve_keys=curve_keys
        )

    def __call__(self, texts: Iterable[str], texts_b: Iterable[str] | None = None) -> Any:
        """Embeds texts, or pairs.

        Args:
            texts: a list of strings.
            texts_b: the second texts of pairs, one for each.

        Returns:
            float32 `[n, dim]`; from a model with a vector for each token a list of n arrays `[tokens, dim]`.

        Raises:
            BadRequest: the arguments are no lists of strings of one length, or a text is too large to send.
            ServerError: the server took over another model during the call.
            ServiceError: what else it says, or that it does not answer.
        """
        return self.encode(texts, texts_b).embeddings

    def encode(
        self,
        texts: Iterable[str],
        texts_b: Iterable[str] | None = None,
        *,
        prompt: str | None = None,
        return_tokens: bool = False,
    ) -> Encoded:
        """Embeds texts, or pairs, and tells how they were tokenised; that texts were cut is logged, too.

        Args:
            texts, texts_b: as for a call of the client itself.
            prompt: in place of the client's.
            return_tokens: whether tokens and offsets are wanted; needs a `vocab`.

        Raises:
            BadRequest, ServiceError: as for a call of the client itself.
        """
        encoder = self._served.fresh() or self.encoder()
        job = self._job(encoder, texts, texts_b, prompt, return_tokens)
        encoded = run(self._client, job)
        if job.num_requests > 1:
            self._served.check_same(encoder, self._client.spec())
        return self._reported(encoder, encoded)

    def encoder(self) -> Encoder:
        """What the server serves now: name, size of vectors, length and so on."""
        return self._served.update(self._client.spec())

    def close(self) -> None:
        """Hangs up."""
        self._client.close()

    def __enter__(self) -> ErnieClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncErnieClient(_Base):
    """`ErnieClient` for asyncio: `vectors = await client([...])`. Texts are tokenised in a thread."""

    def __init__(
        self,
        vocab: str | Path | Tokenizer | None = None,
        host: str = "localhost",
        port: int = 8888,
        timeout: float | None = 10.0,
        *,
        max_seqlen: int | None = None,
        prompt: str | None = None,
        curve_keys: str | Path | None = None,
        model: str | None = None,
    ):
        """See `ErnieClient`."""
        super().__init__(vocab, max_seqlen, prompt)
        self._client = AsyncInferenceClient(
            address_of(host, port), timeout=timeout, model=model, curve_keys=curve_keys
        )

    async def __call__(self, texts: Iterable[str], texts_b: Iterable[str] | None = None) -> Any:
        """See `ErnieClient.__call__`."""
        return (await self.encode(texts, texts_b)).embeddings

    async def encode(
        self,
        texts: Iterable[str],
        texts_b: Iterable[str] | None = None,
        *,
        prompt: str | None = None,
        return_tokens: bool = False,
    ) -> Encoded:
        """See `ErnieClient.encode`."""
        encoder = self._served.fresh() or await self.encoder()
        job = self._job(encoder, texts, texts_b, prompt, return_tokens)
        encoded = await run_async(self._client, job)
        if job.num_requests > 1:
            self._served.check_same(encoder, await self._client.spec())
        return self._reported(encoder, encoded)

    async def encoder(self) -> Encoder:
        """See `ErnieClient.encoder`."""
        return self._served.update(await self._client.spec())

    async def close(self) -> None:
        """Hangs up."""
        await self._client.close()

    async def __aenter__(self) -> AsyncErnieClient:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


def main() -> int:
    """Encodes a file, or standard input; see `bulk.py`."""
    from ernie.service import bulk

    return bulk.main()


if __name__ == "__main__":
    cli.run(main)
