"""Texts to requests for a served encoder, and its replies to vectors in the order of the texts.

    texts -> (tokenised here, or raw) -> requests of texts of like lengths -> outputs of each -> Encoded

No sockets and no Paddle here: the clients, bulk encoding and the HTTP front differ only in how they send.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ernie.service.encoder import OUTPUT, Encoder, check_prompt
from ernie.tokenizing import Encoding, Tokenizer
from propeller.errors import (
    BadRequest,
    DeadlineExceeded,
    Draining,
    Overloaded,
    ServerError,
    ServiceError,
    Unavailable,
)
from propeller.service.frames import to_json
from propeller.service.wire import REQUEST_LIMITS

_INPUTS = ("input_ids", "token_type_ids")

# Texts that are tokenised, and sorted by length, together; meanwhile the server works on those before.
_CHUNK_TEXTS = 1024
# A request of so many texts, or tokens with padding, keeps a server busy for a moment, even a slow one: each
# has a deadline of its own, and several are on their way.
_PART_ROWS = 64
_PART_TOKENS = 1 << 13
# Of raw texts the tokens are only guessed; a character that JSON escapes takes 6.
_BYTES_PER_TOKEN = 4
# Requests not answered in time, one after the other, that end a call: as many as are on their way at a time.
_MAX_LATE = 8
# What a raw example takes besides its texts: its keys, its prompt.
_RAW_BYTES = 64
# What of a part may be padding. The server cuts it off, unless the model has an output for each token.
_MAX_PADDING, _MAX_PADDING_PER_TOKEN = 0.5, 0.125


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """The vectors of n texts, and what else is known of them.

    Attributes:
        embeddings: float32 `[n, dim]`; for a model with a vector for each token a list of n arrays
            `[tokens, dim]`, special tokens included.
        num_tokens: int64 `[n]`; tokens before truncation, prompt and special ones included.
        truncated: bool `[n]`; which texts were cut.
        tokens: of each text its tokens as the model saw them; None if they were not asked for.
        offsets: of each text an int32 array `[tokens, 2]`: where each token begins and ends in it (in
            `texts_b` behind the first `[SEP]`); (0, 0) for special tokens and the prompt. Or None.
    """

    embeddings: np.ndarray | list[np.ndarray]
    num_tokens: np.ndarray
    truncated: np.ndarray
    tokens: list[list[str]] | None = None
    offsets: list[np.ndarray] | None = None


# What may go better the next time.
_LATE = (DeadlineExceeded, Draining, Overloaded, Unavailable)


class Part(NamedTuple):
    """One request.

    Attributes:
        rows: which texts it holds; int64.
        inputs: the model's input arrays by name, or the texts as the bundle's processor takes them.
    """

    rows: np.ndarray
    inputs: dict[str, np.ndarray] | list[dict[str, str]]


class Job(abc.ABC):
    """One call: gives its requests, takes what comes of them.

        while job.more():
            for outcome in client.map(job.method, job.inputs(), return_errors=True):
                job.take(outcome)

    A request that was not answered in time is sent again as long as others are: with many texts most of the
    time goes by behind the call's own requests, and how long that is depends on the machine.

    Args:
        encoder: what is served.
        count: how many texts there are.
        limit: what they are cut to, in tokens.

    Attributes:
        method: of the inference client, which takes the inputs: arrays by `predict`, texts by `outputs`.
        num_requests: how many there were so far.
    """

    method: Literal["predict", "outputs"] = "predict"

    def __init__(self, encoder: Encoder, count: int, limit: int):
        self._encoder, self._limit = encoder, limit
        self.num_requests = 0
        self._waiting: Iterable[Part] | None = self._parts()
        self._sent: deque[Part] = deque()
        self._late: list[Part] = []
        self._late_in_a_row, self._any_answered = 0, False
        self._problem: ServiceError | None = None
        self._num_tokens = np.zeros(count, dtype=np.int64)
        self._vectors = None if encoder.per_token else np.empty((count, encoder.dim), dtype=np.float32)
        self._by_token: list[Any] = [None] * count if encoder.per_token else []
        self._tokens: list[Any] | None = None
        self._offsets: list[Any] | None = None

    def make_all(self) -> None:
        """Makes all requests now, which takes time where texts are tokenised, rather than one by one."""
        self._waiting = list(self._waiting or ())

    def more(self) -> bool:
        """Whether there are requests to be sent, the first or the second time.

        Raises:
            ServiceError: of those just sent none was answered in time.
        """
        if self._late:
            if not self._any_answered and self._problem is not None:
                raise self._problem
            self._waiting, self._late = self._late, []
            self._late_in_a_row, self._any_answered = 0, False
        return self._waiting is not None

    def inputs(self) -> Iterator[Any]:
        """Gives what to send, each when it is asked for."""
        waiting, self._waiting = self._waiting or (), None
        for part in waiting:
            self.num_requests += 1
            self._sent.append(part)
            yield part.inputs

    def take(self, outcome: Mapping[str, np.ndarray] | ServiceError) -> None:
        """Takes what came of the first request that nothing has come of so far.

        Raises:
            ServiceError: the outcome, if that ends the call; or the outputs are not what the encoder gives.
        """
        part = self._sent.popleft()
        if not isinstance(outcome, ServiceError):
            self._any_answered, self._late_in_a_row = True, 0
            self._put(part, outcome)
            return
        self._late.append(part)
        self._late_in_a_row += 1
        self._problem = outcome
        if not isinstance(outcome, _LATE) or self._late_in_a_row >= _MAX_LATE:
            raise outcome

    @abc.abstractmethod
    def _parts(self) -> Iterator[Part]:
        """The requests, each made when it is asked for; together they hold every text once."""

    def _put(self, part: Part, outputs: Mapping[str, np.ndarray]) -> None:
        embeddings = outputs.get(OUTPUT)
        axes = 3 if self._encoder.per_token else 2
        if embeddings is None or embeddings.ndim != axes or embeddings.shape[-1] != self._encoder.dim:
            found = "none" if embeddings is None else f"an array of the shape {list(embeddings.shape)}"
            raise ServerError(
                f"The server gave {found} for embeddings of {self._encoder.dim} numbers: it has taken over "
                "another model since it was asked what it serves. Try again."
            )
        if self.method == "outputs":
            self._num_tokens[part.rows] = outputs["num_tokens"]
        if self._vectors is not None:
            self._vectors[part.rows] = embeddings
            return
        kept = np.minimum(self._num_tokens[part.rows], self._limit)
        for row, length, vectors in zip(part.rows.tolist(), kept.tolist(), embeddings, strict=True):
            self._by_token[row] = vectors[:length].astype(np.float32)  # a copy, so that the padding can go

    def result(self) -> Encoded:
        """Returns all vectors, once every part has been put."""
        truncated = self._num_tokens > self._limit
        embeddings = self._by_token if self._vectors is None else self._vectors
        return Encoded(embeddings, self._num_tokens, truncated, self._tokens, self._offsets)


class IdJob(Job):
    """Texts that somebody else has tokenised.

    Args:
        encoder: what is served.
        rows: ids of each text, special tokens included.
    """

    def __init__(self, encoder: Encoder, rows: Sequence[np.ndarray]):
        super().__init__(encoder, len(rows), encoder.max_seqlen)
        self._rows = [(ids, np.zeros_like(ids)) for ids in rows]
        self._num_tokens[:] = [len(ids) for ids in rows]

    def _parts(self) -> Iterator[Part]:
        yield from _id_parts(self._encoder, self._rows, 0)


class TextJob(Job):
    """Texts, tokenised here or on the server.

    Args:
        encoder: what is served.
        texts: the texts; with `texts_b` the first ones of pairs.
        texts_b: the second ones.
        prompt: which of the encoder's prompts goes before `texts`.
        tokenizer: tokenises here; None lets the server do it.
        max_seqlen: what texts are cut to where they are tokenised here, if less than the encoder's own.
        keep_tokens: whether tokens and offsets are wanted.

    Raises:
        BadRequest: the texts are not two lists of strings of one length, one is too large to be sent, or
            tokens are wanted that only the server knows.
        ConfigError: no such prompt.
    """

    def __init__(
        self,
        encoder: Encoder,
        texts: Iterable[str],
        texts_b: Iterable[str] | None = None,
        *,
        prompt: str | None = None,
        tokenizer: Tokenizer | None = None,
        max_seqlen: int | None = None,
        keep_tokens: bool = False,
    ):
        check_prompt(prompt)
        if keep_tokens and tokenizer is None:
            raise BadRequest(
                "Tokens and offsets are known where a text is tokenised. Make the client with the model's "
                "vocabulary: ErnieClient('vocab.txt', ...)."
            )
        self._texts = _listed(texts, "texts")
        self._texts_b = None if texts_b is None else _listed(texts_b, "texts_b")
        if self._texts_b is not None and len(self._texts_b) != len(self._texts):
            raise BadRequest(
                f"{len(self._texts)} texts came with {len(self._texts_b)} texts_b; expected one for each."
            )
        count = len(self._texts)
        super().__init__(encoder, count, encoder.max_seqlen if max_seqlen is None else max_seqlen)
        self._prompt, self._tokenizer = prompt, tokenizer
        self.method = "outputs" if tokenizer is None else "predict"
        if keep_tokens:
            self._tokens, self._offsets = [None] * count, [None] * count
        self._sizes = np.zeros(count, dtype=np.int64) if tokenizer is not None else self._json_sizes()

    def _parts(self) -> Iterator[Part]:
        for start in range(0, len(self._texts), _CHUNK_TEXTS):
            stop = min(start + _CHUNK_TEXTS, len(self._texts))
            if self._tokenizer is None:
                yield from self._raw_parts(start, stop)
            else:
                yield from self._tokenised_parts(self._tokenizer, start, stop)

    def _tokenised_parts(self, tokenizer: Tokenizer, start: int, stop: int) -> Iterator[Part]:
        prefix = self._encoder.prompts[self._prompt]
        encodings = tokenizer.encode_batch(
            [prefix + text for text in self._texts[start:stop]],
            None if self._texts_b is None else self._texts_b[start:stop],
            max_seqlen=self._limit,
        )
        for row, encoding in enumerate(encodings, start):
            self._num_tokens[row] = encoding.num_tokens
            if self._tokens is not None and self._offsets is not None:
                self._tokens[row] = tokenizer.convert_ids_to_tokens(encoding.input_ids.tolist())
                self._offsets[row] = _without_prompt(encoding, len(prefix))
        yield from _id_parts(self._encoder, [(e.input_ids, e.token_type_ids) for e in encodings], start)

    def _raw_parts(self, start: int, stop: int) -> Iterator[Part]:
        """Packs texts as they are, the short ones first; what has too many bytes the client cuts again."""
        rows: list[int] = []
        for row in (np.argsort(self._sizes[start:stop], kind="stable") + start).tolist():
            tokens = min(int(self._sizes[row]) // _BYTES_PER_TOKEN, self._limit) * (len(rows) + 1)
            if rows and (tokens > _PART_TOKENS or len(rows) == _PART_ROWS):
                yield self._raw_part(rows)
                rows = []
            rows.append(row)
        yield self._raw_part(rows)

    def _raw_part(self, rows: list[int]) -> Part:
        return Part(np.array(rows, dtype=np.int64), [self._raw(row) for row in rows])

    def _raw(self, row: int) -> dict[str, str]:
        raw = {"text_a": self._texts[row]}
        if self._texts_b is not None:
            raw["text_b"] = self._texts_b[row]
        if self._prompt is not None:
            raw["prompt"] = self._prompt
        return raw

    def _json_sizes(self) -> np.ndarray:
        """Bytes that each text takes in a request, at most; int64.

        Raises:
            BadRequest: one is too large. Nothing is cut here, since no number of characters is sure to hold
                the first tokens: blanks make none, and a long word makes one.
        """
        columns = (self._texts,) if self._texts_b is None else (self._texts, self._texts_b)
        # As ASCII, which is never shorter than the UTF-8 that is sent, and quickly written.
        sizes = [np.array([len(json.dumps(text)) for text in column], dtype=np.int64) for column in columns]
        totals: np.ndarray = sum(sizes, np.full(len(self._texts), _RAW_BYTES, dtype=np.int64))
        room = REQUEST_LIMITS.max_body_bytes
        for row in np.flatnonzero(totals > room).tolist():
            exact = len(to_json([self._raw(row)]))
            if exact > room:
                raise BadRequest(
                    f"texts[{row}] takes {exact} bytes; a request takes {room}. Shorten it, or let the "
                    "client tokenise: ErnieClient('vocab.txt', ...) takes texts of any length."
                )
        return totals


def _id_parts(encoder: Encoder, rows: Sequence[tuple[np.ndarray, np.ndarray]], start: int) -> Iterator[Part]:
    """Packs tokenised texts, the short ones first, into requests with little padding.

    Args:
        encoder: what is served.
        rows: `input_ids` and `token_type_ids` of each text; int64 `[S]`.
        start: number of the first text.
    """
    lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int64)
    order = np.argsort(lengths, kind="stable")
    max_padding = _MAX_PADDING_PER_TOKEN if encoder.per_token else _MAX_PADDING
    begin = tokens = 0
    for place, row in enumerate(order):
        length, count = int(lengths[row]), place - begin + 1
        padded = length * count
        too_padded = padded - tokens - length > max_padding * padded
        if place > begin and (too_padded or padded > _PART_TOKENS or count > _PART_ROWS):
            yield _id_part(encoder, rows, order[begin:place], start)
            begin, tokens = place, 0
        tokens += length
    if begin < len(order):
        yield _id_part(encoder, rows, order[begin:], start)


def _id_part(
    encoder: Encoder, rows: Sequence[tuple[np.ndarray, np.ndarray]], members: np.ndarray, start: int
) -> Part:
    arrays = {}
    width = len(rows[members[-1]][0])
    for place, name in enumerate(_INPUTS):
        padded = np.full((len(members), width), encoder.pad_values[name], dtype=np.int64)
        for row, member in enumerate(members):
            values = rows[member][place]
            padded[row, : len(values)] = values
        arrays[name] = padded
    return Part(members + start, arrays)


def _without_prompt(encoding: Encoding, size: int) -> np.ndarray:
    """Offsets within the text alone, which had a prompt of so many characters before it."""
    if not size:
        return encoding.offsets
    first = encoding.token_type_ids == 0
    moved = np.where(first[:, None], encoding.offsets - size, encoding.offsets)
    return np.maximum(moved, 0).astype(np.int32)


def _listed(texts: Iterable[str], what: str) -> list[str]:
    if isinstance(texts, str | bytes):
        raise BadRequest(f"{what} is one {type(texts).__name__}; expected a list of strings: [text].")
    listed = list(texts)
    for place, text in enumerate(listed):
        if not isinstance(text, str):
            raise BadRequest(f"{what}[{place}] is {text!r:.80}; expected a string.")
    return listed
