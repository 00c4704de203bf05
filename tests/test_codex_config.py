"""What `environmentConfig/read` answers: layers of files, and only the keys that were asked for."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from execenv import Environment, PathUri, RpcError, open_environment
from execenv.errors import InternalError, InvalidParams
from execenv.local.codex_config import MAX_BYTES, read_config
from execenv.protocol import EnvironmentConfig, EnvironmentConfigReadParams
from tests.conftest import open_memory

USER = """
model = "one"
secret = "not asked for"
[mcp_servers.a]
command = "foo"
args = ["x", "y"]
env = { A = "1" }
[mcp_servers.b]
url = "http://x"
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CODEX_HOME with a configuration."""
    monkeypatch.setenv("CODEX_HOME", str(tmp_path / "codex"))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "codex").mkdir()
    (tmp_path / "codex" / "config.toml").write_text(USER)
    return tmp_path


def ask(
    home: Path, *keys: Sequence[str], requirements: Sequence[Sequence[str]] = (), cwd: Path | None = None
) -> EnvironmentConfig:
    params = EnvironmentConfigReadParams(
        PathUri.from_native(str(cwd or home)), tuple(map(tuple, keys)), tuple(map(tuple, requirements))
    )
    return read_config(params, system=str(home / "etc"))


def layers(config: EnvironmentConfig) -> list[tuple[str, object]]:
    """The kind of each layer, and what is in it."""
    return [(layer.source.split(" (")[0], tomllib.loads(layer.toml)) for layer in config.config.layers]


def test_only_what_was_asked_for_is_said(home: Path) -> None:
    found = ask(home, ["mcp_servers", "a"], ["model"], ["missing"], ["model", "inside a string"])
    servers = {"a": {"command": "foo", "args": ["x", "y"], "env": {"A": "1"}}}
    assert layers(found) == [("user", {"mcp_servers": servers, "model": "one"})]
    assert found.config.cloud_insertion_index == 0
    [layer] = found.config.layers
    assert layer.source == f"user ({home}/codex/config.toml)"
    assert layer.base_dir == found.codex_home_dir == PathUri.from_native(str(home / "codex"))
    assert found.user_home_dir == PathUri.from_native(str(home))
    assert found.hostname == os.uname().nodename


def test_file_without_the_keys_is_no_layer(home: Path) -> None:
    assert ask(home, ["missing"]).config.layers == ()


def test_without_files_there_are_no_layers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEX_HOME")
    found = ask(home, ["model"], requirements=[["x"]])
    assert (found.config.layers, found.requirements.layers) == ((), ())
    assert found.codex_home_dir == PathUri.from_native(str(home / ".codex"))


def test_overlapping_keys_are_one_value(home: Path) -> None:
    [(_, found)] = layers(ask(home, ["mcp_servers"], ["mcp_servers", "b", "url"]))
    assert found == {"mcp_servers": tomllib.loads(USER)["mcp_servers"]}


def test_layers_of_the_system_and_of_its_administrator_surround_that_of_the_user(home: Path) -> None:
    (home / "etc").mkdir()
    (home / "etc" / "config.toml").write_text('model = "system"')
    (home / "etc" / "managed_config.toml").write_text('model = "managed"')
    (home / "etc" / "requirements.toml").write_text('policies = ["never"]\nother = 1')
    found = ask(home, ["model"], requirements=[["policies"]])
    assert layers(found) == [
        ("system", {"model": "system"}),
        ("user", {"model": "one"}),
        ("legacy managed_config.toml", {"model": "managed"}),
    ]
    assert found.config.cloud_insertion_index == 1
    [layer] = found.requirements.layers
    assert (layer.source, tomllib.loads(layer.toml)) == (
        f"{home}/etc/requirements.toml",
        {"policies": ["never"]},
    )
    assert found.requirements.cloud_insertion_index == 1


@pytest.mark.parametrize(("trust", "trusted"), [("trusted", True), ("untrusted", False), (None, False)])
def test_project_counts_only_where_the_user_trusts_it(home: Path, trust: str | None, trusted: bool) -> None:
    project = home / "project é"
    (project / ".codex").mkdir(parents=True)
    (project / ".codex" / "config.toml").write_text('model = "of the project"')
    if trust is not None:
        text = USER + f'[projects."{project}"]\ntrust_level = "{trust}"\n'
        (home / "codex" / "config.toml").write_text(text)
    kinds = [kind for kind, _ in layers(ask(home, ["model"], cwd=project))]
    assert kinds == (["user", "project"] if trusted else ["user"])


def test_file_that_is_no_toml_is_named_with_its_line(home: Path) -> None:
    (home / "codex" / "config.toml").write_text('good = 1\nmodel = u"\n')
    with pytest.raises(InternalError, match=r"codex/config\.toml:2:9: "):
        ask(home, ["model"])


@pytest.mark.parametrize("content", [b"\xff", b"#" * (MAX_BYTES + 1)])
def test_file_that_cannot_be_read_is_named(home: Path, content: bytes) -> None:
    (home / "codex" / "config.toml").write_bytes(content)
    with pytest.raises(InternalError, match=r"failed to load executor-local config: .*codex/config\.toml: "):
        ask(home, ["model"])


def test_directory_in_the_place_of_the_file_is_named(home: Path) -> None:
    (home / "codex" / "config.toml").unlink()
    (home / "codex" / "config.toml").mkdir()
    with pytest.raises(InternalError, match=r"config\.toml: Is a directory \(os error 21\)"):
        ask(home, ["model"])


def test_working_directory_of_another_system_is_refused() -> None:
    params = EnvironmentConfigReadParams(PathUri.parse("file:///C:/x"), (("model",),), ())
    with pytest.raises(InvalidParams, match="'file:///C:/x' is invalid on 'linux'"):
        read_config(params)


async def test_answer_is_the_same_over_the_wire(home: Path) -> None:
    params = EnvironmentConfigReadParams(PathUri.from_native(str(home)), (("model",),), ())

    async def through(environment: Environment) -> EnvironmentConfig:
        return await environment._backend.read_config(params)

    with trio.fail_after(30):
        async with open_environment("local") as local, open_memory() as (remote, _):
            assert await through(local) == await through(remote)


@pytest.mark.parametrize(
    ("config_paths", "words"),
    [
        ((), "at least one config or requirements path is required"),
        (((),), "TOML paths must contain at least one key segment"),
    ],
)
async def test_request_without_a_key_is_refused(
    config_paths: tuple[tuple[str, ...], ...], words: str
) -> None:
    params = EnvironmentConfigReadParams(PathUri.parse("file:///"), config_paths, ())
    with trio.fail_after(30):
        async with open_memory() as (remote, _):
            with pytest.raises(RpcError, match=words):
                await remote._backend.read_config(params)
