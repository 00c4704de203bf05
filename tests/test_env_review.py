"""What a review of environments found: each test failed before what it is about was mended."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from execenv import CommandTarget, ConnectFailed, EnvironmentUnavailable, UsageError, open_environment
from execenv import _pure_json as pure_json
from execenv.config import Snapshot, parse_config, with_default, with_environment, without_environment
from execenv.environments import open_manager
from execenv.errors import ConfigError
from execenv.providers import FileProvider, UrlProvider, default_target, our_file
from execenv.targets import Target, WebsocketTarget, shown_url
from tests.conftest import SERVE

FILE = "/f/environments.toml"
TIME_LIMIT = 30.0


# Nothing secret in what people read.

PASSWORDS = ["ws://u:sec/ret@h:1", "ws://u:sec?ret@h:1", "ws://u:sec#ret@h:1", "ws://u:[sec]ret@h:1"]


@pytest.mark.parametrize("url", PASSWORDS)
def test_password_that_should_have_been_quoted_is_not_told_by_the_file(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(f'[[environments]]\nid = "a"\nurl = "{url}"\n', file=FILE)
    assert "sec" not in str(caught.value)
    assert "ret" not in str(caught.value)


@pytest.mark.parametrize("url", [*PASSWORDS, "u:sec@h:1", "http://u:sec@ret"])
async def test_password_that_should_have_been_quoted_is_not_told_by_a_connect(url: str) -> None:
    with pytest.raises(ConnectFailed) as caught:
        async with open_environment(WebsocketTarget(url)):
            pytest.fail("it was opened")
    seen: BaseException | None = caught.value
    while seen is not None:  # as --debug shows it
        assert "sec" not in str(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ws://h:1/a?token=x", "ws://h:1/a"),
        ("ws://h:1/?mail=a@b", "ws://h:1/"),
        ("ws://[::1]:1/?mail=a@b", "ws://[::1]:1/"),
        ("ws://u:p@h:1/a?b", "ws://***@h:1/a"),
        ("ws://u:p?q@h:1", "ws://***"),
        ("ws://u:p/q?r@h:1", "ws://***"),
        ("u:p@h", "@h"),
    ],
)
def test_url_is_shown_without_what_may_be_secret(url: str, shown: str) -> None:
    assert shown_url(url) == shown


def test_target_shows_no_secret_of_its_url() -> None:
    assert "hush" not in repr(WebsocketTarget("ws://u:hush@h/?token=hush", "hush"))


# Targets that cannot be used.


def test_token_file_with_a_nul_in_its_name_is_refused_with_its_line() -> None:
    text = '[[environments]]\nid = "a"\nurl = "wss://h"\nauth_bearer_token_file = "a\\u0000"\n'
    with pytest.raises(ConfigError, match="line 4: auth_bearer_token_file holds a NUL"):
        parse_config(text, file=FILE)


def test_token_file_that_is_no_file_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, reason in (
        (str(tmp_path / "fifo"), "no regular file"),
        (str(tmp_path), "directory"),
        ("\0", "null byte"),
    ):
        with pytest.raises(ConnectFailed, match=reason):
            WebsocketTarget("ws://127.0.0.1:1", bearer_token_file=path).read_token()


UNUSABLE = [
    CommandTarget(()),
    CommandTarget(("cat",), initialize_timeout=math.nan),
    WebsocketTarget("ws://127.0.0.1:1", connect_timeout=-1.0),
    WebsocketTarget("ws://127.0.0.1:1", connect_timeout=math.nan),
    WebsocketTarget("ws://127.0.0.1:1", bearer_token="a\ud800"),
]


@pytest.mark.parametrize("target", UNUSABLE, ids=["argv", "nan", "negative", "connect nan", "surrogate"])
async def test_target_that_cannot_be_used_is_refused_before_it_can_end_a_manager(target: Target) -> None:
    with pytest.raises(UsageError):
        async with open_environment(target):
            pytest.fail("it was opened")
    with pytest.raises(UsageError):
        async with open_manager(Snapshot((("a", target),))):
            pytest.fail("it was opened")
    async with open_manager(Snapshot()) as manager:
        with pytest.raises(UsageError):
            await manager.add("a", target)
        assert manager.ids == ()


async def test_token_that_cannot_be_read_is_an_error_of_that_environment_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    lost = WebsocketTarget("ws://127.0.0.1:1", bearer_token_file=str(tmp_path / "fifo"))
    nul = WebsocketTarget("ws://127.0.0.1:1", bearer_token_file="\0")
    with trio.fail_after(TIME_LIMIT):
        async with open_manager(Snapshot((("lost", lost), ("nul", nul)), "local", True)) as manager:
            for id_ in ("lost", "nul"):
                with pytest.raises(ConnectFailed, match="token file"):
                    await manager.require(id_)
            assert (await (await manager.require()).run(["true"])).returncode == 0


async def test_host_that_nothing_can_be_called_is_told() -> None:
    with pytest.raises(
        ConnectFailed, match=r"cannot connect to ws://a+\.example: no host can have that name"
    ):
        async with open_environment(f"ws://{'a' * 64}.example"):
            pytest.fail("it was opened")


async def test_port_0_is_not_port_80() -> None:
    with pytest.raises(ConnectFailed, match=r"127\.0\.0\.1:0: ") as caught:
        async with open_environment("ws://127.0.0.1:0"):
            pytest.fail("it was opened")
    assert "80" not in str(caught.value)


# A manager that ends.


async def test_manager_that_is_ending_begins_nothing_and_gives_nothing() -> None:
    stubborn = [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"]
    seen: list[str] = []
    with trio.fail_after(TIME_LIMIT):
        async with trio.open_nursery() as nursery:
            closing = trio.Event()

            async def late() -> None:
                await closing.wait()
                await wait_all_tasks_blocked()
                for id_ in ("idle", "open"):
                    try:
                        await manager.require(id_)
                    except EnvironmentUnavailable as error:
                        seen.append(str(error))

            nursery.start_soon(late)
            snapshot = Snapshot(
                (
                    ("idle", CommandTarget((*SERVE, "stdio"))),
                    ("open", CommandTarget((*SERVE, "stdio"))),
                    ("slow", CommandTarget(tuple(stubborn))),
                )
            )
            async with open_manager(snapshot) as manager:
                await manager.require("open")
                nursery.start_soon(_ignore, manager.require, "slow")
                await wait_all_tasks_blocked()
                closing.set()
    assert [text for text in seen if "its manager is closed" in text] == seen
    assert len(seen) == 2
    with pytest.raises(EnvironmentUnavailable):
        await manager.require("open")


async def _ignore(call: object, *args: object) -> None:
    assert callable(call)
    with pytest.raises(EnvironmentUnavailable):
        await call(*args)


# Files.


def test_folder_that_leads_nowhere_is_no_reason_to_run_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "execenv").symlink_to(tmp_path / "not-mounted")
    with pytest.raises(ConfigError, match="execenv is a symbolic link that leads nowhere"):
        default_target()
    monkeypatch.setenv("XDG_CONFIG_HOME", "/dev/null")  # a way to say that there is none
    assert FileProvider(our_file()).read() is None


def test_byte_order_mark_is_skipped_as_codex_does(tmp_path: Path) -> None:
    file = tmp_path / "environments.toml"
    file.write_bytes(b'\xef\xbb\xbfdefault = "none"\r\n')
    assert FileProvider(str(file)).read() == Snapshot((), None, True)
    file.write_bytes(b'\xef\xbb\xbf\n\ndefault = "\xff"\n')
    with pytest.raises(ConfigError, match="line 3"):
        FileProvider(str(file)).read()


CRLF = (
    '# mine\r\ndefault = "a"\r\n\r\n[[environments]]\r\nid = "a"\r\nprogram = "p"\r\n'
    'args = [\r\n  "1", # one\r\n]\r\n\r\n# b\r\n[[environments]]\r\nid = "b"\r\nurl = "ws://h"\r\n'
)


def test_file_with_crlf_is_edited_and_stays_one() -> None:
    target = CommandTarget(("q", "x"), {"A": "1"})
    texts = {
        "added": with_environment(CRLF, "c", target, file=FILE),
        "first": with_environment(CRLF, "a", target, file=FILE, replace=True),
        "last": with_environment(CRLF, "b", target, file=FILE, replace=True),
        "default": with_default(CRLF, None, file=FILE),
        "removed": without_environment(CRLF, "b", file=FILE),
        "new default": with_default(CRLF.replace('default = "a"\r\n', ""), "b", file=FILE),
    }
    for text in texts.values():
        assert text.startswith("# mine\r\n")
        assert text.count("\n") == text.count("\r\n") == text.count("\r")
    assert dict(parse_config(texts["first"], file=FILE).environments)["a"] == target
    assert dict(parse_config(texts["last"], file=FILE).environments)["b"] == target


# The command line.


def execenv(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "execenv", *args]
    env = {**os.environ, **variables}
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=TIME_LIMIT, check=False)


def test_token_file_does_not_go_unused_where_a_variable_names_the_server(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hush\n")
    options = ("--token-file", str(tmp_path / "token"))
    done = execenv("run", *options, "--", "true", EXECENV_URL="ws://127.0.0.1:1")
    assert done.returncode == 125
    assert "--token-file is for a URL" in done.stderr
    assert "hush" not in done.stderr


def test_url_variable_that_holds_none_is_told_as_it_is() -> None:
    for value in ("local", "ssh box"):
        done = execenv("run", "--", "true", EXECENV_URL=value)
        assert done.returncode == 125
        assert f"'{value}' is no websocket URL" in done.stderr


def test_nothing_secret_is_logged_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    async def connect() -> None:
        with pytest.raises(ConnectFailed):
            async with open_environment(WebsocketTarget("ws://u:hush@127.0.0.1:1/?token=hush", "hush")):
                pytest.fail("it was opened")

    with caplog.at_level(logging.DEBUG):
        trio.run(connect)
    assert "hush" not in caplog.text


# The codec of a server that was shipped.


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":"\\ud800","a":1}',
        b'{"\\ud800":1,"b":"\\\\ud800"}',
        b'["\\ud83d\\ude00\\ude00"]',
        b'"\\uD83d\\n"',
    ],
)
def test_lone_surrogate_is_refused_wherever_it_stands(data: bytes) -> None:
    for loads in (orjson.loads, pure_json.loads):
        with pytest.raises(ValueError):
            loads(data)


@pytest.mark.parametrize(
    "data",
    [b'{"a":"\\ud83d\\ude00","a":1}', b'"\\\\ud800"', b'"\\\\\\uD83D\\uDe00x\\\\"', b'["\\u0041\\ud7ff"]'],
)
def test_pairs_of_surrogates_are_taken(data: bytes) -> None:
    assert pure_json.loads(data) == orjson.loads(data)


def test_variable_with_blanks_only_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXECENV_URL", " \t")
    assert UrlProvider("EXECENV_URL").read() is None
