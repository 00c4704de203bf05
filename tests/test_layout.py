"""What holds for the whole package: its public names, what imports what, and what README.md promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import execenv
from execenv.protocol import SERVER_CAPABILITIES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "execenv"
MODULES = sorted(PACKAGE.rglob("*.py"))
README = (ROOT / "README.md").read_text()

PUBLIC = """
    __version__
    KillReceipt Output Survivor
    Snapshot
    CapturedOutput CompletedProcess Environment captured_output
    EnvironmentPath
    Capabilities EnvironmentManager EnvironmentStatus open_manager
    ConfigError ConnectFailed ConnectionLost EnvironmentUnavailable ExecenvError HttpFailed NotSupported
    OutputGap ProcessFailed ProcessNotStarted ProtocolViolation RpcError UsageError
    BinaryFile TextFile
    FromVariable HttpResponse StreamedResponse
    open_environment
    PathUri
    Process
    DirectoryEntry EnvPolicy EnvironmentInfo FileMetadata WalkEntry WalkError WalkResult
    Entry GlobRule PathRule SandboxProfile SpecialRule
    Status StatusChange fail_fast
    CommandTarget LocalTarget RelayTarget WebsocketTarget
    Progress TransferReport
"""

LAYERS = (
    {
        "_pure_base64",
        "_pure_json",
        "_service",
        "_toml_lines",
        "_version",
        "abc",
        "codec",
        "config",
        "errors",
        "paths",
        "protocol",
        "sandbox",
        "status",
        "targets",
    },
    {"relay", "rpc", "transports"},
    {"local", "relay_service", "remote", "server"},
    {
        "__init__",
        "__main__",
        "_bootstrap",
        "_bootstrapped",
        "_command",
        "_data_commands",
        "_doctor_command",
        "_env_commands",
        "_first_stage",
        "_locations",
        "_relay_commands",
        "_run_command",
        "_sandboxed",
        "_serve_remote_command",
        "_standard_streams",
        "_tables",
        "cli",
        "environment",
        "environment_path",
        "environments",
        "file",
        "files",
        "http",
        "integrations",
        "open",
        "process",
        "providers",
        "transfer",
    },
    {"testing"},
)
"""Values, pumps, capabilities, assembly, tools for tests: each may import its own and those before it."""

HEAVY = ("attr", "attrs", "cattrs", "h11", "httpcore2", "orjson", "trio", "trio_websocket", "websockets")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


# Names.


def test_public_names_are_these() -> None:
    assert execenv.__all__ == PUBLIC.split()


@pytest.mark.parametrize("name", PUBLIC.split())
def test_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(execenv, name)
    assert isinstance(value, str) or value.__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'execenv' has no attribute 'run'"):
        execenv.run  # noqa: B018
    assert set(dir(execenv)) == set(PUBLIC.split())


# Imports.


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = run_python(
        f"import sys, execenv; print([name for name in {(*HEAVY, 'click')} if name in sys.modules])"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_server_prints_its_url_before_it_imports_what_only_requests_need() -> None:
    blocked = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY}))"  # None: importing it raises ImportError
    )
    done = run_python(f"{blocked}; from execenv.cli import main; main(['serve', '--debug'])")
    assert re.fullmatch(r"ws://127\.0\.0\.1:\d+\n", done.stdout)
    assert "ModuleNotFoundError: import of trio halted" in done.stderr


def _parts(path: Path) -> list[str]:
    return list(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path: Path) -> Iterator[str]:
    """The first name below `execenv` of all that a module imports when it runs, at its top or later."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body.clear()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "execenv" and rest:
                yield rest[0]


def _layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def test_every_module_has_a_layer() -> None:
    assert {_parts(path)[0] for path in MODULES} == set().union(*LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(_parts(path)))
def test_module_imports_only_what_its_layer_may(path: Path) -> None:
    parts = _parts(path)
    for name in _imports(path):
        assert _layer(name) <= _layer(parts[0]), f"{'.'.join(parts)} imports {name}"
        if parts[0] in LAYERS[2] and name in LAYERS[2] and name != parts[0]:
            assert (parts, name) == (["server", "__init__"], "local"), "capabilities meet in abc"
        if parts[0] == "local":
            assert name not in LAYERS[1], "what is local needs no wire"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(_parts(path)))
def test_module_has_no_second_event_loop_no_threads_and_no_fork_hook(path: Path) -> None:
    forbidden = {"asyncio", "Thread", "preexec_fn", "fork"}
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=name) | ast.alias(name=name):
                assert name not in forbidden, f"line {getattr(node, 'lineno', '?')}"
            case ast.ImportFrom(module=name):
                assert name not in forbidden, f"line {node.lineno}"


# README.md and what else comes with it.


def _shell_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)\n```$", README, re.DOTALL | re.MULTILINE)


def test_readme_begins_with_three_sentences_and_two_commands() -> None:
    opening = README.partition("\n\n")[2].partition("\n\n")[0].replace("\n", " ")
    assert len(re.findall(r"\.(?: |$)", opening)) == 3
    first, second = _shell_blocks()[:2]
    assert first == "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/execenv run -- uname -a"
    assert second == "python3 -m venv .venv && .venv/bin/pip install nox && .venv/bin/nox -s tests"


def test_ci_runs_the_test_command_of_the_readme_and_then_interop() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    steps = [line for line in script.splitlines() if "nox -s" in line]
    assert steps == [f"{_shell_blocks()[1]} || exit 1", ".venv/bin/nox -s interop"]
    assert "export EXECENV_REQUIRE_TOOLS=1" in script.partition(steps[0])[0]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_readme_lists_every_capability_of_our_servers() -> None:
    table = re.findall(r"^\| `(\w+)` \|", README.partition("## The protocol")[2], re.MULTILINE)
    theirs = {"environmentConfigRead", "fileWriteStreaming", "fsWatchMissing", "httpHeaderEnvVars"}
    assert sorted(table) == sorted(SERVER_CAPABILITIES.keys() - theirs)


def test_links_of_the_readme_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings
        elif "://" not in link:
            assert (ROOT / link).exists(), link


def test_changelog_has_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## [{execenv.__version__}]" in changelog
