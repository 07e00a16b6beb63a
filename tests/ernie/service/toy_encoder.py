"""A server of the real protocol and the real processor, whose model is a table of random vectors.

A row's vector depends on that row alone, to the last bit. Some texts make it answer with an error; another,
take over a new bundle.
"""

from __future__ import annotations

import threading

import numpy as np
import zmq

from ernie.tasks.embedding import EmbeddingProcessor
from ernie.tasks.pooling import EmbeddingSettings
from ernie.tokenizing import WordPieceTokenizer
from propeller.errors import (
    BadRequest,
    DeadlineExceeded,
    Overloaded,
    PropellerError,
    ServerError,
    ServiceError,
    WorkerDied,
)
from propeller.service.wire import Reply, WireArray, decode_request, encode_reply

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "a",
    "friendly",
    "place",
    "never",
    "again",
    "good",
    "bad",
    "##ly",
    "query",
    ":",
    "!",
    "Place",
    "é",
    "e",
)
VOCABULARY = (*SPECIALS, *WORDS, *(f"w{number}" for number in range(200)))
DIM = 8
ERRORS = {
    "!bad": BadRequest("this text is refused"),
    "!full": Overloaded("the queue is full", 1200.0),
    "!late": DeadlineExceeded("too late"),
    "!died": WorkerDied("it died twice"),
    "!broken": ServerError("the model failed"),
}
TAKE_OVER = "!takeover"


class ToyEncoder:
    """The server, in a thread.

    Args:
        pooling: `mean`, or `none` for a vector for each token.
        settings: others of `EmbeddingSettings`.
        tokenizer: in place of the usual one.

    Attributes:
        port: where it listens.
        requests: (what came, how many rows, tokens of the widest row or None) of each `predict`.
        status: for `ping`.
        hurdle: called before each `predict`; gives the error to be answered, or None.
    """

    def __init__(self, pooling="mean", tokenizer=None, **settings):
        given = {"max_seqlen": 16, "normalize": pooling != "none", "query_prefix": "query: ", **settings}
        self.settings = EmbeddingSettings("layer1", pooling, dimensions=DIM, **given)
        vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
        self.tokenizer = tokenizer or WordPieceTokenizer(vocabulary)
        self.processor = EmbeddingProcessor(self.tokenizer, self.settings)
        self.table = np.random.default_rng(7).standard_normal((len(VOCABULARY), DIM)).astype(np.float32)
        self.bundle = "b" * 64
        self.status = "ready"
        self.requests = []
        self.hurdle = lambda: None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stopped.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def vectors(self, texts, prompt=None):
        """What a client must get, computed one by one."""
        raws = [{"text_a": text, **({"prompt": prompt} if prompt else {})} for text in texts]
        return np.stack([self._row(example["input_ids"]) for example in self.processor.prepare(raws)])

    def _serve(self):
        while not self._stopped.is_set():
            if self._socket.poll(20):
                sender, *frames = self._socket.recv_multipart()
                request = None
                try:
                    request = decode_request(frames)
                    reply = self._answer(request)
                except ServiceError as error:
                    reply = Reply(request.id, error=error)
                self._socket.send_multipart([sender, *encode_reply(reply)])

    def _answer(self, request):
        if request.model not in (None, "toy"):
            raise BadRequest(f"no model {request.model}")
        if request.kind == "ping":
            return Reply(request.id, result={"status": self.status, "version": "0", "models": ["toy"]})
        if request.kind == "spec":
            return Reply(request.id, result=self._spec())
        problem, extras = self.hurdle(), ()
        if problem is not None:
            raise problem
        if request.raws is None:
            arrays = {array.name: array.values for array in request.arrays}
            self.requests.append(("arrays", *arrays["input_ids"].shape))
            rows = [ids[: np.flatnonzero(ids)[-1] + 1] for ids in arrays["input_ids"]]
            width = arrays["input_ids"].shape[1]
        else:
            rows, num_tokens = self._prepared(request.raws)
            self.requests.append(("raws", len(rows), None))
            width = max(map(len, rows))
            extras = (WireArray("num_tokens", num_tokens),)
        if any(ids.max() >= len(self.table) for ids in rows):
            raise BadRequest(f"an id is beyond {len(self.table) - 1}")
        if self.settings.pooling != "none":
            return Reply(request.id, (WireArray("embeddings", np.stack(list(map(self._row, rows)))), *extras))
        padded = np.zeros((len(rows), width, DIM), dtype=np.float32)
        for row, ids in enumerate(rows):
            padded[row, : len(ids)] = self.table[ids]
        lengths = np.array(list(map(len, rows)))
        return Reply(request.id, (WireArray("embeddings", padded), WireArray("lengths", lengths), *extras))

    def _prepared(self, raws):
        for raw in raws:
            if raw["text_a"] in ERRORS:
                raise ERRORS[raw["text_a"]]
            if raw["text_a"] == TAKE_OVER:
                self.bundle = "c" * 64
        try:
            examples = self.processor.prepare(raws)
        except PropellerError as error:
            raise BadRequest(str(error)) from error
        num_tokens = np.array([example["num_tokens"] for example in examples], dtype=np.int64)
        return [example["input_ids"] for example in examples], num_tokens

    def _row(self, ids):
        vector = self.table[ids].mean(axis=0)
        return vector / np.linalg.norm(vector) if self.settings.normalize else vector

    def _spec(self):
        axes = ["batch", "seq_len", DIM] if self.settings.pooling == "none" else ["batch", DIM]
        settings = {field: getattr(self.settings, field) for field in self.settings.__dataclass_fields__}
        common = {"dtype": "int64", "axes": ["batch", "seq_len"], "max_value": None}
        return {
            "model": "toy",
            "models": ["toy"],
            "inputs": [{"name": name, "pad_value": 0, **common} for name in ("input_ids", "token_type_ids")],
            "outputs": [{"name": "embeddings", "dtype": "float32", "axes": axes, "pad_value": 0}],
            "axis_limits": {"seq_len": self.settings.max_seqlen},
            "processor": {
                "name": "embedding",
                "settings": {**settings, "tokenizer": self.tokenizer.fingerprint},
            },
            "labels": None,
            "metrics": {},
            "bundle": self.bundle,
            "version": "0",
            "limits": {"max_rows": 65536, "max_message_bytes": 64 << 20},
        }
