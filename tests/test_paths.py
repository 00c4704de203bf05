"""`execenv.paths`: protocol section 6 row by row, the recorded reference, and what must always hold."""

from __future__ import annotations

import json
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from execenv.paths import ForeignPathError, PathUri, PathUriError

TRACES = Path(__file__).parents[1] / ".." / "shared" / "spec" / "traces"
HOST_OS = {"darwin": "macos"}.get(sys.platform, sys.platform)
RELATIVE = "invalid URI: relative URL without a base"
BAD_HOST = "invalid URI: invalid international domain name"
NATIVE = re.compile(r"/|[A-Za-z]:[\\/]|\\\\")

always = settings(derandomize=True, database=None, deadline=None, max_examples=300)


def invalid(uri: str) -> str:
    return f"'{uri}' is invalid on '{HOST_OS}'"


# -- section 6, the table of inputs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "uri", "native"),
    [
        ("file:///a/b", "file:///a/b", b"/a/b"),
        ("file:/a", "file:///a", b"/a"),
        ("file:a", "file:///a", b"/a"),
        ("file:", "file:///", b"/"),
        ("file://", "file:///", b"/"),
        ("FILE:///a", "file:///a", b"/a"),
        (" \x00 file:///a \x1f", "file:///a", b"/a"),
        ("file://localhost/a", "file:///a", b"/a"),
        ("file://LOCALhost/a", "file:///a", b"/a"),
        ("file://loc%61lhost", "file:///", b"/"),
        ("file:///a/", "file:///a/", b"/a/"),
        ("file:///a/./b", "file:///a/b", b"/a/b"),
        ("file:///a/b/..", "file:///a/", b"/a/"),
        ("file:///a/b/.", "file:///a/b/", b"/a/b/"),
        ("file:///../../a", "file:///a", b"/a"),
        ("file:///a/%2e%2E/b", "file:///b", b"/b"),
        ("file:///a/.%2e/b/%2E", "file:///b/", b"/b/"),
        ("file:///a/...", "file:///a/...", b"/a/..."),
        ("file:///.a/..b/c.", "file:///.a/..b/c.", b"/.a/..b/c."),
        ("file:///a//b", "file:///a//b", b"/a//b"),
        ("file:////a", "file:////a", b"//a"),
        ('file:///a b/é{}`<>"', "file:///a%20b/%C3%A9%7B%7D%60%3C%3E%22", 'a b/é{}`<>"'),
        ("file:///\x01\x7f", "file:///%01%7F", b"/\x01\x7f"),
        ("file:///a\\b", "file:///a/b", b"/a/b"),
        ("file:\\\\\\a\\..\\b", "file:///b", b"/b"),
        ("file:///a%5Cb", "file:///a%5Cb", b"/a\\b"),
        ("fi\nle:///a\tb\r\n/c", "file:///ab/c", b"/ab/c"),
        ("file:///a%09b%0A", "file:///a%09b%0A", b"/a\tb\n"),
        ("file:///a%2Fb", "file:///a%2Fb", b"/a/b"),
        ("file:///a%2F..%2fb", "file:///a%2F..%2fb", b"/a/../b"),
        ("file:///bad%FF%fe", "file:///bad%FF%fe", b"/bad\xff\xfe"),
        ("file:///%2541/100%/%zz", "file:///%2541/100%/%zz", b"/%41/100%/%zz"),
        ("file:///c|/x", "file:///c|/x", b"/c|/x"),
        ("file:c|/x", "file:///c|/x", b"/c|/x"),
        ("file:///tmp/C:/f", "file:///tmp/C:/f", b"/tmp/C:/f"),
        ("file:///tmp/C:/..", "file:///tmp/", b"/tmp/"),
        ("file:///C:x", "file:///C:x", b"/C:x"),
        ("file:///~", "file:///~", b"/~"),
    ],
)
def test_accepted_uri_has_this_canonical_text_and_path(text: str, uri: str, native: bytes | str) -> None:
    expected = native if isinstance(native, bytes) else b"/" + native.encode()
    parsed = PathUri.parse(text)
    assert (parsed.uri, str(parsed), parsed.to_native()) == (uri, uri, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", RELATIVE),
        ("", RELATIVE),
        ("~", RELATIVE),
        (" /a", RELATIVE),
        ("\\x", RELATIVE),
        ("\\\\host", RELATIVE),
        ("1:/a", RELATIVE),
        ("a b:c", RELATIVE),
        ("C:x", "unsupported path URI scheme `c`"),
        ("http://x/", "unsupported path URI scheme `http`"),
        ("HT\ttp://x/", "unsupported path URI scheme `http`"),
        ("codex:///x", "unsupported path URI scheme `codex`"),
        ("file:///a?x=1#f", "query parameters are not allowed in path URIs"),
        ("file:///a?", "query parameters are not allowed in path URIs"),
        ("file:///a#f?x", "fragments are not allowed in path URIs"),
        ("file:///a%00#f", "fragments are not allowed in path URIs"),
        ("file://user@localhost/a", BAD_HOST),
        ("file://user:word@localhost/a", BAD_HOST),
        ("file://localhost:80/a?x", BAD_HOST),
        ("file://h%20h/a", BAD_HOST),
        ("file://bücher/a", BAD_HOST),
        ("file://1.2.3/a", "invalid URI: invalid IPv4 address"),
        ("file://1.2.3.256/a", "invalid URI: invalid IPv4 address"),
        ("file://x.0x1f/a", "invalid URI: invalid IPv4 address"),
        ("file://[::1/a", "invalid URI: invalid IPv6 address"),
        ("file://[::1%25lo]/a", "invalid URI: invalid IPv6 address"),
        ("file://[:]/a", "invalid URI: invalid IPv6 address"),
        ("file:/a/../x%00y", invalid("file:///x%00y")),
        ("file:///a\x00b", invalid("file:///a%00b")),
        ("file:///\ud800", "invalid URI: unpaired surrogate"),
        ("/\ud800", "invalid URI: unpaired surrogate"),
    ],
)
def test_refused_text_is_answered_with_the_text_of_the_reference(text: str, message: str) -> None:
    with pytest.raises(PathUriError) as caught:
        PathUri.parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("file://Host/s", "file://host/s"),
        ("file://host", "file://host/"),
        ("file://host/s/../t", "file://host/t"),
        ("file://h%6Fst/C:/x", "file://host/C:/x"),
        ("file://127.0.0.1/tmp", "file://127.0.0.1/tmp"),
        ("file://[0:0::1]/s", "file://[::1]/s"),
        ("file:\\\\h\\s", "file://h/s"),
        ("file:///C:/x", "file:///C:/x"),
        ("file:///c:", "file:///c:"),
        ("file://C:/x", "file:///C:/x"),
        ("file:C:/x", "file:///C:/x"),
        ("file:////C:/x", "file:////C:/x"),
        ("file:///C%3a/x", "file:///C%3a/x"),
        ("file:///C:/../../x", "file:///C:/x"),
        ("file:///C:/a/../b", "file:///C:/b"),
        ("file:///a/../C:/x", "file:///C:/x"),
    ],
)
def test_uri_of_another_host_is_kept_but_is_no_path_here(text: str, uri: str) -> None:
    parsed = PathUri.parse(text)
    assert parsed.uri == uri
    with pytest.raises(ForeignPathError) as caught:
        parsed.to_native()
    assert str(caught.value) == invalid(uri)


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("/a/b", "file:///a/b"),
        ("/", "file:///"),
        ("//a", "file:////a"),
        ("/tmp/../etc/.", "file:///etc/"),
        ("/sp ace/100%/q?m#h\t", "file:///sp%20ace/100%25/q%3Fm%23h%09"),
        ("/back\\slash/é\udcff", "file:///back%5Cslash/%C3%A9%FF"),
        ("C:\\x", "file:///C:/x"),
        ("c:/x y", "file:///c:/x%20y"),
        ("\\\\host\\share\\f", "file://host/share/f"),
    ],
)
def test_absolute_native_text_is_accepted_as_older_clients_send_it(text: str, uri: str) -> None:
    assert PathUri.parse(text).uri == uri


def test_only_the_listed_bytes_are_escaped_in_output() -> None:
    kept = bytes(set(range(0x21, 0x7F)) - set(b'"#<>?`{}%\\'))
    uri = PathUri.from_native(b"/" + bytes(range(1, 256))).uri
    assert uri == "file:///" + "".join(chr(b) if b in kept else f"%{b:02X}" for b in range(1, 256))
    assert set(b"^|[]:;'+~!$&()*,=@_-") <= set(kept)


# -- section 6, the fallback ----------------------------------------------------------------------------


@pytest.mark.parametrize("payload", ["", "L3RtcA==", "!!", "YR", "A", "YQ/x", "YQ%20", "L2E\u00e9"])
def test_malformed_fallback_is_refused(payload: str) -> None:
    with pytest.raises(PathUriError, match="is invalid on"):
        PathUri.parse(f"file:///%00/bad/path/{payload}")


@pytest.mark.parametrize("payload", ["L3RtcA", "cmVs", "YQ", "L2EvLi4vQzovYg", "XABcAC4AXABDAE8ATQAxAA"])
def test_fallback_around_a_path_that_needs_none_is_foreign(payload: str) -> None:
    uri = PathUri.parse(f"file:///%00/bad/path/{payload}")
    with pytest.raises(ForeignPathError) as caught:
        uri.to_native()
    assert str(caught.value) == invalid(uri.uri)


def test_fallback_with_nul_keeps_its_bytes_and_is_refused_as_a_file_name() -> None:
    uri = PathUri.from_native(b"/a\0b")
    assert uri.uri == "file:///%00/bad/path/L2EAYg"
    assert uri.fallback_payload == b"/a\0b"
    with pytest.raises(ForeignPathError) as caught:
        uri.to_native()
    assert str(caught.value) == "file name contained an unexpected NUL byte"


@pytest.mark.parametrize("path", [b"/C:", b"/c:/x", b"//C:/x", b"/a/../C:/x"])
def test_posix_path_that_begins_like_a_drive_survives_in_a_fallback(path: bytes) -> None:
    uri = PathUri.from_native(path)
    assert uri.is_fallback
    assert PathUri.parse(uri.uri).to_native() == path.replace(b"/a/..", b"")


def test_fallback_is_opaque_to_name_parent_and_join() -> None:
    uri = PathUri.from_native(b"/a\0b")
    assert (uri.name, uri.parent()) == ("", None)
    with pytest.raises(PathUriError, match="is invalid on"):
        uri.join("x")


def test_ordinary_path_that_looks_like_a_fallback_is_not_one() -> None:
    uri = PathUri.from_native(b"/%00/bad/path/L2EAYg")
    assert (uri.is_fallback, uri.fallback_payload) == (False, None)
    assert uri.uri == "file:///%2500/bad/path/L2EAYg"


# -- making URIs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"", b"a", "a/b", "~", "C:\\x", "file:///a"])
def test_from_native_refuses_a_relative_path(path: bytes | str) -> None:
    with pytest.raises(PathUriError, match=RELATIVE):
        PathUri.from_native(path)


def test_from_native_takes_text_as_os_does() -> None:
    assert PathUri.from_native(os.fsdecode(b"/caf\xc3\xa9/\xff")).to_native() == b"/caf\xc3\xa9/\xff"
    with pytest.raises(PathUriError, match="surrogate"):
        PathUri.from_native("/\ud800")


@pytest.mark.parametrize(
    ("path", "resolved"),
    [("/a/./b", "/a/b"), ("/a/b/..", "/a/"), ("/..", "/"), ("/a//../b", "/b"), ("/a//b/.", "/a/b/")],
)
def test_from_native_resolves_dot_segments_as_the_file_system_would(path: str, resolved: str) -> None:
    assert PathUri.from_native(path).to_native() == resolved.encode()


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("C:\\", "file:///C:/"),
        ("C:/", "file:///C:/"),
        ("d:\\Program Files\\100%\\a.txt", "file:///d:/Program%20Files/100%25/a.txt"),
        ("D:\\a\\.\\\\..\\..\\b\\", "file:///D:/b/"),
        ("D:\\a\\..", "file:///D:/"),
        ("\\\\Host\\Share", "file://host/Share/"),
        ("//host/share/a", "file://host/share/a"),
        ("\\\\host\\share\\..\\..\\b", "file://host/share/b"),
        ("\\\\10.0.0.1\\C$\\x", "file://10.0.0.1/C$/x"),
        ("\\\\h\\C:\\x", "file://h/C:/x"),
    ],
)
def test_windows_path_has_this_uri(path: str, uri: str) -> None:
    assert PathUri.from_windows(path).uri == uri
    assert PathUri.parse(uri).uri == uri


@pytest.mark.parametrize(
    "path",
    [
        "\\\\?\\C:\\x",
        "\\\\.\\COM1",
        "\\\\localhost\\c$",
        "\\\\bad host\\share\\x",
        "\\\\h%6Fst\\share",
        "\\\\1\\share",
        "\\\\host\\..\\x",
        "\\\\host\\\ud800",
        "\\\\\udc41\\share",
        "C:\\a\0b",
        "C:\\bad\\\ud800",
    ],
)
def test_windows_path_without_a_uri_is_wrapped_as_utf_16(path: str) -> None:
    uri = PathUri.from_windows(path)
    assert uri.fallback_payload == path.encode("utf-16-le", "surrogatepass")
    assert PathUri.parse(uri.uri) == uri
    with pytest.raises(ForeignPathError):
        uri.to_native()


@pytest.mark.parametrize("path", ["", "x", "C:", "C:x", "\\x", "/x", "\\\\host", "\\\\host\\", "\\\\\\x\\y"])
def test_from_windows_refuses_a_relative_path(path: str) -> None:
    with pytest.raises(PathUriError, match=RELATIVE):
        PathUri.from_windows(path)


# -- names, parents, joins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "name", "parent"),
    [
        ("file:///", "", None),
        ("file:///a", "a", "file:///"),
        ("file:///a%20b/%C3%A9/", "é", "file:///a%20b"),
        ("file:///a//b//", "b", "file:///a"),
        ("file:///a%2Fb/c%FF", "c\udcff", "file:///a%2Fb"),
        ("file:///C:", "", None),
        ("file:///C:/", "", None),
        ("file:///C:/x", "x", "file:///C:/"),
        ("file://host/", "", None),
        ("file://host/share", "", None),
        ("file://host/share/x/y", "y", "file://host/share/x"),
        ("file://host/share/x", "x", "file://host/share/"),
    ],
)
def test_name_and_parent_stop_at_the_root(uri: str, name: str, parent: str | None) -> None:
    path = PathUri.parse(uri)
    assert path.name == name
    assert path.parent() == (None if parent is None else PathUri(parent))


@pytest.mark.parametrize(
    ("base", "segments", "uri"),
    [
        ("file:///", ["a"], "file:///a"),
        ("file:///a/", ["b c", b"\xff%41", "q?#"], "file:///a/b%20c/%FF%2541/q%3F%23"),
        ("file:///a//b", ["", "c/./d//"], "file:///a/b/c/d"),
        ("file:///a/b", ["../../../c"], "file:///c"),
        ("file:///a%2fb", ["\\c", "%2e%2e"], "file:///a%2fb/%5Cc/%252e%252e"),
        ("file:///a", ["\udcff"], "file:///a/%FF"),
        ("file:///a", ["C:"], "file:///a/C:"),
        ("file:///C:", ["x\\y", "../z"], "file:///C:/x/z"),
        ("file:///C:/x", ["..\\..\\..\\y"], "file:///C:/y"),
        ("file://host/share/x", ["../../../y"], "file://host/share/y"),
        ("file://host", ["share"], "file://host/share"),
    ],
)
def test_join_appends_and_resolves_below_the_root(base: str, segments: list[str | bytes], uri: str) -> None:
    joined = PathUri.parse(base).join(*segments)
    assert joined.uri == uri
    assert PathUri.parse(uri) == joined


@pytest.mark.parametrize(
    ("base", "segment", "message"),
    [
        ("file:///a", "/b", "path `/b` must be relative when joining a path URI"),
        ("file:///C:/a", "\\b", "path `/b` must be relative when joining a path URI"),
        ("file:///C:/a", "D:b", "path `D:b` must be relative when joining a path URI"),
        ("file:///a", b"/b\xff", "path `/b\ufffd` must be relative when joining a path URI"),
        ("file:///a", "b\0", invalid("b\0")),
        ("file:///a", "\ud800", "invalid URI: unpaired surrogate"),
    ],
)
def test_join_refuses_what_is_not_below_the_base(base: str, segment: str | bytes, message: str) -> None:
    with pytest.raises(PathUriError) as caught:
        PathUri.parse(base).join(segment)
    assert str(caught.value) == message


def test_join_never_turns_a_posix_path_into_a_drive() -> None:
    joined = PathUri.parse("file:///a").join("../C:", "x")
    assert (joined.is_fallback, joined.to_native()) == (True, b"/C:/x")


# -- the recorded reference -----------------------------------------------------------------------------


def exchanges(name: str) -> list[tuple[str, Any]]:
    """The path of each request of a trace, with the answer."""
    file = TRACES / name
    if not file.exists():
        pytest.skip("the recorded traffic is not part of this checkout")
    messages = [json.loads(line)["msg"] for line in file.read_text("utf-8").splitlines()]
    answers = {m["id"]: m for m in messages if "result" in m or "error" in m}
    paths = [
        (m["id"], m["params"].get("path", m["params"].get("cwd")))
        for m in messages
        if "params" in m and "id" in m
    ]
    return [(path, answers[key]) for key, path in paths if isinstance(path, str)]


def recorded(name: str, wanted: Callable[[int, str], bool]) -> list[tuple[str, str]]:
    found = [
        (path, answer["error"]["message"])
        for path, answer in exchanges(name)
        if "error" in answer and wanted(answer["error"]["code"], answer["error"]["message"])
    ]
    assert found, "the trace holds no such answer"
    return found


def test_recorded_refusals_are_refused_with_the_same_text() -> None:
    texts = re.compile("invalid URI|unsupported path URI|not allowed in path URIs|'file:")
    for path, message in recorded(
        "path_uri.jsonl", lambda code, text: code == -32602 and bool(texts.match(text))
    ):
        if NATIVE.match(path):
            PathUri.parse(path)  # the one deviation
            continue
        with pytest.raises(PathUriError) as caught:
            PathUri.parse(path)
        assert str(caught.value) == message


def test_recorded_foreign_paths_are_parsed_and_refused_with_the_same_text() -> None:
    for path, message in recorded("path_uri.jsonl", lambda code, _: code == -32600):
        with pytest.raises(ForeignPathError) as caught:
            PathUri.parse(path).to_native()
        assert str(caught.value) == message


@pytest.mark.parametrize("trace", ["path_uri.jsonl", "process_start_errors.jsonl"])
def test_recorded_foreign_cwd_gives_the_longer_text(trace: str) -> None:
    for path, message in recorded(trace, lambda _, text: text.startswith("cwd URI")):
        uri = PathUri.parse(path)
        with pytest.raises(ForeignPathError) as caught:
            uri.to_native()
        assert f"cwd URI `{uri}` is not valid on this exec-server host: {caught.value}" == message


def test_recorded_files_are_found_under_the_same_path() -> None:
    compared = 0
    for path, answer in exchanges("path_uri.jsonl"):
        result = answer.get("result", {})
        if "path" not in result or path.endswith("/tolink"):  # a symbolic link leads elsewhere
            continue
        native = PathUri.parse(result["path"]).to_native()
        assert PathUri.from_native(native).uri == result["path"]
        assert b"/" + posixpath.normpath(PathUri.parse(path).to_native()).lstrip(b"/") == native
        compared += 1
    assert compared >= 20


def test_recorded_listing_has_the_same_uris() -> None:
    [entries] = [
        a["result"]["entries"] for _, a in exchanges("path_uri.jsonl") if "truncated" in a.get("result", {})
    ]
    for entry in entries:
        assert PathUri.from_native(PathUri.parse(entry["path"]).to_native()).uri == entry["path"]


# -- what must always hold ------------------------------------------------------------------------------

DOTS = re.compile(rb"/\.\.?(?:/|\Z)")
native_bytes = st.binary().map(lambda tail: b"/" + tail)
separators = st.sampled_from(["/", "\\", "?", "#", "@", "%00", "%2F", " ", "\t", "\udcff", "\ud800"])
names = st.sampled_from(
    [".", "..", "%2e", "%", "%ff", "C:", "c|", "host", "localhost", "é", "1.2", "[::1]", "L2EAYg"]
)
uri_pieces = separators | names | st.just("/%00/bad/path/") | st.text(max_size=3)
uri_like = st.tuples(
    st.sampled_from(["file:///", "file://", "file:/", "file:", "FILE:///", "/", "C:\\", "\\\\", "http:", ""]),
    st.lists(uri_pieces, max_size=8).map("".join),
).map("".join)


@always
@given(native_bytes.map(lambda path: path.replace(b"\0", b"")))
@example(b"/C:/x")
@example(b"//")
@example(b"/a/../b//./")
def test_every_posix_path_comes_back_and_only_dot_segments_are_resolved(path: bytes) -> None:
    uri = PathUri.from_native(path)
    assert PathUri.parse(uri.uri) == uri
    if DOTS.search(path):
        assert (
            uri.to_native().rstrip(b"/") == b"/" + posixpath.normpath(path).strip(b"/")
            or uri.to_native() == b"/"
        )
    else:
        assert uri.to_native() == path


@always
@given(native_bytes, native_bytes)
def test_every_path_with_nul_is_a_fallback_that_parse_keeps(left: bytes, right: bytes) -> None:
    uri = PathUri.from_native(left + b"\0" + right)
    assert uri.is_fallback
    assert PathUri.parse(uri.uri) == uri
    assert uri.fallback_payload == left + b"\0" + right


@always
@given(
    st.sampled_from("CdZ"),
    st.lists(
        st.text(st.characters(exclude_characters="\\/\0", exclude_categories=["Cs"]), min_size=1).filter(
            lambda name: name not in {".", ".."}
        ),
    ),
)
def test_every_drive_path_round_trips_lexically(drive: str, names: list[str]) -> None:
    uri = PathUri.from_windows(f"{drive}:\\" + "\\".join(names))
    assert PathUri.parse(uri.uri) == uri
    assert PathUri.parse(f"{drive}:/" + "/".join(names)) == uri
    found: list[str] = []
    step: PathUri | None = uri
    while step is not None:
        root, found = step, [step.name, *found]
        step = step.parent()
    assert (root.uri, found[1:]) == (f"file:///{drive}:/", names)


@always
@given(uri_like | st.text(st.characters()))
@example("file:/..//a")
@example("file:/.//C:/..")
@example("file://C:")
def test_parse_is_idempotent_and_raises_nothing_else(text: str) -> None:
    try:
        parsed = PathUri.parse(text)
    except PathUriError:
        return
    assert PathUri.parse(parsed.uri) == parsed
    assert parsed.uri.isascii()
    try:
        native = parsed.to_native()
    except ForeignPathError:
        return
    assert native.startswith(b"/")
    assert b"\0" not in native


@always
@given(uri_like, st.lists(st.text(max_size=4) | st.sampled_from(["..", "C:", "a/../b", "%2e"]), max_size=4))
def test_join_and_parent_give_canonical_uris(text: str, segments: list[str]) -> None:
    try:
        path = PathUri.parse(text).join(*segments)
    except PathUriError:
        return
    assert PathUri.parse(path.uri) == path
    parent = path.parent()
    assert parent is None or PathUri.parse(parent.uri) == parent


def test_import_costs_no_url_or_address_module() -> None:
    code = "import sys, execenv.paths; print(*{'urllib', 'ipaddress', 'trio', 'socket'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
        # without what would have it measured, which imports such modules itself
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
    )
    assert run.stdout.split() == []
