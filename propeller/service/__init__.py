"""Service: the inference server and its clients. No Paddle but in the worker process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from propeller.lazy import attach

if TYPE_CHECKING:
    from propeller.service.client import AsyncInferenceClient as AsyncInferenceClient
    from propeller.service.client import InferenceClient as InferenceClient
    from propeller.service.server import Server as Server
    from propeller.service.settings import ServerSettings as ServerSettings
    from propeller.service.text_client import TextClient as TextClient
    from propeller.service.wire import Limits as Limits
    from propeller.service.wire import Reply as Reply
    from propeller.service.wire import Request as Request
    from propeller.service.wire import WireArray as WireArray
    from propeller.service.wire import decode_reply as decode_reply
    from propeller.service.wire import decode_request as decode_request
    from propeller.service.wire import encode_reply as encode_reply
    from propeller.service.wire import encode_request as encode_request

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "propeller.service.client": ["AsyncInferenceClient", "InferenceClient"],
        "propeller.service.server": ["Server"],
        "propeller.service.settings": ["ServerSettings"],
        "propeller.service.text_client": ["TextClient"],
        "propeller.service.wire": [
            "Limits",
            "Reply",
            "Request",
            "WireArray",
            "decode_reply",
            "decode_request",
            "encode_reply",
            "encode_request",
        ],
    },
)
