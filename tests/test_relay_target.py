"""Environments behind a relay, all but the wire: how they are named, checked, opened and shown."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import define, evolve, field
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

import execenv
from execenv import ConnectFailed, RelayTarget, UsageError, WebsocketTarget
from execenv._doctor_command import examine
from execenv.local import open_local
from execenv.open import open_environment
from execenv.relay import extras, harness
from execenv.relay.extras import relay_problem, require_extra
from execenv.relay.noise import noise_available
from execenv.targets import (
    check_target,
    environment_id_problem,
    is_harness_url,
    is_relay_url,
    parse_relay_url,
    registry_problem,
)
from execenv.testing import open_memory_server
from execenv.transports.channel import Channel
from tests.test_cli import check_one_line
from tests.test_cli_env import Here, file, here, write  # noqa: F401 - fixtures

SECRET = "hush-hush"
URL = "relay+https://registry.example/base/env_1"
TARGET = RelayTarget("https://registry.example/base", "env_1")

# The target itself.


@pytest.mark.parametrize(
    ("url", "registry", "id_"),
    [
        (URL, "https://registry.example/base", "env_1"),
        ("relay+https://h/e", "https://h", "e"),
        ("relay+https://h:8443/e/", "https://h:8443", "e"),
        ("relay+https://h//a//e", "https://h//a", "e"),
        ("relay+http://localhost:1/e", "http://localhost:1", "e"),
        ("relay+http://127.9.0.1/e", "http://127.9.0.1", "e"),
        ("relay+http://[::1]:1/a/e", "http://[::1]:1/a", "e"),
        (f"relay+https://h/{'A-b_9' * 51}e", "https://h", f"{'A-b_9' * 51}e"),
    ],
)
def test_last_segment_of_the_url_is_the_id_and_the_rest_the_registry(
    url: str, registry: str, id_: str
) -> None:
    target = parse_relay_url(url, bearer_token=SECRET, connect_timeout=1, initialize_timeout=2)
    assert target == RelayTarget(registry, id_, SECRET, 1, 2)
    assert (target.security, target.read_token()) == ("noise", SECRET)
    assert SECRET not in repr(target) + target.url
    assert parse_relay_url(target.url) == RelayTarget(registry, id_)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", ["is no URL of an environment behind a relay", "relay+https://REGISTRY/ENVIRONMENT_ID"]),
        ("https://h/e", ["'https://h/e' is no URL", "relay+https://REGISTRY/ENVIRONMENT_ID"]),
        ("relay+", ["a registry has an https:// URL"]),
        ("relay+wss://h/e", ["'relay+wss://h/e'", "a registry has an https:// URL"]),
        ("relay+HTTPS://h/e", ["a registry has an https:// URL"]),
        ("relay+http://h.example/e", ["this machine alone", "use https://"]),
        ("relay+http://127.0.0.1.example/e", ["this machine alone"]),
        ("relay+http://0.0.0.0/e", ["this machine alone"]),
        ("relay+https://", ["names no host"]),
        ("relay+https:///e", ["names no host"]),
        ("relay+https://:1/e", ["names no host"]),
        ("relay+https://h:0/e", ["its host or its port cannot be read"]),
        ("relay+https://h:/e", ["its host or its port cannot be read"]),
        ("relay+https://h:99999/e", ["its host or its port cannot be read"]),
        ("relay+https://[::1/e", ["its host or its port cannot be read"]),
        ("relay+https://h\\x/e", ["its host or its port cannot be read"]),
        ("relay+https://h/a b/e", ["the character ' '"]),
        ("relay+https://hé/e", ["the character 'é'"]),
        ("relay+https://h/\x1b[2J/e", ["the character '\\x1b'", "\\x1b[2J"]),
        ("relay+https://h", ["names no environment", "relay+https://REGISTRY/ENVIRONMENT_ID"]),
        ("relay+https://h//", ["names no environment", "relay+https://REGISTRY/ENVIRONMENT_ID"]),
        ("relay+https://h/..", ["names no environment", "only ASCII letters, digits, - and _"]),
        ("relay+https://h/e%2Ff", ["only ASCII letters, digits, - and _"]),
        (f"relay+https://h/{'e' * 257}", ["256 characters at most"]),
        (f"relay+https://me:{SECRET}@h/e", ["'relay+https://***@h/e'", "names a user"]),
        (f"relay+https://{SECRET}@h/e", ["names a user", "a token is given beside the URL"]),
        (f"relay+https://me:{SECRET}:/?x@h/e", ["relay+https://***"]),
        ("relay+https://@h/e", ["names a user"]),
        (f"relay+https://h/e?token={SECRET}", ["'relay+https://h/e'", "it has a query"]),
        ("relay+https://h/e?", ["it has a query"]),
        (f"relay+https://h/e#{SECRET}", ["'relay+https://h/e'", "it has a fragment"]),
        (f"relay+https://h/e#?{SECRET}", ["it has a fragment"]),
    ],
)
def test_url_that_cannot_be_is_refused_with_what_is_wrong_and_no_secret(url: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_relay_url(url, bearer_token=SECRET)
    for word in words:
        assert word in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\x1b" not in str(caught.value)


PARTS = st.sampled_from(
    [
        *("relay+", "https://", "http://", "ws://", "h.example", "localhost", "[::1]", ":1", ":", "/", "//"),
        *("e", "env_1", "?", "#", "@", "%2f", "..", " ", "\\", "\n", "é", "\udc80", "[", "]"),
    ]
)


@given(st.lists(PARTS).map("".join) | st.lists(PARTS).map(lambda parts: "relay+https://h" + "".join(parts)))
def test_any_text_is_a_target_that_can_be_used_or_is_refused(text: str) -> None:
    try:
        target = parse_relay_url(text)
    except UsageError:
        return
    check_target(target)
    assert is_relay_url(text)
    assert parse_relay_url(target.url) == target
    assert text.rstrip("/").endswith(f"/{target.environment_id}")
    assert target.url.startswith(("relay+https://", "relay+http://localhost", "relay+http://[::1]"))


@given(
    st.sampled_from(["https://h", "https://h.example:1/a", "http://127.0.0.1:1", "http://localhost/b/c"]),
    st.text("/", max_size=3),
    st.from_regex(r"[A-Za-z0-9_-]{1,256}", fullmatch=True),
)
def test_registry_and_id_make_a_url_that_gives_both_back(registry: str, slashes: str, id_: str) -> None:
    target = RelayTarget(registry + slashes, id_)
    check_target(target)
    assert target.registry == registry
    assert parse_relay_url(target.url) == target


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (evolve(TARGET, registry=""), "a registry has an https:// URL"),
        (evolve(TARGET, registry="https://"), "names no host"),
        (
            evolve(TARGET, registry=f"https://u:{SECRET}@h"),
            r"'https://\*\*\*@h' cannot be used: it names a user",
        ),
        (evolve(TARGET, registry=f"https://h?{SECRET}"), "'https://h' cannot be used: it has a query"),
        (evolve(TARGET, registry=f"https://h#{SECRET}"), "'https://h' cannot be used: it has a fragment"),
        (evolve(TARGET, registry="http://10.0.0.1"), "this machine alone"),
        (evolve(TARGET, environment_id=""), "environment_id '' cannot be used: .*cannot be empty"),
        (evolve(TARGET, environment_id="a/b"), "environment_id 'a/b' cannot be used: .*only ASCII"),
        (evolve(TARGET, environment_id="é"), "only ASCII letters, digits, - and _"),
        (evolve(TARGET, environment_id="a\n"), "only ASCII letters, digits, - and _"),
        (evolve(TARGET, environment_id="e" * 257), "256 characters at most"),
        (evolve(TARGET, bearer_token=f"{SECRET}\n"), "bearer_token cannot stand in a header"),
        (evolve(TARGET, bearer_token=""), "bearer_token cannot stand in a header"),
        (evolve(TARGET, account_id=f"{SECRET}\x00"), "account_id cannot stand in a header"),
        (evolve(TARGET, account_id=" "), "account_id cannot stand in a header"),
        (evolve(TARGET, security="Clear"), "security cannot be 'Clear': it is 'noise' or 'clear'"),  # type: ignore[arg-type]
        (evolve(TARGET, connect_timeout=-1), "connect_timeout cannot be -1"),
        (evolve(TARGET, initialize_timeout=math.nan), "initialize_timeout cannot be nan"),
    ],
)
async def test_target_that_cannot_be_used_is_refused_before_anything_is_opened(
    dialled: Dialled, target: RelayTarget, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        async with open_environment(target):
            raise AssertionError("it was opened")
    assert SECRET not in str(caught.value) + repr(target).replace(repr(target.account_id), "")
    assert dialled.targets == []


def test_target_at_the_limits_can_be_used() -> None:
    for target in (
        TARGET,
        evolve(TARGET, environment_id="e" * 256, security="clear", account_id="an account"),
        evolve(TARGET, registry="http://[::1]", connect_timeout=0, initialize_timeout=math.inf),
    ):
        check_target(target)


def test_problems_are_told_one_at_a_time() -> None:
    assert registry_problem(TARGET.registry) is environment_id_problem(TARGET.environment_id) is None
    assert registry_problem("https://u@h?x") == registry_problem("https://u@h")


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (URL, True),
        ("relay+ftp://h", True),
        ("RELAY+https://h/e", True),
        ("relay+x", False),
        ("relay://h/e", False),
        ("ws://relay+https://h", False),
        ("relay+/x://", False),
    ],
)
def test_url_of_a_relay_is_told_from_other_texts(text: str, is_one: bool) -> None:
    assert is_relay_url(text) == is_one


@pytest.mark.parametrize(
    ("url", "is_one"),
    [
        ("ws://h/rendezvous/e?role=harness", True),
        ("wss://h?x=1&role=harness&sig=a%2Bb", True),
        ("ws://h?role=%68arness", True),
        ("ws://h", False),
        ("ws://h/role=harness", False),
        ("ws://h?role=executor", False),
        ("ws://h?role=harnesses", False),
        ("ws://h?xrole=harness", False),
        ("ws://h#?role=harness", False),
        ("ws://[h?role=harness", False),
    ],
)
def test_websocket_of_a_relay_is_known_by_its_role(url: str, is_one: bool) -> None:
    assert is_harness_url(url) == is_one


# Opening.


@define
class Dialled:
    """What stands for the wire: each connection leads to a server of this machine, in memory.

    Attributes:
        targets: what was to be reached, in order of the connections.
        recoveries: with which every dialler was made.
    """

    targets: list[RelayTarget | WebsocketTarget] = field(factory=list)
    recoveries: list[float] = field(factory=list)

    @asynccontextmanager
    async def dial(self, target: RelayTarget | WebsocketTarget) -> AsyncIterator[Channel]:
        self.targets.append(target)
        async with open_memory_server(open_local) as server, server.dial() as channel:
            yield channel


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> Dialled:
    dialled = Dialled()

    class Dialer:
        def __init__(self, target: RelayTarget, recovery: float) -> None:
            self.name = f"relay {target.registry}/{target.environment_id}"
            self._target = target
            dialled.recoveries.append(recovery)

        def dial(self) -> object:
            return dialled.dial(self._target)

    monkeypatch.setattr(harness, "RelayDialer", Dialer)
    monkeypatch.setattr(harness, "dial_clear", lambda target, recovery: dialled.dial(target))
    return dialled


async def test_environment_is_opened_by_url_or_target_with_its_token_and_times(dialled: Dialled) -> None:
    with trio.fail_after(30):
        async with open_environment(
            URL, bearer_token=SECRET, connect_timeout=3, initialize_timeout=4, recovery=5
        ) as env:
            assert (await env.run(["echo", "in"])).stdout == b"in\n"
            assert env.name == "relay https://registry.example/base/env_1"
        clear = RelayTarget("http://127.0.0.1:1", "e", bearer_token_env="X", security="clear")
        async with open_environment(clear, recovery=math.inf):
            pass
    assert dialled.targets == [RelayTarget(TARGET.registry, "env_1", SECRET, 3, 4), clear]
    assert dialled.recoveries == [5, math.inf]


async def test_websocket_with_the_role_of_a_harness_is_opened_in_clear_text(dialled: Dialled) -> None:
    url = f"ws://127.0.0.1:1/rendezvous/e?role=harness&sig={SECRET}"
    with trio.fail_after(30):
        async with open_environment(url, bearer_token=SECRET) as env:
            assert (await env.run(["echo", "in"])).stdout == b"in\n"
            assert env.name == "relay ws://127.0.0.1:1/rendezvous/e"
        assert dialled.targets == [WebsocketTarget(url, SECRET)]
        with pytest.raises(ConnectFailed, match="cannot connect to ws://127"):
            async with open_environment("ws://127.0.0.1:1/rendezvous/e?role=executor"):
                raise AssertionError("it was opened")
    assert len(dialled.targets) == 1


@pytest.mark.parametrize("recovery", [0, 45])
async def test_lost_connection_is_made_again_as_that_of_a_websocket(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, recovery: float
) -> None:
    async with open_memory_server(open_local) as server:

        class Dialer:
            name = "relay"

            def __init__(self, target: RelayTarget, recovery: float) -> None:
                self.dial = server.dial

        monkeypatch.setattr(harness, "RelayDialer", Dialer)
        async with open_environment(TARGET, recovery=recovery) as env:
            before = env.session_id
            server.cut()
            if recovery:
                await env.info()
                assert env.session_id == before
            else:
                with pytest.raises(execenv.ConnectionLost):
                    await env.probe()
                await wait_all_tasks_blocked()
                await env.probe()  # by a connection of its own, to another session
                assert env.session_id != before


async def test_unconnected_environment_dials_when_it_is_used(dialled: Dialled) -> None:
    with trio.fail_after(30):
        async with open_environment(TARGET, connect=False) as env:
            assert dialled.targets == []
            await env.probe()
            assert dialled.targets == [TARGET]


@pytest.mark.parametrize("text", ["relay+https://h", "relay+wss://h/e", f"relay+https://{SECRET}@h/e", "x"])
async def test_text_that_is_no_environment_opens_nothing(dialled: Dialled, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        async with open_environment(text):
            raise AssertionError("it was opened")
    assert SECRET not in str(caught.value)
    assert dialled.targets == []


# What is not installed.


def without_protobuf(patch: pytest.MonkeyPatch) -> None:
    for name in ("google.protobuf", "google.protobuf.runtime_version"):
        patch.setitem(sys.modules, name, None)


def protobuf_without_its_base(patch: pytest.MonkeyPatch) -> None:
    patch.delitem(sys.modules, "execenv.relay.schema_pb2", raising=False)
    patch.setitem(sys.modules, "google.protobuf.internal", None)


def old_protobuf(patch: pytest.MonkeyPatch) -> None:
    from google.protobuf import runtime_version

    def refuse(*args: object) -> None:
        raise runtime_version.VersionError("gencode 7 runtime 6")

    patch.delitem(sys.modules, "execenv.relay.schema_pb2", raising=False)
    patch.setattr(runtime_version, "ValidateProtobufRuntimeVersion", refuse)


def without_cryptography(patch: pytest.MonkeyPatch) -> None:
    for name in ("cryptography", "cryptography.exceptions"):
        patch.setitem(sys.modules, name, None)


def old_cryptography(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.mlkem", None)


def cryptography_of_an_old_openssl(patch: pytest.MonkeyPatch) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import mlkem

    class Key:
        @classmethod
        def generate(cls) -> Key:
            raise UnsupportedAlgorithm("ML-KEM is not supported")

    patch.setattr(mlkem, "MLKEM768PrivateKey", Key)


NO_RELAY = (
    (without_protobuf, "protobuf is not installed"),
    (protobuf_without_its_base, "protobuf cannot be used"),
    (old_protobuf, "protobuf is too old: gencode 7 runtime 6"),
)
NO_NOISE = (
    (without_cryptography, "cryptography is not installed"),
    (old_cryptography, "cryptography is too old, it knows no ML-KEM"),
    (cryptography_of_an_old_openssl, "the OpenSSL that it was built with has none"),
)


async def check_missing(target: RelayTarget | WebsocketTarget | str, words: str, extra: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        async with open_environment(target, connect=False):
            raise AssertionError("it was opened")
    assert f"pip install 'execenv[{extra}]'" in str(caught.value)


@pytest.mark.parametrize(("spoil", "words"), NO_RELAY)
async def test_without_protobuf_no_relay_is_contacted_and_the_extra_is_named(
    dialled: Dialled, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    assert relay_problem() is noise_available() is None
    spoil(monkeypatch)
    await check_missing(URL, words, "noise")
    await check_missing(evolve(TARGET, security="clear"), words, "relay")
    await check_missing("ws://h?role=harness", words, "relay")
    assert (dialled.recoveries, dialled.targets) == ([], [])
    assert noise_available() is None


@pytest.mark.parametrize(("spoil", "words"), NO_NOISE)
async def test_without_cryptography_nothing_goes_in_clear_text_instead(
    dialled: Dialled, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    spoil(monkeypatch)
    await check_missing(URL, words, "noise")
    assert (dialled.recoveries, dialled.targets) == ([], [])
    require_extra("clear")
    with trio.fail_after(30):
        async with open_environment(evolve(TARGET, security="clear")):
            pass


def test_targets_and_their_files_need_no_extra() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('google.protobuf', 'cryptography')));"
        "import execenv; from execenv.config import parse_config;"
        'text = \'[[environments]]\\nid = "a"\\nregistry = "https://h"\\nenvironment_id = "e"\';'
        "print(parse_config(text, file='f').environments[0][1].url);"
        "print(execenv.RelayTarget('https://h', 'e').url)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("relay+https://h/e\n" * 2, "")


async def rows() -> dict[str, tuple[str, str]]:
    return {check.name: (check.state, check.detail) for check in (await examine()).checks}


@pytest.mark.parametrize("platform", [sys.platform, "darwin"])
async def test_doctor_tells_whether_relays_can_be_used(
    monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    found = await rows()
    assert found["relay"] == ("ok", "frames by protobuf")
    assert found["noise"] == ("ok", "a key of ML-KEM-768 was made")


@pytest.mark.parametrize(("spoil", "words"), [*NO_RELAY, *NO_NOISE])
async def test_doctor_tells_what_a_relay_lacks_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    spoil(monkeypatch)
    found = await rows()
    lacks_relay = (spoil, words) in NO_RELAY
    if lacks_relay:
        assert found["relay"][0] == "none"
        assert words in found["relay"][1]
        assert found["relay"][1].endswith(extras.INSTALL["clear"])
    else:
        assert found["relay"][0] == "ok"
    assert found["noise"][0] == "none"
    assert words in found["noise"][1]
    assert found["noise"][1].endswith(extras.INSTALL["noise"])


# The command line.


def entry(id_: str, *lines: str) -> str:
    first = f'[[environments]]\nid = "{id_}"\nregistry = "https://registry.example/base"\n'
    return f'{first}environment_id = "env_1"\n' + "".join(f"{line}\n" for line in lines)


def test_relay_is_added_listed_shown_and_removed(here: Here, file: Path) -> None:  # noqa: F811
    here.good("env", "add", "plain", URL)
    assert file.read_text() == entry("plain")
    options = ("--token-env", "A_TOKEN", "--security", "clear", "--account-id", "an-account")
    here.good("env", "add", "full", URL, *options, "--connect-timeout", "2", "--default")
    assert file.read_text().endswith(
        entry(
            "full",
            'security = "clear"',
            'account_id = "an-account"',
            "connect_timeout_sec = 2",
            'auth_bearer_token_env = "A_TOKEN"',
        )
    )
    plain = here.good("env", "list")
    assert re.search(rf"^\* +full +relay +{re.escape(URL)} ", plain, re.MULTILINE)
    assert json.loads(here.good("env", "show", "--json")) == {
        "name": "full",
        "kind": "relay",
        "registry": "https://registry.example/base",
        "environmentId": "env_1",
        "security": "clear",
        "accountId": "an-account",
        "token": "in the variable A_TOKEN",
        "connectTimeout": 2.0,
        "initializeTimeout": 10.0,
        "source": str(file),
        "default": True,
        "inUse": True,
    }
    shown = here.good("env", "show", "plain")
    assert re.search("^security: +noise$", shown, re.MULTILINE)
    assert "accountId" not in shown
    here.good("env", "add", "full", URL, "--replace", "--token-file", "/t")
    assert file.read_text().endswith(entry("full", 'auth_bearer_token_file = "/t"'))
    here.good("env", "remove", "plain")
    assert file.read_text().count("[[environments]]") == 1


def test_secrets_of_a_relay_are_not_listed(here: Here, file: Path) -> None:  # noqa: F811
    write(file, entry("a", f'auth_bearer_token = "{SECRET}"'))
    for args in (["list"], ["list", "--json"], ["show", "a"], ["show", "a", "--json"]):
        assert SECRET not in here.good("env", *args)
    assert "in the file" in here.good("env", "show", "a")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["relay+https://h"], ("names no environment",)),
        (["relay+http://h.example/e"], ("use https://",)),
        ([f"relay+https://{SECRET}@h/e"], ("names a user",)),
        ([f"relay+https://h/e?{SECRET}"], ("it has a query",)),
        ([URL, "--token-env", "X", "--token-file", "f"], ("both set",)),
        ([URL, "--token-env", "A=B"], ("name of a variable",)),
        ([URL, "--account-id", ""], ("account_id cannot stand in a header",)),
        ([URL, "--cwd", "/", "--bootstrap"], ("--cwd and --bootstrap are for commands",)),
        ([URL, "--connect-timeout", "-1"], ("connect_timeout_sec cannot be -1",)),
        (["ws://h", "--security", "clear"], ("--security is for relay+https:// URLs",)),
        (
            ["--security", "noise", "--account-id", "x", "--", "sh"],
            ("--security and --account-id are for relay",),
        ),
    ],
)
def test_relay_that_cannot_be_is_not_added(
    here: Here,  # noqa: F811
    file: Path,  # noqa: F811
    args: list[str],
    words: tuple[str, ...],
) -> None:
    here.bad("env", "add", "x", *args, words=words)
    assert not file.exists()


def test_security_is_noise_or_clear(here: Here, file: Path) -> None:  # noqa: F811
    here.bad("env", "add", "x", URL, "--security", "none", words=("'none' is not one of",), status=2)
    assert not file.exists()


def test_commands_take_the_url_of_a_relay_with_the_token_of_the_command_line(
    here: Here,  # noqa: F811
    dialled: Dialled,
    tmp_path: Path,
) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    (tmp_path / "a").write_text("content")
    token = ("--token-file", str(tmp_path / "token"))
    assert here.good("run", "--env", URL, *token, "--recovery", "7", "--", "echo", "in") == "in\n"
    assert here.good("ls", *token, f"{URL}:{tmp_path}/a") == f"{tmp_path}/a\n"
    assert here.good("cat", *token, "--recovery", "forever", f"{URL}:{tmp_path}/a") == "content"
    here.good("cp", "-q", *token, f"{URL}:{tmp_path}/a", str(tmp_path / "b"))
    assert (tmp_path / "b").read_text() == "content"
    assert here.good("cat", *token, "--alias", f"box={URL}", f"box:{tmp_path}/b") == "content"
    assert json.loads(here.good("info", "--env", URL, *token, "--json"))["environment"].startswith("relay ")
    assert set(dialled.targets) == {evolve(TARGET, bearer_token=SECRET)}
    assert dialled.recoveries[:3] == [7, 45, math.inf]


def test_commands_take_the_name_of_a_relay_with_its_own_token(
    here: Here,  # noqa: F811
    file: Path,  # noqa: F811
    dialled: Dialled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXECENV_TOKEN", "of-the-variable")
    (tmp_path / "a").write_text("content")
    write(file, 'default = "box"\n' + entry("box", 'auth_bearer_token_env = "A_TOKEN"', 'security = "clear"'))
    assert here.good("run", "--env", "box", "--", "echo", "in") == "in\n"
    assert here.good("run", "--", "echo", "in") == "in\n"
    assert here.good("cat", f"box:{tmp_path}/a") == here.good("cat", f"{tmp_path}/a") == "content"
    assert set(dialled.targets) == {evolve(TARGET, bearer_token_env="A_TOKEN", security="clear")}
    stdout, _, _ = here.run("run", "--env", "box", "--token-file", str(tmp_path / "a"), "true")
    assert stdout == b""


def test_check_takes_names_and_urls_of_relays(
    here: Here,  # noqa: F811
    file: Path,  # noqa: F811
    dialled: Dialled,
) -> None:
    write(file, f"include_local = false\n{entry('box')}")
    reports = json.loads(here.good("env", "check", "box", URL, "--json"))
    assert [(report["name"], report["kind"], report["ok"]) for report in reports] == [
        ("box", "relay", True),
        (URL, "relay", True),
    ]
    assert {report["target"] for report in reports} == {URL}
    assert dialled.targets == [TARGET, TARGET]


def test_variable_of_ours_may_name_a_relay(
    here: Here,  # noqa: F811
    dialled: Dialled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EXECENV_URL", URL)
    monkeypatch.setenv("EXECENV_TOKEN", SECRET)
    assert here.good("run", "--", "echo", "in") == "in\n"
    assert dialled.targets == [evolve(TARGET, bearer_token_env="EXECENV_TOKEN")]
    assert SECRET not in here.good("env", "list")


@pytest.mark.parametrize("args", [["info", "--env", URL], ["cat", f"{URL}:/a"]])
def test_command_without_what_a_relay_takes_says_how_to_get_it(
    here: Here,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
) -> None:
    without_cryptography(monkeypatch)
    stdout, stderr, status = here.run(*args)
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, "cryptography is not installed", "pip install 'execenv[noise]'")


def test_bootstrap_is_not_for_a_relay(here: Here) -> None:  # noqa: F811
    here.bad("info", "--env", URL, "--bootstrap", words=("--bootstrap is for a command",))
