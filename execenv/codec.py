"""The envelope and its contents, from bytes to values and back. No `await` here.

`decode` applies every rule of protocol.md §2 to one message; `structure` and `unstructure` turn the
contents into the classes of `protocol` by cattrs; the few messages that carry bulk (`process/output`)
are put together from a template, because that is ten times cheaper than building a dict of them first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from attrs import fields, frozen, has

from execenv.errors import InvalidParams
from execenv.errors import wrong_type as _wrong_type
from execenv.paths import PathUri, PathUriError
from execenv.protocol import U64, Base64, Base64Text, Unit
from execenv.sandbox.policy import Sandbox, decode_sandbox, encode_sandbox

try:
    import orjson
    import pybase64
except ImportError:  # compiled, so a server that was shipped to another machine goes without
    from execenv import _pure_base64 as pybase64  # type: ignore[no-redef]
    from execenv import _pure_json as orjson  # type: ignore[no-redef]

if TYPE_CHECKING:
    from cattrs import Converter

MAX_VALUES = 262_144
MAX_DEPTH = 127
LONG = 32 * 1024
"""Bytes of a message from which on its base64 is handled apart."""

CONNECTION_LEVEL_ID = -1
"""The id of an error about a message that could not be parsed (§2.4)."""

T = TypeVar("T")
Id = int | str
Json = Any


class MalformedMessage(Exception):
    """Not a message of the protocol. The text is the detail behind the prefix of §2.4."""


@frozen
class Request:
    id: Id
    method: str
    params: Json


@frozen
class NotificationMessage:
    method: str
    params: Json


@frozen
class Response:
    id: Id
    result: Json


@frozen
class ErrorMessage:
    id: Id
    code: int
    message: str


Message = Request | NotificationMessage | Response | ErrorMessage


# Decoding.


def decode(data: bytes, *, limited: bool = True) -> Message:
    """One message from its bytes.

    Args:
        limited: refuse more than `MAX_VALUES` values. Answers that were asked for have no such limit.

    Raises:
        MalformedMessage: if the bytes are no message, for any reason of §2-§2.1.
    """
    if len(data) > LONG:
        cut = _cut_payload(data)
        if cut is not None:
            shell, payload = cut
            message = _decode(shell, limited=limited)
            return message if _put_back(message, payload) else _decode(data, limited=limited)
    return _decode(data, limited=limited)


def _decode(data: bytes, *, limited: bool) -> Message:
    if limited and len(data) > 2 * MAX_VALUES:
        _check_size(data)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise MalformedMessage(str(error)) from None
    if type(value) is not dict:
        raise MalformedMessage("expected a JSON-RPC object")
    if limited:
        _check_limits(data, value)
    return _classify(value)


# A large file is nearly all of its message: a string that only base64 will look at. It is cut out before the
# JSON is parsed, and put back as a view of the message: no copy of it as text, no look at each character for
# the limits. In valid JSON, what follows the opening quote of a member up to the next quote is the string,
# if there is no backslash in it; and what is not valid without it is not valid with it.


def _cut_payload(data: bytes) -> tuple[bytes, memoryview] | None:
    """The message with a placeholder in the place of its base64, and the base64."""
    for opening in _PAYLOADS:
        start = data.find(opening, 0, LONG)
        if start >= 0:
            start += len(opening)
            end = data.find(b'"', start)
            if end - start > LONG and data.find(b"\\", start, end) < 0:
                return data[:start] + _PLACEHOLDER + data[end:], memoryview(data)[start:end]
    return None


def _put_back(message: Message, payload: memoryview) -> bool:
    holder = message.params if isinstance(message, Request | NotificationMessage) else None
    if isinstance(message, Response):
        holder = message.result
    if isinstance(holder, dict):
        for name, value in holder.items():
            if value == _TEXT:
                holder[name] = payload
                return True
    return False


_PAYLOADS = (b'"dataBase64":"', b'"chunk":"', b'"bodyBase64":"', b'"deltaBase64":"')
_TEXT = f"<{os.urandom(16).hex()}>"  # nobody else can know it
_PLACEHOLDER = _TEXT.encode()


def _classify(value: dict[str, Json]) -> Message:
    # By members, in this order (§2): a stray `result` beside a method is ignored.
    if "method" in value:
        method = value["method"]
        if type(method) is not str:
            raise MalformedMessage(_wrong_type(method, "a string"))
        if "id" not in value:
            return NotificationMessage(method, value.get("params"))
        trace = value.get("trace")
        if trace is not None:
            _check_trace(trace)
        return Request(_check_id(value["id"]), method, value.get("params"))
    if "result" in value and "id" in value:
        return Response(_check_id(value["id"]), value["result"])
    error = value.get("error")
    if "error" not in value:
        raise MalformedMessage("missing field `error`")
    if type(error) is not dict:
        raise MalformedMessage(_wrong_type(error, "struct JSONRPCErrorError"))
    if "id" not in value:
        raise MalformedMessage("missing field `id`")
    code, message = error.get("code"), error.get("message")
    if type(code) is not int or type(message) is not str:
        raise MalformedMessage("an error needs an integer `code` and a string `message`")
    return ErrorMessage(_check_id(value["id"]), code, message)


def _check_id(value: Json) -> Id:
    if type(value) is str or (type(value) is int and -(2**63) <= value < 2**63):
        return value
    raise MalformedMessage("data did not match any variant of untagged enum RequestId")


def _check_trace(trace: Json) -> None:
    if type(trace) is not dict:
        raise MalformedMessage(_wrong_type(trace, "struct W3cTraceContext"))
    for name in ("traceparent", "tracestate"):
        member = trace.get(name)
        if member is not None and type(member) is not str:
            raise MalformedMessage(_wrong_type(member, "a string"))


# Possessive, and matches also what is cut off: one pass, no memory, whatever comes.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)


def _check_size(data: bytes) -> None:
    if data.count(b",") + data.count(b"[") + data.count(b"{") <= MAX_VALUES:
        return
    bare = _STRING.sub(b"", data)
    if max(bare.count(b","), bare.count(b"[") + bare.count(b"{")) > MAX_VALUES:
        raise MalformedMessage(f"more than {MAX_VALUES} values in one message")


def _check_limits(data: bytes, value: dict[str, Json]) -> None:
    """Repeated keys, nesting and the number of values (§2.1), which orjson does not look at.

    Nearly every message is settled by counting: as many colons as keys were found leaves no room for a
    repeated key. Only what that cannot settle (colons inside strings) has its strings taken out first.
    """
    keys = _count_keys(value, 0)
    colons = data.count(b":") - data.count(b'"file:')
    many = len(data) > 2 * MAX_VALUES and data.count(b",") + data.count(b"[") + data.count(b":") > MAX_VALUES
    if colons != keys or many:
        bare = _STRING.sub(b"", data)
        if bare.count(b":") != keys:
            raise MalformedMessage("duplicate field")
        # Every value but the first follows one of these, or opens a container that is not empty.
        if bare.count(b",") + bare.count(b":") + bare.count(b"[") > MAX_VALUES:
            _check_count(value)


def _count_keys(value: Json, depth: int) -> int:
    if depth >= MAX_DEPTH:
        raise MalformedMessage("recursion limit exceeded")
    if type(value) is dict:
        count = len(value)
        for member in value.values():
            if type(member) is dict or type(member) is list:
                count += _count_keys(member, depth + 1)
        return count
    count = 0
    for member in value:
        if type(member) is dict or type(member) is list:
            count += _count_keys(member, depth + 1)
    return count


def _check_count(value: Json) -> None:
    count, left = 0, [value]
    while left:
        member = left.pop()
        count += 1
        if type(member) is dict:
            left.extend(member.values())
        elif type(member) is list:
            left.extend(member)
    if count > MAX_VALUES:
        raise MalformedMessage(f"more than {MAX_VALUES} values in one message")


# Encoding.


def encode_request(id_: Id, method: str, params: Json) -> bytes:
    """A request as bytes.

    Raises:
        InvalidParams: if a string in it cannot be encoded (a lone surrogate).
    """
    try:
        return orjson.dumps({"id": id_, "method": method, "params": params})
    except orjson.JSONEncodeError as error:
        raise InvalidParams(f"cannot be sent as JSON: {error}") from error


def encode_notification(method: str, params: Json) -> bytes:
    return orjson.dumps({"method": method, "params": params})


def encode_result(id_: Id, result: Json) -> bytes:
    return orjson.dumps({"id": id_, "result": result})


RESULT_TAIL = b"}"


def result_head(id_: Id) -> bytes:
    """What comes before the JSON of a result; `RESULT_TAIL` comes behind it."""
    return b'{"id":%b,"result":' % orjson.dumps(id_)


def base64_member(name: str, data: bytes, rest: str = "") -> Json:
    """A result `{name: base64 of data, ...}` encoded without a detour over text; `rest` is JSON members."""
    return orjson.Fragment(b'{"%b":"%b"%b}' % (name.encode(), pybase64.b64encode(data), rest.encode()))


def encode_base64(data: bytes) -> bytes:
    return pybase64.b64encode(data)


def encode_error(id_: Id, code: int, message: str) -> bytes:
    try:
        return orjson.dumps({"error": {"code": code, "message": message}, "id": id_})
    except orjson.JSONEncodeError:  # a lone surrogate, from a file name that is not UTF-8
        return encode_error(id_, code, message.encode(errors="replace").decode())


class OutputTemplate:
    """`process/output` of one process as bytes; the same as encoding `ProcessOutputParams`."""

    __slots__ = ("_head",)

    def __init__(self, process_id: str) -> None:
        self._head = b'{"method":"process/output","params":{"processId":' + orjson.dumps(process_id)

    def encode(self, seq: int, stream: str, chunk: bytes) -> tuple[bytes, bytes, bytes]:
        """The message in three buffers; the middle one is the base64 of `chunk`."""
        head = b'%b,"seq":%d,"stream":"%b","chunk":"' % (self._head, seq, stream.encode())
        return head, pybase64.b64encode(chunk), b'"}}'


def http_result(status: int, headers: list[dict[str, str]], body: bytes) -> Json:
    """The result of `http/request`; the same as encoding `HttpRequestResult`."""
    return base64_member("bodyBase64", body, "," + _http_head(status, headers).decode())


def http_result_head(status: int, headers: list[dict[str, str]]) -> bytes:
    """The same up to the base64 of the body; `HTTP_RESULT_TAIL` comes behind it."""
    return b'{%b,"bodyBase64":"' % _http_head(status, headers)


HTTP_RESULT_TAIL = b'"}'


def _http_head(status: int, headers: list[dict[str, str]]) -> bytes:
    return b'"status":%d,"headers":%b' % (status, orjson.dumps(headers))


class HttpDeltaTemplate:
    """`http/request/bodyDelta` of one stream as bytes; the same as encoding `HttpBodyDeltaParams`."""

    __slots__ = ("_head",)

    def __init__(self, request_id: str) -> None:
        self._head = b'{"method":"http/request/bodyDelta","params":{"requestId":' + orjson.dumps(request_id)

    def encode(self, seq: int, delta: bytes) -> tuple[bytes, bytes, bytes]:
        """A piece in three buffers; the middle one is its base64."""
        head = b'%b,"seq":%d,"deltaBase64":"' % (self._head, seq)
        return head, pybase64.b64encode(delta), b'","done":false,"error":null}}'

    def encode_end(self, seq: int, error: str | None) -> bytes:
        end = b'%b,"seq":%d,"deltaBase64":"","done":true,"error":%b}}'
        return end % (self._head, seq, orjson.dumps(error))


# Values.


def structure(value: Json, cls: type[T]) -> T:
    """Parameters or a result as the class that `protocol` has for them.

    Raises:
        InvalidParams: if the value does not fit, with the words of the reference where it has some.
    """
    if cls is Unit:
        return _structure_unit(value, cls)
    if type(value) is list:
        value = _by_position(value, cls)
    elif type(value) is not dict:
        raise InvalidParams(_wrong_type(value, f"struct {_struct_name(cls)}"))
    try:
        return converter().structure(value, cls)
    except KeyError as error:
        raise InvalidParams(f"missing field `{error.args[0]}`") from None
    except PathUriError as error:
        raise InvalidParams(str(error)) from None


def unstructure(value: object) -> Json:
    """A class of `protocol` as what JSON can hold."""
    return converter().unstructure(value)


def encoded(value: object) -> Json:
    """The same, encoded once for many messages."""
    return orjson.Fragment(orjson.dumps(unstructure(value)))


def encode_json(value: Json) -> bytes:
    """JSON values encoded as they are, for results of which there may be very many."""
    return orjson.dumps(value)


def fragment(data: bytes) -> Json:
    """A value that is encoded already."""
    return orjson.Fragment(data)


def _structure_unit(value: Json, cls: type[T]) -> T:
    if value is None or value == {}:
        return cls()
    raise InvalidParams(_wrong_type(value, "unit"))


def _struct_name(cls: type) -> str:
    return cls.__name__.removeprefix("Process")


def _by_position(values: list[Json], cls: type) -> dict[str, Json]:
    # The reference takes an array of exactly the right length, in the order of declaration (§2).
    names = [camel(attribute.name) for attribute in fields(cls)]
    if len(values) != len(names):
        wanted = f"struct {_struct_name(cls)} with {len(names)} elements"
        raise InvalidParams(f"invalid length {len(values)}, expected {wanted}")
    return dict(zip(names, values, strict=True))


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def _structure_str(value: Json, _: object) -> str:
    if type(value) is not str:
        raise InvalidParams(_wrong_type(value, "a string"))
    return value


def _structure_bool(value: Json, _: object) -> bool:
    if type(value) is not bool:
        raise InvalidParams(_wrong_type(value, "a boolean"))
    return value


def _structure_int(value: Json, _: object) -> int:
    if type(value) is not int:
        raise InvalidParams(_wrong_type(value, "an integer"))
    return value


def _structure_float(value: Json, _: object) -> float:
    if type(value) is not int and type(value) is not float:
        raise InvalidParams(_wrong_type(value, "a number"))
    return float(value)


def _structure_u64(value: Json, _: object) -> U64:
    if type(value) is int and 0 <= value < 2**64:
        return U64(value)
    if type(value) is int or type(value) is float:
        raise InvalidParams("invalid number")
    raise InvalidParams(_wrong_type(value, "u64"))


def _structure_path(value: Json, _: object) -> PathUri:
    return PathUri.parse(_structure_str(value, None))


def _structure_literal(value: Json, kind: Any) -> Any:
    if type(value) is not str:
        raise InvalidParams(_wrong_type(value, "string or map"))
    variants = get_args(kind)
    if value not in variants:
        known = " or ".join(f"`{variant}`" for variant in variants)
        raise InvalidParams(f"unknown variant `{value}`, expected {known}")
    return value


def _structure_strings(value: Json, kind: Any) -> tuple[Any, ...]:
    if type(value) is not list:
        raise InvalidParams(_wrong_type(value, "a sequence"))
    item = get_args(kind)[0]
    if item is str and all(type(member) is str for member in value):
        return tuple(value)
    structure_item = converter().get_structure_hook(item)
    return tuple(structure_item(member, item) for member in value)


def _structure_map(value: Json, kind: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise InvalidParams(_wrong_type(value, "a map"))
    check = _structure_str if get_args(kind)[1] is str else _structure_bool
    for member in value.values():
        check(member, None)
    return value


def _structure_base64(value: Json, _: object) -> Base64:
    return Base64(decode_base64(_structure_text(value, None)))


def _structure_text(value: Json, _: object) -> Base64Text:
    return value if type(value) is memoryview else _structure_str(value, None)


def decode_base64(text: Base64Text) -> bytes:
    """Standard alphabet, padded, no white space, trailing bits zero (§2).

    Raises:
        InvalidParams: in the words of the reference.
    """
    try:
        data = pybase64.b64decode(text, validate=True)
    except ValueError:
        raise InvalidParams(_base64_fault(_as_str(text))) from None
    tail = _as_str(text[-4:])
    last = data[-1:] if tail[2:] == "==" else data[-2:]
    if tail.endswith("=") and pybase64.b64encode_as_string(last) != tail:
        at = len(text) - 4 + tail.index("=") - 1
        raise InvalidParams(f"Invalid last symbol {ord(tail[tail.index('=') - 1])}, offset {at}.")
    return data


def _as_str(text: Base64Text) -> str:
    return text if isinstance(text, str) else bytes(text).decode(errors="replace")


def _base64_fault(text: str) -> str:
    found = re.search(r"[^A-Za-z0-9+/=]", text)
    if found:
        return f"Invalid symbol {ord(found[0])}, offset {found.start()}."
    first = text.find("=")
    if first >= 0 and text[first:].strip("="):
        return f"Invalid symbol {ord('=')}, offset {first}."
    return "Invalid padding"


def _is_generic(generic: object, kind: Any) -> bool:
    return get_origin(kind) is generic


@cache
def converter() -> Converter:
    """The one converter. Made at its first use: cattrs takes 10 ms to import."""
    from cattrs import Converter
    from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

    conv = Converter(detailed_validation=False)

    def overrides(cls: type) -> dict[str, Any]:
        return {
            attribute.name: override(
                rename=camel(attribute.name),
                omit_if_default=bool(attribute.metadata.get("omit_default")),
            )
            for attribute in fields(cls)
        }

    def structure_factory(cls: type) -> Any:
        generated: Callable[[Json, Any], Any] = make_dict_structure_fn(cls, conv, **overrides(cls))

        def checked(value: Json, kind: type) -> Any:
            if type(value) is not dict:
                raise InvalidParams(_wrong_type(value, f"struct {_struct_name(cls)}"))
            return generated(value, kind)

        return checked

    conv.register_structure_hook_factory(has, structure_factory)
    conv.register_unstructure_hook_factory(
        has,
        lambda cls: make_dict_unstructure_fn(cls, conv, **overrides(cls)),
    )
    for generic, hook in (
        (Literal, _structure_literal),
        (tuple, _structure_strings),
        (dict, _structure_map),
    ):
        conv.register_structure_hook_func(partial(_is_generic, generic), hook)
    conv.register_structure_hook(str, _structure_str)
    conv.register_structure_hook(bool, _structure_bool)
    conv.register_structure_hook(int, _structure_int)
    conv.register_structure_hook(float, _structure_float)
    conv.register_structure_hook_func(lambda kind: kind is U64, _structure_u64)
    conv.register_structure_hook_func(lambda kind: kind is Base64, _structure_base64)
    conv.register_structure_hook_func(lambda kind: kind is Base64Text, _structure_text)
    conv.register_structure_hook_func(lambda kind: kind is PathUri, _structure_path)
    conv.register_structure_hook(Sandbox, lambda value, _: decode_sandbox(value))
    conv.register_unstructure_hook(Sandbox, encode_sandbox)
    conv.register_unstructure_hook(PathUri, lambda path: path.uri)
    conv.register_unstructure_hook_func(
        lambda kind: kind is Base64, lambda data: pybase64.b64encode_as_string(data)
    )
    return conv
