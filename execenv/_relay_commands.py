"""`execenv relay`: a relay of one's own, and its tokens."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from execenv.relay_service.exchange import Exchange
    from execenv.relay_service.store import Store

EPILOG_RELAY = """
\b
Examples:
  execenv relay token create --environment box --role executor > executor-token
  execenv relay token create --environment box --role harness > harness-token
  execenv relay serve --listen http://127.0.0.1:8700
  execenv relay serve --listen http://0.0.0.0:8700 --public-url https://relay.example.com
"""

REDIS_VARIABLE = "EXECENV_REDIS_URL"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@click.group("relay", epilog=EPILOG_RELAY)
def relay() -> None:
    """Host a relay, which environments that cannot be dialled are reached through.

    They register there, with a token of the role executor; who uses them has one of the role harness.
    """


_store_option = click.option(
    "--store",
    metavar="PATH",
    help="The file that tokens and registrations are kept in.  [default: relay.sqlite3 in the folder of "
    "execenv's state]",
)
_redis_option = click.option(
    "--redis-url-file",
    metavar="PATH",
    help=f"Keep them in Redis instead, for more than one node: the file that holds its URL.  [default: "
    f"{REDIS_VARIABLE}, if that is set]",
)
_debug_option = click.option("--debug", is_flag=True, help="Log everything to stderr, and show tracebacks.")


@relay.command("serve")
@click.option(
    "--listen",
    default="http://127.0.0.1:0",
    show_default=True,
    metavar="http://IP:PORT",
    help="Where to serve. Port 0 takes a free one. TLS is for a proxy in front.",
)
@click.option(
    "--public-url",
    metavar="URL",
    help="Where the relay is reached, https:// unless that is this machine. Required unless the address is "
    "loopback.",
)
@_store_option
@_redis_option
@click.option("--require-noise", is_flag=True, help="Refuse executors that take clear text.")
@click.option(
    "--url-ttl",
    type=click.FloatRange(min=1, max=86400),
    default=900,
    show_default=True,
    metavar="SECONDS",
    help="How long an executor may use the URL that it got for registering.",
)
@click.option(
    "--max-frame",
    type=click.IntRange(min=1024),
    default=64 * 1024 * 1024 + 64 * 1024,
    show_default=True,
    metavar="BYTES",
    help="The largest frame of clear text. With Noise it is 128 KiB.",
)
@click.option("--public-metrics", is_flag=True, help="Answer /metrics to other machines too.")
@click.option(
    "--audit-log", metavar="FILE", help="Append a line for each connection here, instead of on stderr."
)
@_debug_option
def serve(
    listen: str,
    public_url: str | None,
    store: str | None,
    redis_url_file: str | None,
    require_noise: bool,
    url_ttl: float,
    max_frame: int,
    public_metrics: bool,
    audit_log: str | None,
    debug: bool,
) -> None:
    """Be a relay: a registry and a rendezvous on one port.

    The first line on stdout is its URL. SIGTERM and SIGINT end it; who is connected then comes back.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: os._exit(0))  # until Trio has its own handlers
    from execenv.cli import _bound_socket, _is_loopback, _log_to_stderr

    host, port = _listen_address(listen)
    _check_public_url(public_url, loopback=_is_loopback(host))
    redis_url = _redis_url(store, redis_url_file)
    _require_protobuf()
    sock = _bound_socket(host, port, "http")
    bound = sock.getsockname()
    url = f"http://{f'[{bound[0]}]' if ':' in bound[0] else bound[0]}:{bound[1]}"

    import gc
    from functools import partial

    import trio

    from execenv.relay_service import Settings, audit
    from execenv.server import run_until_signalled

    _log_to_stderr(debug)
    try:
        audit.send_to(audit_log)
    except OSError as error:
        raise click.ClickException(f"cannot write --audit-log {audit_log}: {error.strerror}") from error
    _raise_open_files()
    settings = Settings(
        public_url or url,
        require_noise=require_noise,
        executor_url_ttl=url_ttl,
        max_clear_frame=max_frame,
        public_metrics=public_metrics,
    )
    gc.freeze()  # what is imported now stays: the collector need not look at it again
    trio.run(run_until_signalled, partial(_serve, sock, url, settings, store, redis_url))


async def _serve(
    sock: socket.socket, url: str, settings: Any, store_path: str | None, redis_url: str | None
) -> None:
    from execenv.relay_service import serve_relay

    node_id = f"{socket.gethostname()}:{sock.getsockname()[1]}"
    async with _open_state(store_path, redis_url, node_id) as (store, exchange):
        click.echo(url)
        await serve_relay(sock, store=store, exchange=exchange, settings=settings)


@relay.group("token")
def tokens() -> None:
    """Make, list and revoke the tokens that a relay takes."""


@tokens.command("create")
@click.option(
    "--environment", required=True, metavar="ID", help="The environment that it is for, or '*' for all."
)
@click.option(
    "--role",
    required=True,
    type=click.Choice(["executor", "harness"]),
    help="What it is for: to be the environment, or to use it.",
)
@click.option("--name", default="", metavar="TEXT", help="What it is called in lists.")
@click.option("--expires", metavar="TIME", help="When it ends: 12h, 30d, 8w from now.  [default: never]")
@_store_option
@_redis_option
@_debug_option
def create_token(
    environment: str,
    role: Any,
    name: str,
    expires: str | None,
    store: str | None,
    redis_url_file: str | None,
    debug: bool,
) -> None:
    """Make a token and print it. It cannot be shown again."""
    _require_protobuf()
    from execenv.relay_service import tokens as machine
    from execenv.relay_service.store import ANY_ENVIRONMENT

    if environment != ANY_ENVIRONMENT and not machine.is_environment_id(environment):
        raise click.ClickException("--environment takes letters, digits, '-' and '_', 256 at most, or '*'")
    now = time.time()
    until = None if expires is None else now + _span(expires)
    token, record = machine.make_token(environment, role, name, now=now, expires=until)

    async def add() -> None:
        async with _open_store(store, _redis_url(store, redis_url_file)) as opened:
            await opened.add_token(record)

    _run(debug, add)
    click.echo(token)


@tokens.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_store_option
@_redis_option
@_debug_option
def list_tokens(as_json: bool, store: str | None, redis_url_file: str | None, debug: bool) -> None:
    """List the tokens that there are, without their secrets."""

    async def show() -> None:
        from execenv._tables import print_json, print_table

        async with _open_store(store, _redis_url(store, redis_url_file)) as opened:
            records = await opened.tokens()
        if as_json:
            await print_json(
                [
                    {
                        "id": record.token_id,
                        "environment": record.environment_id,
                        "role": record.role,
                        "name": record.name,
                        "created": record.created,
                        "expires": record.expires,
                    }
                    for record in records
                ]
            )
            return
        await print_table(
            ("ID", "ENVIRONMENT", "ROLE", "NAME", "CREATED", "EXPIRES"),
            [
                (
                    record.token_id,
                    record.environment_id,
                    record.role,
                    record.name,
                    _date(record.created),
                    "never" if record.expires is None else _date(record.expires),
                )
                for record in records
            ],
        )

    _run(debug, show)


@tokens.command("revoke")
@_store_option
@_redis_option
@_debug_option
@click.argument("token_id")
def revoke_token(token_id: str, store: str | None, redis_url_file: str | None, debug: bool) -> None:
    """Revoke a token, by the id that `list` shows. What is connected with it ends within seconds."""

    async def revoke() -> None:
        async with _open_store(store, _redis_url(store, redis_url_file)) as opened:
            if not await opened.revoke_token(token_id):
                raise click.ClickException("there is no token of that id: see execenv relay token list")

    _run(debug, revoke)


def _run(debug: bool, work: Any) -> None:
    _require_protobuf()
    import trio

    from execenv.cli import _log_to_stderr

    _log_to_stderr(debug)
    trio.run(work)


@asynccontextmanager
async def _open_store(path: str | None, redis_url: str | None) -> AsyncIterator[Store]:
    with _store_errors():
        if redis_url is not None:
            from execenv.relay_service.redis import open_redis_store

            async with open_redis_store(redis_url) as store:
                yield store
            return
        from execenv.relay_service.sqlite import open_sqlite

        async with open_sqlite(path or _default_store()) as store:
            yield store


@asynccontextmanager
async def _open_state(
    path: str | None, redis_url: str | None, node_id: str
) -> AsyncIterator[tuple[Store, Exchange]]:
    if redis_url is None:
        from execenv.relay_service.exchange_local import LocalExchange
        from execenv.relay_service.sqlite import open_sqlite

        with _store_errors():
            async with open_sqlite(path or _default_store(), durable=False) as store:
                yield store, LocalExchange()
        return
    from execenv.relay_service.redis import open_redis

    with _store_errors():
        async with open_redis(redis_url, node_id=node_id) as state:
            yield state


@contextmanager
def _store_errors() -> Iterator[None]:
    from execenv.relay_service.store import StoreUnavailable

    try:
        yield
    except StoreUnavailable as error:
        raise click.ClickException(f"the store of the relay cannot be used: {error}") from error


def _default_store() -> str:
    import platformdirs

    return os.path.join(platformdirs.user_state_path("execenv"), "relay.sqlite3")


def _redis_url(store: str | None, file: str | None) -> str | None:
    """The URL of a Redis, if that is to be used. It may hold a password, hence no option for it."""
    if store is not None:
        if file is not None:
            raise click.ClickException("--store and --redis-url-file exclude each other")
        return None
    if file is None:
        return os.environ.get(REDIS_VARIABLE) or None
    from execenv.cli import _file

    url = _file(file, "--redis-url-file ").decode(errors="replace").strip()
    if not url:
        raise click.ClickException(f"--redis-url-file {file} is empty")
    return url


def _require_protobuf() -> None:
    from execenv.errors import UsageError
    from execenv.relay.extras import INSTALL, relay_problem

    problem = relay_problem()
    if problem:
        raise UsageError(f"a relay cannot be served here: {problem}: {INSTALL['clear']}")


def _listen_address(listen: str) -> tuple[str, int]:
    scheme, _, rest = listen.partition("://")
    host, _, port = rest.rstrip("/").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if scheme != "http" or not host or not port.isdecimal() or int(port) > 65535:
        raise click.ClickException(f"cannot listen on {listen!r}: give http://IP:PORT")
    return ("127.0.0.1" if host == "localhost" else host), int(port)


def _check_public_url(url: str | None, *, loopback: bool) -> None:
    from urllib.parse import urlsplit

    from execenv.cli import _is_loopback

    if url is None:
        if not loopback:
            raise click.ClickException(
                "add --public-url https://...: the URLs that the relay gives are made of it, and without TLS "
                "in front tokens would go through a network in clear text"
            )
        return
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        parts, host = urlsplit(""), ""
    if (
        parts.scheme not in ("http", "https")
        or not host
        or parts.query
        or parts.fragment
        or "@" in parts.netloc
    ):
        raise click.ClickException("--public-url takes https://HOST[:PORT], without user, query and fragment")
    here = loopback and (host == "localhost" or _is_loopback(host))
    if parts.scheme != "https" and not here:
        raise click.ClickException("--public-url should be https://: tokens go there")


def _span(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6})([smhdw])", text)
    if found is None or not int(found[1]):
        raise click.ClickException(f"--expires takes a time such as 12h, 30d or 8w, not {text!r}")
    return float(int(found[1]) * _UNITS[found[2]])


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _raise_open_files() -> None:
    """A socket is an open file, and there may be thousands."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
