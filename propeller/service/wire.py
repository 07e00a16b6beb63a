"""What travels between client and server.

    request   {"v": 1, "id": "...", "kind": "predict" | "spec" | "ping", "model": text | null,
               "deadline_ms": number | null, "want": "arrays" | "answers" | null, "arrays": [...],
               "body": "raws" | null}
    reply     {"v": 1, "id": "...", "ok": true, "arrays": [...], "body": "answers" | "result" | null}
              {"v": 1, "id": "...", "ok": false, "error": {"code", "message", "retry_after_ms"}}

`propeller/service/frames.py` says how arrays and body follow the header. What a request leaves out is null or
empty, but for `v`, `id` and `kind`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from propeller.errors import BadRequest, Overloaded, ServerError, ServiceError, error_from
from propeller.service.frames import VERSION as VERSION
from propeller.service.frames import Frame, MessageReader, shown, to_frames, to_json
from propeller.service.frames import Limits as Limits
from propeller.service.frames import WireArray as WireArray

KINDS = ("predict", "spec", "ping")
WANTS = ("arrays", "answers")

REQUEST_LIMITS = Limits()
# A client asked for what comes, so these only guard against a server that is broken.
REPLY_LIMITS = Limits(max_message_bytes=2 << 30, max_body_bytes=64 << 20, max_arrays=256, max_rows=1 << 24)

_REQUEST_KEYS = ("v", "id", "kind", "model", "deadline_ms", "want", "arrays", "body")
_REPLY_KEYS = ("v", "id", "ok", "arrays", "body", "error")
_ERROR_KEYS = ("code", "message", "retry_after_ms")
# However it is escaped, it fits into the lowest header limit.
_MAX_ERROR_CHARS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What a client asks for.

    Attributes:
        id: comes back in the reply; 1 to 64 printable ASCII characters.
        kind: `predict`, or `spec` and `ping`, which carry neither arrays nor raws.
        model: which of the server's models; None means its first one.
        deadline_ms: milliseconds that are left; None if there is no deadline.
        arrays: inputs of the bundle, rows first. All have names or none has.
        raws: what the bundle's processor makes raw examples of, in place of arrays: JSON objects, texts, or
            lists of texts; see `Processor.raw_of`.
        want: the model's outputs as `arrays`, or what the processor makes of them, `answers`; None means
            arrays for arrays and answers for raws.
    """

    id: str
    kind: str = "predict"
    model: str | None = None
    deadline_ms: float | None = None
    arrays: tuple[WireArray, ...] = ()
    raws: Sequence[Any] | None = None
    want: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Reply:
    """What a server answers: results, or the error that stands in their place.

    Attributes:
        id: the request's.
        arrays: outputs of the model, row-aligned with the request.
        answers: what the processor made of them, one JSON value for each example.
        result: what `spec` and `ping` ask for; not together with answers.
        error: why there is nothing of the above.
    """

    id: str
    arrays: tuple[WireArray, ...] = ()
    answers: Sequence[Any] | None = None
    result: Mapping[str, Any] | None = None
    error: ServiceError | None = None


def encode_request(request: Request) -> list[Frame]:
    """Turns a request into frames; arrays that are contiguous and little endian are not copied.

    Raises:
        BadRequest: an array's dtype is not one that is sent, or `raws` is not JSON, which NaN is not.
    """
    header = {
        "id": request.id,
        "kind": request.kind,
        "model": request.model,
        "deadline_ms": request.deadline_ms,
        "want": request.want,
    }
    body = None if request.raws is None else ("raws", request.raws)
    return to_frames(header, request.arrays, body, BadRequest)


def encode_reply(reply: Reply) -> list[Frame]:
    """Turns a reply into frames; arrays that are contiguous and little endian are not copied.

    Raises:
        ServerError: an array's dtype is not one that is sent, or answers or result are not JSON (NaN is
            not). An error in place of results can always be encoded.
    """
    if reply.error is not None:
        return [_error_header(reply.id, reply.error)]
    if reply.answers is not None and reply.result is not None:
        raise ServerError("A reply has either answers or a result, got both.", request_id=reply.id)
    body: tuple[str, Any] | None = None
    if reply.answers is not None:
        body = "answers", reply.answers
    elif reply.result is not None:
        body = "result", reply.result
    return to_frames({"id": reply.id, "ok": True}, reply.arrays, body, ServerError)


def _error_header(request_id: str, error: ServiceError) -> bytes:
    retry_after_ms = error.retry_after_ms if isinstance(error, Overloaded) else None
    if retry_after_ms is not None and not math.isfinite(retry_after_ms):  # JSON has no infinity
        retry_after_ms = None
    values = {
        "code": error.code,
        "message": str(error)[:_MAX_ERROR_CHARS],
        "retry_after_ms": retry_after_ms,
    }
    return to_json({"v": VERSION, "id": request_id, "ok": False, "error": values})


def decode_request(frames: Sequence[Frame], limits: Limits = REQUEST_LIMITS) -> Request:
    """Reads a request, which may come from anybody.

    Args:
        frames: all frames of the message, without the sender's address.
        limits: how large it may be.

    Returns:
        The request; its arrays are read-only views of the frames.

    Raises:
        BadRequest: the message is not a request; `request_id` is set if that much could be read.
    """
    message = MessageReader(frames, limits, BadRequest)
    message.only(message.header, _REQUEST_KEYS, "the header")
    kind = message.one_of("kind", message.text("kind", message.header.get("kind")), KINDS)
    model = message.text_or_none("model", message.header.get("model"))
    deadline_ms = message.number_or_none("deadline_ms", message.header.get("deadline_ms"))
    want = message.text_or_none("want", message.header.get("want"))
    if want is not None:
        message.one_of("want", want, WANTS)
    arrays, body, raws = message.payload({"raws": list})
    if kind != "predict" and (arrays or body):
        message.fail(f"A {kind} request carries neither arrays nor raws.")
    if kind == "predict" and bool(arrays) is bool(body):
        found = "both" if arrays else "neither"
        message.fail(f"A predict request carries either arrays or raws, got {found}.")
    if body:
        _check_raws(message, raws)
    return Request(message.id, kind, model, deadline_ms, arrays, raws, want)


def _check_raws(message: MessageReader, raws: Sequence[Any]) -> None:
    if not raws:
        message.fail("raws is an empty list: there is nothing to predict.")
    for place, raw in enumerate(raws):
        if not isinstance(raw, dict | str | list):
            message.fail(f"raws[{place}] must be a JSON object, a text or a list of texts, got {shown(raw)}.")


def decode_reply(frames: Sequence[Frame], limits: Limits = REPLY_LIMITS) -> Reply:
    """Reads a reply; the error in it, if there is one, is returned and not raised.

    Raises:
        ServiceError: the message is not a reply; `request_id` is set if that much could be read.
    """
    message = MessageReader(frames, limits, ServiceError)
    message.only(message.header, _REPLY_KEYS, "the header")
    ok = message.header.get("ok")
    if type(ok) is not bool:
        message.fail(f"ok must be true or false, got {shown(ok)}.")
    if not ok:
        return Reply(message.id, error=_error_of(message))
    if "error" in message.header:
        message.fail("A reply with ok: true has no error.")
    arrays, body, content = message.payload({"answers": list, "result": dict})
    if body == "answers":
        return Reply(message.id, arrays, answers=content)
    return Reply(message.id, arrays, result=content)


def _error_of(message: MessageReader) -> ServiceError:
    """The error of a reply that is not ok."""
    arrays, _, _ = message.payload({})
    if arrays:
        message.fail("A reply with ok: false has no arrays.")
    error = message.header.get("error")
    if not isinstance(error, dict):
        message.fail(f"error must be a JSON object, got {shown(error)}.")
    message.only(error, _ERROR_KEYS, "error")
    text = error.get("message")
    if not isinstance(text, str):
        message.fail(f"error.message must be text, got {shown(text)}.")
    code = message.text("error.code", error.get("code"))
    retry_after_ms = message.number_or_none("error.retry_after_ms", error.get("retry_after_ms"))
    return error_from(code, text, retry_after_ms, request_id=message.id)
