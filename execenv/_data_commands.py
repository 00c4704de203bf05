"""`execenv cp`, `ls`, `cat`, `info` and `http`."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from typing import Any

from attrs import define, frozen

from execenv._locations import Location, Target
from execenv._standard_streams import complain, one_line, pieces, printable, write
from execenv.environment import Environment
from execenv.environment_path import EnvironmentPath
from execenv.errors import UsageError
from execenv.http import FromVariable, RequestHeaders
from execenv.open import open_environment
from execenv.protocol import FileMetadata
from execenv.transfer import Progress, TransferReport, look_at

PLAIN_LINES = 5.0
"""Seconds between two lines of progress where there is no terminal."""


@define
class Environments:
    """The environments that one command works with, each opened once."""

    _stack: AsyncExitStack
    _token: str | None
    _open: list[tuple[Target, Environment]]

    async def get(self, target: Target) -> Environment:
        for known, environment in self._open:
            if known == target:
                return environment
        # The token is for URLs of the command line; what is configured has its own.
        token = self._token if isinstance(target, str) and target != "local" else None
        environment = await self._stack.enter_async_context(open_environment(target, bearer_token=token))
        self._open.append((target, environment))
        return environment

    async def path(self, location: Location) -> EnvironmentPath:
        environment = await self.get(location.target)
        return EnvironmentPath(environment.files, await environment._locate(location.path or "."))


@asynccontextmanager
async def open_environments(token: str | None) -> AsyncIterator[Environments]:
    async with AsyncExitStack() as stack:
        yield Environments(stack, token, [])


# cp


@frozen
class CopyJob:
    """What `execenv cp` was asked for."""

    sources: Sequence[Location]
    destination: Location
    token: str | None
    recursive: bool
    atomic: bool
    as_json: bool
    quiet: bool


async def run_copy(job: CopyJob) -> int:
    failures: list[str] = []

    def failed(error: OSError | UsageError) -> None:
        failures.append(one_line(error))
        complain(failures[-1])

    total = TransferReport()
    async with open_environments(job.token) as environments:
        into = await environments.path(job.destination)
        inside = await into.is_dir()
        if not inside and (len(job.sources) > 1 or job.destination.path.endswith("/")):
            raise UsageError(f"{job.destination.text} is no directory")
        for location in job.sources:
            source = await environments.path(location)
            try:
                if not job.recursive and await source.is_dir():
                    raise UsageError(f"{location.text} is a directory: copy it with -r")
                destination = into / source.name if inside and _is_named(location) else into
                began = time.monotonic()
                with _shown_progress(job, location.text) as progress:
                    done = await source.copy_to(
                        destination, atomic=job.atomic, progress=progress, on_error=failed
                    )
            except (OSError, UsageError) as error:
                failed(error)
                continue
            _add(total, done)
            if not job.quiet and not sys.stderr.isatty():
                print(_summary(location.text, done, time.monotonic() - began), file=sys.stderr)
    for path in total.skipped:
        complain(f"not copied: {printable(path.text)}")
    if job.as_json:
        await _print_json(
            {
                "files": total.files,
                "bytes": total.bytes,
                "resumedBytes": total.resumed_bytes,
                "unchanged": total.unchanged,
                "skipped": [path.text for path in total.skipped],
                "metadataKept": total.metadata_kept,
                "errors": failures,
            }
        )
    elif not total.metadata_kept and total.files and not job.quiet:
        complain("permissions and times were not kept: a server does not offer that")
    return 1 if failures else 0


def _is_named(location: Location) -> bool:
    """Whether it goes into a directory under its own name; of `.` and `..` the content does, as with cp."""
    return location.path.rstrip("/").rpartition("/")[2] not in ("", ".", "..")


def _add(total: TransferReport, done: TransferReport) -> None:
    total.files += done.files
    total.bytes += done.bytes
    total.resumed_bytes += done.resumed_bytes
    total.unchanged += done.unchanged
    total.skipped += done.skipped
    total.metadata_kept = total.metadata_kept and done.metadata_kept


@contextmanager
def _shown_progress(job: CopyJob, name: str) -> Iterator[Callable[[Progress], None] | None]:
    """A bar on a terminal, a line now and then elsewhere; always on stderr."""
    if job.quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(name) as show:
            yield show
    else:
        yield _lines(name)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # No refresh thread: it is drawn when there is something new.
    with Bars(*columns, console=Console(stderr=True), auto_refresh=False) as bars:
        bar = bars.add_task(printable(name), total=None)
        drawn = 0.0

        def show(progress: Progress) -> None:
            nonlocal drawn
            now = time.monotonic()
            complete = progress.complete and progress.done_files == progress.total_files
            if now - drawn < 0.1 and not complete:
                return
            drawn = now
            bars.update(
                bar,
                completed=progress.done_bytes,
                total=progress.total_bytes if progress.complete else None,
                description=printable(progress.path.name or name),
            )
            bars.refresh()

        yield show


def _lines(name: str) -> Callable[[Progress], None]:
    told = time.monotonic()
    first: tuple[float, int] | None = None  # what was left from an earlier transfer tells nothing of the rate

    def show(progress: Progress) -> None:
        nonlocal told, first
        now, done = time.monotonic(), progress.done_bytes
        first = first or (now, done)
        if now - told >= PLAIN_LINES and now > first[0]:
            told = now
            rate = (done - first[1]) / (now - first[0])
            of = f" of {_size(progress.total_bytes)}" if progress.complete else ""
            left = ""
            if progress.complete and rate:
                left = f", {(progress.total_bytes - done) / rate:.0f} s left"
            print(f"{printable(name)}: {_size(done)}{of}, {_size(rate)}/s{left}", file=sys.stderr)

    return show


def _summary(name: str, done: TransferReport, seconds: float) -> str:
    files = f"{done.files} file{'' if done.files == 1 else 's'}"
    text = f"{printable(name)}: {files}, {_size(done.bytes)} in {seconds:.1f} s"
    if done.resumed_bytes:
        text += f", {_size(done.resumed_bytes)} from an earlier transfer"
    if done.unchanged:
        text += f", {done.unchanged} unchanged"
    return text


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


# ls and cat


@frozen
class ListJob:
    """What `execenv ls` was asked for."""

    locations: Sequence[Location]
    token: str | None
    long: bool
    as_json: bool


async def run_list(job: ListJob) -> int:
    status = 0
    files: list[tuple[EnvironmentPath, str]] = []
    directories: list[tuple[str, list[tuple[EnvironmentPath, str]]]] = []
    async with open_environments(job.token) as environments:
        for location in job.locations:
            try:
                path = await environments.path(location)
                if (await path.stat()).is_directory:
                    entries = [(entry, entry.name) for entry in await path.iterdir()]
                    directories.append((location.text, entries))
                else:
                    files.append((path, location.path))
            except OSError as error:
                complain(one_line(error))
                status = 1
        groups = [("", files), *directories] if files else directories
        if job.as_json:
            await _print_json(await _described([path for _, entries in groups for path, _ in entries]))
            return status
        for number, (heading, entries) in enumerate(groups):
            text = "\n" if number else ""
            if heading and len(job.locations) > 1:
                text += f"{_for_stdout(heading)}:\n"
            if job.long:
                looked = await _looked_at([entry for entry, _ in entries])
                for (_, name), metadata in zip(entries, looked, strict=True):
                    text += _long_line(_for_stdout(name), metadata)
            else:
                text += "".join(f"{_for_stdout(name)}\n" for _, name in entries)
            await write(1, text.encode("utf-8", "surrogateescape"))
    return status


def _for_stdout(text: str) -> str:
    """A program gets a name as it is; on a terminal it could be a command to that."""
    return printable(text) if os.isatty(1) else text


async def _looked_at(paths: Sequence[EnvironmentPath]) -> list[FileMetadata | None]:
    """The metadata of each; `None` for what is gone by now."""
    if not paths:
        return []
    found = await look_at(paths[0]._files._backend, [path.uri for path in paths])
    return [None if isinstance(one, OSError) else one for one in found]


async def _described(paths: Sequence[EnvironmentPath]) -> list[dict[str, Any]]:
    return [
        {
            "path": str(path).encode("utf-8", "surrogateescape").decode(errors="replace"),
            "uri": path.uri.uri,
            "isDirectory": found.is_directory,
            "isFile": found.is_file,
            "isSymlink": found.is_symlink,
            "size": found.size,
            "mode": found.mode,
            "createdAtMs": found.created_at_ms or None,
            "modifiedAtMs": found.modified_at_ms or None,
        }
        for path, found in zip(paths, await _looked_at(paths), strict=True)
        if found is not None
    ]


def _long_line(name: str, found: FileMetadata | None) -> str:
    if found is None:
        return f"{'?' * 10} {'?':>12} {'?':>16} {name}\n"
    kind = stat.S_IFDIR if found.is_directory else stat.S_IFREG if found.is_file else 0
    mode = stat.filemode(kind | found.mode) if found.mode is not None else stat.filemode(kind)[0] + "?" * 9
    changed = "?"
    if found.modified_at_ms:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(found.modified_at_ms / 1000))
    link = "@" if found.is_symlink else ""
    return f"{mode} {found.size:>12} {changed:>16} {name}{link}\n"


async def run_cat(locations: Sequence[Location], token: str | None) -> int:
    status = 0
    async with open_environments(token) as environments:
        for location in locations:
            try:
                path = await environments.path(location)
                file = await path._files._backend.open(path.uri)
                try:
                    async with aclosing(file.read_blocks()) as blocks:
                        async for block in blocks:
                            await write(1, block)
                finally:
                    await file.close()
            except BrokenPipeError:
                raise
            except OSError as error:
                complain(one_line(error))
                status = 1
    return status


# info


async def run_info(target: Target, token: str | None, *, as_json: bool) -> int:
    async with open_environments(token) as environments:
        environment = await environments.get(target)
        info, state = await environment.info(), await environment.probe()
    fields: dict[str, Any] = {
        "environment": environment.name,
        "status": state,
        "shell": {"name": info.shell.name, "path": info.shell.path},
        "cwd": info.cwd and info.cwd.text,
        "version": info.executor_version,
        "os": info.platform_os,
        "home": info.user_home_dir and info.user_home_dir.text,
        "temporaryDirectory": info.temp_dir and info.temp_dir.text,
        "temporaryDirectories": [path.text for path in info.temporary_directories],
        "capabilities": sorted(name for name, there in info.capabilities.items() if there),
    }
    if as_json:
        await _print_json(fields)
        return 0
    fields["shell"] = info.shell.path
    lines = []
    for name, value in fields.items():
        text = " ".join(value) if isinstance(value, list) else value
        lines.append(f"{name + ':':22}{_for_stdout(text) if text else '-'}\n")
    await write(1, "".join(lines).encode("utf-8", "surrogateescape"))
    return 0


# http


@frozen
class HttpJob:
    """What `execenv http` was asked for."""

    target: Target
    token: str | None
    method: str
    url: str
    headers: RequestHeaders
    body: bytes | None
    body_from_stdin: bool
    timeout: float | None
    follow: bool
    include: bool
    fail: bool
    as_json: bool


async def run_http(job: HttpJob) -> int:
    body = job.body
    if job.body_from_stdin:
        body = b"".join([piece async for piece in pieces(0)])
    async with open_environments(job.token) as environments:
        environment = await environments.get(job.target)
        async with environment.http.stream(
            job.method,
            job.url,
            headers=job.headers,
            body=body,
            timeout=job.timeout,
            follow_redirects=job.follow,
        ) as response:
            if job.as_json:
                content = await response.read()
                pairs = [list(pair) for pair in response.headers]
                shown: dict[str, Any] = {"status": response.status, "headers": pairs}
                try:
                    shown["body"] = content.decode()
                except UnicodeDecodeError:
                    shown["bodyBase64"] = base64.b64encode(content).decode()
                await _print_json(shown)
            else:
                if job.include:
                    head = "".join(f"{name}: {value}\n" for name, value in response.headers)
                    await write(1, f"{response.status}\n{head}\n".encode())
                async for piece in response:
                    await write(1, piece)
            return 1 if job.fail and response.status >= 400 else 0


def header(text: str, *, from_variable: bool = False) -> tuple[str, str | FromVariable]:
    """`Name: value`, or with `from_variable` `Name: prefix$VARIABLE`.

    Raises:
        UsageError: if it is not that.
    """
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise UsageError(f"{'--header-from' if from_variable else '-H'} takes 'Name: value'")
    if not from_variable:
        return name.strip(), value.strip()
    prefix, dollar, variable = value.lstrip().rpartition("$")
    if not dollar or not variable:
        raise UsageError("--header-from takes 'Name: prefix $VARIABLE'")
    return name.strip(), FromVariable(variable, prefix)


async def _print_json(value: object) -> None:
    await write(1, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode(errors="replace"))
