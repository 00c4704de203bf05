"""`execenv doctor` tells what this machine can enforce, by trying it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from execenv import _doctor_command
from execenv.errors import NotSupported
from execenv.sandbox import landlock
from tests.conftest import time_limit
from tests.test_cli import execenv, on_terminal

REAL = shutil.which("bwrap")

pytestmark = pytest.mark.skipif(sys.platform != "linux" or REAL is None, reason="needs Linux and bubblewrap")

VERDICTS = ["processes confined", "files confined", "network off"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory on PATH, and beside it where claims are kept."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


def put(place: Path, body: str) -> None:
    path = place / "bin" / "bwrap"
    path.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
    path.chmod(0o755)


def table(stdout: bytes) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The rows by their names, and the verdicts."""
    rows, _, verdicts = stdout.decode().partition("\n\n")
    head, *lines = rows.splitlines()
    assert head.split() == ["WHAT", "STATE", "FOUND"]
    state, found = head.index("STATE"), head.index("FOUND")
    return (
        {line[:state].strip(): (line[state:found].strip(), line[found:]) for line in lines},
        dict(line.split(": ", 1) for line in verdicts.splitlines()),
    )


async def test_where_all_works_the_status_is_0(place: Path) -> None:
    put(place, f'exec {REAL} "$@"')
    stdout, stderr, status = await execenv("doctor")
    assert (stderr, status) == (b"", 0)
    rows, verdicts = table(stdout)
    assert verdicts == dict.fromkeys(VERDICTS, "yes")
    assert rows["bubblewrap"][0] == "ok"
    assert f"{place}/bin/bwrap" in rows["bubblewrap"][1]
    for feature in ("user namespaces", "/proc", "network namespaces", "system call filters"):
        assert rows[feature] == ("ok", "tried")
    assert rows["mount points"] == ("ok", f"{place}/run/execenv")
    assert [rows[name][0] for name in ("relay", "noise")] == ["ok", "ok"]
    assert rows["Landlock"][0] == ("ok" if landlock.abi() else "none")
    assert rows["unshare"] == ("none", "not on PATH; of util-linux")
    assert not (place / "run" / "execenv").exists()


async def test_without_bubblewrap_only_the_network_can_be_taken(place: Path) -> None:
    stdout, stderr, status = await execenv("doctor")
    assert (stderr, status) == (b"", 1)
    rows, verdicts = table(stdout)
    assert rows["bubblewrap"][0] == "missing"
    assert "apt install bubblewrap" in rows["bubblewrap"][1]
    assert "user namespaces" not in rows
    assert verdicts["network off"] == "yes"
    for name in VERDICTS[:2]:
        assert verdicts[name].startswith(
            "no: cannot enforce the sandbox: there is no bubblewrap (bwrap) on PATH"
        )


async def test_what_is_refused_is_a_row(place: Path) -> None:
    put(place, f'case "$*" in *--proc*) echo no proc; exit 1;; esac\nexec {REAL} "$@"')
    rows, verdicts = table((await execenv("doctor"))[0])
    assert rows["/proc"] == ("missing", "refused, see bubblewrap")
    assert rows["network namespaces"] == ("ok", "tried")
    assert "systempaths=unconfined" in rows["bubblewrap"][1]
    assert verdicts["files confined"].endswith("(status 1: no proc)")
    put(place, f'[ $# = 1 ] && exec {REAL} "$@"\nexit 1')
    rows, _ = table((await execenv("doctor"))[0])
    assert rows["user namespaces"] == ("missing", "refused, see bubblewrap")
    assert rows["/proc"] == ("none", "not tried without user namespaces")


async def test_place_for_claims_that_cannot_be_used_is_told(place: Path) -> None:
    put(place, f'exec {REAL} "$@"')
    (place / "run" / "execenv").mkdir()
    (place / "run" / "execenv").chmod(0o777)
    stdout, _, status = await execenv("doctor")
    rows, verdicts = table(stdout)
    assert status == 1
    assert rows["mount points"][0] == "missing"
    assert "is not this user's alone" in verdicts["processes confined"]
    assert verdicts["files confined"] == "yes"


async def test_json_has_the_same_for_programs(place: Path) -> None:
    for body, works in ((f'exec {REAL} "$@"', True), ("exit 1", False)):
        put(place, body)
        stdout, stderr, status = await execenv("doctor", "--json")
        assert (stderr, status) == (b"", 0 if works else 1)
        found = json.loads(stdout)
        assert (found["system"], found["uid"], found["landlock"]) == ("linux", os.geteuid(), landlock.abi())
        (bubblewrap,) = found["bubblewraps"]
        assert bubblewrap["path"] == f"{place}/bin/bwrap"
        assert (bubblewrap["problem"] is None) == works
        for name in ("processesConfined", "filesConfined"):
            assert found[name]["enforced"] == works
            assert (found[name]["reason"] is None) == works
        assert found["networkOff"] == {"enforced": True, "reason": None}
        assert {"name", "state", "detail"} == found["checks"][0].keys()


async def test_on_a_terminal_it_is_a_table() -> None:
    async with on_terminal("doctor") as terminal:
        await terminal.expect(b"network off: ")


async def test_machine_with_unknown_system_calls_can_enforce_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(**options: object) -> bytes:
        raise NotSupported("the system calls of riscv64 are not known here")

    put(place, f'exec {REAL} "$@"')
    monkeypatch.setattr(_doctor_command, "compile_filter", unknown)
    async with time_limit():
        report = await _doctor_command.examine()
    assert [reason for _, _, reason in report.verdicts] == [
        "no: the system calls of riscv64 are not known here"
    ] * 3
    states = {check.name: check.state for check in report.checks}
    assert (states["bubblewrap"], states["system call filters"]) == ("ok", "missing")


async def test_other_systems_can_enforce_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    report = await _doctor_command.examine()
    assert {reason for _, _, reason in report.verdicts} == {"no: sandboxes take Linux"}
