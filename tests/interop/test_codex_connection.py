"""A released codex and its connection: who idles is asked for a sign of life, and a cut is no end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from execenv import Environment
from execenv.protocol import ProcessReadResult
from execenv.remote.connection import open_remote
from execenv.server import open_local_sessions
from execenv.server.listen import Listener
from execenv.server.sessions import Sessions
from execenv.transports import websocket
from execenv.transports._frames import Event, FrameCodec, Pong
from execenv.transports.websocket import WebsocketChannel
from tests.fakes import only
from tests.interop.codex import ExecResult, ProcessMark, real_exec_server, run_codex
from tests.interop.conftest import exec_command

pytestmark = pytest.mark.interop


@pytest.fixture
def pings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens to all websockets here: a word for each ping and answer, the reason of each failure."""
    happened: list[str] = []
    ping, fail, receive = WebsocketChannel._ping, WebsocketChannel.fail, FrameCodec.receive

    def note_ping(self: WebsocketChannel) -> trio.Event:
        happened.append("ping")
        return ping(self)

    def note_failure(self: WebsocketChannel, loss: str) -> None:
        happened.append(loss)
        fail(self, loss)

    def note_pongs(self: FrameCodec, data: bytes) -> list[Event]:
        events = receive(self, data)
        happened.extend("pong" for event in events if isinstance(event, Pong))
        return events

    monkeypatch.setattr(FrameCodec, "receive", note_pongs)
    monkeypatch.setattr(WebsocketChannel, "_ping", note_ping)
    monkeypatch.setattr(WebsocketChannel, "fail", note_failure)
    return happened


def check(pings: list[str]) -> None:
    assert set(pings) == {"ping", "pong"}
    assert pings.count("ping") > 10
    assert pings.count("pong") > 10


async def test_codex_that_idles_answers_the_pings_of_our_server(
    codex: Path, tmp_path: Path, pings: list[str]
) -> None:
    with trio.fail_after(60):
        async with open_local_sessions() as sessions, trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            server = Listener(sessions, ping_interval=0.2, pong_timeout=1.0)
            nursery.start_soon(server.serve, [listener])
            run = await run_codex(
                codex,
                f"ws://127.0.0.1:{listener.socket.getsockname()[1]}",
                [exec_command("sleep 4; echo awake")],
                cwd=tmp_path,
                home=tmp_path / "client",
                mark=ProcessMark(),
            )
            nursery.cancel_scope.cancel()
    assert run.returncode == 0, run.stderr
    assert [ExecResult.parse(text).output for text in run.tool_outputs] == ["awake\n"]
    check(pings)


async def test_exec_server_of_codex_answers_our_pings(codex: Path, tmp_path: Path, pings: list[str]) -> None:
    with trio.fail_after(60):
        async with real_exec_server(codex, tmp_path / "server", {}) as server:
            channel = await websocket.connect(server.url, ping_interval=0.2, pong_timeout=1.0)
            async with open_remote(only(channel), "websocket") as remote:
                done = await Environment(remote).run(["sh", "-c", "sleep 4; echo awake"])
    assert done.stdout == b"awake\n"
    check(pings)


async def test_codex_goes_on_after_a_cut_although_the_beginning_of_the_output_is_not_kept(
    codex: Path, tmp_path: Path
) -> None:
    """The answer to its `process/read` then says so, in a member that it does not know."""
    flag, go = tmp_path / "written", tmp_path / "go"
    command = f"head -c 3000000 /dev/zero | tr '\\0' x; touch {flag}; while ! [ -e {go} ]; do sleep 0.1; done"
    answers: list[ProcessReadResult] = []

    async def cut(sessions: Sessions) -> None:
        while not flag.exists():  # noqa: ASYNC110 - what a command does has no event here
            await trio.sleep(0.01)
        (session,) = [one for one in sessions._by_id.values() if one.processes.running]
        (process,) = [entry.process for entry in session.processes._entries.values()]
        assert process is not None
        read = process.read

        async def note_read(*args: Any) -> ProcessReadResult:
            answers.append(await read(*args))
            return answers[-1]

        process.read = note_read  # type: ignore[method-assign, assignment]
        assert isinstance(session.channel, WebsocketChannel)
        session.channel.fail("cut")
        while not answers:  # noqa: ASYNC110
            await trio.sleep(0.01)
        go.touch()

    with trio.fail_after(60):
        async with open_local_sessions() as sessions, trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            nursery.start_soon(Listener(sessions).serve, [listener])
            nursery.start_soon(cut, sessions)
            run = await run_codex(
                codex,
                f"ws://127.0.0.1:{listener.socket.getsockname()[1]}",
                [exec_command(command + "; echo; echo the end")],
                cwd=tmp_path,
                home=tmp_path / "client",
                mark=ProcessMark(),
            )
            nursery.cancel_scope.cancel()
    assert answers[0].evicted_bytes > 1_000_000
    [result] = [ExecResult.parse(text) for text in run.tool_outputs]
    assert result.output.endswith("the end\n")
    assert result.exit_code == 0
