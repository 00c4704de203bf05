"""Ours with ours over a relay, each a process of its own, and both legs cut wherever they can be."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from execenv import ConnectFailed, Environment, open_environment
from execenv.targets import Security, Target
from tests.conftest import time_limit
from tests.relay_processes import Relay, RelayServer, open_executor, open_proxied, run_relay
from tests.relay_proxy import Leg, Way
from tests.relay_scenarios import BEGINNINGS, check_everything, cuts, first, leave_marks, seen, work

pytestmark = pytest.mark.no_cover  # what these run is measured elsewhere, and they take their time

PAIRINGS = ("noise", "clear", "clear url")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayServer]:
    with run_relay(tmp_path_factory.mktemp("relay")) as server:
        yield server


@pytest.fixture
async def relay(server: RelayServer) -> AsyncIterator[Relay]:
    async with time_limit(60), open_proxied(server) as relay:
        yield relay


def security_of(pairing: str) -> Security:
    return "noise" if pairing == "noise" else "clear"


def target_of(relay: Relay, pairing: str) -> Target:
    return relay.clear_target if pairing == "clear url" else relay.target(security_of(pairing))


@pytest.fixture(params=PAIRINGS)
def pairing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def environment(relay: Relay, pairing: str) -> AsyncIterator[Environment]:
    async with (
        open_executor(relay, security_of(pairing)),
        open_environment(target_of(relay, pairing)) as environment,
    ):
        yield environment


async def test_everything_works(environment: Environment, tmp_path: Path) -> None:
    await check_everything(environment, tmp_path)


async def check_cuts(
    env: Environment, relay: Relay, folder: Path, leg: Leg, places: list[tuple[Way, int]]
) -> None:
    session_id = env.session_id
    done = cuts(relay.proxy, leg, places)
    works = 0
    while done() < len(places):
        await work(env, folder, str(works))
        works += 1
    assert relay.proxy.sockets[leg] >= 1 + len([index for _, index in places if index])
    assert env.session_id == session_id


async def test_nothing_is_lost_or_doubled_by_cuts_of_the_harness_leg(
    environment: Environment, relay: Relay, tmp_path: Path
) -> None:
    """What there is is cut in the midst of work, then an upgrade, its answer, the resume, its answer, and
    work again. No call fails."""
    places: list[tuple[Way, int]] = [("out", 5), ("in", 0), ("out", 0), ("in", 1), ("out", 1)]
    await check_cuts(environment, relay, tmp_path, "harness", [*places, ("in", 4), ("out", 20)])


@pytest.mark.parametrize("pairing", ["noise", "clear"], indirect=True)
@pytest.mark.parametrize("places", [[("in", 1), ("out", 0)], [("out", 1), ("in", 2)]])
async def test_nothing_is_lost_or_doubled_by_cuts_of_the_executor_leg(
    environment: Environment, relay: Relay, tmp_path: Path, places: list[tuple[Way, int]]
) -> None:
    await check_cuts(environment, relay, tmp_path, "executor", places)


@pytest.mark.parametrize("pairing", ["noise", "clear"], indirect=True)
@pytest.mark.parametrize("leg", ["harness", "executor"])
async def test_socket_that_only_its_own_end_has_lost_locks_nobody_out(
    environment: Environment, relay: Relay, tmp_path: Path, leg: Leg
) -> None:
    session_id = environment.session_id
    await work(environment, tmp_path, "before")
    relay.proxy.cut_client(leg)
    await work(environment, tmp_path, "after")
    assert environment.session_id == session_id


async def test_beginning_that_is_cut_fails_at_once_and_the_next_is_well(relay: Relay) -> None:
    """A first connection is not made again by itself; it says who has not answered, and not what was said."""
    async with open_executor(relay):
        for number, (name, wanted) in enumerate(BEGINNINGS.items()):
            relay.proxy.watch, met = first(wanted, ("cut", "tear")[number % 2])
            with pytest.raises(ConnectFailed) as caught:
                async with open_environment(relay.target()):
                    pass
            assert met.is_set(), name
            assert f"127.0.0.1:{relay.proxy.port}" in str(caught.value), name
            assert relay.server.harness_token not in str(caught.value)
            async with open_environment(relay.target()) as env:
                assert (await env.run(["echo", name])).stdout == name.encode() + b"\n"


REMAKING = ["the look-up", "its answer", "the upgrade", "its answer 101"]


@pytest.mark.parametrize("pairing", ["noise", "clear"], indirect=True)
async def test_lost_websocket_is_made_again_whatever_of_that_is_cut(
    environment: Environment, relay: Relay, tmp_path: Path
) -> None:
    for name in REMAKING:
        relay.proxy.watch, met = first(BEGINNINGS[name], "cut")
        relay.proxy.cut("harness")
        await work(environment, tmp_path, name.replace(" ", "-"))
        assert met.is_set(), name


# What the relay can read.


@pytest.mark.parametrize("security", ["noise", "clear"])
async def test_relay_reads_nothing_of_what_is_encrypted(
    relay: Relay, tmp_path: Path, security: Security
) -> None:
    """In clear text, where all of it is there to be read, the same search finds it on both legs."""
    recorded = relay.proxy.recorded = []
    async with open_executor(relay, security), open_environment(relay.target(security)) as env:
        markers = await leave_marks(env, tmp_path)
        relay.proxy.cut("harness")
        await leave_marks(env, tmp_path)
    legs: tuple[Leg, ...] = ("executor", "harness")
    everything = {(leg, name) for leg in legs for name in markers}
    assert seen(recorded, markers) == (set() if security == "noise" else everything)
