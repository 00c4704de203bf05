"""`execenv doctor`: what this machine can enforce and reach, and what is missing where it cannot."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Literal

import trio
from attrs import asdict, frozen

from execenv._standard_streams import one_line
from execenv._tables import print_json, print_lines, print_table
from execenv.errors import InternalError, NotSupported
from execenv.local.bubblewrap import INSTALL, NAMESPACES, Bubblewraps, Finding
from execenv.local.mount_points import MountPoints, registry_directory
from execenv.local.restrict import restricted
from execenv.relay.extras import INSTALL as RELAY_INSTALL
from execenv.relay.extras import relay_problem
from execenv.relay.noise import noise_available
from execenv.sandbox import landlock
from execenv.sandbox.seccomp import compile_filter

TIME_LIMIT = 60.0
"""Seconds for all that is tried."""

HELPERS = ("unshare", "setpriv", "setsid")

_FEATURES = (NAMESPACES, "/proc", "network namespaces", "system call filters")

_NO_SOCKET = """
import errno, socket
try:
    socket.socket(socket.AF_INET)
except OSError as error:
    print(errno.errorcode[error.errno])
"""


@frozen
class Check:
    """`state`: `"ok"`; `"missing"`, so that something cannot be enforced; `"none"`, which does no harm."""

    name: str
    state: Literal["ok", "missing", "none"]
    detail: str


@frozen
class Report:
    """What was found, and what can be enforced: `None`, or the reason why it cannot."""

    checks: tuple[Check, ...]
    bubblewraps: tuple[Finding, ...]
    processes: str | None
    files: str | None
    network: str | None

    @property
    def verdicts(self) -> tuple[tuple[str, str, str | None], ...]:
        """Names for JSON and for people, and the reason."""
        return (
            ("processesConfined", "processes confined", self.processes),
            ("filesConfined", "files confined", self.files),
            ("networkOff", "network off", self.network),
        )


async def run_doctor(as_json: bool) -> int:
    """Print what was found; the exit status is 0 if all can be enforced, else 1."""
    report = await examine()
    status = 1 if any(reason for _, _, reason in report.verdicts) else 0
    if as_json:
        await print_json(
            {
                "system": sys.platform,
                "kernel": os.uname().release,
                "machine": os.uname().machine,
                "uid": os.geteuid(),
                "landlock": landlock.abi(),
                "bubblewraps": [
                    {**asdict(found), "path": os.fsdecode(found.path)} for found in report.bubblewraps
                ],
                "checks": [asdict(check) for check in report.checks],
                **{
                    name: {"enforced": reason is None, "reason": reason}
                    for name, _, reason in report.verdicts
                },
            }
        )
        return status
    await print_table(
        ("WHAT", "STATE", "FOUND"), [(check.name, check.state, check.detail) for check in report.checks]
    )
    await print_lines(["", *(f"{name}: {reason or 'yes'}" for _, name, reason in report.verdicts)])
    return status


async def examine() -> Report:
    """Try what sandboxes are made of, as this user, here."""
    with trio.fail_after(TIME_LIMIT):
        checks = [_system(), _user(), *_relays()]
        if sys.platform != "linux":
            reason = "no: sandboxes take Linux"
            return Report(tuple(checks), (), reason, reason, reason)
        with closing(Bubblewraps(os.environ, set())) as bubblewraps:
            findings: tuple[Finding, ...] = ()
            files = None
            try:
                await bubblewraps.find()
                findings = await bubblewraps.examine()
            except InternalError as error:
                files = f"no: {one_line(error)}"
                try:
                    findings = await bubblewraps.examine()
                except InternalError:
                    findings = ()
            unknown = _unknown_machine()
            files = f"no: {unknown}" if unknown and files is None else files
            checks += _bubblewrap_checks(findings, unknown)
            checks.append(_propagation(bubblewraps.mounts_propagate))
        network = await _try_filter()
        checks.append(
            Check("filter of our own", "missing" if network else "ok", network or "socket(2) is refused")
        )
        checks.append(_landlock())
        registry = _try_registry()
        checks.append(
            Check("mount points", "missing" if registry else "ok", registry or registry_directory())
        )
        checks += map(_helper, HELPERS)
        processes = files or (f"no: {registry}" if registry else None)
        return Report(tuple(checks), findings, processes, files, f"no: {network}" if network else None)


def _system() -> Check:
    name = os.uname()
    state: Literal["ok", "missing"] = "ok" if sys.platform == "linux" else "missing"
    return Check("system", state, f"{name.sysname} {name.release}, {name.machine}")


def _user() -> Check:
    uid = os.geteuid()
    return Check("user", "ok", "root" if uid == 0 else f"uid {uid}, unprivileged")


def _relays() -> list[Check]:
    """Whether environments behind a relay can be used, and those that are encrypted from end to end."""
    relay, noise = relay_problem(), noise_available()
    without, encrypted = RELAY_INSTALL["clear"], RELAY_INSTALL["noise"]
    return [
        Check("relay", "none", f"{relay}: {without}")
        if relay
        else Check("relay", "ok", "frames by protobuf"),
        Check("noise", "none", f"{noise or relay}: {encrypted}")
        if noise or relay
        else Check("noise", "ok", "a key of ML-KEM-768 was made"),
    ]


def _unknown_machine() -> str | None:
    try:
        compile_filter(network=False)
    except NotSupported as error:
        return one_line(error)
    return None


def _bubblewrap_checks(findings: Sequence[Finding], unknown_machine: str | None) -> list[Check]:
    if not findings:
        return [Check("bubblewrap", "missing", f"not on PATH: {INSTALL}")]
    checks = []
    for found in findings:
        if found.problem is None:
            detail = f"{found.version}, {os.fsdecode(found.path)}"
            detail += ", with --argv0" if found.argv0 else ", without --argv0 (since 0.9.0; not needed)"
            checks.append(Check("bubblewrap", "ok", detail))
        else:
            checks.append(Check("bubblewrap", "missing", found.problem))
    best = next((found for found in findings if found.problem is None), findings[0])
    if best.problem is not None and not best.lacking:
        return checks  # it could not even be tried
    for feature in _FEATURES:
        if feature == "system call filters" and unknown_machine:
            checks.append(Check(feature, "missing", unknown_machine))
        elif feature in best.lacking:
            checks.append(Check(feature, "missing", "refused, see bubblewrap"))
        elif NAMESPACES in best.lacking:
            checks.append(Check(feature, "none", f"not tried without {NAMESPACES}"))
        else:
            checks.append(Check(feature, "ok", "tried"))
    return checks


def _propagation(propagates: bool) -> Check:
    if not propagates:
        return Check("later mounts", "ok", "do not propagate")
    if shutil.which("unshare") is None:
        return Check("later mounts", "missing", "propagate, and there is no unshare: install util-linux")
    return Check("later mounts", "ok", "propagate, and are cut off by unshare")


async def _try_filter() -> str | None:
    """Why a program cannot be deprived of the network without bubblewrap; `None` if it can."""
    try:
        argv = [sys.executable, "-I", "-S", "-c", _NO_SOCKET]
        command, fd = restricted(argv, env={}, arg0=None, seccomp=compile_filter(network=False))
    except (InternalError, NotSupported, OSError) as error:
        return one_line(error)
    try:
        done = await trio.run_process(
            command, env={}, pass_fds=[fd], capture_stdout=True, capture_stderr=True, check=False
        )
    finally:
        os.close(fd)
    if done.stdout == b"EPERM\n":
        return None
    said = " ".join((done.stdout + done.stderr).decode(errors="replace").split())
    return f"system calls cannot be refused: {said[-300:] or f'status {done.returncode}'}"


def _landlock() -> Check:
    version = landlock.abi()
    if version:
        return Check("Landlock", "ok", f"ABI {version}, as a second layer")
    return Check("Landlock", "none", "not in this kernel, or off: a second layer is missing, nothing else")


def _try_registry() -> str | None:
    """Why mount points cannot be kept track of; `None` if they can."""
    try:
        MountPoints().sweep()
        directory = registry_directory()
        above = directory if os.path.exists(directory) else os.path.dirname(directory)
        return None if os.access(above, os.W_OK) else f"{above} cannot be written"
    except OSError as error:
        return one_line(error)


def _helper(name: str) -> Check:
    path = shutil.which(name)
    return Check(name, "ok" if path else "none", path or "not on PATH; of util-linux")
