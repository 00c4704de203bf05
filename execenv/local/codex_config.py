"""What the configuration files of a codex on this machine say, for a codex elsewhere that works here (§8.3).

Only the keys that are asked for leave the machine. The layers are those of the reference, as far as they are
files of this machine: what the system configures, the user, and a project that the user trusts.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import tomllib
from collections.abc import Sequence
from typing import Any

from execenv.errors import InternalError, InvalidParams, os_error_text
from execenv.paths import ForeignPathError, PathUri
from execenv.protocol import ConfigLayer, ConfigLayers, EnvironmentConfig, EnvironmentConfigReadParams

SYSTEM = "/etc/codex"
MAX_BYTES = 1024 * 1024

Keys = Sequence[tuple[str, ...]]
Table = dict[str, Any]


def read_config(params: EnvironmentConfigReadParams, system: str = SYSTEM) -> EnvironmentConfig:
    """Read the files and pick out what was asked for. Blocks.

    Raises:
        InvalidParams: if `cwd` is no path of this system.
        InternalError: if a file is there and cannot be read, naming it and the line.
    """
    try:
        cwd = os.fsdecode(params.cwd.to_native())
    except ForeignPathError as error:
        raise InvalidParams(str(error)) from None
    home = os.path.expanduser("~")
    codex_home = os.path.abspath(os.environ.get("CODEX_HOME") or os.path.join(home, ".codex"))
    user = os.path.join(codex_home, "config.toml")
    files = [(f"system ({system}/config.toml)", f"{system}/config.toml"), (f"user ({user})", user)]
    if _trusts(_load(user), cwd):
        project = os.path.join(cwd.rstrip("/"), ".codex", "config.toml")
        files.append((f"project ({project})", project))
    managed = f"{system}/managed_config.toml"
    files.append((f"legacy managed_config.toml ({managed})", managed))
    layers = _layers(files, params.config_paths)
    requirements = _layers([(f"{system}/requirements.toml",) * 2], params.requirements_paths)
    from_system = sum(layer.source.startswith("system ") for layer in layers)
    return EnvironmentConfig(
        user_home_dir=PathUri.from_native(os.path.abspath(home)),
        codex_home_dir=PathUri.from_native(codex_home),
        hostname=socket.gethostname(),
        config=ConfigLayers(layers, from_system),
        requirements=ConfigLayers(requirements, len(requirements)),
    )


def _layers(files: Sequence[tuple[str, str]], keys: Keys) -> tuple[ConfigLayer, ...]:
    layers = []
    for source, path in files:
        picked = _pick(_load(path), keys)
        if picked:
            directory = PathUri.from_native(os.path.dirname(path))
            layers.append(ConfigLayer(source, directory, _to_toml(picked)))
    return tuple(layers)


def _load(path: str) -> Table:
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InternalError(f"failed to load executor-local config: {path}: not a regular file")
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InternalError(f"failed to load executor-local config: {path}: {os_error_text(error)}") from None
    if len(data) > MAX_BYTES:
        raise InternalError(f"failed to load executor-local config: {path}: larger than {MAX_BYTES} bytes")
    try:
        return tomllib.loads(data.decode())
    except ValueError as error:
        where = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error))
        text = f"{path}:{where[2]}:{where[3]}: {where[1]}" if where else f"{path}: {error}"
        raise InternalError(f"failed to load executor-local config: {text}") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # a fifo would wait for a writer


def _trusts(user: Table, cwd: str) -> bool:
    projects = user.get("projects")
    project = projects.get(cwd) if isinstance(projects, dict) else None
    return isinstance(project, dict) and project.get("trust_level") == "trusted"


def _pick(table: Table, keys: Keys) -> Table:
    """The part of `table` that has the values at `keys`."""
    picked: Table = {}
    for key in keys:
        value: Any = table
        for segment in key:
            value = value.get(segment) if isinstance(value, dict) else None
        if value is None:
            continue
        inner = picked
        for segment in key[:-1]:
            inner = inner.setdefault(segment, {})
        inner[key[-1]] = value
    return picked


def _to_toml(table: Table) -> str:
    import tomlkit

    return tomlkit.dumps(table)
