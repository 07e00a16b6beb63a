"""OpenAI's embeddings API in front of an encoder server: HTTP in, the server's own protocol out.

    POST /v1/embeddings   GET /v1/models   GET /health   GET /metrics

No second engine: every text goes into the queue of the server, which tokenises it, cuts it to the model's
length and batches it with those of all other clients. Beyond OpenAI's own fields a request may have a
`prompt` ("query" or "passage", for models that want one); how many texts were cut is in the header
`x-truncated-inputs`.
Token ids are the model's own, special tokens included, not those of OpenAI's tokenizers.

Source: https://platform.openai.com/docs/api-reference/embeddings (fields, forms of answers and errors).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import logging
import math
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StrictInt, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from ernie.service.calls import run_async
from ernie.service.encoder import Encoder, Served
from ernie.service.texts import Encoded, IdJob, Job, TextJob
from ernie.service.vector_json import number_list
from ernie.tasks.pooling import PROMPTS
from propeller.errors import (
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    Draining,
    Overloaded,
    ServerError,
    ServiceError,
    Unavailable,
)
from propeller.service.client import AsyncInferenceClient
from propeller.service.frames import to_json
from propeller.version import __version__

log = logging.getLogger("ernie")

MAX_INPUTS = 2048  # OpenAI's own limit
MAX_BODY_BYTES = 16 << 20
MAX_IDS = 1 << 20  # OpenAI takes 300,000 in a request
# Requests for embeddings at a time, further ones are answered by 429; with the limit of a body and the time
# that one may take to come it bounds the memory. Not connections: those that ask for nothing cost little.
MAX_RUNNING = 256
_BODY_S = 30.0
# Beyond its input a request has a few fields and lists. A body of less than so many bytes is parsed at once.
_MAX_OTHERS, _QUICK_BYTES = 256, 1 << 16
_BUSY_RETRY_MS = 1000.0
_HEALTH_S = 2.0
_METRICS_S = 5.0
_TOO_MANY = f"at most {MAX_INPUTS} texts, or rows of token ids, are taken at a time"
_STATUS: tuple[tuple[type[ServiceError], int], ...] = (
    (BadRequest, 400),
    (Overloaded, 429),
    (Draining, 503),
    (Unavailable, 503),
    (DeadlineExceeded, 504),
    (ServiceError, 500),
)
_CREATED = 0  # of a model; clients expect the field, nobody knows the time
# The front and the server are neighbours, so no proxy of the environment stands between them.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# Pydantic tries each form of a union, and without `fail_fast` notes the fault of each of a million items.
_TokenIds = Annotated[list[StrictInt], Field(fail_fast=True)]
_Texts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_INPUTS)]
_Rows = Annotated[list[_TokenIds], Field(fail_fast=True, max_length=MAX_INPUTS)]


class EmbeddingsRequest(BaseModel):
    """The body of `POST /v1/embeddings`; what else it holds is ignored.

    Attributes:
        input: one text or token row, or a list of up to 2048.
        model: what the server calls its model.
        encoding_format: `float` (also the default) or `base64`, of little-endian float32.
        dimensions: how many numbers of each vector are wanted.
        prompt: which of the model's prompts goes before each text.
    """

    input: str | _Texts | _TokenIds | _Rows
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: StrictInt | None = None
    prompt: Literal[PROMPTS] | None = None  # type: ignore[valid-type]  # which is a tuple of literals


class _NoSuchModel(HTTPException):
    """Another model was asked for than the one that is served."""


def make_app(
    connect: Callable[[], AsyncInferenceClient], api_key: str | None = None, metrics_url: str | None = None
) -> FastAPI:
    """Makes the ASGI application.

    Args:
        connect: makes the client that talks to the server; called at start, closed at the end.
        api_key: what callers must send as `Authorization: Bearer ...`, but for `/health`; None asks nobody.
        metrics_url: where the server's own `/metrics` is; None if it has none.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with connect() as client:
            app.state.client, app.state.served = client, Served()
            yield

    # No pages of documentation, which would load scripts from elsewhere; the schema is a route of its own.
    app = FastAPI(
        title="ernie-propeller", version=__version__, lifespan=lifespan,
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    app.state.metrics_url = metrics_url
    app.state.running = asyncio.Semaphore(MAX_RUNNING)
    app.include_router(_keyed, dependencies=[Depends(_key_check(api_key))])
    app.include_router(_open)
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(ConfigError, _on_config_error)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_any_error)
    return app


_keyed, _open = APIRouter(), APIRouter()


@_keyed.post(
    "/v1/embeddings",
    openapi_extra={
        "requestBody": {"content": {"application/json": {"schema": EmbeddingsRequest.model_json_schema()}}}
    },
)
async def embeddings(request: Request) -> Response:
    """Vectors of one or many texts, in their order."""
    running: asyncio.Semaphore = request.app.state.running
    if running.locked():
        raise Overloaded(f"{MAX_RUNNING} requests are being answered, no more at a time.", _BUSY_RETRY_MS)
    async with running:
        return await _answer(request)


async def _answer(request: Request) -> Response:
    body = await _body(request)
    wanted = _parsed(body) if len(body) < _QUICK_BYTES else await asyncio.to_thread(_parsed, body)
    encoder = await _encoder(request, wanted.model)
    vectors, num_tokens, truncated = await _vectors(request, encoder, wanted)
    if wanted.dimensions is not None:
        vectors = _cut(vectors, wanted.dimensions, encoder)
    as_base64 = wanted.encoding_format == "base64"
    # In a thread: 2048 vectors as decimal numbers take a good part of a second.
    content = await asyncio.to_thread(_content, encoder.model, vectors, num_tokens, as_base64)
    return Response(content, media_type="application/json", headers={"x-truncated-inputs": str(truncated)})


@_keyed.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served here."""
    return {"object": "list", "data": [_described(await _encoder(request))]}


@_keyed.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """That model by its name."""
    return _described(await _encoder(request, name))


@_keyed.get("/openapi.json", include_in_schema=False)
async def schema(request: Request) -> dict[str, Any]:
    """What there is, for tools."""
    described: dict[str, Any] = request.app.openapi()
    return described


@_keyed.get("/metrics")
async def metrics(request: Request) -> Response:
    """The server's own figures, for Prometheus."""
    url = request.app.state.metrics_url
    if url is None:
        raise HTTPException(404, "The server was started without --metrics-port.")
    try:
        content, kind = await asyncio.to_thread(_fetched, url)
    except (urllib.error.URLError, OSError) as error:
        raise Unavailable(f"The server's metrics cannot be read: {error}.") from error
    return Response(content, headers={"content-type": kind})


@_open.get("/health")
async def health(request: Request) -> JSONResponse:
    """200 when the server is ready, 503 with its status otherwise."""
    try:
        status = (await asyncio.wait_for(request.app.state.client.ping(), _HEALTH_S))["status"]
    except (asyncio.TimeoutError, ServiceError):
        status = "unavailable"
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


def _key_check(api_key: str | None) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if api_key is None:
            return
        same = hmac.compare_digest(given.strip().encode("latin-1"), api_key.encode("utf-8"))
        if scheme.lower() != "bearer" or not same:
            raise HTTPException(401, "Missing or wrong API key; expected 'Authorization: Bearer KEY'.")

    return check


async def _body(request: Request) -> bytes:
    """The request's body.

    Raises:
        HTTPException: 413 before it takes more memory than it may, 408 if it comes too slowly, 400 if the
            caller hangs up.
    """
    try:
        return await asyncio.wait_for(_received(request), _BODY_S)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"The body did not come within {_BODY_S:g} s.") from error
    except ClientDisconnect as error:  # nobody reads this, nor wants a traceback of it in the log
        raise HTTPException(400, "The body ended before it was whole.") from error


async def _received(request: Request) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > MAX_BODY_BYTES:
            raise HTTPException(413, f"The body has more than {MAX_BODY_BYTES} bytes. Send fewer inputs.")
        pieces.append(piece)
    return b"".join(pieces)


def _check_items(body: bytes) -> None:
    """Refuses more items than any request has: to parse them would hold up all others, also in a thread."""
    most = MAX_INPUTS + _MAX_OTHERS
    bare = body.replace(rb"\\", b"").replace(rb"\"", b"")
    outside = b"".join(bare.split(b'"', 2 * most)[::2])
    strings, lists = bare.count(b'"') // 2, outside.count(b"[") + outside.count(b"{")
    if max(strings, lists, outside.count(b",") - MAX_IDS) > most:
        raise BadRequest(f"input: {_TOO_MANY}, {MAX_IDS} ids altogether.")


def _parsed(body: bytes) -> EmbeddingsRequest:
    """Reads and checks what can be checked without the model."""
    _check_items(body)
    try:
        wanted = EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        problem = problems[0]
        field, expected = ".".join(map(str, problem["loc"][:1])) or "The body", problem["msg"]
        if any(one["type"] == "too_long" for one in problems):
            expected = _TOO_MANY
        elif field == "input" and problem["type"] != "missing":
            expected = "expected a string, a list of strings, a list of token ids, or a list of such lists"
        raise BadRequest(f"{field}: {expected}.") from error
    given = wanted.input
    if not given:
        raise BadRequest("input is empty; expected at least one text.")
    if isinstance(given, list) and not isinstance(given[0], int):
        for place, one in enumerate(given):
            if not one:
                raise BadRequest(f"input[{place}] is empty; expected a text.")
    return wanted


async def _encoder(request: Request, name: str | None = None) -> Encoder:
    """What is served now.

    Raises:
        HTTPException: 404, it is not called so.
    """
    served: Served = request.app.state.served
    encoder = served.fresh() or served.update(await request.app.state.client.spec())
    if name not in (None, encoder.model):
        raise _NoSuchModel(404, f"The model {name!r} does not exist here; expected {encoder.model!r}.")
    return encoder


async def _vectors(
    request: Request, encoder: Encoder, wanted: EmbeddingsRequest
) -> tuple[np.ndarray, int, int]:
    """Vectors of what is asked for, their tokens, and how many texts were cut."""
    if encoder.per_token:
        raise BadRequest(
            "The server's model gives a vector for each token; this API has one for each text. Start the "
            "encoder server with --pooling cls, mean, max or pooler."
        )
    given: list[Any] = wanted.input if isinstance(wanted.input, list) else [wanted.input]
    if isinstance(given[0], int):
        given = [given]
    if isinstance(given[0], str):
        encoded = await _run(request, encoder, TextJob(encoder, given, prompt=wanted.prompt))
        seen = int(np.minimum(encoded.num_tokens, encoder.max_seqlen).sum())
        return np.asarray(encoded.embeddings), seen, int(encoded.truncated.sum())
    if wanted.prompt is not None:
        raise BadRequest("A prompt goes before texts; input has token ids.")
    try:
        rows = [np.array(ids, dtype=np.int64) for ids in given]
    except OverflowError as error:
        raise BadRequest("input has a token id of more than 64 bits.") from error
    encoded = await _run(request, encoder, IdJob(encoder, rows))
    return np.asarray(encoded.embeddings), sum(map(len, rows)), 0


async def _run(request: Request, encoder: Encoder, job: Job) -> Encoded:
    client, served = request.app.state.client, request.app.state.served
    encoded = await run_async(client, job)
    if job.num_requests > 1:
        served.check_same(encoder, await client.spec())
    return encoded


def _cut(vectors: np.ndarray, dimensions: int, encoder: Encoder) -> np.ndarray:
    """The first numbers of each vector, of length 1 again where the whole ones are."""
    if not 1 <= dimensions <= encoder.dim:
        raise BadRequest(f"dimensions is {dimensions}; expected 1 to {encoder.dim}, which the model has.")
    cut = vectors[:, :dimensions]
    if not encoder.normalized:
        return cut
    norms = np.linalg.norm(cut, axis=1, keepdims=True)
    shorter: np.ndarray = cut / np.maximum(norms, np.finfo(np.float32).tiny)
    return shorter


def _content(model: str, vectors: np.ndarray, num_tokens: int, as_base64: bool) -> bytes:
    """The answer's JSON. Vectors are written by themselves: `json.dumps` takes three times as long."""
    if not np.isfinite(vectors).all():
        raise ServerError("The model gave numbers that are not finite.")
    if as_base64:
        little = vectors.astype("<f4")
        written = [f'"{base64.b64encode(row.tobytes()).decode()}"' for row in little]
    else:
        written = [number_list(row) for row in vectors]
    data = ",".join(
        f'{{"object":"embedding","index":{index},"embedding":{text}}}' for index, text in enumerate(written)
    )
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    rest = to_json({"model": model, "usage": usage}).decode()
    return f'{{"object":"list","data":[{data}],{rest[1:]}'.encode()


def _fetched(url: str) -> tuple[bytes, str]:
    with _OPENER.open(url, timeout=_METRICS_S) as answer:
        return answer.read(), answer.headers.get("content-type", "text/plain")


def _described(encoder: Encoder) -> dict[str, Any]:
    return {"id": encoder.model, "object": "model", "created": _CREATED, "owned_by": "ernie-propeller"}


def _error(status: int, message: str, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    content = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(content, status)


async def _on_service_error(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    answer = _error(status, str(error), getattr(error, "code", None))
    if isinstance(error, Overloaded):
        answer.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_ms / 1000.0)))
    return answer


async def _on_config_error(request: Request, error: Exception) -> Response:
    log.error("%s", error)
    return _error(500, str(error))


async def _on_http_error(request: Request, error: Exception) -> Response:
    status, detail = getattr(error, "status_code", 500), getattr(error, "detail", str(error))
    codes = {401: "invalid_api_key", 404: "not_found", 413: "request_too_large"}
    code = "model_not_found" if isinstance(error, _NoSuchModel) else codes.get(status)
    answer = _error(status, str(detail), code)
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer


async def _on_any_error(request: Request, error: Exception) -> Response:
    return _error(500, "The front failed on this request; its log says why.")
