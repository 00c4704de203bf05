"""`Environment.sandboxed`: what is left of an environment under a sandbox, apart from what is enforced."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import trio

from execenv import Environment, NotSupported, PathUri, SandboxProfile, UsageError, open_environment
from execenv.integrations.httpx import EnvironmentTransport
from execenv.remote.connection import open_remote
from execenv.server import open_local_sessions
from execenv.server.listen import serve_channel
from execenv.testing import open_fake_environment
from execenv.transports.memory import memory_pair
from tests.conftest import time_limit
from tests.fakes import only
from tests.http_origin import open_origin

READ_ONLY = SandboxProfile.read_only()


async def test_session_is_that_of_the_environment_also_when_that_comes_later() -> None:
    async with time_limit(), open_local_sessions() as sessions, trio.open_nursery() as nursery:
        ours, theirs = memory_pair()
        nursery.start_soon(serve_channel, theirs, sessions)
        async with open_remote(only(ours), "memory", connect=False) as remote:
            environment = Environment(remote)
            confined = await environment.sandboxed(READ_ONLY)
            assert confined.session_id is None
            assert confined.status is environment.status
            assert await confined.probe() == "ready"
            assert confined.session_id == environment.session_id is not None


async def test_information_is_that_of_the_environment_without_what_is_refused(tmp_path: Path) -> None:
    async with open_environment("local") as environment:
        whole = await environment.info()
        confined = await (await environment.sandboxed(READ_ONLY)).info()
        assert confined.cwd == whole.cwd
        assert {name for name, has in confined.capabilities.items() if not has} == {
            "environmentConfigRead",
            "fsWatchMissing",
        }
        assert confined.capabilities.keys() == whole.capabilities.keys()
        elsewhere = await environment.sandboxed(READ_ONLY, cwd=tmp_path)
        assert (await elsewhere.info()).cwd == PathUri.from_native(str(tmp_path))
        with pytest.raises(NotSupported, match="nothing can be watched"):
            async with elsewhere.files.watch_missing(["x"]):
                pass


async def test_requests_go_as_far_as_the_network_of_the_profile() -> None:
    online = SandboxProfile.read_only(network="enabled")
    async with time_limit(), open_origin() as origin, open_environment("local") as environment:
        for profile, reached in ((READ_ONLY, 0), (online, 1)):
            transport = EnvironmentTransport(await environment.sandboxed(profile))
            async with httpx.AsyncClient(transport=transport) as client:
                if reached:
                    assert (await client.get(origin.url("/echo"))).status_code == 200
                else:
                    with pytest.raises(httpx.UnsupportedProtocol, match="no network"):
                        await client.get(origin.url("/echo"))
            assert len(origin.received) == reached


async def test_paths_of_the_environment_outside_are_of_another_one(tmp_path: Path) -> None:
    async with open_environment("local") as environment:
        confined = await environment.sandboxed(READ_ONLY, cwd=environment.path(str(tmp_path)))
        with pytest.raises(UsageError, match="another environment"):
            await confined.run(["true"], cwd=environment.path(str(tmp_path)))


async def test_fake_environment_refuses_what_it_cannot_enforce() -> None:
    async with open_fake_environment() as environment:
        with pytest.raises(NotSupported, match="cannot be put under a sandbox"):
            await environment.sandboxed(READ_ONLY)
