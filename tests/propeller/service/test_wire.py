"""Messages as they travel: what is written is read, and whatever else comes is refused, precisely."""

from __future__ import annotations

import gc
import json
import math
import random
import string
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from propeller.errors import (
    BadRequest,
    ConfigError,
    Draining,
    Overloaded,
    ServerError,
    ServiceError,
    WorkerDied,
)
from propeller.service import (
    Limits,
    Reply,
    Request,
    WireArray,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
IDS = np.arange(6, dtype=np.int64).reshape(2, 3)


def sent(frames):
    """What arrives: the same bytes."""
    return [bytes(frame) for frame in frames]


def same(ours, theirs):
    """Whether two sets of arrays are equal in every bit."""
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (_, wanted), (_, found) in zip(ours, theirs, strict=True):
        wanted = np.asarray(wanted)
        assert found.dtype.name == wanted.dtype.name and found.shape == wanted.shape
        little = wanted.astype(wanted.dtype.newbyteorder("<"), order="C")
        assert found.tobytes() == little.tobytes()


ids = st.text(string.ascii_letters + string.digits + string.punctuation + " ", min_size=1, max_size=64)
names = st.text(
    st.characters(exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")),
    min_size=1,
    max_size=64,
).filter(str.isprintable)
numbers = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=4)
arrays_of_any_kind = st.sampled_from([np.dtype(name) for name in DTYPES]).flatmap(
    lambda dtype: hnp.arrays(
        st.sampled_from([dtype.newbyteorder("<"), dtype.newbyteorder(">")]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)


@st.composite
def wire_arrays(draw, min_size=0):
    values = draw(st.lists(arrays_of_any_kind, min_size=min_size, max_size=4))
    values = [value.T[::-1] if value.ndim and draw(st.booleans()) else value for value in values]
    called = [None] * len(values)
    if draw(st.booleans()):
        called = draw(st.lists(names, min_size=len(values), max_size=len(values), unique=True))
    return tuple(map(WireArray, called, values))


@st.composite
def requests(draw):
    about = {"model": draw(st.none() | names), "deadline_ms": draw(st.none() | numbers)}
    kind = draw(st.sampled_from(["predict", "predict", "spec", "ping"]))
    if kind == "predict" and draw(st.booleans()):
        about["arrays"] = draw(wire_arrays(min_size=1))
    elif kind == "predict":
        about["raws"] = draw(st.lists(objects, min_size=1, max_size=3))
    return Request(draw(ids), kind, **about)


@st.composite
def replies(draw):
    if draw(st.booleans()):
        cls = draw(st.sampled_from([BadRequest, WorkerDied, Draining, Overloaded]))
        more = [draw(st.floats(0, 1e9))] if cls is Overloaded else []
        return Reply(draw(ids), error=cls(draw(st.text(st.characters(), max_size=1000)), *more))
    body = draw(st.sampled_from(["answers", "result", None]))
    content = {"answers": st.lists(json_values, max_size=4), "result": objects, None: st.none()}[body]
    return Reply(draw(ids), draw(wire_arrays()), **({body: draw(content)} if body else {}))


class TestRoundTrip:
    @settings(max_examples=150, deadline=None)
    @given(requests())
    def test_of_requests(self, request):
        found = decode_request(sent(encode_request(request)))
        assert (found.id, found.kind, found.model) == (request.id, request.kind, request.model)
        assert found.deadline_ms == (None if request.deadline_ms is None else float(request.deadline_ms))
        assert found.raws == request.raws
        same(request.arrays, found.arrays)

    @settings(max_examples=150, deadline=None)
    @given(replies())
    def test_of_replies(self, reply):
        found = decode_reply(sent(encode_reply(reply)))
        assert (found.id, found.answers, found.result) == (reply.id, reply.answers, reply.result)
        same(reply.arrays, found.arrays)
        assert type(found.error) is type(reply.error)
        if reply.error is not None:
            assert (str(found.error), found.error.request_id) == (str(reply.error), reply.id)
            assert getattr(found.error, "retry_after_ms", 0) == getattr(reply.error, "retry_after_ms", 0)

    @pytest.mark.parametrize("name", DTYPES)
    def test_of_every_dtype(self, name):
        values = np.array([[0, 1], [1, 0]]).astype(name)
        same([WireArray("x", values)], decode_request(encode_request(arrays_request(x=values))).arrays)

    @pytest.mark.parametrize(
        "text", ["", "\0", "a\ud800b", "\udfff", "\U0001f600", "深度学习", "\u2028", "x" * 9999]
    )
    def test_of_texts(self, text):
        raws = [{"text_a": text, text: 1}]
        assert decode_request(encode_request(Request("r", raws=raws))).raws == raws


def arrays_request(request_id="r1", **arrays):
    return Request(request_id, arrays=tuple(map(WireArray, arrays, arrays.values())))


class TestCopies:
    def test_none_where_none_is_needed(self):
        frames = encode_request(arrays_request(ids=IDS))
        assert np.shares_memory(np.frombuffer(frames[1], np.uint8), IDS)
        (found,) = decode_request(frames).arrays
        assert np.shares_memory(found.values, IDS)
        assert not found.values.flags.writeable and IDS.flags.writeable

    def test_of_what_does_not_fit(self):
        found = decode_request(encode_request(arrays_request(a=IDS.T, b=IDS.astype(">i8"), c=IDS[:, ::-2])))
        assert [values.tolist() for _, values in found.arrays] == [
            IDS.T.tolist(),
            IDS.tolist(),
            IDS[:, ::-2].tolist(),
        ]
        assert all(values.flags.c_contiguous for _, values in found.arrays)

    def test_lists_are_taken_as_arrays(self):
        found = decode_request(encode_request(arrays_request(x=[[1.5, 2.5]])))
        assert found.arrays[0].values.dtype == np.float64

    def test_of_a_writable_frame_is_read_only_all_the_same(self):
        frames = [bytearray(frame) for frame in encode_request(arrays_request(ids=IDS))]
        assert not decode_request(frames).arrays[0].values.flags.writeable


class TestSenders:
    """What cannot be sent fails where it is made."""

    @pytest.mark.parametrize(
        "values", [np.array(["a"]), np.array([None]), np.array([1j]), np.array([[1], 2, {}][:0], "M8[s]")]
    )
    def test_dtypes(self, values):
        with pytest.raises(BadRequest, match="Array 'x' is .*; expected one of bool, int8") as caught:
            encode_request(arrays_request(x=values))
        assert caught.value.request_id == "r1"
        with pytest.raises(ServerError, match="Array 0 is .*; expected one of bool, int8"):
            encode_reply(Reply("r1", (WireArray(None, values),)))

    @pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, b"x", np.float32(1), np.arange(2)])
    def test_what_is_not_json(self, value):
        with pytest.raises(BadRequest, match="The raws cannot be sent as JSON") as caught:
            encode_request(Request("r1", raws=[{"text": value}]))
        assert caught.value.request_id == "r1"
        with pytest.raises(ServerError, match="The answers cannot be sent as JSON"):
            encode_reply(Reply("r1", answers=[value]))
        with pytest.raises(ServerError, match="The result cannot be sent as JSON"):
            encode_reply(Reply("r1", result={"x": value}))

    def test_a_value_that_holds_itself(self):
        raw = {}
        raw["self"] = raw
        with pytest.raises(BadRequest, match="The raws cannot be sent as JSON"):
            encode_request(Request("r1", raws=[raw]))

    def test_a_deadline_that_is_no_number(self):
        with pytest.raises(BadRequest, match="The header cannot be sent as JSON"):
            encode_request(Request("r1", "ping", deadline_ms=math.nan))

    def test_answers_and_a_result(self):
        with pytest.raises(ServerError, match="either answers or a result, got both"):
            encode_reply(Reply("r1", answers=[], result={}))

    @pytest.mark.parametrize("text", ["x", "\0", "\ud800\U0001f600"])
    def test_an_error_can_always_be_sent(self, text):
        error = Overloaded(text * 100_000, math.inf)
        (frame,) = encode_reply(Reply("i" * 64, error=error))
        found = decode_reply([frame], Limits(max_header_bytes=1 << 14)).error
        assert type(found) is Overloaded and found.retry_after_ms == 0
        assert len(str(found)) == 1000 and str(error).startswith(str(found))

    def test_an_error_of_another_release(self):
        error = ServiceError("brews coffee only")
        error.code = "teapot"
        found = decode_reply(encode_reply(Reply("r1", error=error))).error
        assert type(found) is ServiceError and found.code == "teapot"


def message(*frames, **header):
    """Frames of a request; by default of the array IDS."""
    whole = {"v": 1, "id": "r1", "kind": "predict", "arrays": [dict(ARRAY)]} | header
    return [json.dumps(whole).encode(), *(frames or (IDS.tobytes(),))]


ARRAY = {"name": "ids", "dtype": "int64", "shape": [2, 3]}


def of_array(**changed):
    return message(arrays=[{key: value for key, value in (ARRAY | changed).items() if value != "gone"}])


def of_raws(body):
    return [*message(arrays=[], body="raws")[:1], body]


def of_kind(**header):
    return message(**header)[:1]


LONG = "x" * 65
WIDE = [{"name": f"a{place}", "dtype": "int8", "shape": [0]} for place in range(17)]
BAD = {
    "no such key": (message(deadline=5), r'Unknown key "deadline" in the header. Did you mean .deadline_ms'),
    "kind missing": (message(kind=None), "kind must be 1 to 64 printable characters, got null"),
    "kind unknown": (message(kind="predicts"), "Unknown kind 'predicts'; .* Did you mean 'predict'"),
    "kind a list": (message(kind=["predict"]), "kind must be .*, got a JSON list of 1"),
    "model a number": (message(model=3), "model must be 1 to 64 printable characters, got 3"),
    "model empty": (message(model=""), 'model must be .*, got ""'),
    "model long": (message(model=LONG), r"model must be .*, got \"x{63}\.\.\."),
    "model a surrogate": (message(model="\ud800"), r"model must be .*, got \"\\ud800\""),
    "deadline text": (message(deadline_ms="5"), 'deadline_ms must be a number or null, got "5"'),
    "deadline a bool": (message(deadline_ms=True), "deadline_ms must be a number or null, got true"),
    "arrays an object": (message(arrays={}), "arrays must be a JSON list, got a JSON object of 0"),
    "body unknown": (message(body="answers"), "Unknown body 'answers'; expected raws"),
    "body a number": (message(body=1), "body must be 1 to 64 printable characters, got 1"),
    "a frame missing": (message()[:1], "has 1 frames, but its header announces 2: itself, 1 arrays, no body"),
    "a frame too many": ([*message(), b""], "has 3 frames, but its header announces 2"),
    "many frames": (message(*[b""] * 99), "has 100 frames, but its header announces 2"),
    "body missing": (of_kind(arrays=[], body="raws"), "has 1 frames, but its header announces 2: .* a body"),
    "many arrays": (message(*[b""] * 17, arrays=WIDE), "has 17 arrays; at most 16 are taken"),
    "neither": (of_kind(arrays=[]), "either arrays or raws, got neither"),
    "both": (message(IDS.tobytes(), b"[{}]", body="raws"), "either arrays or raws, got both"),
    "ping with arrays": (message(kind="ping"), "A ping request carries neither arrays nor raws"),
    "spec with raws": ([of_kind(kind="spec", arrays=[], body="raws")[0], b"[{}]"], "A spec request carries"),
    "array a list": (message(arrays=[[1]]), r"arrays\[0\] must be a JSON object, got a JSON list of 1"),
    "array key": (of_array(order="F"), r'Unknown key "order" in arrays\[0\]'),
    "array key missing": (
        of_array(dtype="gone"),
        r"arrays\[0\] \(ids\) has the dtype null; expected one of bool",
    ),
    "array name a number": (of_array(name=0), r"arrays\[0\].name must be 1 to 64 .* got 0"),
    "array name long": (of_array(name=LONG), r"arrays\[0\].name must be 1 to 64"),
    "dtype object": (of_array(dtype="object"), 'has the dtype "object"; expected one of bool, int8'),
    "dtype code": (of_array(dtype="<i8"), 'has the dtype "<i8"; expected one of'),
    "dtype a list": (of_array(dtype=[["a", "i8"]]), "has the dtype a JSON list of 1; expected one of"),
    "shape text": (of_array(shape="23"), 'has the shape "23"; expected a list of whole numbers'),
    "shape missing": (of_array(shape="gone"), "has the shape null; expected a list"),
    "shape negative": (of_array(shape=[-2, -3]), "has -2 in its shape; expected whole numbers from 0 on"),
    "shape float": (of_array(shape=[2.0, 3]), "has 2.0 in its shape"),
    "shape bool": (of_array(shape=[True, 6]), "has true in its shape"),
    "shape other": (of_array(shape=[2, 2]), r"int64 of the shape \[2, 2\], which takes 32 bytes, .* has 48"),
    "shape huge": (of_array(shape=[2, 2**62, 8]), r"which takes 590295810358705651712 bytes"),
    "shape hidden": (message(b"", arrays=[ARRAY | {"shape": [0, 2**62, 2**62]}]), "is beyond the limits"),
    "axes": (of_array(shape=[1] * 9), "has 9 axes; at most 8 are taken"),
    "rows": (of_array(shape=[65537]), "has 65537 rows; at most 65536 are taken at a time"),
    "bool bytes": (message(b"\0\1\2\0\0\0", arrays=[ARRAY | {"dtype": "bool"}]), "bytes other than 0 and 1"),
    "same name": (message(*[IDS.tobytes()] * 2, arrays=[ARRAY] * 2), "Two arrays are called 'ids'"),
    "a name missing": (
        message(*[IDS.tobytes()] * 2, arrays=[ARRAY, ARRAY | {"name": None}]),
        "Either all arrays have a name or none; got 1 of 2",
    ),
    "raws no json": (of_raws(b"[{]"), "The raws frame is not JSON in UTF-8: .* column 3"),
    "raws empty frame": (of_raws(b""), "The raws frame is not JSON in UTF-8"),
    "raws utf-16": (of_raws("[{}]".encode("utf-16")), "The raws frame is not JSON in UTF-8"),
    "raws a number": (of_raws(b"7"), "raws must be a JSON list, got 7"),
    "raws an object": (of_raws(b"{}"), "raws must be a JSON list, got a JSON object of 0"),
    "raws none": (of_raws(b"[]"), "raws is an empty list: there is nothing to predict"),
    "raws numbers": (of_raws(b'[{}, "a", ["b"], 3]'), r"raws\[3\] must be a JSON object, a text or a list"),
    "raws NaN": (of_raws(b'[{"a": NaN}]'), "it holds NaN, which is not JSON"),
    "raws infinity": (of_raws(b'[{"a": -Infinity}]'), "it holds -Infinity, which is not JSON"),
    "raws overflow": (of_raws(b'[{"a": 1e999}]'), "it holds 1e999, which is beyond the range of a double"),
    "raws digits": (of_raws(b'[{"a": %s}]' % (b"9" * 9999)), "an integer of 9999 digits; at most 20"),
    "raws deep": (of_raws(b'[{"a":%s%s}]' % (b"[" * 31, b"]" * 31)), "nested more than 32 levels deep"),
    "raws very deep": (of_raws(b"[" * 200_000), "The raws frame is nested too deep"),
    "raws many": (of_raws(b"[%s{}]" % (b"{}," * 65536)), "raws has 65537 rows; at most 65536"),
    "raws large": (of_raws(b" " * ((1 << 20) + 1)), "examples of a request have 1048577 bytes; at most 10"),
}
UNADDRESSED = {
    "no frames": ([], "The message has no frames; expected a header"),
    "empty": ([b""], "The header frame is not JSON in UTF-8"),
    "not json": ([b"GET / HTTP/1.1"], "The header frame is not JSON in UTF-8"),
    "not utf-8": ([b'{"id": "\xff"}'], "The header frame is not JSON in UTF-8"),
    "a byte order mark": ([b"\xef\xbb\xbf{}"], "The header frame is not JSON in UTF-8"),
    "NaN": ([b'{"v": NaN}'], "it holds NaN, which is not JSON"),
    "a list": ([b"[]"], "The header must be a JSON object, got a JSON list of 0"),
    "deep": ([b"[" * 60_000], "The header frame is nested too deep"),
    "long": ([b" " * 65537], "The header frame has 65537 bytes; at most 65536 are taken"),
    "no id": ([b'{"v": 1}'], "id must be 1 to 64 printable ASCII characters, got null"),
    "id empty": (message(id=""), 'id must be .*, got ""'),
    "id long": (message(id=LONG), r"id must be .*, got \"x{63}\.\.\."),
    "id a number": (message(id=7), "id must be .*, got 7"),
    "id a bool": (message(id=True), "id must be .*, got true"),
    "id not ascii": (message(id="ü"), "id must be 1 to 64 printable ASCII characters"),
    "id a line": (message(id="a\nb"), "id must be 1 to 64 printable ASCII characters"),
    "id a surrogate": (message(id="\udfff"), "id must be 1 to 64 printable ASCII characters"),
}


class TestBadRequests:
    @pytest.mark.parametrize("case", BAD)
    def test_are_named_and_addressed(self, case):
        frames, words = BAD[case]
        with pytest.raises(BadRequest, match=words) as caught:
            decode_request(frames)
        assert caught.value.request_id == "r1"
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize("case", UNADDRESSED)
    def test_that_cannot_be_addressed(self, case):
        frames, words = UNADDRESSED[case]
        with pytest.raises(BadRequest, match=words) as caught:
            decode_request(frames)
        assert caught.value.request_id is None
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize("version", [0, 2, 1.0, True, None, "1", [1]])
    def test_of_another_version(self, version):
        with pytest.raises(
            BadRequest, match="speaks protocol version .*, this side speaks 1. Install"
        ) as caught:
            decode_request(message(v=version, new_key=0))
        assert caught.value.request_id == "r1"

    def test_what_may_be_left_out(self):
        header = {"v": 1, "id": "r1", "kind": "predict", "arrays": [{"dtype": "int64", "shape": [2, 3]}]}
        found = decode_request([json.dumps(header).encode(), IDS.tobytes()])
        assert (found.model, found.deadline_ms, found.raws) == (None, None, None)
        same([WireArray(None, IDS)], found.arrays)
        assert decode_request([b'{"v":1,"id":"r1","kind":"ping"}']).kind == "ping"

    def test_the_deepest_that_is_taken(self):
        raws = [{"a": json.loads("[" * 30 + "]" * 30)}]
        assert decode_request(encode_request(Request("r1", raws=raws))).raws == raws

    def test_limits_are_the_servers(self):
        frames = encode_request(arrays_request(a=np.zeros((3, 5000), np.int8), b=IDS))
        assert decode_request(frames, Limits(max_rows=3, max_ndim=2, max_arrays=2, max_message_bytes=1 << 14))
        for limits, words in [
            (Limits(max_rows=2), r"arrays\[0\] \(a\) has 3 rows; at most 2 are taken"),
            (Limits(max_ndim=1), r"arrays\[0\] \(a\) has 2 axes; at most 1 are taken"),
            (Limits(max_arrays=1), "has 2 arrays; at most 1 are taken"),
        ]:
            with pytest.raises(BadRequest, match=words) as caught:
                decode_request(frames, limits)
            assert caught.value.request_id == "r1"
        frames = encode_request(arrays_request(a=np.zeros((1, 1 << 14), np.int8)))
        with pytest.raises(BadRequest, match=r"has 16\d+ bytes; at most 16384 are taken") as caught:
            decode_request(frames, Limits(max_message_bytes=1 << 14))
        assert caught.value.request_id == "r1"

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"max_arrays": 0}, "max_arrays must be a whole number of at least 1, got 0"),
            ({"max_rows": 1.5}, "max_rows must be a whole number of at least 1, got 1.5"),
            ({"max_rows": True}, "max_rows must be a whole number of at least 1, got True"),
            ({"max_header_bytes": 100}, "max_header_bytes must be a whole number of at least 16384, got 100"),
            ({"max_ndim": 33}, "max_ndim must be at most 32, got 33"),
        ],
    )
    def test_limits_that_fit_nothing(self, values, words):
        with pytest.raises(ConfigError, match=words):
            Limits(**values)


def reply_of(*frames, **header):
    return [json.dumps({"v": 1, "id": "r1"} | header).encode(), *frames]


ERROR = {"code": "draining", "message": "ends", "retry_after_ms": None}


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (reply_of(), "ok must be true or false, got null"),
        (reply_of(ok=1), "ok must be true or false, got 1"),
        (reply_of(ok=True, kind="predict"), 'Unknown key "kind" in the header'),
        (reply_of(ok=True, error=ERROR), "A reply with ok: true has no error"),
        (reply_of(b"", ok=False, error=ERROR), "has 2 frames, but its header announces 1"),
        (reply_of(b"[]", ok=False, error=ERROR, body="answers"), "Unknown body 'answers'; expected none"),
        (reply_of(IDS.tobytes(), ok=False, error=ERROR, arrays=[ARRAY]), "ok: false has no arrays"),
        (reply_of(ok=False), "error must be a JSON object, got null"),
        (reply_of(ok=False, error=ERROR | {"code": 3}), "error.code must be 1 to 64 printable"),
        (reply_of(ok=False, error=ERROR | {"message": None}), "error.message must be text, got null"),
        (reply_of(ok=False, error=ERROR | {"retry_after_ms": "1"}), "error.retry_after_ms must be a number"),
        (reply_of(ok=False, error=ERROR | {"trace": ""}), 'Unknown key "trace" in error'),
        (reply_of(b"{}", ok=True, body="answers"), "answers must be a JSON list, got a JSON object of 0"),
        (reply_of(b"[]", ok=True, body="result"), "result must be a JSON object, got a JSON list of 0"),
        (reply_of(b"[]", ok=True, body="raws"), "Unknown body 'raws'; expected answers or result"),
        (reply_of(ok=True, v=2), "speaks protocol version 2, this side speaks 1"),
    ],
)
def test_bad_replies(frames, words):
    with pytest.raises(ServiceError, match=words) as caught:
        decode_reply(frames)
    assert type(caught.value) is ServiceError and caught.value.request_id == "r1"


NASTY = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**30, 0.5, 1e308, math.nan, math.inf),
    *("", "ids", "\0", "\ud800", "int64", "object", "predict", "ping", "raws", "x" * 5000, [], {}, [[]]),
    *([0], [2**62, 2**62], [0, 2**63, 2**63], [-1], [2, 3], {"name": "ids"}, [None] * 1000),
]


class Mutator:
    """Changes real messages: their bytes, their frames, what their headers say."""

    def __init__(self, seed, messages):
        self._random, self._messages = random.Random(seed), messages

    def __call__(self):
        frames = list(self._random.choice(self._messages))
        for _ in range(self._random.choice([1, 1, 1, 2, 5])):
            self._random.choice([self._bytes, self._bytes, self._frames, self._header, self._header])(frames)
        return frames

    def _bytes(self, frames):
        if not frames:
            return
        place = self._random.randrange(len(frames))
        frame = bytearray(frames[place])
        at = self._random.randrange(len(frame) + 1)
        end = at + self._random.choice([0, 1, 1, 8, 100])
        frame[at:end] = self._random.choice(
            [
                b"",
                self._random.randbytes(1),
                self._random.randbytes(8),
                bytes(frame[:at]),
                b"[" * 300,
                b'"',
                b"}",
            ]
        )
        frames[place] = bytes(frame)

    def _frames(self, frames):
        at = self._random.randrange(len(frames) + 1)
        other = self._random.choice(self._random.choice(self._messages))
        frames[at : at + self._random.choice([0, 1, 1, len(frames)])] = self._random.choice(
            [[], [other], [b""], [self._random.randbytes(48)], frames[:at], [b""] * 20]
        )

    def _header(self, frames):
        """Puts something else in a place of the header, or of the body, that is chosen at random."""
        place = self._random.choice([0, 0, -1])
        try:
            whole = json.loads(frames[place])
        except (IndexError, ValueError, RecursionError):
            return
        holder = {"": whole}
        key = ""
        while isinstance(holder[key], dict | list) and holder[key] and self._random.random() < 0.8:
            holder = holder[key]
            key = self._random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if self._random.random() < 0.2 and isinstance(holder, dict):
            del holder[key]
            holder[self._random.choice(["dtype", "raws", "x", key * 2])] = 1
        else:
            holder[key] = self._random.choice(NASTY)
        frames[place] = json.dumps(holder.get("", whole) if isinstance(holder, dict) else whole).encode()


REAL = [
    arrays_request(input_ids=IDS, token_type_ids=IDS * 0, attention_mask=np.ones((2, 3), np.float32)),
    Request("r2", arrays=(WireArray(None, IDS), WireArray(None, IDS > 2))),
    Request(
        "r3", model="small", deadline_ms=250, raws=[{"text_a": "深度", "text_b": "学习"}, {"text_a": ""}]
    ),
    Request("r4", "spec"),
    Request("r5", "ping", deadline_ms=10.5),
]
MUTATIONS = 20_000


def test_mutations_are_read_or_refused():
    """Each of them is a request or a `BadRequest`, takes little memory, and leaves none behind."""
    limits = Limits(max_message_bytes=1 << 16, max_header_bytes=1 << 14, max_body_bytes=1 << 14)
    mutate = Mutator(7, [sent(encode_request(request)) for request in REAL])
    read, addressed, longest, highest = 0, 0, 0, 0
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(MUTATIONS):
            frames = mutate()
            tracemalloc.reset_peak()
            now = tracemalloc.get_traced_memory()[0]
            try:
                request = decode_request(frames, limits)
            except BadRequest as error:
                addressed += error.request_id is not None
                longest = max(longest, len(str(error)))
            else:
                read += 1
                assert request.kind in ("predict", "spec", "ping") and 1 <= len(request.id) <= 64
                assert all(values.nbytes <= 1 << 16 for _, values in request.arrays)
                encode_request(request)
            highest = max(highest, tracemalloc.get_traced_memory()[1] - now)
        del frames
        request = None
        gc.collect()
        left = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert read > MUTATIONS // 50 and addressed > MUTATIONS // 5, "the mutator must reach every check"
    assert longest < 1000
    assert highest < 1 << 18 and left < 1 << 17


def test_mutated_replies_are_read_or_refused():
    replies_sent = [
        Reply("r1", (WireArray("logits", np.ones((2, 3), np.float32)),)),
        Reply("r2", answers=[{"label": "1", "probability": 0.5}]),
        Reply("r3", result={"inputs": [{"name": "input_ids"}]}),
        Reply("r4", error=Overloaded("the queue is full", 12.5)),
    ]
    mutate = Mutator(8, [sent(encode_reply(reply)) for reply in replies_sent])
    read = 0
    for _ in range(2000):
        try:
            decode_reply(mutate())
            read += 1
        except ServiceError as error:
            assert type(error) is ServiceError
    assert read > 50


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.binary(max_size=200), max_size=6)
    | st.lists(json_values.map(json.dumps).map(str.encode), max_size=3)
)
def test_noise_is_refused(frames):
    with pytest.raises(BadRequest):
        decode_request(frames)


def test_a_claim_takes_no_memory():
    """Sizes are compared before anything is made of them."""
    frames = of_array(dtype="float64", shape=[60_000, 2**40])
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest, match="its frame has 48"):
            decode_request(frames)
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()
