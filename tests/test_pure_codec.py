"""The codec without compiled libraries, as it is where the server was sent to: only its speed may change."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import orjson
import pybase64
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from execenv import _pure_base64 as pure_base64
from execenv import _pure_json as pure_json

ROOT = Path(__file__).parent.parent

PURE = """\
import sys
sys.modules["orjson"] = sys.modules["pybase64"] = None
from execenv import codec
assert codec.orjson.__name__ == "execenv._pure_json" and codec.pybase64.__name__ == "execenv._pure_base64"
del sys.modules["orjson"], sys.modules["pybase64"]  # the tests themselves want them
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "words",
    [
        ("tests/test_codec.py",),
        ("tests/contract/test_run.py", "tests/contract/test_environments.py", "-k", "memory"),
        ("tests/contract/test_files.py", "tests/contract/test_http.py", "-k", "memory"),
    ],
    ids=["codec", "environments", "files"],
)
async def test_tests_of_the_protocol_pass_without_compiled_libraries(words: tuple[str, ...]) -> None:
    argv = [sys.executable, "-c", PURE, "-q", "-p", "no:cacheprovider", *words]
    with trio.fail_after(120):
        done = await trio.run_process(argv, capture_stdout=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout.decode()
    assert b" passed" in done.stdout


NUMBERS = ["-0", "1.5", "1e5", "1E400", "18446744073709551615", "18446744073709551616", "01", "-", "."]
TEXTS = ['"\\ud83d\\ude00"', '"\\ud800"', '"\\udc00\\ud800"', '"\\u0041"', '"\x7f"', '"\x01"', '"é"', '"\\x"']
JSON = st.lists(
    st.sampled_from(
        [
            *NUMBERS,
            *TEXTS,
            *'[]{},: \n\t"\\',
            "null",
            "true",
            "NaN",
            '"k":',
            "9" * 5000,
            "-9223372036854775809",
        ]
    ),
    max_size=8,
).map(lambda pieces: "".join(pieces).encode())


@given(
    JSON
    | st.binary(max_size=8)
    | st.recursive(st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_same_json_is_taken_and_refused(data: bytes) -> None:
    try:
        expected = repr(orjson.loads(data))
    except orjson.JSONDecodeError:
        with pytest.raises(pure_json.JSONDecodeError):
            pure_json.loads(data)
    else:
        assert repr(pure_json.loads(data)) == expected


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(VALUES)
def test_same_values_are_encoded(value: object) -> None:
    assert orjson.loads(pure_json.dumps(value)) == orjson.loads(orjson.dumps(value))


def test_encoded_pieces_are_put_in_where_they_were() -> None:
    piece, other = pure_json.Fragment(b'{"a":"<>"}'), pure_json.Fragment(b"[1, 2]")
    assert pure_json.dumps([piece, {"k": other}, "x"]) == b'[{"a":"<>"},{"k":[1, 2]},"x"]'
    assert pure_json.dumps(piece) == b'{"a":"<>"}'


@pytest.mark.parametrize("value", ["\ud800", {"\udfff": 1}, b"bytes", object(), float("nan"), float("inf")])
def test_what_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(pure_json.JSONEncodeError):
        pure_json.dumps(value)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(pure_json.JSONDecodeError):
        pure_json.loads(b"[" * 100_000 + b"]" * 100_000)


@given(
    st.text("AB=+/z9\n é-", max_size=9)
    | st.binary(max_size=20).map(lambda data: pybase64.b64encode(data).decode())
)
def test_same_base64_is_taken_and_refused(text: str) -> None:
    for given_as in (text, memoryview(text.encode())):
        try:
            expected = pybase64.b64decode(given_as, validate=True)
        except ValueError:
            with pytest.raises(ValueError):
                pure_base64.b64decode(given_as, validate=True)
        else:
            assert pure_base64.b64decode(given_as, validate=True) == expected
            assert pure_base64.b64encode_as_string(expected) == pybase64.b64encode_as_string(expected)
