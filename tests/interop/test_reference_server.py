"""The contract over a released codex's own exec-server, by a websocket and by our relay: what our client
promises, whoever serves.

`DIFFERENCES` says what is not so there, and why.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from _pytest.mark import ParameterSet

from execenv import Environment, open_environment
from execenv.targets import RelayTarget
from tests.conftest import ANY_PORT, SERVER_VARIABLES, run_websocket_server, time_limit
from tests.contract import (
    test_detached,
    test_ending,
    test_files,
    test_http,
    test_input,
    test_output,
    test_run,
    test_transfer,
    test_tty,
    test_variables,
)
from tests.interop.codex import ProcessMark, require_codex
from tests.relay_processes import BOX, run_relay, wait_for_executor
from tests.test_cuts import CUTS, Body, check_restart, open_cuttable

pytestmark = pytest.mark.interop

Contract = Callable[[Environment], Awaitable[None]]

MODULES: tuple[ModuleType, ...] = (
    test_run,
    test_input,
    test_output,
    test_variables,
    test_tty,
    test_ending,
    test_detached,
    test_http,
    test_files,
    test_transfer,
)

NO_CALL = "there is no such call"
NO_NAMES = "what is not UTF-8 is U+FFFD in every answer, which leads nowhere"
NO_TRANSFER = "files are written in place, and neither permissions nor times can be set"
NO_RECEIPT = "process/terminate is not waited for, says nothing of what was ended, and spares daemons"

DIFFERENCES = {
    "test_closing_stdin_ends_it_behind_all_that_was_sent": NO_CALL,
    "test_terminal_takes_another_size_and_tells_the_program": NO_CALL,
    "test_sending_to_an_ended_process_says_broken": "a write just after the exit may be accepted",
    "test_arg0_is_what_a_program_on_a_terminal_sees": "arg0 is looked up as the program there",
    "test_missing_working_directory_is_not_started_on_a_terminal": "it is started in the home directory",
    "test_death_by_signal_on_a_terminal_is_128_and_its_number": "on a terminal the status is 1",
    "test_interrupt_without_a_trap_ends_with_130": "on a terminal the status is 1",
    "test_terminate_lets_a_trap_run": "there is SIGKILL only",
    "test_leaving_the_block_ends_the_whole_tree": NO_RECEIPT,
    "test_leaving_the_block_by_an_error_ends_the_whole_tree": NO_RECEIPT,
    "test_leaving_the_block_by_cancellation_ends_the_whole_tree": NO_RECEIPT,
    "test_leaving_the_block_ends_what_an_exited_process_left_behind": NO_RECEIPT,
    "test_kill_ends_the_whole_tree": NO_RECEIPT,
    "test_block_ends_a_descendant_that_holds_the_output": NO_RECEIPT,
    "test_run_ends_what_the_program_left_behind": NO_RECEIPT,
    "test_run_that_leaves_nothing_behind_signals_nobody": NO_RECEIPT,
    "test_program_on_a_terminal_leaves_nothing_behind": NO_RECEIPT,
    "test_killed_program_is_gone": NO_RECEIPT,
    "test_metadata_says_the_permissions": NO_CALL,
    "test_rename": NO_CALL,
    "test_set_metadata": NO_CALL,
    "test_atomic_write_replaces_the_file": NO_CALL,
    "test_atomic_write_that_fails_changes_nothing": NO_CALL,
    "test_atomic_write_that_is_cancelled_changes_nothing": NO_CALL,
    "test_atomic_write_follows_no_links": NO_CALL,
    "test_metadata_of_a_time_before_1970": "it is told as 0, which is unknown",
    "test_copy_of_a_file_onto_itself_loses_nothing": "it is emptied there",
    "test_link_itself_is_removed_where_links_are_not_followed": "it is refused",
    "test_names_that_are_not_utf8_are_found": NO_NAMES,
    "test_tree_has_names_that_are_not_utf8": NO_NAMES,
    "test_watches_side_by_side": "there is one watch at a time: the next takes its place",
    "test_file_keeps_its_permissions_and_time": NO_TRANSFER,
    "test_tree_keeps_permissions_and_times": NO_TRANSFER,
    "test_what_is_there_is_left_alone": NO_TRANSFER,
    "test_file_goes_on_where_it_was_cut": NO_TRANSFER,
    "test_tree_goes_on_where_it_was_cut": NO_TRANSFER,
    "test_atomic_transfer": NO_TRANSFER,
    "test_what_is_private_is_so_while_it_arrives": NO_TRANSFER,
}
SOMETIMES = {
    "test_program_on_a_terminal_leaves_nothing_behind",  # what the hangup ends may be gone by the first look
    "test_sending_to_an_ended_process_says_broken",
}
"""Differences that are a matter of timing."""


def contracts() -> list[Contract]:
    """Every contract test; each takes an environment and nothing else."""
    return [value for module in MODULES for name, value in vars(module).items() if name.startswith("test_")]


def _parameter(contract: Contract) -> ParameterSet:
    name = contract.__name__
    reason = DIFFERENCES.get(name)
    marks = [] if reason is None else [pytest.mark.xfail(reason=reason, strict=name not in SOMETIMES)]
    return pytest.param(contract, id=name.removeprefix("test_"), marks=marks)


@contextmanager
def run_reference(home: str) -> Iterator[str]:
    codex, mark = require_codex(), ProcessMark()
    env = {"PATH": os.environ["PATH"], "HOME": home, "CODEX_HOME": home, **SERVER_VARIABLES, **mark.env}
    with run_websocket_server([str(codex), "exec-server", "--listen", ANY_PORT], env) as server:
        yield server.url
    mark.kill()  # what it does not end, such as daemons


@pytest.fixture(scope="module")
def relayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayTarget]:
    """A reference behind our relay, encrypted."""
    codex, mark, home = require_codex(), ProcessMark(), str(tmp_path_factory.mktemp("codex"))
    with run_relay(tmp_path_factory.mktemp("relay"), proxied=False) as relay:
        env = {"PATH": os.environ["PATH"], "HOME": home, "CODEX_HOME": home, **SERVER_VARIABLES, **mark.env}
        env["CODEX_API_KEY"] = relay.executor_token
        argv = [str(codex), "exec-server", "--remote", relay.url, "--environment-id", BOX]
        with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            try:
                wait_for_executor(relay)
                yield RelayTarget(relay.url, BOX, relay.harness_token)
            finally:
                mark.kill()
                process.wait()


@pytest.fixture(scope="module")
def reference_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_reference(str(tmp_path_factory.mktemp("codex"))) as url:
        yield url


@pytest.fixture(params=["websocket", "relay"])
async def environment(request: pytest.FixtureRequest) -> AsyncIterator[Environment]:
    target = request.getfixturevalue("reference_url" if request.param == "websocket" else "relayed")
    async with time_limit(), open_environment(target) as environment:
        yield environment


@pytest.mark.parametrize("contract", [_parameter(contract) for contract in contracts()])
async def test_reference(contract: Contract, environment: Environment) -> None:
    await contract(environment)


def test_differences_name_contracts() -> None:
    assert DIFFERENCES.keys() >= SOMETIMES
    assert DIFFERENCES.keys() <= {contract.__name__ for contract in contracts()}


@pytest.mark.parametrize("body", CUTS, ids=lambda body: body.__name__)
async def test_reference_behind_cuts(
    body: Body, reference_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    async with open_cuttable(reference_url) as (env, proxy):
        await body(env, proxy, str(tmp_path_factory.mktemp("folder")))


async def test_reference_that_was_restarted(
    reference_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with run_reference(str(tmp_path_factory.mktemp("codex"))) as other_url:
        await check_restart(other_url, reference_url)
