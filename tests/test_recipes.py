"""How people reach other machines, as README.md has it: ssh, docker exec, kubectl exec, srun, chains of them.

sshd is real and listens on loopback. docker, kubectl and srun are stand-ins that check their arguments, and
treat stdin and the variables, as the real ones do.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
import trio

from execenv import CommandTarget, ConnectFailed, ConnectionLost, _bootstrap, open_environment
from tests.conftest import SERVE
from tests.fakes import Watched
from tests.other_side import Box, Sshd, closed_environment, make_box, run_sshd
from tests.test_cli import EXECENV

TIME_LIMIT = 30.0
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with closed_environment(), run_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return make_box(tmp_path)


def served(sshd: Sshd) -> list[str]:
    """The recipe for a machine where execenv is installed: the command there is one word for ssh."""
    return [*sshd.argv, f"PYTHONPATH={shlex.quote(str(ROOT))} {shlex.join([*SERVE, 'stdio'])}"]


def brought(argv: tuple[str, ...]) -> CommandTarget:
    return CommandTarget(argv, bootstrap=True)


async def shown(target: CommandTarget | list[str], command: str) -> bytes:
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(target) as environment:
            done = await environment.run(["sh", "-c", command])
    assert done.stdout is not None
    return done.stdout


async def refusal(target: CommandTarget | list[str]) -> str:
    with trio.fail_after(TIME_LIMIT), pytest.raises(ConnectFailed) as caught:
        async with open_environment(target):
            pytest.fail("it was opened")
    return str(caught.value)


# ssh


async def test_ssh_runs_programs_where_execenv_is_installed(sshd: Sshd) -> None:
    assert (await shown(served(sshd), "echo $SSH_CONNECTION")).startswith(b"127.0.0.1 ")


async def test_ssh_has_terminals_without_one_of_its_own(sshd: Sshd) -> None:
    with trio.fail_after(TIME_LIMIT):
        async with open_environment(served(sshd)) as environment:
            done = await environment.run(["sh", "-c", "test -t 0 && tty"], tty=True)
    assert done.stdout is not None
    assert done.stdout.startswith(b"/dev/")


async def test_files_are_copied_over_ssh(sshd: Sshd, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").write_bytes(bytes(range(256)) * 4096)
    argv = [*EXECENV, "cp", "-q", "--bootstrap", "--alias", f"box={shlex.join(in_cache(sshd, tmp_path))}"]
    with trio.fail_after(TIME_LIMIT):
        await trio.run_process([*argv, str(tmp_path / "here"), f"box:{tmp_path}/there/"])
        await trio.run_process([*argv, f"box:{tmp_path}/there/here", str(tmp_path / "back")])
    assert (tmp_path / "back").read_bytes() == (tmp_path / "here").read_bytes()


def in_cache(sshd: Sshd, folder: Path) -> tuple[str, ...]:
    return (*sshd.argv, "env", f"XDG_CACHE_HOME={folder}/cache")


@pytest.mark.parametrize("how", ["installed", "bootstrap"])
async def test_end_of_the_ssh_client_ends_everything_at_the_other_side(
    sshd: Sshd, tmp_path: Path, how: str
) -> None:
    target = served(sshd) if how == "installed" else brought(in_cache(sshd, tmp_path))
    with closing(Watched()) as watched, trio.fail_after(TIME_LIMIT):
        with pytest.raises(ConnectionLost):
            async with open_environment(target) as environment:
                script = "setsid sleep 1000 & echo $PPID $$ $!; wait"
                async with environment.open_process(["sh", "-c", script]) as process:
                    for pid in (await anext(aiter(process))).data.split():
                        watched.add(int(pid))
                    assert len(watched.alive()) == 3
                    os.kill(ssh_client(), signal.SIGKILL)
                    await process.wait()
        await watched.wait_gone()


def ssh_client() -> int:
    """The child of ours that is an ssh."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            name, _, rest = (entry / "stat").read_text().partition(" (")[2].rpartition(") ")
            if name == "ssh" and int(rest.split()[1]) == os.getpid():
                return int(entry.name)
    raise LookupError("no ssh")


async def test_server_is_sent_over_ssh_once(
    sshd: Sshd, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = brought(in_cache(sshd, tmp_path))
    with caplog.at_level(logging.INFO, "execenv"):
        assert (await shown(target, "echo $SSH_CONNECTION")).startswith(b"127.0.0.1 ")
        assert "sending the server" in caplog.text
        caplog.clear()
        assert (await shown(target, "echo $SSH_CONNECTION")).startswith(b"127.0.0.1 ")
        assert "sending the server" not in caplog.text


@pytest.mark.parametrize("bootstrap", [False, True])
async def test_wrong_key_is_told_in_the_words_of_ssh(sshd: Sshd, bootstrap: bool) -> None:
    text = await refusal(CommandTarget(sshd.stranger, bootstrap=bootstrap))
    assert "ssh ended with status 255 and said: " in text
    assert "Permission denied (publickey)." in text


async def test_no_server_at_the_other_side_is_told_in_the_words_of_its_shell(sshd: Sshd) -> None:
    text = await refusal([*sshd.argv, "no-such-execenv serve --listen stdio"])
    assert "ssh ended with status 127 and said: " in text
    assert "not found" in text


async def test_no_python_at_the_other_side_is_told(
    sshd: Sshd, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bootstrap, "_ELSEWHERE", "")  # not those of this machine
    box.put("python3", 'echo 3.9.2; case "$*" in *version_info*) exit 1; esac')
    box.put("python3.14", "exit 127")
    text = await refusal(brought((*sshd.argv, "env", f"PATH={box.bin}", f"HOME={box.home}")))
    assert "stdio of ssh: no Python >= 3.11 at the other side" in text
    assert "(found python3 3.9.2, python3.14 that does not run)" in text
    assert "install one there" in text


async def test_terminal_of_ssh_is_refused(sshd: Sshd) -> None:
    text = await refusal(brought((sshd.argv[0], "-tt", *sshd.argv[1:])))
    assert "stdin is a terminal at the other side: leave out -t" in text


def require(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"there is no {program}")
    return found


@pytest.fixture(params=["sh", "bash", "zsh", "fish", "tcsh"])
def shell(request: pytest.FixtureRequest) -> str:
    """The path of a shell that people have for their login."""
    return require(request.param)


async def test_login_shell_of_the_other_side_does_not_matter(
    shell: str, box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGIN_SHELL", shell)
    assert await shown(brought((box.tool("ssh"), "devbox")), "echo $HOME") == f"{box.home}\n".encode()


@pytest.fixture(params=["dash", "bash", "ksh", "zsh", "busybox"])
def other_sh(request: pytest.FixtureRequest) -> str:
    """The path of what some systems have for `sh`."""
    return require(request.param)


async def test_sh_of_the_other_side_does_not_matter(box: Box, other_sh: str) -> None:
    (box.bin / "sh").unlink()
    (box.bin / "sh").symlink_to(other_sh)
    assert await shown(brought(recipe(box, "docker")), "echo $HOME") == f"{box.home}\n".encode()


async def test_chain_of_ssh_and_docker_is_a_command_like_any_other(sshd: Sshd, box: Box) -> None:
    chain = (*sshd.argv, box.tool("docker"), "exec", "-i", "box")
    assert await shown(brought(chain), 'echo "$HOME $SSH_CONNECTION"') == f"{box.home} \n".encode()


# docker, kubectl, srun


def recipe(box: Box, tool: str) -> tuple[str, ...]:
    words = {
        "docker": ("exec", "-i", "box"),
        "kubectl": ("exec", "-i", "pod", "--"),
        "srun": ("--ntasks=1",),
    }
    return (box.tool(tool), *words[tool])


@pytest.mark.parametrize("tool", ["docker", "kubectl", "srun"])
async def test_server_is_brought_into_a_container(box: Box, tool: str) -> None:
    assert await shown(brought(recipe(box, tool)), "echo $HOME") == f"{box.home}\n".encode()
    assert [entry.name for entry in box.home.iterdir()] == [".cache"]


@pytest.mark.parametrize("tool", ["docker", "kubectl", "srun"])
async def test_server_that_is_in_the_container_is_used(box: Box, tool: str) -> None:
    box.put("execenv", f'PYTHONPATH={ROOT} exec {sys.executable} -m execenv "$@"')
    argv = [*recipe(box, tool), "execenv", "serve", "--listen", "stdio"]
    assert await shown(argv, "echo $HOME") == f"{box.home}\n".encode()
    assert list(box.home.iterdir()) == []


async def test_command_line_brings_a_server_into_a_container(box: Box) -> None:
    argv = [*EXECENV, "run", "--env", shlex.join(recipe(box, "docker")), "--bootstrap", "--", "sh", "-c"]
    with trio.fail_after(TIME_LIMIT):
        done = await trio.run_process([*argv, "cat; echo $HOME"], stdin=b"in ", capture_stdout=True)
    assert done.stdout == f"in {box.home}\n".encode()


async def test_command_line_refuses_to_bring_a_server_to_this_machine() -> None:
    argv = [*EXECENV, "info", "--env", "local", "--bootstrap"]
    with trio.fail_after(TIME_LIMIT):
        done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
    assert (done.stdout, done.returncode) == (b"", 1)
    assert b"--bootstrap is for a command, such as 'ssh devbox', and not for 'local'" in done.stderr


async def test_check_of_an_environment_brings_a_server_over_ssh(
    sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with trio.fail_after(TIME_LIMIT):
        argv = [*EXECENV, "env", "add", "devbox", "--bootstrap", "--", *in_cache(sshd, tmp_path)]
        await trio.run_process(argv, capture_stdout=True)
        done = await trio.run_process([*EXECENV, "env", "check", "devbox"], capture_stdout=True)
    assert b"devbox" in done.stdout
    assert (tmp_path / "cache" / "execenv").is_dir()


@pytest.mark.parametrize("words", [("docker", "exec", "box"), ("kubectl", "exec", "pod", "--")])
@pytest.mark.parametrize("bootstrap", [False, True])
async def test_forgotten_i_is_told(box: Box, words: tuple[str, ...], bootstrap: bool) -> None:
    box.put("execenv", f'PYTHONPATH={ROOT} exec {sys.executable} -m execenv "$@"')
    server = () if bootstrap else ("execenv", "serve", "--listen", "stdio")
    text = await refusal(CommandTarget((box.tool(words[0]), *words[1:], *server), bootstrap=bootstrap))
    assert "was its stdin closed? docker exec and kubectl exec need -i" in text


async def test_what_a_tool_says_of_its_arguments_is_told(box: Box) -> None:
    text = await refusal(brought((box.tool("kubectl"), "exec", "-i", "pod")))
    assert "Use exec [POD] -- [COMMAND] instead" in text
    text = await refusal(brought((box.tool("docker"), "exec", "-i", "other")))
    assert "Error response from daemon: No such container: other" in text
    text = await refusal(brought((box.tool("docker"), "exec", "-it", "box")))
    assert "the input device is not a TTY" in text


async def test_container_without_a_shell_is_told(box: Box) -> None:
    (box.bin / "sh").unlink()
    text = await refusal(brought(recipe(box, "docker")))
    assert "docker ended with status 127 and said: OCI runtime exec failed" in text
    assert 'exec: "sh": executable file not found' in text


@pytest.mark.parametrize("found", ["none", "python 2.7.18"])
async def test_container_without_python_is_told(
    box: Box, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bootstrap, "_ELSEWHERE", "")  # not those of this machine
    (box.bin / "python3").unlink()
    if found != "none":
        box.put("python", "echo 2.7.18; exit 1")
    text = await refusal(brought(recipe(box, "docker")))
    assert f"no Python >= 3.11 at the other side (found {found}): install one there" in text
