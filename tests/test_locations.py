"""Paths and environments as they are written on the command line."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execenv import targets
from execenv._locations import Location, Target, parse_alias, parse_location, parse_target
from execenv.errors import UsageError

BOX = ["ssh", "box", "execenv serve --listen stdio"]
ALIASES: dict[str, Target] = {"box": BOX, "url": "ws://10.0.0.1:9"}

# As `os.fsdecode` gives it: any character but NUL, and surrogates for bytes that are not UTF-8.
ARGUMENTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from("\udc80\udcff:/.[]")
)
HOSTS = st.sampled_from(["localhost", "127.0.0.1", "[::1]", "[fe80::1%eth0]", "box.example", "user@box"])
PORTS = st.just("") | st.integers(0, 65535).map(lambda port: f":{port}")
URL_PATHS = st.just("") | st.from_regex(r"/[a-z0-9/?=&.-]*", fullmatch=True)
URLS = st.builds("{}://{}{}{}".format, st.sampled_from(["ws", "wss"]), HOSTS, PORTS, URL_PATHS)

RELAY_URLS = st.builds(
    "relay+{}/{}".format,
    st.sampled_from(["https://h", "https://h:443", "https://h/a/b", "http://[::1]:1", "https://h:0443/443"]),
    st.from_regex(r"[A-Za-z0-9_-]{1,9}/?", fullmatch=True),
)


@pytest.mark.parametrize(
    ("text", "target", "path"),
    [
        ("report.pdf", "local", "report.pdf"),
        ("/srv/a:b", "local", "/srv/a:b"),
        ("./a:b", "local", "./a:b"),
        ("dir/a:b", "local", "dir/a:b"),
        (":a", "local", ":a"),
        ("", "local", ""),
        ("a\nb", "local", "a\nb"),
        ("local:a", "local", "a"),
        ("local:", "local", ""),
        ("box:work/", BOX, "work/"),
        ("box:", BOX, ""),
        ("box:a:b", BOX, "a:b"),
        ("box:C:\\work", BOX, "C:\\work"),
        ("box:\udcff\n", BOX, "\udcff\n"),
        ("url:/srv", "ws://10.0.0.1:9", "/srv"),
        ("ws://127.0.0.1:8765:/srv", "ws://127.0.0.1:8765", "/srv"),
        ("ws://127.0.0.1:8765:", "ws://127.0.0.1:8765", ""),
        ("ws://127.0.0.1:8765/:a", "ws://127.0.0.1:8765/", "a"),
        ("ws://127.0.0.1:8765:9000", "ws://127.0.0.1:8765", "9000"),
        ("wss://host.example:/srv", "wss://host.example", "/srv"),
        ("wss://host.example:2024-logs", "wss://host.example", "2024-logs"),
        ("wss://host.example/one/two?x=1:a:b/c", "wss://host.example/one/two?x=1", "a:b/c"),
        ("ws://[::1]:8765:/srv", "ws://[::1]:8765", "/srv"),
        ("ws://[::1]:/srv", "ws://[::1]", "/srv"),
        ("relay+https://h/ID:/srv/a", "relay+https://h/ID", "/srv/a"),
        ("relay+https://h:443/base/ID:", "relay+https://h:443/base/ID", ""),
        ("relay+https://h/ID:443/a:b", "relay+https://h/ID", "443/a:b"),
        ("relay+http://[::1]:80/ID:a", "relay+http://[::1]:80/ID", "a"),
        ("relay+https://h/443:443:a", "relay+https://h/443", "443:a"),
        ("relay+https://h/ID/:\n", "relay+https://h/ID/", "\n"),
        ("./relay+https://h/ID:a", "local", "./relay+https://h/ID:a"),
    ],
)
def test_location_is_a_path_and_where_it_is(text: str, target: Target, path: str) -> None:
    assert parse_location(text, ALIASES) == Location(target, path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("other:a", ["'other'", "--alias other=TARGET", "./other:a"]),
        ("ws://127.0.0.1:8765", ["names no path", "URL:PATH"]),
        ("ws://127.0.0.1:8765/", ["names no path"]),
        ("ws://127.0.0.1:8765/srv", ["names no path"]),
        ("wss://host.example", ["names no path"]),
        ("ws://[::1]:8765", ["names no path"]),
        ("ws://:a", ["names no path"]),
        ("ws://[]:a", ["names no path"]),
        ("http://127.0.0.1:8765:/srv", ["'http'"]),
        ("relay+https://h/ID", ["'relay+https://h/ID' names no path", "relay+https://REGISTRY/ID:PATH"]),
        ("relay+https://h:443/ID", ["names no path"]),
        ("relay+https://h:/srv", ["its host or its port cannot be read"]),
        ("relay+https://h:443:/srv", ["its host or its port cannot be read"]),
        ("relay+https://h/:/srv", ["names no environment", "relay+https://REGISTRY/ENVIRONMENT_ID"]),
        ("relay+https://h/I.D:/srv", ["only ASCII letters, digits, - and _"]),
        ("relay+http://h/ID:/srv", ["this machine alone", "use https://"]),
        ("relay+wss://h/ID:/srv", ["https:// URL"]),
        ("relay+ssh:/srv", ["'relay+ssh'", "--alias"]),
    ],
)
def test_what_names_no_place_is_refused_with_what_to_write(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_location(text, ALIASES)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "ws://hush-hush@h",
        "ws://h/?hush-hush",
        "relay+https://u:hush-hush@h/ID:/srv",
        "relay+https://hush-hush@h/ID:/srv",
        "relay+https://h/ID?hush-hush:/srv",
        "relay+https://h/ID#hush-hush:/srv",
        "relay+https://h/ID#hush-hush",
    ],
)
def test_secret_in_a_url_is_not_shown(text: str) -> None:
    for parse in (lambda: parse_location(text, {}), lambda: parse_target(text.replace("ws:", "http:"))):
        with pytest.raises(UsageError) as caught:
            parse()
        assert "hush-hush" not in str(caught.value)


def test_path_without_a_place_is_in_the_default_one() -> None:
    assert parse_location("a", {}, BOX) == Location(BOX, "a", "a")
    assert parse_location("local:a", {}, BOX) == Location("local", "a", "local:a")


@given(ARGUMENTS)
def test_any_text_is_a_location_or_refused(text: str) -> None:
    try:
        location = parse_location(text, ALIASES)
    except UsageError:
        assert ":" in text
        return
    assert location.text == text
    assert text.endswith(location.path)
    assert text.removesuffix(location.path) in ("", "box:", "url:", "local:", f"{location.target}:")


@given(URLS, ARGUMENTS)
def test_any_path_may_follow_a_url(url: str, path: str) -> None:
    if path[:1].isdecimal():
        path = f"./{path}"  # behind a host without a port, a number would be that
    assert parse_location(f"{url}:{path}", {}) == Location(url, path, f"{url}:{path}")


@given(RELAY_URLS, ARGUMENTS)
def test_any_path_may_follow_the_url_of_a_relay(url: str, path: str) -> None:
    assert parse_location(f"{url}:{path}", {}) == Location(url, path, f"{url}:{path}")


@given(ARGUMENTS)
def test_path_that_begins_with_a_directory_is_always_here(path: str) -> None:
    assert parse_location(f"./{path}", ALIASES) == Location("local", f"./{path}", f"./{path}")
    assert parse_location(f"/{path}", ALIASES) == Location("local", f"/{path}", f"/{path}")


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("local", "local"),
        ("ws://127.0.0.1:1/x?y", "ws://127.0.0.1:1/x?y"),
        ("wss://host.example", "wss://host.example"),
        ("relay+https://h/base/ID", "relay+https://h/base/ID"),
        ("relay+x y", ["relay+x", "y"]),
        ("ssh box 'execenv serve --listen stdio'", BOX),
        ("/opt/my\\ server", ["/opt/my server"]),
        ("server ws://127.0.0.1:1", ["server", "ws://127.0.0.1:1"]),
    ],
)
def test_target_is_this_machine_a_url_or_a_command(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["", "  ", "http://127.0.0.1:1", "'ssh box", "ssh box\\", "relay+https://h"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no |names no environment"):
        parse_target(text)


@given(st.lists(ARGUMENTS, min_size=2))
def test_command_is_split_as_a_shell_would(words: list[str]) -> None:
    text = shlex.join(words)
    if not text.startswith(("ws://", "wss://")):
        assert parse_target(text) == words


def named(name: str) -> targets.Target | None:
    return {"box": targets.WebsocketTarget("ws://box"), "sh": targets.WebsocketTarget("ws://sh")}.get(name)


def test_configured_name_is_a_target_before_a_program_of_that_name() -> None:
    assert parse_target("box", named) == named("box")
    assert parse_target("sh", named) == named("sh")
    assert parse_target("env", named) == ["env"]
    for text in ("local", "ws://h"):
        assert parse_target(text, named) == text
    assert parse_target("box x", named) == ["box", "x"]
    assert parse_target("./box", named) == ["./box"]
    with pytest.raises(UsageError, match="'no-such-name' is no environment"):
        parse_target("no-such-name", named)
    assert parse_alias("x=box", named) == ("x", named("box"))


def test_configured_name_may_stand_before_a_path_behind_aliases_and_local() -> None:
    assert parse_location("sh:a", ALIASES, named=named) == Location(named("sh") or "", "a", "sh:a")
    assert parse_location("box:a", ALIASES, named=named).target == BOX
    assert parse_location("local:a", {}, named=lambda name: named("box")).target == "local"


def test_default_place_is_only_looked_for_if_a_path_needs_it() -> None:
    def refuse() -> Target:
        raise UsageError("there is none")

    assert parse_location("box:a", ALIASES, refuse).target == BOX
    with pytest.raises(UsageError, match="there is none"):
        parse_location("a", ALIASES, refuse)


def test_alias_names_a_target() -> None:
    assert parse_alias("box=ssh box 'execenv serve --listen stdio'") == ("box", BOX)
    assert parse_alias("a=ws://127.0.0.1:1/?b=c") == ("a", "ws://127.0.0.1:1/?b=c")


@pytest.mark.parametrize("text", ["box", "=ssh box", "a/b=local", "a:b=local", "box=", "box=http://x"])
def test_what_is_no_alias_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_alias(text)
