"""Contract of the working directory and the environment variables of a program."""

from __future__ import annotations

import os
import tempfile

from execenv import Environment, EnvPolicy, PathUri
from tests.conftest import SERVER_VARIABLES
from tests.fakes import program_file


async def test_working_directory_is_where_the_program_runs(environment: Environment) -> None:
    with tempfile.TemporaryDirectory(prefix="é ☃ %41 ") as folder:
        where = os.path.realpath(folder)  # noqa: ASYNC240 - no slower than any call
        for cwd in (where, PathUri.from_native(where)):
            done = await environment.run(["pwd"], cwd=cwd)
            assert done.stdout is not None
            assert done.stdout.decode() == where + "\n"


async def test_relative_program_is_looked_up_in_the_working_directory(environment: Environment) -> None:
    with program_file("#!/bin/sh\necho found\n") as program:
        folder, _, name = program.rpartition("/")
        assert (await environment.run([f"./{name}"], cwd=folder)).stdout == b"found\n"


async def test_without_cwd_it_is_that_of_the_environment(environment: Environment) -> None:
    info = await environment.info()
    assert info.cwd is not None
    assert (await environment.run(["pwd"])).stdout == info.cwd.to_native() + b"\n"


async def variables(
    environment: Environment,
    *,
    env: dict[str, str] | None = None,
    extra_env: dict[str, str] | None = None,
    env_policy: EnvPolicy | None = None,
) -> dict[str, str]:
    done = await environment.run(["/usr/bin/env", "-0"], env=env, extra_env=extra_env, env_policy=env_policy)
    assert done.stdout is not None
    pairs = (entry.partition("=") for entry in done.stdout.decode().split("\0")[:-1])
    return {name: value for name, _, value in pairs}


async def test_env_is_the_complete_environment(environment: Environment) -> None:
    wanted = {"ONE": "1", "EMPTY": "", "UNICODE": "é ☃", "LINES": "a\nb=c"}
    assert await variables(environment, env=wanted) == wanted
    assert await variables(environment, env={}) == {}


async def test_extra_env_is_laid_over_env(environment: Environment) -> None:
    assert await variables(environment, env={"A": "1", "B": "1"}, extra_env={"B": "2"}) == {
        "A": "1",
        "B": "2",
    }


async def test_without_env_all_is_inherited(environment: Environment) -> None:
    inherited = await variables(environment)
    assert inherited.items() >= SERVER_VARIABLES.items()
    changed = await variables(environment, extra_env={"CONTRACT_PLAIN": "changed", "NEW": "new"})
    assert changed == inherited | {"CONTRACT_PLAIN": "changed", "NEW": "new"}


async def test_policy_excludes_secrets_unless_told_otherwise(environment: Environment) -> None:
    kept = await variables(environment, env_policy=EnvPolicy("all", True, (), {}, ()))
    assert {"CONTRACT_PLAIN", "CONTRACT_SECRET"} <= kept.keys()
    filtered = await variables(environment, env_policy=EnvPolicy("all", False, (), {}, ()))
    assert "CONTRACT_PLAIN" in filtered
    assert "CONTRACT_SECRET" not in filtered


async def test_policy_excludes_then_sets(environment: Environment) -> None:
    policy = EnvPolicy("all", True, ("contract_pl?in", "[a-z]*"), {"CONTRACT_SET": "set"}, ())
    found = await variables(environment, env_policy=policy)
    assert "CONTRACT_PLAIN" not in found
    assert found["CONTRACT_SECRET"] == "secret"
    assert found["CONTRACT_SET"] == "set"


async def test_include_only_filters_what_was_set_but_not_what_is_laid_over(environment: Environment) -> None:
    policy = EnvPolicy("all", True, (), {"CONTRACT_SET": "set", "OTHER": "other"}, ("contract_*",))
    found = await variables(environment, env_policy=policy, extra_env={"LAST": "last"})
    assert found == SERVER_VARIABLES | {"CONTRACT_SET": "set", "LAST": "last"}


async def test_inherit_none_starts_from_nothing(environment: Environment) -> None:
    policy = EnvPolicy("none", True, (), {"CONTRACT_SET": "set"}, ())
    assert await variables(environment, env_policy=policy) == {"CONTRACT_SET": "set"}


async def test_inherit_core_keeps_the_usual_ones(environment: Environment) -> None:
    found = await variables(environment, env_policy=EnvPolicy("core", True, (), {}, ()))
    assert "PATH" in found
    assert not found.keys() & SERVER_VARIABLES.keys()


async def test_arg0_is_what_the_program_sees_as_its_name(environment: Environment) -> None:
    done = await environment.run(["sh", "-c", "echo $0"], arg0="another name")
    assert done.stdout == b"another name\n"
