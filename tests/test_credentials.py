"""The API key of an executor: where it is looked for, and which registries may see it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from execenv.errors import ConnectFailed, UsageError
from execenv.relay.credentials import ApiKey, api_key_headers, check_destination, find_api_key

BOTH = {"EXECENV_API_KEY": "ours-secret", "CODEX_API_KEY": "theirs-secret"}


# Where it is kept.


def test_file_comes_before_stdin_and_stdin_before_variables(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("file-secret\n")
    stdin = io.BytesIO(b" stdin-secret \n")
    assert find_api_key(file=str(file), stdin=stdin, environ=BOTH).read() == "file-secret"
    assert find_api_key(stdin=stdin, environ=BOTH).read() == "stdin-secret"
    ours = find_api_key(environ=BOTH)
    assert (ours.read(), ours.variable) == ("ours-secret", "EXECENV_API_KEY")
    theirs = find_api_key(environ=BOTH | {"EXECENV_API_KEY": " "})
    assert (theirs.read(), theirs.variable) == ("theirs-secret", "CODEX_API_KEY")


def test_no_key_is_an_error_that_says_where_one_is_looked_for() -> None:
    with pytest.raises(UsageError) as caught:
        find_api_key(environ={})
    for word in ("--api-key-file", "--api-key-stdin", "EXECENV_API_KEY", "CODEX_API_KEY"):
        assert word in str(caught.value)


@pytest.mark.parametrize("text", ["two\nlines-secret", "caf\u00e9-secret", "secret\0", "secret" * 11_000])
def test_what_cannot_stand_in_a_header_is_no_key_and_is_not_shown(text: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(text)
    with pytest.raises(ConnectFailed, match=str(file)) as in_file:
        find_api_key(file=str(file), environ=BOTH)
    with pytest.raises(UsageError, match="stdin holds no API key") as in_stdin:
        find_api_key(stdin=io.BytesIO(text.encode()), environ=BOTH)
    with pytest.raises(UsageError, match="the variable CODEX_API_KEY holds no API key") as in_variable:
        find_api_key(environ={"CODEX_API_KEY": text})
    for caught in (in_file, in_stdin, in_variable):
        assert "secret" not in str(caught.value)


def test_empty_stdin_is_no_key_and_variables_are_not_looked_at_instead() -> None:
    with pytest.raises(UsageError, match="stdin holds no API key"):
        find_api_key(stdin=io.BytesIO(b"\n"), environ=BOTH)


def test_file_that_is_missing_is_an_error_with_its_path_and_nothing_else_is_taken(tmp_path: Path) -> None:
    with pytest.raises(ConnectFailed, match=str(tmp_path / "missing")):
        find_api_key(file=str(tmp_path / "missing"), environ=BOTH)


def test_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConnectFailed, match="no regular file"):
        find_api_key(file=str(tmp_path / "fifo"), environ=BOTH)


def test_file_is_read_again_for_every_request(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("first")
    headers = api_key_headers(find_api_key(file=str(file), environ={}), "http://127.0.0.1:7")
    assert headers() == {"authorization": "Bearer first"}
    file.write_text("second")
    assert headers() == {"authorization": "Bearer second"}
    file.unlink()
    with pytest.raises(ConnectFailed, match="cannot read"):
        headers()


def test_repr_has_no_key() -> None:
    assert "secret" not in repr(find_api_key(environ=BOTH))


# Where it may go.


@pytest.mark.parametrize(
    "url",
    [
        "https://openai.com",
        "https://openai.org",
        "https://api.openai.com/v1/",
        "https://a.b.c.openai.org",
        "https://API.OpenAI.COM",
        "https://openai.com:8443",
        "http://127.0.0.1:8080",
        "http://127.255.255.254",
        "https://127.0.0.1",
        "http://localhost:1",
        "http://LOCALHOST",
        "http://[::1]:8080",
    ],
)
def test_registries_that_may_see_a_key(url: str) -> None:
    check_destination(url)
    assert api_key_headers(ApiKey("k"), url)() == {"authorization": "Bearer k"}


REFUSED = [
    "http://openai.com",
    "http://api.openai.com",
    "http://api.openai.com:443",
    "https://evilopenai.com",
    "https://evil-openai.com",
    "https://openai.com.evil.example",
    "https://openai.com-evil.example",
    "https://openai.co",
    "https://com",
    "https://evil.example",
    "http://evil.example",
    "https://evil.example/openai.com",
    "https://evil.example/@openai.com",
    "https://openai.com@evil.example",
    "https://openai.com:443@evil.example",
    "https://openai.com:password@openai.com",
    "https://evil.example#openai.com",
    "https://evil.example#@openai.com",
    "https://evil.example?.openai.com",
    "https://evil.example\\.openai.com",
    "https://evil.example\\@openai.com",
    "https://evil.example%2f.openai.com",
    "https://evil.example%00.openai.com",
    "https://evil.example\0.openai.com",
    "https://evil.example\n.openai.com",
    "https://evil.example\t.openai.com",
    "https://evil.example .openai.com",
    "https://openai.com.",
    "https://api.openai.com.",
    "https://.openai.com",
    "https://api..openai.com",
    "https://openai.com:",
    "https://openai.com:0",
    "https://openai.com:0443",
    "https://openai.com:65536",
    "https://openai.com:443:443",
    "https://openai.com:-1",
    "https://openai\u3002com",
    "https://\u043fpenai.com",
    "https://\u043epenai.com",
    "https://openai\uff0ecom",
    "https://evil.example\uff0f.openai.com",
    "https://evil.example\u2100.openai.com",
    "https://xn--penai-nye.com",
    "https:openai.com",
    "https:/openai.com",
    "https:///openai.com",
    "//openai.com",
    "openai.com",
    "ftp://openai.com",
    "wss://openai.com",
    "https://[openai.com]",
    "http://localhost.",
    "http://localhost.evil.example",
    "http://evil.localhost",
    "http://127.0.0.1.evil.example",
    "http://127.1",
    "http://127.0.1",
    "http://0177.0.0.1",
    "http://127.0.0.1.",
    "http://0x7f000001",
    "http://2130706433",
    "http://0.0.0.0",
    "http://128.0.0.1",
    "http://[::]",
    "http://[::2]",
    "http://[::ffff:127.0.0.1]",
    "http://[::1%25eth0]",
    "http://10.0.0.1",
    "",
]


@pytest.mark.parametrize("url", REFUSED)
def test_registries_that_may_not_see_a_key(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_destination(url)
    assert "password" not in str(caught.value)
    with pytest.raises(UsageError):
        api_key_headers(ApiKey("k"), url, ["relay.example"])


def test_refusal_says_what_allows_it_and_that_does() -> None:
    with pytest.raises(UsageError, match=r"add --allow-registry relay\.example:8443$"):
        check_destination("https://Relay.Example:8443/base")
    check_destination("https://Relay.Example:8443/base", ["relay.example:8443"])


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("https://relay.example", "relay.example"),
        ("https://RELAY.example/base", "Relay.Example"),
        ("https://relay.example:443", "relay.example"),
        ("https://relay.example", "relay.example:443"),
        ("https://10.0.0.1:8443", "10.0.0.1:8443"),
        ("https://[fd00::1]:8443", "[fd00:0::1]:8443"),
        ("https://relay.example:8443", "relay.example:8443"),
    ],
)
def test_registry_of_ones_own_is_allowed(url: str, allow: str) -> None:
    check_destination(url, ["other.example", allow])


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        ("http://relay.example", "relay.example"),
        ("http://relay.example:443", "relay.example:443"),
        ("https://relay.example:8443", "relay.example"),
        ("https://relay.example", "relay.example:8443"),
        ("https://sub.relay.example", "relay.example"),
        ("https://evilrelay.example", "relay.example"),
        ("https://relay.example.evil.example", "relay.example"),
        ("https://relay.example.", "relay.example"),
        ("https://10.0.0.2", "10.0.0.1"),
    ],
)
def test_allowing_one_registry_allows_no_other(url: str, allow: str) -> None:
    with pytest.raises(UsageError):
        check_destination(url, [allow])


@pytest.mark.parametrize(
    "allow",
    [
        "",
        "*",
        "*.example",
        ".example",
        "relay.example.",
        "https://relay.example",
        "relay.example/",
        "user@relay.example",
        "relay.example:",
        "relay.example:0",
        "relay.example:99999",
        "relay.example:x",
        "relay example",
        "caf\u00e9.example",
        "127.1",
        "fd00::1",
        "relay.example,other.example",
    ],
)
def test_what_is_no_host_cannot_be_allowed_even_if_it_is_not_needed(allow: str) -> None:
    with pytest.raises(UsageError, match="--allow-registry takes HOST or HOST:PORT"):
        check_destination("https://openai.com", [allow])
