"""`execenv env`: environments by name, listed, edited and checked."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import trio
from attrs import asdict, define, evolve, field, frozen

from execenv._locations import Target
from execenv._standard_streams import complain, one_line, printable
from execenv._tables import print_json, print_lines, print_table
from execenv.config import (
    LOCAL,
    LOCAL_ONLY,
    Snapshot,
    close_to,
    shown,
    with_default,
    with_environment,
    without_environment,
)
from execenv.environment import Environment
from execenv.errors import ConfigError, ExecenvError, HttpFailed, MethodNotFound, UsageError
from execenv.open import open_environment
from execenv.protocol import SERVER_CAPABILITIES
from execenv.providers import all_providers, load_snapshot, our_file, read_text
from execenv.targets import (
    CONNECT_TIMEOUT,
    INITIALIZE_TIMEOUT,
    CommandTarget,
    LocalTarget,
    RelayTarget,
    Security,
    WebsocketTarget,
    is_relay_url,
    parse_relay_url,
    shown_registry,
    shown_url,
)

CHECK_TIMEOUT = 30.0
"""Seconds that an environment has for each thing that `check` asks of it."""

NOBODY = "http://127.0.0.1:9/"
"""Where hardly anybody listens: whether a request can be made shows, and nobody is asked for anything."""

# What there is.


@frozen
class Source:
    """A provider, and what it says."""

    name: str
    state: str  # "rules", "overruled", "absent" or "bad"
    snapshot: Snapshot
    error: str | None


def _sources() -> list[Source]:
    found = []
    ruled = False
    for provider in all_providers():
        error, snapshot = None, None
        try:
            snapshot = provider.read()
        except ConfigError as wrong:
            error = one_line(wrong)
        there = snapshot is not None or error is not None
        state = "absent" if not there else "overruled" if ruled else "bad" if error else "rules"
        ruled = ruled or there
        found.append(Source(provider.name, state, snapshot or Snapshot(), error))
    if not ruled:
        found.append(Source("nothing is configured", "rules", LOCAL_ONLY, None))
    return found


def _rows(sources: Sequence[Source]) -> list[dict[str, Any]]:
    rows = []
    for source in sources:
        local: tuple[tuple[str, Any], ...] = (
            ((LOCAL, LocalTarget()),) if source.snapshot.include_local else ()
        )
        for id_, target in (*local, *source.snapshot.environments):
            rules = source.state == "rules"
            rows.append(
                {
                    "name": id_,
                    "kind": _kind(target),
                    "target": _where(target),
                    "default": rules and id_ == source.snapshot.default,
                    "source": source.name,
                    "inUse": rules,
                }
            )
    return rows


def _kind(target: Target) -> str:
    if isinstance(target, WebsocketTarget):
        return "websocket"
    if isinstance(target, RelayTarget):
        return "relay"
    return "command" if isinstance(target, CommandTarget) else "local"


def _where(target: Target) -> str:
    if isinstance(target, WebsocketTarget):
        return shown_url(target.url)
    if isinstance(target, RelayTarget):
        return shown_registry(target.url)
    return shlex.join(target.argv) if isinstance(target, CommandTarget) else "this machine"


async def run_list(as_json: bool) -> int:
    sources = _sources()
    rows = _rows(sources)
    ruling = next(source for source in sources if source.state in ("rules", "bad"))
    if as_json:
        await print_json(
            {
                "rules": ruling.name,
                "default": ruling.snapshot.default,
                "environments": rows,
                "sources": [
                    {"name": source.name, "state": source.state, "error": source.error} for source in sources
                ],
            }
        )
        return 1 if ruling.error else 0
    cells = [
        ("*" if row["default"] else "", row["name"], row["kind"], row["target"], _used(row)) for row in rows
    ]
    if cells:
        await print_table(("", "NAME", "KIND", "TARGET", "SOURCE"), cells)
    lines = [""] if cells else []
    if not ruling.error:
        default = ruling.snapshot.default
        lines.append(f"default: {default}" if default else "default: none")
    for source in sources:
        because = {
            "rules": "rules, as the first that is there"
            if source.snapshot is not LOCAL_ONLY
            else "this machine",
            "overruled": f"not in use: {ruling.name} comes before it",
            "absent": "not there",
            "bad": "rules, and cannot be used",
        }[source.state]
        lines.append(f"{source.name}: {because}" + (f": {source.error}" if source.error else ""))
    await print_lines(lines)
    return 1 if ruling.error else 0


def _used(row: dict[str, Any]) -> str:
    return row["source"] if row["inUse"] else f"{row['source']} (not in use)"


async def run_show(name: str | None, as_json: bool) -> int:
    sources = _sources()
    ruling = next(source for source in sources if source.state in ("rules", "bad"))
    if name is None:
        if ruling.error:
            raise UsageError(ruling.error)
        name = ruling.snapshot.default
        if name is None:
            raise UsageError(f"there is no default environment, says {ruling.name}: name one")
    for source in sources:
        target = LocalTarget() if name == LOCAL else dict(source.snapshot.environments).get(name)
        if target is not None and (name != LOCAL or source.snapshot.include_local):
            break
    else:
        known = [row["name"] for row in _rows(sources)]
        reason = f": {ruling.error}" if ruling.error else close_to(name, known)
        raise UsageError(f"{shown(name)} is not configured{reason}")
    fields = {
        "name": name,
        **_described(target),
        "source": source.name,
        "default": source is ruling and source.snapshot.default == name,
        "inUse": source is ruling,
    }
    if as_json:
        await print_json(fields)
        return 0
    lines = []
    for key, value in fields.items():
        if value is not None:
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append(f"{key + ':':20}{text or '-'}")
    await print_lines(lines)
    return 0


def _described(target: Target) -> dict[str, Any]:
    """How it is reached, for people: values of variables and tokens left out."""
    if isinstance(target, WebsocketTarget):
        return {"kind": "websocket", "url": shown_url(target.url), **_token_and_times(target)}
    if isinstance(target, RelayTarget):
        return {
            "kind": "relay",
            "registry": shown_registry(target.registry),
            "environmentId": target.environment_id,
            "security": target.security,
            "accountId": target.account_id,
            **_token_and_times(target),
        }
    if isinstance(target, CommandTarget):
        return {
            "kind": "command",
            "command": shlex.join(target.argv),
            "cwd": target.cwd,
            "variables": sorted(target.env),
            "initializeTimeout": target.initialize_timeout,
            "bootstrap": target.bootstrap,
        }
    return {"kind": "local"}


def _token_and_times(target: WebsocketTarget | RelayTarget) -> dict[str, Any]:
    token = None
    if target.bearer_token_file is not None:
        token = f"in {target.bearer_token_file}"
    elif target.bearer_token_env is not None:
        token = f"in the variable {target.bearer_token_env}"
    elif target.bearer_token is not None:
        token = "in the file"
    return {
        "token": token,
        "connectTimeout": target.connect_timeout,
        "initializeTimeout": target.initialize_timeout,
    }


# Changing our own file.


@frozen
class Addition:
    """What `execenv env add` was asked for."""

    name: str
    words: Sequence[str]
    token_file: str | None
    token_env: str | None
    cwd: str | None
    extra_env: dict[str, str]
    bootstrap: bool
    connect_timeout: float | None
    initialize_timeout: float | None
    replace: bool
    is_default: bool
    security: Security | None = None
    account_id: str | None = None

    def target(self) -> WebsocketTarget | CommandTarget | RelayTarget:
        words = list(self.words)
        if len(words) == 1 and "://" not in words[0]:
            try:
                words = shlex.split(words[0])
            except ValueError as error:
                raise UsageError(f"{words[0]!r} is no command: {str(error).lower()}") from None
        initialize_timeout = (
            INITIALIZE_TIMEOUT if self.initialize_timeout is None else self.initialize_timeout
        )
        if len(words) == 1 and "://" in words[0]:
            self._refuse(
                "for commands", {"--cwd": self.cwd, "-e": self.extra_env, "--bootstrap": self.bootstrap}
            )
            connect_timeout = CONNECT_TIMEOUT if self.connect_timeout is None else self.connect_timeout
            # Paths in the file begin at its folder; those of the command line at ours.
            token_file = self.token_file and os.path.abspath(self.token_file)
            if is_relay_url(words[0]):
                return evolve(
                    parse_relay_url(words[0]),
                    connect_timeout=connect_timeout,
                    initialize_timeout=initialize_timeout,
                    bearer_token_file=token_file,
                    bearer_token_env=self.token_env,
                    security=self.security or "noise",
                    account_id=self.account_id,
                )
            self._refuse("for relay+https:// URLs", self._of_relays())
            return WebsocketTarget(
                words[0],
                connect_timeout=connect_timeout,
                initialize_timeout=initialize_timeout,
                bearer_token_file=token_file,
                bearer_token_env=self.token_env,
            )
        self._refuse("for relay+https:// URLs", self._of_relays())
        self._refuse(
            "for URLs",
            {
                "--token-file": self.token_file,
                "--token-env": self.token_env,
                "--connect-timeout": self.connect_timeout is not None,
            },
        )
        if not words:
            raise UsageError("name a URL or a command")
        return CommandTarget(
            tuple(words),
            self.extra_env,
            self.cwd and os.path.abspath(self.cwd),
            initialize_timeout,
            bootstrap=self.bootstrap,
        )

    def _of_relays(self) -> dict[str, object]:
        return {"--security": self.security, "--account-id": self.account_id is not None}

    def _refuse(self, purpose: str, options: dict[str, object]) -> None:
        given = [name for name, value in options.items() if value]
        if given:
            raise UsageError(f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} {purpose}")


def add(addition: Addition) -> None:
    """Write it into our file.

    Raises:
        ConfigError: if the file cannot be used.
        UsageError: if the addition cannot be.
    """
    target = addition.target()
    path = our_file()
    before = None if os.path.lexists(path) else _ruling_before()

    def edit(text: str) -> str:
        text = with_environment(text, addition.name, target, file=path, replace=addition.replace)
        return with_default(text, addition.name, file=path) if addition.is_default else text

    _edit(path, edit)
    if before is not None:
        complain(f"{path} rules from now on, and {before} does not count any more")
    if isinstance(target, CommandTarget) and shutil.which(target.argv[0]) is None and not target.cwd:
        complain(f"{printable(target.argv[0])} was added, though no such program is found now")


def _ruling_before() -> str | None:
    with suppress(ConfigError):
        loaded = load_snapshot()
        return None if loaded.snapshot is LOCAL_ONLY else loaded.source
    return "what was wrong before"


def remove(names: Sequence[str]) -> None:
    """Take environments out of our file: all, or if one cannot be none.

    Raises:
        ConfigError: if the file cannot be used.
        UsageError: if one is not in it, or is the default.
    """
    path = our_file()

    def edit(text: str) -> str:
        for name in dict.fromkeys(names):
            text = without_environment(text, name, file=path)
        return text

    _edit(path, edit)


def default() -> str | None:
    """The id of the default of what rules.

    Raises:
        ConfigError: if that cannot be used.
    """
    return load_snapshot().snapshot.default


def set_default(id_: str | None) -> None:
    """Write it into our file; `None` for none.

    Raises:
        ConfigError: if the file cannot be used.
        UsageError: if there is no such environment in it.
    """
    path = our_file()
    _edit(path, lambda text: with_default(text, id_, file=path))


def _edit(path: str, edit: Callable[[str], str]) -> None:
    """Change the file, whole or not at all; made with mode 0600 if it is new."""
    path = os.path.realpath(path)  # a link to it stays one
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    with _locked(folder):
        before = read_text(path)
        text = edit(before or "")
        if text == before:
            return
        fd, new = tempfile.mkstemp(dir=folder, prefix=".environments.")  # 0600
        try:
            with open(fd, "wb") as file:
                if before is not None:
                    os.fchmod(fd, stat.S_IMODE(os.stat(path).st_mode))
                file.write(text.encode())
                file.flush()
                os.fsync(fd)
            os.replace(new, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(new)
            raise


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """One at a time, or one of two that edit would undo what the other did."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# check


@define
class Report:
    """What `check` found out about one environment. `None`: not known."""

    name: str
    kind: str
    target: str
    ok: bool = False
    error: str | None = None
    connect_seconds: float | None = None
    answer_seconds: float | None = None
    version: str | None = None
    shell: str | None = None
    cwd: str | None = None
    capabilities: list[str] = field(factory=list)
    missing: list[str] = field(factory=list)
    tests: dict[str, str] = field(factory=dict)
    """Of `run`, `read` and `http`: "ok", "not offered", or what went wrong."""


def all_targets() -> list[tuple[str, Target]]:
    """Those that are in use.

    Raises:
        ConfigError: if what says so cannot be used.
    """
    snapshot = load_snapshot().snapshot
    local: list[tuple[str, Target]] = [(LOCAL, LocalTarget())] if snapshot.include_local else []
    return [*local, *snapshot.environments]


async def run_check(chosen: Sequence[tuple[str, Target]], token: str | None, as_json: bool) -> int:
    reports = [Report(name, _kind_of(target), _shown(target)) for name, target in chosen]
    async with trio.open_nursery() as nursery:
        for report, (_, target) in zip(reports, chosen, strict=True):
            nursery.start_soon(_check, report, target, token)
    if as_json:
        await print_json([_json_of(report) for report in reports])
    elif reports:
        await _print_reports(reports)
    else:
        complain("no environment is configured")
    return 0 if all(report.ok for report in reports) else 1


def _kind_of(target: Target) -> str:
    if isinstance(target, str):
        return "local" if target == LOCAL else "relay" if is_relay_url(target) else "websocket"
    return "command" if isinstance(target, list) else _kind(target)


def _shown(target: Target) -> str:
    if isinstance(target, str):
        return "this machine" if target == LOCAL else shown_url(target)
    return shlex.join(target) if isinstance(target, list) else _where(target)


async def _check(report: Report, target: Target, token: str | None) -> None:
    own = token if isinstance(target, str) and target != LOCAL else None
    began = trio.current_time()
    try:
        async with open_environment(target, bearer_token=own) as environment:
            report.connect_seconds = trio.current_time() - began
            await _look_at(environment, report)
    except (ExecenvError, OSError) as error:
        report.error = one_line(error)
    except trio.TooSlowError:
        report.error = f"no answer within {CHECK_TIMEOUT:g} s"
    report.ok = report.error is None and report.tests["run"] == report.tests["read"] == "ok"


async def _look_at(environment: Environment, report: Report) -> None:
    with trio.fail_after(CHECK_TIMEOUT):
        info = await environment.info()
        began = trio.current_time()
        await environment.probe()
        report.answer_seconds = trio.current_time() - began
    report.version = info.executor_version
    report.shell = info.shell.path
    report.cwd = info.cwd.text if info.cwd else None
    report.capabilities = sorted(name for name, there in info.capabilities.items() if there)
    report.missing = sorted(SERVER_CAPABILITIES.keys() - set(report.capabilities))

    async def run() -> None:
        done = await environment.run([info.shell.path, "-c", "echo works"])
        if done.stdout != b"works\n":
            raise UsageError(f"a shell that was to print 'works' printed {done.stdout!r}")

    async def read() -> None:
        async with await environment.files.open(info.shell.path, "rb") as file:
            await file.read(1)

    async def http() -> None:
        try:
            await environment.http.request("GET", NOBODY)
        except HttpFailed as error:
            if isinstance(error.__cause__, MethodNotFound):
                raise error.__cause__ from None

    for name, test in (("run", run), ("read", read), ("http", http)):
        report.tests[name] = "no answer"
        try:
            with trio.fail_after(CHECK_TIMEOUT):
                await test()
            report.tests[name] = "ok"
        except MethodNotFound:
            report.tests[name] = "not offered"
        except (ExecenvError, OSError) as error:
            report.tests[name] = one_line(error)


def _json_of(report: Report) -> dict[str, Any]:
    fields = asdict(report)
    fields["connectSeconds"] = fields.pop("connect_seconds")
    fields["answerSeconds"] = fields.pop("answer_seconds")
    return fields


async def _print_reports(reports: Sequence[Report]) -> None:
    def shown_seconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1000:.1f} ms"

    await print_table(
        ("NAME", "STATE", "CONNECT", "ANSWER", "VERSION", "RUN", "READ", "HTTP"),
        [
            (
                report.name,
                "ok" if report.ok else "bad",
                shown_seconds(report.connect_seconds),
                shown_seconds(report.answer_seconds),
                report.version or "-",
                *(_verdict(report.tests.get(name)) for name in ("run", "read", "http")),
            )
            for report in reports
        ],
    )
    lines = []
    for report in reports:
        problems = [] if report.error is None else [report.error]
        problems += [f"{name}: {told}" for name, told in report.tests.items() if told != "ok"]
        lines += [f"{report.name}: {problem}" for problem in problems]
        if report.error is None and report.missing:
            lines.append(f"{report.name}: does not offer {', '.join(report.missing)}")
    await print_lines(lines)


def _verdict(told: str | None) -> str:
    return "-" if told is None else told if told in ("ok", "not offered") else "fails"


# Printing.
