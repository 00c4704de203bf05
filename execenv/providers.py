"""What says which environments there are: files and variables; and which rules (environments.md §3.3, 3.4).

1. `$XDG_CONFIG_HOME/execenv/environments.toml`, if it exists,
2. `EXECENV_URL`,
3. the variables `CODEX_EXEC_SERVER_NOISE_*`,
4. `environments.toml` in `CODEX_HOME`, if it exists,
5. `CODEX_EXEC_SERVER_URL`.

The first that is there rules alone; what follows is not looked at. Without any there is only this machine.
One that is there and cannot be used is an error: it is never passed over for the next.
"""

from __future__ import annotations

import codecs
import os
import stat
from abc import ABC, abstractmethod
from pathlib import PurePath

from attrs import evolve, frozen

from execenv.config import DISABLED, LOCAL, LOCAL_ONLY, Snapshot, parse_config
from execenv.errors import ConfigError, UsageError
from execenv.targets import (
    LocalTarget,
    RelayTarget,
    Target,
    WebsocketTarget,
    environment_id_problem,
    is_relay_url,
    is_token,
    parse_relay_url,
    registry_problem,
)

FILE_NAME = "environments.toml"
OUR_URL = "EXECENV_URL"
OUR_TOKEN = "EXECENV_TOKEN"
CODEX_HOME = "CODEX_HOME"
CODEX_URL = "CODEX_EXEC_SERVER_URL"
NOISE_VARIABLES = (
    "CODEX_EXEC_SERVER_NOISE_REGISTRY_URL",
    "CODEX_EXEC_SERVER_NOISE_ENVIRONMENT_ID",
    "CODEX_EXEC_SERVER_NOISE_AUTH_TOKEN",
)
NOISE_ACCOUNT = "CODEX_EXEC_SERVER_NOISE_CHATGPT_ACCOUNT_ID"
REMOTE = "remote"
"""The id of the environment that a variable names."""
MAX_BYTES = 1024 * 1024


class Provider(ABC):
    """One place that may say which environments there are.

    Attributes:
        name: what people call it: a path, or a variable.
        ours: whether it is of execenv, and not of codex.
    """

    name: str
    ours: bool

    @abstractmethod
    def read(self) -> Snapshot | None:
        """What it says now; `None` if it is not there. Blocks, shortly.

        Raises:
            ConfigError: if it is there and cannot be used.
        """


@frozen
class FileProvider(Provider):
    """An environments.toml."""

    name: str
    ours: bool = True

    def read(self) -> Snapshot | None:
        text = read_text(self.name)
        return None if text is None else parse_config(text, file=self.name, ours=self.ours)


@frozen
class UrlProvider(Provider):
    """A variable with a URL, or `none`. One of ours may be that of an environment behind a relay.

    Attributes:
        token_variable: shown to that server, if it is set.
    """

    name: str
    ours: bool = False
    token_variable: str | None = None

    def read(self) -> Snapshot | None:
        url = os.environ.get(self.name, "").strip()
        if not url:
            return None
        if url.lower() == DISABLED:
            return Snapshot()
        token = self.token_variable if os.environ.get(self.token_variable or "") else None
        if self.ours and is_relay_url(url):
            try:
                target = evolve(parse_relay_url(url), bearer_token_env=token)
            except UsageError as error:
                raise ConfigError(f"{self.name}: {error}", key=self.name) from None
            return Snapshot(((REMOTE, target),), REMOTE)
        # Its scheme is looked at when it is connected to, as the reference does.
        return Snapshot(((REMOTE, WebsocketTarget(url, bearer_token_env=token)),), REMOTE)


@frozen
class NoiseProvider(Provider):
    """The variables that select an environment behind a relay, encrypted from end to end.

    Its token stays in its variable, and is read whenever the registry is asked.
    """

    name: str = "CODEX_EXEC_SERVER_NOISE_*"
    ours: bool = False

    def read(self) -> Snapshot | None:
        there = [name for name in NOISE_VARIABLES if os.environ.get(name, "").strip()]
        if not there:
            return None
        missing = [name for name in NOISE_VARIABLES if name not in there]
        if missing:
            raise ConfigError(
                f"{' and '.join(there)} {_are(there)} set but {' and '.join(missing)} {_are(missing)} not: "
                "set all three, or none",
                key=missing[0],
            )
        registry, id_, token = NOISE_VARIABLES
        url, environment_id = os.environ[registry].strip(), os.environ[id_].strip()
        account = os.environ.get(NOISE_ACCOUNT, "").strip() or None
        for name, problem in (
            (registry, registry_problem(url)),
            (id_, environment_id_problem(environment_id)),
            (NOISE_ACCOUNT, _account_problem(account)),
        ):
            if problem:
                raise ConfigError(f"{name} cannot be used: {problem}", key=name)
        target = RelayTarget(url, environment_id, bearer_token_env=token, account_id=account)
        return Snapshot(((REMOTE, target),), REMOTE)


def _account_problem(account: str | None) -> str | None:
    if account is None or is_token(account):
        return None
    return "it cannot stand in a header: it should be one line of printable ASCII"


@frozen
class CodexFileProvider(Provider):
    """The environments.toml in `CODEX_HOME`."""

    ours: bool = False

    @property
    def name(self) -> str:  # type: ignore[override]
        return os.path.join(os.environ.get(CODEX_HOME) or "~/.codex", FILE_NAME)

    def read(self) -> Snapshot | None:
        return FileProvider(os.path.join(codex_home(), FILE_NAME), ours=False).read()


@frozen
class Loaded:
    """The snapshot that rules.

    Attributes:
        snapshot: what there is.
        source: where that comes from, for people.
    """

    snapshot: Snapshot
    source: str


def our_file() -> str:
    """The path of execenv's own file, whether it exists or not."""
    import platformdirs

    return os.path.abspath(platformdirs.user_config_path("execenv") / FILE_NAME)


def codex_home() -> str:
    """The folder of codex's own files.

    Raises:
        ConfigError: if `CODEX_HOME` is set and is no folder.
    """
    given = os.environ.get(CODEX_HOME)
    if not given:
        return os.path.join(os.path.expanduser("~"), ".codex")
    if not os.path.isdir(given):
        reason = "is no directory" if os.path.lexists(given) else "does not exist"
        raise ConfigError(f"{CODEX_HOME} is {given!r}, which {reason}: correct or unset it", key=CODEX_HOME)
    return os.path.abspath(given)


def our_providers() -> tuple[Provider, ...]:
    """Those of execenv, in their order."""
    return FileProvider(our_file()), UrlProvider(OUR_URL, ours=True, token_variable=OUR_TOKEN)


def all_providers() -> tuple[Provider, ...]:
    """All, in their order."""
    return *our_providers(), NoiseProvider(), CodexFileProvider(), UrlProvider(CODEX_URL)


def load_snapshot() -> Loaded:
    """What the first provider says that is there; this machine alone, if none is. Blocks, shortly.

    Raises:
        ConfigError: if that one cannot be used.
    """
    return first_of(all_providers()) or Loaded(LOCAL_ONLY, "nothing is configured")


def first_of(providers: tuple[Provider, ...]) -> Loaded | None:
    """What the first of them says that is there.

    Raises:
        ConfigError: if that one cannot be used.
    """
    for provider in providers:
        snapshot = provider.read()
        if snapshot is not None:
            return Loaded(snapshot, provider.name)
    return None


def read_text(path: str) -> str | None:
    """The text of a configuration file; `None` if there is no such file.

    Raises:
        ConfigError: if it is there and cannot be read, or is no text.
    """

    def failed(reason: str, line: int | None = None) -> ConfigError:
        return ConfigError(reason, file=path, line=line, verb="read")

    try:
        # Without O_NONBLOCK a fifo would hold us up until somebody writes to it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise failed("it is no regular file")
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        # A folder that is elsewhere, and not there now, is no reason to do with what is here.
        for name in (path, *map(str, PurePath(path).parents)):
            if os.path.islink(name) and not os.path.exists(name):
                raise failed(f"{name} is a symbolic link that leads nowhere: repair or remove it") from error
        return None
    except OSError as error:
        raise failed(f"{error.strerror}: make it readable, or remove it") from error
    if len(data) > MAX_BYTES:
        raise failed(f"it is larger than {MAX_BYTES} bytes")
    data = data.removeprefix(codecs.BOM_UTF8)  # some editors begin with one, and codex skips it
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise failed("it is not UTF-8: save it as that", line) from None


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


# For the command line.


def named_target(name: str) -> Target | None:
    """The target of a configured environment; `None` if no such environment is in what rules.

    Raises:
        ConfigError: if that cannot be used.
    """
    return dict(load_snapshot().snapshot.environments).get(name)


def known_names() -> tuple[str, ...]:
    """The ids in what rules.

    Raises:
        ConfigError: if that cannot be used.
    """
    return load_snapshot().snapshot.ids


def default_target() -> Target:
    """What a command uses that is not told where: this machine, unless our file or variable has another.

    Those of codex do not count here: whoever configured codex has said nothing of our commands.

    Raises:
        ConfigError: if that cannot be used.
        UsageError: if there is to be no default.
    """
    loaded = first_of(our_providers())
    if loaded is None:
        return LocalTarget()
    default = loaded.snapshot.default
    if default is None:
        raise UsageError(f"{loaded.source} says that there is no default environment: choose one with --env")
    return LocalTarget() if default == LOCAL else dict(loaded.snapshot.environments)[default]
