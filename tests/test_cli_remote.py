"""`execenv serve --remote` as a user meets it: real processes, and a relay that is the test's or ours."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from attrs import evolve, frozen

import execenv
from execenv.relay.keys import PublicKey
from execenv.targets import RelayTarget, Security
from tests.fake_relay import (
    API_KEY,
    ID,
    REGISTRATION_ID,
    SIGNATURE,
    Answer,
    FakeRegistry,
    FakeRendezvous,
    clear,
    error_answer,
    open_fake_registry,
    open_fake_rendezvous,
    registered,
)
from tests.fakes import Watched
from tests.test_cli import EXECENV, Running, check_one_line, started
from tests.test_cli import execenv as run_execenv

TIME_LIMIT = 30.0


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXECENV_API_KEY", "CODEX_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text(API_KEY + "\n")
    return str(path)


@frozen
class Fakes:
    registry: FakeRegistry
    rendezvous: FakeRendezvous

    @property
    def shown(self) -> str:
        return f"{self.rendezvous.base}/rendezvous/{ID}"

    def serve(self, *more: str) -> list[str]:
        """The command line of an executor."""
        return [*EXECENV, "serve", "--remote", self.registry.url, "--environment-id", ID, *more]


@pytest.fixture
async def fakes() -> AsyncIterator[Fakes]:
    async with open_fake_registry() as registry, open_fake_rendezvous() as rendezvous:
        registry.answer("register", registered(rendezvous.url))
        yield Fakes(registry, rendezvous)


async def end(running: Running, signum: signal.Signals = signal.SIGTERM) -> tuple[bytes, bytes, int]:
    running.process.send_signal(signum)
    return await running.rest()


# Registering.


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_executor_says_when_it_is_registered_and_a_signal_ends_it_well(
    signum: signal.Signals, fakes: Fakes, key_file: str
) -> None:
    async with started(fakes.serve("--api-key-file", key_file)) as running:
        assert await running.expect(b"\n") == f"registered {ID} at {fakes.shown}\n".encode()
        await fakes.rendezvous.wait_until(lambda: bool(fakes.rendezvous.sockets))
        assert await end(running, signum) == (b"", b"", 0)
    (asked,) = fakes.registry.asked
    assert asked.line == f"POST /cloud/environment/{ID}/register HTTP/1.1"
    assert asked.header("authorization") == f"Bearer {API_KEY}"
    assert re.fullmatch(
        rb'\{"security_profile":"noise_hybrid_ik_v1","executor_public_key":\{.*\}\}', asked.body
    )


async def test_keys_are_made_once_for_each_process(fakes: Fakes, key_file: str) -> None:
    for plan in ([403, 101], [101]):
        fakes.rendezvous.plan = plan
        async with started(fakes.serve("--api-key-file", key_file)) as running:
            await running.expect(b"registered")
            await end(running)
    first, again, other = [
        PublicKey.from_json(asked.json["executor_public_key"]) for asked in fakes.registry.asked
    ]
    assert first == again != other


async def test_clear_text_is_registered_without_a_body_if_it_is_asked_for(
    fakes: Fakes, key_file: str
) -> None:
    fakes.registry.answer("register", clear(fakes.rendezvous.url))
    async with started(fakes.serve("--api-key-file", key_file, "--remote-transport", "clear")) as running:
        await running.expect(b"registered")
        assert (await end(running))[2] == 0
    assert [asked.body for asked in fakes.registry.asked] == [b""]


async def test_registry_of_clear_text_is_no_reason_to_speak_it(fakes: Fakes, key_file: str) -> None:
    fakes.registry.answer("register", clear(fakes.rendezvous.url))
    stdout, stderr, status = await run_execenv(*fakes.serve("--api-key-file", key_file)[3:])
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, "its security profile is none and not noise_hybrid_ik_v1")
    assert fakes.rendezvous.heads == []


async def test_lost_socket_is_told_on_stderr_and_registration_only_once_on_stdout(
    fakes: Fakes, key_file: str
) -> None:
    fakes.rendezvous.plan = [1012, 101]
    async with started(fakes.serve("--api-key-file", key_file)) as running:
        await fakes.rendezvous.wait_until(lambda: bool(fakes.rendezvous.sockets))
        stdout, stderr, status = await end(running)
    assert (stdout, status) == (f"registered {ID} at {fakes.shown}\n".encode(), 0)
    told = (
        rf"the connection to {fakes.shown} ended: websocket closed with code 1012; retry in (0\.[5-9]|1\.0) s"
    )
    check_one_line(stderr)
    assert re.search(told, stderr.decode())
    assert fakes.registry.count("register") == 1


# The API key.


async def test_key_of_stdin_is_shown(fakes: Fakes) -> None:
    async with started(fakes.serve("--api-key-stdin")) as running:
        assert running.process.stdin is not None
        await running.process.stdin.send_all(b"from-stdin\n")
        await running.process.stdin.aclose()
        await running.expect(b"registered")
        await end(running)
    assert fakes.registry.asked[0].header("authorization") == "Bearer from-stdin"


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"CODEX_API_KEY": "theirs"}, "theirs"),
        ({"CODEX_API_KEY": "theirs", "EXECENV_API_KEY": "ours"}, "ours"),
    ],
)
async def test_key_of_a_variable_is_shown(
    variables: dict[str, str], shown: str, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    async with started(fakes.serve()) as running:
        await running.expect(b"registered")
        await end(running)
    assert fakes.registry.asked[0].header("authorization") == f"Bearer {shown}"


async def test_without_a_key_it_says_where_one_is_looked_for(fakes: Fakes) -> None:
    stdout, stderr, status = await run_execenv(*fakes.serve()[3:])
    assert (stdout, status, fakes.registry.asked) == (b"", 1, [])
    check_one_line(stderr, "--api-key-file", "--api-key-stdin", "EXECENV_API_KEY", "CODEX_API_KEY")


async def test_both_sources_by_option_are_too_many(fakes: Fakes, key_file: str) -> None:
    _, stderr, status = await run_execenv(*fakes.serve("--api-key-file", key_file, "--api-key-stdin")[3:])
    assert (status, fakes.registry.asked) == (1, [])
    check_one_line(stderr, "from one place")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://registry.invalid", "add --allow-registry registry.invalid"),
        ("https://registry.invalid:8443/base", "add --allow-registry registry.invalid:8443"),
        ("http://api.openai.com", "would get credentials in clear"),
        ("https://user:hidden@registry.invalid", "without user"),
        ("ftp://127.0.0.1", "should be https:// or http://"),
    ],
)
async def test_registry_that_may_not_see_the_key_is_refused(url: str, words: str, key_file: str) -> None:
    stdout, stderr, status = await run_execenv(
        "serve", "--remote", url, "--environment-id", ID, "--api-key-file", key_file
    )
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, words)
    assert b"hidden" not in stderr


async def test_registry_that_is_allowed_is_asked(key_file: str) -> None:
    args = ["--remote", "https://registry.invalid", "--environment-id", ID, "--api-key-file", key_file]
    allow = ["--allow-registry", "other.invalid", "--allow-registry", "registry.invalid"]
    _, stderr, status = await run_execenv("serve", *args, *allow)
    assert status == 1
    check_one_line(stderr, "cannot ask the registry https://registry.invalid")


# What ends it.


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error_answer(401, "c", "who are you?"), "authentication failed (401): who are you?"),
        (error_answer(403), "authentication failed (403): empty or malformed error body"),
        (error_answer(503, "busy", "later"), "request failed (503, busy): later"),
        (Answer(status=307, headers=(("location", "http://127.0.0.1:1/"),)), "request failed (307)"),
        (registered(environment_id="other"), "not about the environment"),
        (registered(executor_registration_id=""), "executor_registration_id is missing or blank"),
        (registered("http://relay.example"), "should be wss:// or ws://"),
    ],
)
async def test_registration_that_fails_ends_it_with_one_line(
    answer: Answer, words: str, fakes: Fakes, key_file: str
) -> None:
    fakes.registry.answer("register", answer)
    stdout, stderr, status = await run_execenv(*fakes.serve("--api-key-file", key_file)[3:])
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, words)
    assert len(fakes.registry.asked) == 1


async def test_registry_that_is_not_there_ends_it_with_one_line(key_file: str) -> None:
    async with open_fake_registry() as registry:
        url = registry.url
    args = ["--remote", url, "--environment-id", ID, "--api-key-file", key_file]
    stdout, stderr, status = await run_execenv("serve", *args)
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, f"cannot ask the registry {url}", "refused")


async def test_executor_that_was_replaced_ends_with_one_line(fakes: Fakes, key_file: str) -> None:
    fakes.rendezvous.plan = [4409]
    stdout, stderr, status = await run_execenv(*fakes.serve("--api-key-file", key_file)[3:])
    assert (stdout, status) == (f"registered {ID} at {fakes.shown}\n".encode(), 1)
    check_one_line(stderr, "a newer executor has taken the place of this one")


async def test_conflict_is_waited_for_and_a_signal_ends_that_too(fakes: Fakes, key_file: str) -> None:
    conflict = error_answer(503, "registration_conflict")
    fakes.registry.answer("register", conflict, conflict, evolve(conflict, delay=1000))
    async with started(fakes.serve("--api-key-file", key_file)) as running:
        assert running.process.stderr is not None
        told = b""
        while told.count(b"\n") < 2:
            told += await running.process.stderr.receive_some()
        stdout, stderr, status = await end(running)
    assert (stdout, stderr, status) == (b"", b"", 0)
    assert told.count(b"request failed (503, registration_conflict): ") == 2


# Options.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--remote", "https://openai.com"], "--remote needs --environment-id"),
        (["--remote", "https://openai.com", "--environment-id", "a/b"], "an environment id has 1 to 256"),
        (["--remote", "https://openai.com", "--environment-id", ""], "an environment id has 1 to 256"),
        (["--remote", "", "--environment-id", ID], "the URL of the registry is empty"),
        (["--remote", "https://openai.com", "--listen", "ws://127.0.0.1:0"], "--remote takes no --listen"),
        (["--remote", "https://openai.com", "--listen", "stdio"], "--remote takes no --listen"),
        (["--remote", "https://openai.com", "--ws-auth", "capability-token"], "--remote takes no"),
        (["--remote", "https://openai.com", "--ws-token-file", "token"], "--remote takes no"),
        (["--remote-transport", "clear"], "--remote-transport is for --remote"),
        (["--api-key-file", "key"], "--api-key-file is for --remote"),
        (["--api-key-stdin"], "--api-key-stdin is for --remote"),
        (["--allow-registry", "a.example"], "--allow-registry is for --remote"),
    ],
)
async def test_options_that_do_not_fit_are_refused(
    args: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXECENV_API_KEY", API_KEY)
    stdout, stderr, status = await run_execenv("serve", *args)
    assert (stdout, status) == (b"", 1)
    check_one_line(stderr, words)


async def test_transport_that_is_none_is_refused() -> None:
    _, stderr, status = await run_execenv(
        "serve", "--remote", "https://openai.com", "--remote-transport", "direct"
    )
    assert status == 2
    check_one_line(stderr, "direct")


async def test_environment_id_without_a_registry_just_listens() -> None:
    async with started([*EXECENV, "serve", "--environment-id", ID, "--name", "box"]) as running:
        assert (await running.expect(b"\n")).startswith(b"ws://127.0.0.1:")
        assert await end(running) == (b"", b"", 0)


@pytest.mark.parametrize(
    ("module", "transport", "words"),
    [
        ("google.protobuf.runtime_version", "clear", "protobuf is not installed, or too old: pip install"),
        ("cryptography.exceptions", "noise", "pip install 'execenv[noise]'"),
    ],
)
async def test_what_is_not_installed_is_named_and_nothing_is_asked(
    module: str, transport: str, words: str, fakes: Fakes, key_file: str
) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; from execenv.cli import main; main(sys.argv[1:])"
    args = fakes.serve("--api-key-file", key_file, "--remote-transport", transport)[len(EXECENV) :]
    async with started([sys.executable, "-c", code, *args]) as running:
        stdout, stderr, status = await running.rest()
    assert (stdout, status, fakes.registry.asked) == (b"", 1, [])
    check_one_line(stderr, words)


# Logs.


async def test_log_at_debug_says_what_happens_and_no_secret(fakes: Fakes, key_file: str) -> None:
    fakes.rendezvous.plan = [403, 1000, 101]
    fakes.registry.answer(
        "register",
        error_answer(503, "registration_conflict", f"with {API_KEY}"),
        registered(fakes.rendezvous.url),
    )
    args = ("--api-key-file", key_file, "--name", "box-of-mine", "--debug")
    async with started(fakes.serve(*args)) as running:
        await fakes.rendezvous.wait_until(lambda: bool(fakes.rendezvous.sockets))
        _, stderr, status = await end(running)
    log = stderr.decode()
    assert status == 0
    for words in (
        f"box-of-mine is to be {ID} at {fakes.registry.url}",
        f"{ID}: registered at {fakes.registry.url}",
        f"{ID}: connected to {fakes.shown}",
        f"{fakes.shown} refused the websocket with status 403; registering again",
    ):
        assert words in log
    assert re.search(r"DEBUG|INFO", log)
    key = fakes.registry.asked[0].json["executor_public_key"]["x25519_public_key"]
    for secret in (API_KEY, SIGNATURE, "sig=", "Bearer", key):
        assert secret not in log
    assert REGISTRATION_ID not in log


# With our own relay, and a client of ours.


@frozen
class Relay:
    url: str
    executor_token: str
    harness_token: str


@asynccontextmanager
async def our_relay(folder: Path) -> AsyncIterator[Relay]:
    store = ["--store", str(folder / "relay.sqlite3")]
    tokens: dict[str, str] = {}
    for role in ("executor", "harness"):
        token, stderr, status = await run_execenv(
            "relay", "token", "create", "--environment", ID, "--role", role, *store
        )
        assert status == 0, stderr
        tokens[role] = token.decode().strip()
    async with started([*EXECENV, "relay", "serve", *store]) as running:
        url = (await running.expect(b"\n")).decode().strip()
        yield Relay(url, tokens["executor"], tokens["harness"])


@pytest.mark.parametrize("security", ["noise", "clear"])
async def test_programs_run_through_our_relay_without_our_key_and_end_with_the_executor(
    security: Security, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    async with our_relay(tmp_path) as relay:
        monkeypatch.setenv("EXECENV_API_KEY", relay.executor_token)
        monkeypatch.setenv("CODEX_API_KEY", "of somebody else")
        serve = ["serve", "--remote", relay.url, "--environment-id", ID, "--remote-transport", security]
        async with started([*EXECENV, *serve]) as executor:
            await executor.expect(b"registered")
            target = RelayTarget(relay.url, ID, bearer_token=relay.harness_token, security=security)
            with trio.fail_after(TIME_LIMIT):
                async with execenv.open_environment(target, recovery=0) as env:
                    done = await env.run(["sh", "-c", "echo key:$EXECENV_API_KEY; head -c 1000000 /dev/zero"])
                    assert done.stdout == b"key:\n" + bytes(1_000_000)
                    # Of the executor, which is the parent of what it starts.
                    shown = await env.run(["sh", "-c", "tr '\\0' '\\n' < /proc/$PPID/environ; env"])
                    assert shown.stdout is not None
                    assert b"PATH=" in shown.stdout
                    assert b"CODEX_API_KEY=of somebody else" in shown.stdout
                    assert relay.executor_token.encode() not in shown.stdout
                    await env.start_detached("sleeper", ["sh", "-c", "echo $$; exec sleep 1000"])
                    async with env.attach("sleeper") as process:
                        watched.add(int(await process.stdout.receive_some()))
                    stdout, _, status = await end(executor)
                    assert (stdout.count(b"\n"), status) == (1, 0)
                    await watched.wait_gone()
    watched.close()


@pytest.mark.parametrize("security", ["noise", "clear"])
async def test_newer_executor_takes_the_place_of_the_older_one_which_ends(
    security: Security, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with our_relay(tmp_path) as relay:
        monkeypatch.setenv("EXECENV_API_KEY", relay.executor_token)
        serve = ["serve", "--remote", relay.url, "--environment-id", ID, "--remote-transport", security]
        async with started([*EXECENV, *serve]) as older:
            await older.expect(b"registered")
            async with started([*EXECENV, *serve]) as newer:
                await newer.expect(b"registered")
                _, stderr, status = await older.rest()
                assert status == 1
                check_one_line(stderr, f"a newer executor has taken the place of this one for {ID}")
                assert (await end(newer))[1:] == (b"", 0)
