"""The command line: `execenv serve`, `run`, `cp`, `ls`, `cat`, `info`, `http`, `doctor`, `env` and `relay`.

Imports nothing that takes long: `serve` prints its URL before Trio is imported, and clients that connect
meanwhile wait in the kernel's queue.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from execenv._relay_commands import relay
from execenv._version import __version__

if TYPE_CHECKING:
    from execenv._locations import Access, Location, Target
    from execenv.server.auth import Authenticator
    from execenv.targets import Security

OUR_FAILURE = 125  # as env, docker run and timeout have it: the command itself never ran

EPILOG_RUN = """
\b
Examples:
  execenv run -- make test
  execenv run --env ws://127.0.0.1:8765 --cwd /src -- pytest -x
  execenv run --env "ssh devbox execenv serve --listen stdio" --tty -- bash
  execenv run --env relay+https://registry.example/devbox --token-file token -- make
  execenv run --env "docker exec -i box" --bootstrap -- uname -a
  execenv run --sandbox workspace-write --no-network -- make
"""

EPILOG_CP = """
\b
Examples:
  execenv cp report.pdf ws://127.0.0.1:8765:/srv/
  execenv cp -r ws://127.0.0.1:8765:/var/log logs
  execenv cp --token-file token relay+https://registry.example/devbox:/srv/report.pdf .
  execenv cp -r --alias box="ssh devbox execenv serve --listen stdio" src box:work/
"""

EPILOG_ENV = """
Which there are is said by the first of these that is there, alone: $XDG_CONFIG_HOME/execenv/environments.toml
(the file that these commands edit); EXECENV_URL, a ws://, wss:// or relay+https:// URL or 'none'; codex's own
CODEX_EXEC_SERVER_NOISE_* variables, environments.toml in CODEX_HOME, and CODEX_EXEC_SERVER_URL. The first two
also say where commands run without --env; without them that is here.

\b
Examples:
  execenv env add devbox ws://127.0.0.1:8765 --default
  execenv env add build -- ssh build execenv serve --listen stdio
  execenv env add laptop relay+https://registry.example/laptop --token-file token
  execenv env check
  execenv run --env build -- make
"""

EPILOG_HTTP = """
\b
Examples:
  execenv http --env ws://127.0.0.1:8765 http://localhost:3000/health
  execenv http -X POST -H 'content-type: application/json' -d '{}' https://api.example.com/
  execenv http --header-from 'Authorization: Bearer $API_TOKEN' https://api.example.com/
"""

EPILOG_SERVE = """
\b
Examples:
  execenv serve                                  a free port on loopback; the URL is printed
  execenv serve --listen stdio                   on stdin and stdout, for ssh, docker exec, kubectl exec
  execenv serve --listen ws://0.0.0.0:8765 \\
      --ws-auth capability-token --ws-token-file token
  execenv serve --remote https://registry.example --allow-registry registry.example \\
      --environment-id build-1 --api-key-file key
"""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. Errors are one line on stderr; `--debug` shows where they came from."""
    _open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words[: words.index("--")] if "--" in words else "--debug" in words
    try:
        status = cli.main(args=words, prog_name="execenv", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError):
            hint = f" (see {error.ctx.command_path if error.ctx else 'execenv'} --help)"
        click.echo(f"execenv: {' '.join(error.format_message().split())}{hint}", err=True)
        sys.exit(OUR_FAILURE if words[:1] == ["run"] else error.exit_code)
    except (Exception, BaseExceptionGroup) as error:
        if debug:
            raise
        click.echo(f"execenv: {_one_line(error)}", err=True)
        sys.exit(OUR_FAILURE if words[:1] == ["run"] else 1)
    sys.exit(status if isinstance(status, int) else 0)


def _open_standard_streams() -> None:
    """Give what was closed to /dev/null, or the next descriptor opened would be taken for it."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, hence this one


def _one_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    from execenv._standard_streams import one_line
    from execenv.errors import ExecenvError
    from execenv.paths import ForeignPathError, PathUriError

    if isinstance(error, ExecenvError | OSError | ForeignPathError | PathUriError):
        return one_line(error)
    return f"internal error: {type(error).__name__}: {one_line(error)} (run again with --debug to see where)"


_debug_option = click.option("--debug", is_flag=True, help="Log everything to stderr, and show tracebacks.")
_env_option = click.option(
    "--env",
    "target",
    metavar="TARGET",
    help="Where: a configured name (see execenv env), 'local', a ws:// or wss:// URL, "
    "relay+https://REGISTRY/ID for an environment behind a relay, or a command that speaks the protocol over "
    "stdio.  [default: that of EXECENV_URL or of execenv's own file, else local]",
)
_bootstrap_option = click.option(
    "--bootstrap",
    is_flag=True,
    help="The command of TARGET runs what is appended to it at another side: bring execenv there first. "
    "That needs a sh and a Python >= 3.11.",
)
_token_option = click.option(
    "--token-file", metavar="PATH", help="The file that holds the bearer token of the URL."
)
_recovery_option = click.option(
    "--recovery",
    default="45",
    show_default=True,
    metavar="SECONDS|forever",
    help="How long a lost connection to a websocket server or a relay is tried again; 0 for not at all.",
)
_alias_option = click.option(
    "--alias", "aliases", multiple=True, metavar="NAME=TARGET", help="Name an environment, for NAME:PATH."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _check_sandbox(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    mode, _, roots = (value or "").partition(":")
    if value is not None and (
        mode not in ("read-only", "workspace-write")
        or (mode == "read-only" and ":" in value)
        or (":" in value and not all(roots.split(":")))
    ):
        raise click.BadParameter(f"{value!r} is neither read-only nor workspace-write[:DIR...]")
    return value


def _log_to_stderr(debug: bool) -> None:
    import logging

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if debug else logging.WARNING,
        format="execenv: %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("httpcore2").setLevel(logging.INFO)  # below that it logs headers, with their secrets


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="execenv")
def cli() -> None:
    """Run programs in the places where work runs: here, in a container, on another machine.

    A place is an environment. Each one is reached in the same way, and whatever ends here, by Ctrl-C or
    otherwise, ends there too, with everything that it started.
    """


cli.add_command(relay)


@cli.command(epilog=EPILOG_SERVE)
@click.option(
    "--listen",
    default="ws://127.0.0.1:0",
    show_default=True,
    metavar="ws://IP:PORT|stdio",
    help="Where to serve. Port 0 takes a free one.",
)
@click.option(
    "--ws-auth",
    type=click.Choice(["capability-token", "signed-bearer-token"]),
    help="What a websocket client has to show. Required unless the address is loopback.",
)
@click.option("--ws-token-file", metavar="PATH", help="capability-token: the file that holds the token.")
@click.option("--ws-token-sha256", metavar="HEX", help="capability-token: the SHA-256 of the token instead.")
@click.option(
    "--ws-shared-secret-file", metavar="PATH", help="signed-bearer-token: the HS256 secret, 32 bytes or more."
)
@click.option("--ws-issuer", metavar="ISS", help="signed-bearer-token: the issuer that a token must have.")
@click.option(
    "--ws-audience", metavar="AUD", help="signed-bearer-token: the audience that a token must have."
)
@click.option(
    "--ws-max-clock-skew-seconds",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="signed-bearer-token: how far clocks may be apart (30).",
)
@click.option(
    "--detached-ttl",
    default="80",
    show_default=True,
    metavar="TIME|running=TIME,exited=TIME",
    help="How long a session waits for its client to come back: seconds, or 'never' for no end of it. "
    "'running' is for a session with a process that runs, 'exited' from the last exit on.",
)
@click.option(
    "--max-message",
    type=click.IntRange(min=1024),
    default=64 * 1024 * 1024,
    show_default=True,
    metavar="BYTES",
    help="The largest message taken from a client.",
)
@click.option(
    "--retain",
    type=click.IntRange(min=0),
    default=1024 * 1024,
    show_default=True,
    metavar="BYTES",
    help="How much output of each process is kept for a client that comes back.",
)
@click.option(
    "--remote",
    metavar="URL",
    help="Listen nowhere: register at the registry with this URL, and serve who comes by its relay.",
)
@click.option("--environment-id", metavar="ID", help="--remote: what the registry is to call this.")
@click.option("--name", metavar="NAME", help="--remote: a name for logs.  [default: that of this machine]")
@click.option(
    "--remote-transport",
    type=click.Choice(["noise", "clear"]),
    default="noise",
    show_default=True,
    help="--remote: encrypted from end to end; or in clear text, that the relay can read and change.",
)
@click.option(
    "--api-key-file",
    metavar="PATH",
    help="--remote: the file that holds the API key.  [default: EXECENV_API_KEY, else CODEX_API_KEY]",
)
@click.option("--api-key-stdin", is_flag=True, help="--remote: the API key is what stdin has to say.")
@click.option(
    "--allow-registry",
    multiple=True,
    metavar="HOST[:PORT]",
    help="--remote: a registry of one's own, by https, that may see the API key. May be given several times.",
)
@_debug_option
@click.pass_context
def serve(
    context: click.Context,
    listen: str,
    ws_auth: str | None,
    ws_token_file: str | None,
    ws_token_sha256: str | None,
    ws_shared_secret_file: str | None,
    ws_issuer: str | None,
    ws_audience: str | None,
    ws_max_clock_skew_seconds: float | None,
    detached_ttl: str,
    max_message: int,
    retain: int,
    remote: str | None,
    environment_id: str | None,
    name: str | None,
    remote_transport: Security,
    api_key_file: str | None,
    api_key_stdin: bool,
    allow_registry: tuple[str, ...],
    debug: bool,
) -> None:
    """Offer this machine to clients of the exec-server protocol, such as execenv itself and codex.

    With a websocket the first line on stdout is its URL; with --remote the only one is "registered ID at
    URL", once it is connected. SIGTERM and SIGINT end the server and all processes that it started.
    """
    # Until Trio has its own handlers a signal ends us here; nothing was started yet.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: os._exit(0))
    ttl = _detached_ttl(detached_ttl)
    auth_options = {
        "token_file": ws_token_file,
        "token_sha256": ws_token_sha256,
        "shared_secret_file": ws_shared_secret_file,
        "issuer": ws_issuer,
        "audience": ws_audience,
        "clock_skew": ws_max_clock_skew_seconds,
    }
    wants_auth = ws_auth is not None or any(value is not None for value in auth_options.values())
    given = {option for option in context.params if _is_given(context, option)}
    if remote is not None:
        if wants_auth or "listen" in given:
            raise click.ClickException("--remote takes no --listen and no --ws-*: nothing listens here")
        from execenv import _serve_remote_command
        from execenv.server import DetachedTtl

        options = _serve_remote_command.RemoteOptions(
            remote, environment_id, name, remote_transport, api_key_file, api_key_stdin, allow_registry
        )
        _run_server(
            debug,
            "serve_remote",
            max_message=max_message,
            detached_ttl=DetachedTtl(**ttl),
            retained_bytes=retain,
            **_serve_remote_command.arguments(options),
        )
        return
    unused = given & {"remote_transport", "api_key_file", "api_key_stdin", "allow_registry"}
    if unused:
        raise click.ClickException(f"--{min(unused).replace('_', '-')} is for --remote URL")
    if listen in ("stdio", "stdio://"):
        if wants_auth:
            raise click.ClickException("--ws-* options are for websockets: stdio has whoever started it")
        _run_server(debug, "serve_stdio", max_message=max_message, retained_bytes=retain)
        return
    host, port = _listen_address(listen)
    auth = _authenticator(ws_auth, auth_options) if wants_auth else None
    if auth is None and not _is_loopback(host):
        raise click.ClickException(
            f"{host} can be reached from other machines, and whoever reaches it can run anything here: "
            "add --ws-auth capability-token --ws-token-file PATH, or listen on 127.0.0.1"
        )
    sock = _bound_socket(host, port)
    bound = sock.getsockname()
    shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
    click.echo(f"ws://{shown}:{bound[1]}")
    from execenv.server import DetachedTtl  # imports Trio

    _run_server(
        debug,
        "serve_websocket",
        sock,
        auth=auth,
        max_message=max_message,
        detached_ttl=DetachedTtl(**ttl),
        retained_bytes=retain,
    )


def _is_given(context: click.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source is not click.core.ParameterSource.DEFAULT


def _run_server(debug: bool, name: str, /, *args: Any, **options: Any) -> None:
    import gc
    from functools import partial

    import trio

    from execenv import server

    _log_to_stderr(debug)
    gc.freeze()  # what is imported now stays: the collector need not look at it again
    serve_it = partial(getattr(server, name), *args, whole_program=True, **options)
    trio.run(server.run_until_signalled, serve_it)


def _authenticator(mode: str | None, options: dict[str, Any]) -> Authenticator | None:
    from execenv.errors import UsageError
    from execenv.server.auth import authenticator

    try:
        return authenticator(mode, **options)
    except UsageError as error:
        raise click.ClickException(str(error)) from error


def _detached_ttl(text: str) -> dict[str, float]:
    """The arguments of `execenv.server.DetachedTtl`, which would import Trio."""
    if "=" not in text:
        return {"running": _ttl(text, text)}
    times = {"running": 80.0, "exited": 80.0}
    named = [part.strip().partition("=") for part in text.split(",")]
    names = [name for name, _, _ in named]
    if not times.keys() >= set(names) or len(set(names)) < len(names):
        raise _bad_ttl(text)
    return times | {name: _ttl(time, text) for name, _, time in named}


def _ttl(time: str, text: str) -> float:
    seconds = _seconds(time, "never")
    if seconds is None:
        raise _bad_ttl(text)
    return seconds


def _seconds(text: str, infinite: str) -> float | None:
    """A time as it was given, or `None` if it is none; `infinite` is the word for no end."""
    if text == infinite:
        return math.inf
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if seconds >= 0 else None


def _bad_ttl(text: str) -> click.ClickException:
    return click.ClickException(
        "--detached-ttl takes a number of seconds, 'never', or both kinds of session by name "
        f"(running=never,exited=3600), not {text!r}"
    )


def _listen_address(listen: str) -> tuple[str, int]:
    scheme, _, rest = listen.partition("://")
    host, _, port = rest.rstrip("/").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if scheme != "ws" or not host or not port.isdecimal() or int(port) > 65535:
        raise click.ClickException(f"cannot listen on {listen!r}: give ws://IP:PORT or stdio")
    return ("127.0.0.1" if host == "localhost" else host), int(port)


def _is_loopback(host: str) -> bool:
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name may stand for any address
        return False


def _bound_socket(host: str, port: int, scheme: str = "ws") -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except (OSError, OverflowError) as error:
        sock.close()
        raise click.ClickException(f"cannot listen on {scheme}://{host}:{port}: {error}") from error
    return sock


@cli.command(
    epilog=EPILOG_RUN, context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False}
)
@_env_option
@_bootstrap_option
@_token_option
@_recovery_option
@click.option("-t", "--tty", is_flag=True, help="Run it on a terminal, as an interactive program needs it.")
@click.option("--cwd", metavar="DIR", help="The directory to run in, as the environment names it.")
@click.option(
    "-e",
    "--set-env",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a variable for the program.",
)
@click.option(
    "--sandbox",
    metavar="read-only|workspace-write[:DIR...]",
    callback=_check_sandbox,
    help="What the program, and all that it starts, may write: nothing; or the directories named (relative "
    "ones are from the one it runs in), else the one it runs in, and those for temporary files. It may read "
    "everything. Refused where it cannot be enforced.",
)
@click.option("--no-network", is_flag=True, help="The program has no network, not even of this machine.")
@_debug_option
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    target: str | None,
    bootstrap: bool,
    token_file: str | None,
    recovery: str,
    tty: bool,
    cwd: str | None,
    assignments: tuple[str, ...],
    sandbox: str | None,
    no_network: bool,
    debug: bool,
    argv: tuple[str, ...],
) -> None:
    """Run a program in an environment, with its output here as it comes.

    stdin is passed on. The exit status is the program's; 127 if it was not found (under --sandbox also if it
    could not be run), 126 if it could not be run, 125 if anything else failed. Ctrl-C interrupts the program,
    a second one ends it.
    """
    from execenv import _run_command

    where = _target(target, bootstrap)
    job = _run_command.Job(
        target=where,
        access=_access(token_file, recovery, where),
        argv=argv,
        tty=tty,
        cwd=cwd,
        extra_env=dict(map(_assignment, assignments)),
        sandbox=sandbox,
        network=not no_network,
    )
    _exit_with(debug, _run_command.run_job, job)


@cli.command(epilog=EPILOG_CP)
@click.option("-r", "--recursive", is_flag=True, help="Copy directories with all that is in them.")
@click.option("--atomic", is_flag=True, help="Bring each file to the disk before it gets its name.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@_alias_option
@_bootstrap_option
@_token_option
@_recovery_option
@_json_option
@_debug_option
@click.argument("sources", nargs=-1, required=True, metavar="SRC...")
@click.argument("destination", metavar="DST")
def cp(
    sources: tuple[str, ...],
    destination: str,
    recursive: bool,
    atomic: bool,
    quiet: bool,
    aliases: tuple[str, ...],
    bootstrap: bool,
    token_file: str | None,
    recovery: str,
    as_json: bool,
    debug: bool,
) -> None:
    """Copy files and trees between environments: PATH is here, URL:PATH or NAME:PATH elsewhere.

    NAME is a configured environment, or an alias. A URL is ws://HOST:PORT or relay+https://REGISTRY/ID; if
    it has a path, that ends at the first colon.

    Into DST if that is a directory, else to exactly DST. Permissions and times are kept, links are followed.
    What was cut goes on where it was, and what is there already is left alone, when the same is copied again.
    """
    from execenv import _data_commands

    locations = _locations((*sources, destination), aliases, bootstrap=bootstrap)
    job = _data_commands.CopyJob(
        sources=locations[:-1],
        destination=locations[-1],
        access=_access(token_file, recovery, *(location.target for location in locations)),
        recursive=recursive,
        atomic=atomic,
        as_json=as_json,
        quiet=quiet,
    )
    _exit_with(debug, _data_commands.run_copy, job)


@cli.command()
@click.option("-l", "--long", is_flag=True, help="Show permissions, size and time of the last change.")
@_env_option
@_bootstrap_option
@_alias_option
@_token_option
@_recovery_option
@_json_option
@_debug_option
@click.argument("paths", nargs=-1)
def ls(
    paths: tuple[str, ...],
    long: bool,
    target: str | None,
    bootstrap: bool,
    aliases: tuple[str, ...],
    token_file: str | None,
    recovery: str,
    as_json: bool,
    debug: bool,
) -> None:
    """List directories of an environment. A PATH may name its own environment, as for cp."""
    from execenv import _data_commands

    locations = _locations(paths or ("",), aliases, target, bootstrap=bootstrap)
    access = _access(token_file, recovery, *(location.target for location in locations))
    job = _data_commands.ListJob(locations, access, long, as_json)
    _exit_with(debug, _data_commands.run_list, job)


@cli.command()
@_env_option
@_bootstrap_option
@_alias_option
@_token_option
@_recovery_option
@_debug_option
@click.argument("paths", nargs=-1, required=True)
def cat(
    paths: tuple[str, ...],
    target: str | None,
    bootstrap: bool,
    aliases: tuple[str, ...],
    token_file: str | None,
    recovery: str,
    debug: bool,
) -> None:
    """Write the content of files to stdout. A PATH may name its own environment, as for cp."""
    from execenv import _data_commands

    locations = _locations(paths, aliases, target, bootstrap=bootstrap)
    access = _access(token_file, recovery, *(location.target for location in locations))
    _exit_with(debug, _data_commands.run_cat, locations, access)


@cli.command()
@_env_option
@_bootstrap_option
@_token_option
@_recovery_option
@_json_option
@_debug_option
def info(
    target: str | None,
    bootstrap: bool,
    token_file: str | None,
    recovery: str,
    as_json: bool,
    debug: bool,
) -> None:
    """Show what an environment says of itself."""
    from functools import partial

    from execenv import _data_commands

    run_info = partial(_data_commands.run_info, as_json=as_json)
    where = _target(target, bootstrap)
    _exit_with(debug, run_info, where, _access(token_file, recovery, where))


@cli.command(epilog=EPILOG_HTTP)
@_env_option
@_bootstrap_option
@_token_option
@_recovery_option
@click.option("-X", "--method", metavar="METHOD", help="GET, or POST where there is a body, if not given.")
@click.option("-H", "--header", "headers", multiple=True, metavar="'NAME: VALUE'", help="Add a header.")
@click.option(
    "--header-from",
    "secret_headers",
    multiple=True,
    metavar="'NAME: PREFIX$VARIABLE'",
    help="Add a header that ends with a variable of the environment, which it keeps to itself.",
)
@click.option("-d", "--data", metavar="TEXT|@FILE|@-", help="The body, as it is sent.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="For all of it; no limit.")
@click.option("--no-follow", is_flag=True, help="Do not follow redirects.")
@click.option("-i", "--include", is_flag=True, help="Print status and headers before the body.")
@click.option("-f", "--fail", is_flag=True, help="End with status 1 if the server answers 400 or more.")
@_json_option
@_debug_option
@click.argument("url")
def http(
    url: str,
    target: str | None,
    bootstrap: bool,
    token_file: str | None,
    recovery: str,
    method: str | None,
    headers: tuple[str, ...],
    secret_headers: tuple[str, ...],
    data: str | None,
    timeout: float | None,
    no_follow: bool,
    include: bool,
    fail: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Send an HTTP request from an environment, and write the body of the response to stdout."""
    from execenv import _data_commands

    pairs = [_data_commands.header(text) for text in headers]
    pairs += [_data_commands.header(text, from_variable=True) for text in secret_headers]
    where = _target(target, bootstrap)
    job = _data_commands.HttpJob(
        target=where,
        access=_access(token_file, recovery, where),
        method=method or ("GET" if data is None else "POST"),
        url=url,
        headers=pairs,
        body=None if data is None or data == "@-" else _content(data),
        body_from_stdin=data == "@-",
        timeout=timeout,
        follow=not no_follow,
        include=include,
        fail=fail,
        as_json=as_json,
    )
    _exit_with(debug, _data_commands.run_http, job)


@cli.command()
@_json_option
@_debug_option
def doctor(as_json: bool, debug: bool) -> None:
    """Show what this machine can enforce of a sandbox, and whether it can use relays.

    Where it cannot, what to do is shown too.

    It is tried, as the user who asks. The exit status is 0 if processes and files can be confined and the
    network can be taken away, and 1 if one of these cannot be.
    """
    from execenv import _doctor_command

    _exit_with(debug, _doctor_command.run_doctor, as_json)


@cli.group("env", epilog=EPILOG_ENV)
def environments() -> None:
    """Name environments, and see whether they work."""


@environments.command("list")
@_json_option
@_debug_option
def list_environments(as_json: bool, debug: bool) -> None:
    """List the environments that are known, and what says so."""
    from execenv import _env_commands

    _exit_with(debug, _env_commands.run_list, as_json)


@environments.command("show")
@_json_option
@_debug_option
@click.argument("name", required=False)
def show_environment(name: str | None, as_json: bool, debug: bool) -> None:
    """Show how an environment is reached, or the default one. Secrets are left out."""
    from execenv import _env_commands

    _exit_with(debug, _env_commands.run_show, name, as_json)


@environments.command("add")
@click.option("--token-file", metavar="PATH", help="URL: the file that will hold the bearer token.")
@click.option("--token-env", metavar="VARIABLE", help="URL: the variable that will hold the bearer token.")
@click.option("--cwd", metavar="DIR", help="COMMAND: the directory of this machine to start it in.")
@click.option(
    "-e",
    "--set-env",
    "assignments",
    multiple=True,
    metavar="NAME=VALUE",
    help="COMMAND: set a variable for it.",
)
@click.option("--bootstrap", is_flag=True, help="COMMAND: bring execenv along to where it leads.")
@click.option(
    "--security",
    type=click.Choice(["noise", "clear"]),
    help="Relay URL: encrypted from end to end (noise), or in clear text, which whoever has the relay can "
    "read and change; the other end has to be told so too.  [default: noise]",
)
@click.option("--account-id", metavar="ID", help="Relay URL: sent to the registry with the token.")
@click.option("--connect-timeout", type=float, metavar="SECONDS", help="URL: for the websocket (10).")
@click.option(
    "--initialize-timeout", type=float, metavar="SECONDS", help="For the handshake behind that (10)."
)
@click.option("--replace", is_flag=True, help="Replace the environment of that name, if there is one.")
@click.option("--default", "is_default", is_flag=True, help="Make it the default.")
@_debug_option
@click.argument("name")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="URL | -- COMMAND...")
def add_environment(
    name: str,
    words: tuple[str, ...],
    token_file: str | None,
    token_env: str | None,
    cwd: str | None,
    assignments: tuple[str, ...],
    bootstrap: bool,
    security: Literal["noise", "clear"] | None,
    account_id: str | None,
    connect_timeout: float | None,
    initialize_timeout: float | None,
    replace: bool,
    is_default: bool,
    debug: bool,
) -> None:
    """Add an environment to execenv's own file. Tokens are not written there, only where they are kept."""
    from execenv import _env_commands

    addition = _env_commands.Addition(
        name=name,
        words=words,
        token_file=token_file,
        token_env=token_env,
        cwd=cwd,
        extra_env=dict(map(_assignment, assignments)),
        bootstrap=bootstrap,
        security=security,
        account_id=account_id,
        connect_timeout=connect_timeout,
        initialize_timeout=initialize_timeout,
        replace=replace,
        is_default=is_default,
    )
    _env_commands.add(addition)


@environments.command("remove")
@_debug_option
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def remove_environments(names: tuple[str, ...], debug: bool) -> None:
    """Remove environments from execenv's own file."""
    from execenv import _env_commands

    _env_commands.remove(names)


@environments.command("default")
@_debug_option
@click.argument("name", required=False, metavar="[NAME|none]")
def default_environment(name: str | None, debug: bool) -> None:
    """Make an environment the default in execenv's own file, or say which it is.

    With 'none' commands are refused that do not say where, by --env.
    """
    from execenv import _env_commands

    if name is None:
        click.echo(_env_commands.default() or "none")
    else:
        _env_commands.set_default(None if name.lower() == "none" else name)


@environments.command("check")
@_token_option
@_json_option
@_debug_option
@_bootstrap_option
@click.argument("targets", nargs=-1, metavar="[NAME...]")
def check_environments(
    targets: tuple[str, ...], token_file: str | None, as_json: bool, debug: bool, bootstrap: bool
) -> None:
    """Connect to environments, all if none is named, and say what works there and what does not.

    The exit status is 1 if one cannot be used.
    """
    from execenv import _env_commands

    chosen = [(text, _target(text, bootstrap)) for text in targets] or _env_commands.all_targets()
    token = _token(token_file, [target for _, target in chosen])
    _exit_with(debug, _env_commands.run_check, chosen, token, as_json)


def _exit_with(debug: bool, command: Callable[..., Any], *args: Any) -> NoReturn:
    """Run a command to its end and exit with the status that it gives back."""
    import trio

    _log_to_stderr(debug)
    try:
        status = trio.run(command, *args)
    except BaseException as error:
        if _is_in(error, KeyboardInterrupt):
            status = 128 + signal.SIGINT
        elif _is_in(error, BrokenPipeError):  # whoever reads our output has seen enough
            status = 128 + signal.SIGPIPE
        else:
            raise
    raise click.exceptions.Exit(status)


def _is_in(error: BaseException, kind: type[BaseException]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(kind) is not None
    return isinstance(error, kind)


def _content(data: str) -> bytes:
    return _file(data[1:]) if data.startswith("@") else data.encode("utf-8", "surrogateescape")


def _file(path: str, named: str = "") -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise click.ClickException(f"cannot read {named}{path}: {error.strerror}") from error


def _locations(
    texts: Sequence[str], aliases: Sequence[str], default: str | None = "local", *, bootstrap: bool
) -> list[Location]:
    from execenv._locations import parse_alias, parse_location
    from execenv.errors import UsageError
    from execenv.providers import named_target

    try:
        named = [parse_alias(text, named_target) for text in aliases]
        known = {name: _brought(target, bootstrap) for name, target in named}
        return [
            parse_location(text, known, lambda: _brought(_target(default), bootstrap), named_target)
            for text in texts
        ]
    except UsageError as error:
        raise click.ClickException(str(error)) from error


def _target(text: str | None, bootstrap: bool = False) -> Target:
    from execenv._locations import parse_target
    from execenv.errors import UsageError
    from execenv.providers import default_target, named_target

    try:
        target = default_target() if text is None else parse_target(text, named_target)
    except UsageError as error:
        raise click.ClickException(str(error)) from error
    brought = _brought(target, bootstrap)
    if bootstrap and brought is target:
        shown = "the default environment" if text is None else repr(text)
        raise click.ClickException(f"--bootstrap is for a command, such as 'ssh devbox', and not for {shown}")
    return brought


def _brought(target: Target, bootstrap: bool) -> Target:
    """The same, for a command with `--bootstrap` as one that execenv is brought along to."""
    from attrs import evolve

    from execenv.targets import CommandTarget

    if bootstrap and isinstance(target, list):
        return CommandTarget(tuple(target), bootstrap=True)
    if bootstrap and isinstance(target, CommandTarget):
        return evolve(target, bootstrap=True)
    return target


def _access(token_file: str | None, recovery: str, *targets: Target) -> Access:
    from execenv._locations import Access

    seconds = _seconds(recovery, "forever")
    if seconds is None:
        raise click.ClickException(f"--recovery takes a number of seconds or 'forever', not {recovery!r}")
    return Access(_token(token_file, targets), seconds)


def _token(path: str | None, targets: Sequence[Target]) -> str | None:
    if path is None:
        token, source = os.environ.get("EXECENV_TOKEN", ""), "EXECENV_TOKEN"
        if not token:
            return None
    else:
        source = f"--token-file {path}"
        token = _file(path, "--token-file ").decode(errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():  # it goes into a header
        raise click.ClickException(f"{source} holds no token: one line of ASCII")
    if path is not None and not any(isinstance(target, str) and target != "local" for target in targets):
        raise click.ClickException(
            "--token-file is for a URL of the command line: what is configured names its own token, "
            "EXECENV_URL has EXECENV_TOKEN, and nothing else takes one"
        )
    return token


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.ClickException(f"-e takes NAME=VALUE, not {text!r}")
    return name, value
