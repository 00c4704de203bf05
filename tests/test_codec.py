"""The envelope and its contents as bytes: what is refused, in which words, and what comes back unchanged."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from typing import Any
from unittest.mock import patch

import attrs
import orjson
import pytest
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from execenv import codec, protocol
from execenv.codec import (
    MAX_VALUES,
    ErrorMessage,
    MalformedMessage,
    NotificationMessage,
    OutputTemplate,
    Request,
    Response,
    decode,
    decode_base64,
    encode_error,
    encode_notification,
    encode_request,
    encode_result,
    structure,
    unstructure,
)
from execenv.errors import InvalidParams
from execenv.protocol import (
    PROCESS_OUTPUT,
    U64,
    Base64,
    EnvPolicy,
    Method,
    Notification,
    ProcessOutputParams,
    ProcessReadParams,
    ProcessSignalParams,
    ProcessStartParams,
    ProcessStartResult,
    ProcessTerminateResult,
    ProcessWriteParams,
    Unit,
)
from execenv.server.connection import ServerConnection
from execenv.server.processes import ROUTES
from execenv.transports.memory import memory_pair

START = {"processId": "p", "argv": ["true"], "cwd": "file:///tmp", "env": {"A": "1"}, "tty": False}


def request_with(params: str) -> bytes:
    return b'{"id":1,"method":"m","params":%b}' % params.encode()


def fault(data: bytes | str) -> str:
    """The detail with which a message is refused."""
    with pytest.raises(MalformedMessage) as refused:
        decode(data if isinstance(data, bytes) else data.encode())
    return str(refused.value)


def refusal(value: Any, cls: type[Any]) -> str:
    """The words in which parameters are refused."""
    with pytest.raises(InvalidParams) as refused:
        structure(value, cls)
    return refused.value.message


# Classification (§2).


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id":1,"method":"m","params":[2]}', Request(1, "m", [2])),
        ('{"id":"","method":"m"}', Request("", "m", None)),
        ('{"id":1,"method":"m","result":3,"error":{"code":1,"message":""}}', Request(1, "m", None)),
        ('{"jsonrpc":"1.0","id":1,"method":"m","other":[]}', Request(1, "m", None)),
        ('{"id":1,"method":"m","trace":{"traceparent":"a","tracestate":null,"x":1}}', Request(1, "m", None)),
        ('{"id":1,"method":"m","trace":null}', Request(1, "m", None)),
        ('{"method":"m","params":null}', NotificationMessage("m", None)),
        ('{"method":"m","trace":5}', NotificationMessage("m", None)),
        ('{"id":1,"result":null}', Response(1, None)),
        ('{"id":1,"result":2,"error":{"code":1,"message":"x"}}', Response(1, 2)),
        ('{"id":1,"error":{"code":-2,"message":"x","data":{}}}', ErrorMessage(1, -2, "x")),
        (' \r\n\t{"method":"m"}\n ', NotificationMessage("m", None)),
    ],
)
def test_members_say_what_a_message_is(text: str, message: codec.Message) -> None:
    assert decode(text.encode()) == message


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("[]", "expected a JSON-RPC object"),
        ('[{"id":5,"method":"m"}]', "expected a JSON-RPC object"),
        ("42", "expected a JSON-RPC object"),
        ("null", "expected a JSON-RPC object"),
        ("{}", "missing field `error`"),
        ('{"id":5}', "missing field `error`"),
        ('{"result":5}', "missing field `error`"),
        ('{"error":{"code":1,"message":"x"}}', "missing field `id`"),
        ('{"id":1,"error":5}', "invalid type: number, expected struct JSONRPCErrorError"),
        ('{"id":1,"error":{"code":1.0,"message":"x"}}', "`code`"),
        ('{"id":1,"error":{"code":1}}', "`message`"),
        ('{"id":5,"method":5}', "invalid type: number, expected a string"),
        ('{"method":null}', "invalid type: null, expected a string"),
        ('{"id":1,"method":"m","trace":5}', "invalid type: number, expected struct W3cTraceContext"),
        ('{"id":1,"method":"m","trace":{"tracestate":1}}', "invalid type: number, expected a string"),
    ],
)
def test_what_is_no_message_is_refused_with_the_reason(text: str, detail: str) -> None:
    assert detail in fault(text)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" ",
        b"{nope",
        b"\xff\xfe",
        b'{"id":1,"method":"m"}{"id":2,"method":"m"}',
        b'{"id":1,"method":"m"}\n{"id":2,"method":"m"}',
        b'{"id":1,"method":"\xff"}',
        b'{"id":1,"method":"\xed\xa0\x80"}',
        b'{"id":1,"method":"m","params":NaN}',
        b'{"id":1,"method":"m","params":Infinity}',
        b'{"id":1,"method":"m",}',
        b"{'id':1}",
        b'\xef\xbb\xbf{"id":1,"method":"m"}',
    ],
)
def test_what_is_not_one_json_value_is_refused(data: bytes) -> None:
    assert fault(data)


@pytest.mark.parametrize("id_", [0, -1, -7, 2**63 - 1, -(2**63), "", "abc", "1", "é\U0001f600"])
def test_id_comes_back_as_it_was(id_: int | str) -> None:
    message = decode(encode_request(id_, "m", None))
    assert isinstance(message, Request)
    assert (message.id, type(message.id)) == (id_, type(id_))
    assert json.loads(encode_result(message.id, {}))["id"] == id_


@pytest.mark.parametrize(
    "id_", ["null", "true", "1.0", "1.5", "1e3", str(2**63), str(-(2**63) - 1), "[]", "{}"]
)
def test_id_that_is_no_string_and_no_64_bit_integer_is_malformed(id_: str) -> None:
    words = "data did not match any variant of untagged enum RequestId"
    assert fault(f'{{"id":{id_},"method":"m"}}') == words
    assert fault(f'{{"id":{id_},"result":1}}') == words
    assert fault(f'{{"id":{id_},"error":{{"code":1,"message":""}}}}') == words


def test_integer_beyond_any_json_library_is_no_id() -> None:
    assert fault('{"id":%s,"method":"m"}' % ("9" * 400))


# Limits (§2.1).


@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}")])
def test_nesting_ends_at_depth_127(open_: str, close: str) -> None:
    def nested(depth: int) -> bytes:
        return request_with(open_ * depth + "0" + close * depth)

    assert isinstance(decode(nested(126)), Request)
    assert fault(nested(127)) == "recursion limit exceeded"
    assert fault(nested(1000))
    assert fault(nested(100_000))


def test_depth_is_of_one_branch_and_not_of_all() -> None:
    assert isinstance(decode(request_with("[" + ",".join(["[" * 60 + "]" * 60] * 10) + "]")), Request)


def test_number_of_values_ends_at_262144() -> None:
    fixed = 4  # the message, its id, its method, the array
    for item in ("0", '"a,b:[c"', "[]"):
        fits = request_with("[" + ",".join([item] * (MAX_VALUES - fixed)) + "]")
        assert isinstance(decode(fits), Request)
        assert fault(request_with("[" + ",".join([item] * (MAX_VALUES - fixed + 1)) + "]")) == (
            "more than 262144 values in one message"
        )


def test_number_of_values_counts_members_of_objects_and_not_their_names() -> None:
    fixed = 4

    def members(count: int) -> bytes:
        return request_with("{" + ",".join(f'"{i}": 0' for i in range(count)) + "}")

    assert isinstance(decode(members(MAX_VALUES - fixed)), Request)
    assert "262144" in fault(members(MAX_VALUES - fixed + 1))


def test_long_string_of_commas_is_one_value() -> None:
    assert isinstance(decode(request_with('"' + ",:[" * 400_000 + '"')), Request)


@pytest.mark.parametrize(
    "text",
    [
        '{"id":1,"id":1,"method":"m"}',
        '{"id":1,"method":"m","method":"m"}',
        '{"id":1,"method":"m","params":{"a":1,"a":2}}',
        '{"id":1,"method":"m","params":{"a" : 1 , "a"\n:\t2}}',
        '{"id":1,"method":"m","params":[{"a":{"b":1,"c":2,"b":3}}]}',
        '{"id":1,"method":"m","params":{"a":1,"\\u0061":2}}',
        '{"id":1,"method":"m","params":{"x":":::","a":1,"a":2}}',
        '{"id":1,"method":"m","params":{"x":"a\\":\\"b","a":1,"a":2}}',
        '{"id":1,"method":"m","params":{"x":"\\\\","a":1,"a":2}}',
        '{"id":1,"method":"m","params":{"x":"\\"file:","a":1,"a":2}}',
        '{"id":1,"method":"m","params":{"cwd":"file:///a:b","a":1,"a":2}}',
        '{"id":1,"method":"m","params":{"file:a":1,"file:a":2}}',
        '{"id":1,"method":"m","params":{"a:b":1,"a:b":2}}',
        '{"method":"m","unknown":1,"unknown":1}',
        '{"id":1,"result":{"":1,"":1}}',
    ],
)
def test_repeated_key_is_malformed_wherever_it_is(text: str) -> None:
    json.loads(text)  # otherwise it is refused for another reason
    assert fault(text) == "duplicate field"


@pytest.mark.parametrize(
    "text",
    [
        '{"id":1,"method":"m","params":{"a":{"x":1},"b":{"x":1}}}',
        '{"id":1,"method":"m","params":{"a":":","b":"::","c:":":d"}}',
        '{"id":1,"method":"m","params":{"a":"\\":","b":"\\\\:","c":"\\\\\\":"}}',
        '{"id":1,"method":"m","params":{"a" : 1, "b"\n:\t2}}',
        '{"id":1,"method":"m","params":{"cwd":"file:///x","other":"file:","file:":"\\"file:"}}',
        '{"id":1,"method":"m","params":["a:1","a:1",{"a":1},{"a":1}]}',
        '{"id":1,"method":"m","params":{"a":1,"A":2,"a ":3}}',
    ],
)
def test_colons_in_strings_and_white_space_are_no_repeated_keys(text: str) -> None:
    assert decode(text.encode()) == Request(1, "m", json.loads(text)["params"])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(':"\\,[{file')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from(':"\\ab,file')), inner),
    max_leaves=20,
)


@given(params=JSON, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
@settings(deadline=None, database=None, derandomize=True, max_examples=300)
def test_any_json_travels_unchanged(params: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps({"id": 1, "method": "m", "params": params}, ensure_ascii=ascii_only, indent=indent)
    assert decode(text.encode()) == Request(1, "m", params)


@given(data=st.binary(max_size=60))
@settings(deadline=None, database=None, derandomize=True, max_examples=500)
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    try:
        message = decode(data)
    except MalformedMessage:
        return
    assert isinstance(message, codec.Message)


def pairs_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a repeated key")
    return dict(pairs)


KEYS = st.sampled_from(["a", "b", ":", '"', "\\", "file:", "a:", ""])


@given(
    pairs=st.lists(
        st.tuples(KEYS, st.sampled_from(['":"', '"file:///"', '"\\":"', '"\\\\"', "1", '{"a":1}', "[]"])),
        max_size=4,
    ),
    colon=st.sampled_from([":", " :", ": ", "\n:\t"]),
)
@settings(deadline=None, database=None, derandomize=True, max_examples=500)
def test_repeated_keys_are_found_exactly(pairs: list[tuple[str, str]], colon: str) -> None:
    body = ",".join(f"{json.dumps(key)}{colon}{value}" for key, value in pairs)
    text = f'{{"id"{colon}1,"method":"m","params":{{{body}}}}}'
    try:
        json.loads(text, object_pairs_hook=pairs_of)
    except ValueError:
        assert fault(text) == "duplicate field"
    else:
        assert isinstance(decode(text.encode()), Request)


# Encoding.


def test_server_writes_no_jsonrpc_member() -> None:
    assert encode_request(1, "m", {}) == b'{"id":1,"method":"m","params":{}}'
    assert encode_notification("m", {}) == b'{"method":"m","params":{}}'
    assert encode_result(1, {}) == b'{"id":1,"result":{}}'
    assert encode_error("a", -32600, "no") == b'{"error":{"code":-32600,"message":"no"},"id":"a"}'


def test_error_about_a_name_that_is_not_utf8_can_be_sent() -> None:
    answer = json.loads(encode_error(1, -32603, b"no file \xff".decode(errors="surrogateescape")))
    assert answer["error"]["message"] == "no file ?"


@given(
    process_id=st.text(st.characters(exclude_categories=["Cs"])),
    seq=st.integers(0, 2**64 - 1),
    stream=st.sampled_from(["stdout", "stderr", "pty"]),
    chunk=st.binary(),
)
@settings(deadline=None, database=None, derandomize=True, max_examples=300)
def test_output_template_is_the_encoded_notification(
    process_id: str, seq: int, stream: Any, chunk: bytes
) -> None:
    params = ProcessOutputParams(process_id, seq, stream, Base64(chunk))
    from_template = b"".join(OutputTemplate(process_id).encode(seq, stream, chunk))
    assert from_template == encode_notification(PROCESS_OUTPUT.name, unstructure(params))
    message = decode(from_template)
    assert isinstance(message, NotificationMessage)
    assert structure(message.params, ProcessOutputParams) == params


def test_value_encoded_once_is_the_same_as_encoded_each_time() -> None:
    value = ProcessStartResult("p", "none")
    assert encode_result(1, codec.encoded(value)) == encode_result(1, unstructure(value))


def test_members_that_only_newer_peers_know_are_left_out_at_their_defaults() -> None:
    assert unstructure(ProcessStartResult("p")) == {"processId": "p"}
    assert unstructure(ProcessTerminateResult(True)) == {"running": True}
    assert unstructure(ProcessReadParams("p")) == {
        "processId": "p",
        "afterSeq": None,
        "maxBytes": None,
        "waitMs": None,
    }


# Values.


def test_parameters_by_name_ignore_what_they_do_not_know() -> None:
    assert structure({**START, "unknown": 1}, ProcessStartParams) == structure(START, ProcessStartParams)


def test_parameters_by_position_must_be_all_there() -> None:
    assert structure(["p", None, U64(1), None], ProcessReadParams) == ProcessReadParams("p", None, U64(1))
    assert refusal([], ProcessReadParams) == "invalid length 0, expected struct ReadParams with 4 elements"


@pytest.mark.parametrize("value", [None, {}])
def test_method_without_parameters_takes_none(value: Any) -> None:
    assert structure(value, Unit) == Unit()


@pytest.mark.parametrize(
    ("value", "found"),
    [({"a": 1}, "map"), ([], "sequence"), (1, "number"), ("", "string"), (False, "boolean")],
)
def test_method_without_parameters_takes_nothing_else(value: Any, found: str) -> None:
    assert refusal(value, Unit).startswith(f"invalid type: {found}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"processId": 5}, "invalid type: number, expected a string"),
        ({"processId": None}, "invalid type: null, expected a string"),
        ({"argv": "true"}, 'invalid type: string "true", expected a sequence'),
        ({"argv": [1]}, "invalid type: number, expected a string"),
        ({"argv": ["a", None]}, "invalid type: null, expected a string"),
        ({"env": None}, "invalid type: null, expected a map"),
        ({"env": [["A", "1"]]}, "invalid type: sequence, expected a map"),
        ({"env": {"A": 1}}, "invalid type: number, expected a string"),
        ({"env": {"A": None}}, "invalid type: null, expected a string"),
        ({"tty": None}, "invalid type: null, expected a boolean"),
        ({"tty": 1}, "invalid type: number, expected a boolean"),
        ({"tty": "false"}, 'invalid type: string "false", expected a boolean'),
        ({"pipeStdin": None}, "invalid type: null, expected a boolean"),
        ({"enforceManagedNetwork": None}, "invalid type: null, expected a boolean"),
        ({"arg0": 1}, "invalid type: number, expected a string"),
        ({"cwd": 1}, "invalid type: number, expected a string"),
        ({"cwd": "tmp"}, "invalid URI: relative URL without a base"),
        ({"cwd": "http://x/"}, "unsupported path URI scheme `http`"),
        ({"envPolicy": {}}, "missing field `inherit`"),
        ({"envPolicy": 1}, "invalid type: number, expected struct EnvPolicy"),
        ({"envPolicy": {"inherit": "most"}}, "unknown variant `most`, expected "),
    ],
)
def test_wrong_member_is_refused_in_the_words_of_the_reference(change: dict[str, Any], words: str) -> None:
    assert refusal({**START, **change}, ProcessStartParams).startswith(words)


@pytest.mark.parametrize("missing", sorted(START))
def test_missing_member_is_named_as_on_the_wire(missing: str) -> None:
    value = {name: member for name, member in START.items() if name != missing}
    assert refusal(value, ProcessStartParams) == f"missing field `{missing}`"


@pytest.mark.parametrize(
    "optional",
    [
        "envPolicy",
        "arg0",
        "sandbox",
        "managedNetwork",
        "networkProxy",
        "shellSnapshot",
        "credentialProviders",
    ],
)
def test_optional_member_may_be_null(optional: str) -> None:
    assert structure({**START, optional: None}, ProcessStartParams) == structure(START, ProcessStartParams)


def test_policy_has_to_be_whole() -> None:
    policy: dict[str, Any] = {
        "inherit": "core",
        "ignoreDefaultExcludes": False,
        "exclude": ["X*"],
        "set": {"A": "1"},
        "includeOnly": [],
    }
    assert structure(policy, EnvPolicy) == EnvPolicy("core", False, ("X*",), {"A": "1"}, ())
    for name in policy:
        rest = {other: member for other, member in policy.items() if other != name}
        assert refusal(rest, EnvPolicy) == f"missing field `{name}`"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-1, "invalid number"),
        (1.5, "invalid number"),
        (1.0, "invalid number"),
        (2**64, "invalid number"),
        ("1", 'invalid type: string "1", expected u64'),
        (True, "invalid type: boolean, expected u64"),
        ([], "invalid type: sequence, expected u64"),
    ],
)
def test_count_that_is_no_unsigned_integer_is_refused(value: Any, words: str) -> None:
    params = orjson.loads(json.dumps({"processId": "p", "maxBytes": value}))  # as it arrives
    assert refusal(params, ProcessReadParams) == words


@pytest.mark.parametrize("value", [0, 2**63, 2**64 - 1])
def test_count_may_have_64_bits(value: int) -> None:
    params = orjson.loads(orjson.dumps({"processId": "p", "waitMs": value}))
    assert structure(params, ProcessReadParams).wait_ms == value


def test_only_the_interrupt_signal_is_known() -> None:
    assert structure({"processId": "p", "signal": "interrupt"}, ProcessSignalParams).signal == "interrupt"
    words = "unknown variant `kill`, expected `interrupt`"
    assert refusal({"processId": "p", "signal": "kill"}, ProcessSignalParams) == words


# Base64 (§2).


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!!", "Invalid symbol 33, offset 0."),
        ("YQ", "Invalid padding"),
        ("YQ=", "Invalid padding"),
        ("YWI", "Invalid padding"),
        ("YQ==\n", "Invalid symbol 10, offset 4."),
        ("YR==", "Invalid last symbol 82, offset 1."),
        ("YWJjYR==", "Invalid last symbol 82, offset 5."),
        ("YWJ=", "Invalid last symbol 74, offset 2."),
        ("_-8=", "Invalid symbol 95, offset 0."),
        ("YW Jj", "Invalid symbol 32, offset 2."),
        ("YWé=", "Invalid symbol"),
    ],
)
def test_bad_base64_is_refused_in_the_words_of_the_reference(text: str, words: str) -> None:
    params = {"processId": "p", "chunk": text, "writeId": "w"}
    assert refusal(params, ProcessWriteParams).startswith(words)


@pytest.mark.parametrize("text", ["=", "==", "====", "Y===", "YQ==YQ==", "=YQ=", "Y=Q=", "YWJj=", "A"])
def test_padding_out_of_place_is_refused(text: str) -> None:
    with pytest.raises(InvalidParams, match=r"^Invalid "):
        decode_base64(text)


@given(data=st.binary())
@settings(deadline=None, database=None, derandomize=True)
def test_base64_has_one_spelling_for_each_bytes(data: bytes) -> None:
    assert decode_base64(b64encode(data).decode()) == data


@given(text=st.text("AQRYZaz09+/=\n -_", max_size=9))
@settings(deadline=None, database=None, derandomize=True, max_examples=1000)
def test_base64_that_is_taken_is_spelled_as_we_would(text: str) -> None:
    try:
        data = decode_base64(text)
    except InvalidParams as error:
        assert error.message.startswith(("Invalid symbol ", "Invalid padding", "Invalid last symbol "))  # noqa: PT017
    else:
        assert b64encode(data).decode() == text


# Long base64, which is cut out before the rest is parsed. Here anything counts as long, to try much.

PAYLOADS = ("dataBase64", "chunk", "bodyBase64", "deltaBase64")
LONG_TEXTS = (
    "A" * 200,
    "B" * 150,
    "A" * 150 + "\\",
    '"' * 100,
    "\u00e9" * 150,
    "A" * 121,
    "A" * 120,
    "A" * 119,
)
TRICKS = ('"dataBase64":"', '"chunk":"AAAA"', 'x"chunk', '\\"chunk":"', '"chunk', "\\", '},"id":2,{"chunk":"')
MEMBERS = st.dictionaries(
    st.sampled_from((*PAYLOADS, *PAYLOADS, *TRICKS, "a", "id", "method", "params", "result")),
    st.recursive(
        st.sampled_from((*LONG_TEXTS, *LONG_TEXTS, *TRICKS, 1, None)),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from((*PAYLOADS, *TRICKS)), inner, max_size=3)
        ),
        max_leaves=4,
    ),
    max_size=4,
)


def outcome_of(decode: Any, data: bytes, *, limited: bool) -> Any:
    """A message with its views as text, or why there is none."""
    try:
        message = decode(data, limited=limited)
    except MalformedMessage:
        return "malformed"
    if isinstance(message, Request | NotificationMessage):
        return attrs.evolve(message, params=as_text(message.params))
    return attrs.evolve(message, result=as_text(message.result)) if isinstance(message, Response) else message


def as_text(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_text(member) for name, member in value.items()}
    return bytes(value).decode() if isinstance(value, memoryview) else value


@given(
    holder=MEMBERS,
    around=MEMBERS,
    kind=st.sampled_from(["params", "result"]),
    ascii_only=st.booleans(),
    limited=st.booleans(),
    change=st.none()
    | st.tuples(st.integers(0, 400), st.sampled_from([b"", b'"', b"\\", b"{", b"}", b",", b":", b"A"])),
)
@settings(deadline=None, database=None, derandomize=True, max_examples=1000)
def test_cutting_out_base64_changes_nothing(
    holder: Any, around: Any, kind: str, ascii_only: bool, limited: bool, change: tuple[int, bytes] | None
) -> None:
    message = {"id": 1, **({"method": "m"} if kind == "params" else {}), **around, kind: holder}
    data = json.dumps(message, ensure_ascii=ascii_only, separators=(",", ":")).encode()
    if change is not None:
        place = change[0] % len(data)
        data = data[:place] + change[1] + data[place + 1 :]
    with patch.object(codec, "LONG", 120):
        cut = outcome_of(decode, data, limited=limited)
    assert cut == outcome_of(codec._decode, data, limited=limited)


@pytest.mark.parametrize("name", PAYLOADS)
def test_long_base64_is_a_view_of_its_message(name: str) -> None:
    text = "QUJD" * 20_000
    data = request_with(json.dumps({"a": 1, name: text, "b": [2]}, separators=(",", ":")))
    message = decode(data)
    assert isinstance(message, Request)
    assert type(message.params[name]) is memoryview
    assert message.params[name].obj is data
    assert message.params == {"a": 1, name: text.encode(), "b": [2]}


def test_two_long_payloads_stay_where_they_were() -> None:
    one, other = "A" * 40_000, "B" * 50_000
    for first, second in (PAYLOADS[:2], PAYLOADS[1::-1], PAYLOADS[2:]):
        data = request_with(json.dumps({first: one, second: other}, separators=(",", ":")))
        message = decode(data)
        assert isinstance(message, Request)
        # not compared as wholes: the difference would be printed
        assert [as_text(value)[:1] for value in message.params.values()] == ["A", "B"]
        assert [len(value) for value in message.params.values()] == [40_000, 50_000]


@pytest.mark.parametrize(
    ("beside", "detail"),
    [
        ('"a":1,"a":2', "duplicate field"),
        ('"b":' + "[" * 200 + "]" * 200, "recursion limit exceeded"),
        ('"b":[' + "1," * MAX_VALUES + "1]", f"more than {MAX_VALUES} values in one message"),
        ('"chunk":"A"', "duplicate field"),
    ],
)
def test_limits_hold_beside_long_base64(beside: str, detail: str) -> None:
    payload = '"chunk":"' + "A" * 40_000 + '"'
    assert fault(request_with(f"{{{payload},{beside}}}")) == detail
    assert fault(request_with(f"{{{beside},{payload}}}")) == detail


def test_answers_have_no_limit_of_values() -> None:
    entries = '[{"a":"b"}' + ',{"a":"b"}' * MAX_VALUES + "]"
    data = b'{"id":1,"result":{"entries":%b}}' % entries.encode()
    with pytest.raises(MalformedMessage, match="values"):
        decode(data)
    message = decode(data, limited=False)
    assert isinstance(message, Response)
    assert len(message.result["entries"]) == MAX_VALUES + 1


@pytest.mark.parametrize(
    "bad",
    ["!", "\u00e9", "=", "A", "AA", "AAA", "AA=", "A===", "AB==", "AAB=", "AA==AAAA", " AAA", "AAA ", "-_AA"],
)
@pytest.mark.parametrize("length", [0, 4, 64, 40_000])
def test_bad_base64_is_refused_alike_as_text_and_as_view(bad: str, length: int) -> None:
    text = "A" * length + bad
    with pytest.raises(InvalidParams) as of_text:
        decode_base64(text)
    with pytest.raises(InvalidParams) as of_view:
        decode_base64(memoryview(text.encode()))
    assert of_text.value.message == of_view.value.message
    found = re.search(r"offset (\d+)", of_text.value.message)
    assert found is None or length <= int(found[1]) < length + len(bad)


@given(data=st.binary(max_size=90))
@settings(deadline=None, database=None, derandomize=True)
def test_base64_of_a_view_is_that_of_the_text(data: bytes) -> None:
    text = b64encode(data)
    assert decode_base64(memoryview(text)) == decode_base64(text.decode()) == data


@given(data=st.binary(max_size=90), rest=st.sampled_from(["", ',"eof":true']))
@settings(deadline=None, database=None, derandomize=True)
def test_base64_member_is_the_encoded_result(data: bytes, rest: str) -> None:
    plain = {"chunk": b64encode(data).decode(), **({"eof": True} if rest else {})}
    assert encode_result(7, codec.base64_member("chunk", data, rest)) == encode_result(7, plain)
    head = codec.result_head("x") + b'{"chunk":"' + codec.encode_base64(data) + b'"' + rest.encode() + b"}"
    assert head + codec.RESULT_TAIL == encode_result("x", plain)


# The table of methods.


@frozen
class Declared:
    methods: list[Method[Any, Any]]
    notifications: list[Notification[Any]]


def declared() -> Declared:
    values = [value for name, value in vars(protocol).items() if name.isupper()]
    return Declared(
        [value for value in values if isinstance(value, Method)],
        [value for value in values if isinstance(value, Notification)],
    )


def test_every_method_has_exactly_one_route_on_the_server() -> None:
    channel, _ = memory_pair()
    connection = ServerConnection(channel, sessions=None, detachable=False)  # type: ignore[arg-type]
    routed = [route.method for route in connection._routes()]
    assert sorted(method.name for method in routed) == sorted(method.name for method in declared().methods)
    assert len({method for method, _ in ROUTES}) == len(ROUTES)


def test_names_on_the_wire_are_used_once() -> None:
    names = [one.name for one in declared().methods] + [one.name for one in declared().notifications]
    assert len(names) == len(set(names)) > 10


def test_every_type_of_the_protocol_can_be_structured() -> None:
    for method in declared().methods:
        for cls in (method.params, method.result):
            if attrs.fields(cls):
                with pytest.raises(InvalidParams):
                    structure(5, cls)


def test_too_many_values_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orjson, "loads", lambda _: pytest.fail("was parsed"))
    with pytest.raises(codec.MalformedMessage, match="values"):
        codec.decode(b'{"id":1,"method":"x","params":[' + b"{}," * 300_000 + b"{}]}")
