"""`execenv env`, and names of environments wherever the command line takes an environment."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from attrs import define

from execenv.cli import main
from tests.conftest import SERVE, WebsocketServer, run_websocket_server
from tests.test_cli import check_one_line, execenv, on_terminal

SECRET = "hush-hush"
COMMAND = [*SERVE, "stdio"]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where our own file would be, in a home of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    (tmp_path / "codex").mkdir()
    monkeypatch.setenv("CODEX_HOME", str(tmp_path / "codex"))
    return tmp_path / "xdg" / "execenv" / "environments.toml"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


def websocket(id_: str, url: str) -> str:
    return f'[[environments]]\nid = "{id_}"\nurl = "{url}"\n'


def command(id_: str) -> str:
    return f'[[environments]]\nid = "{id_}"\nprogram = "{sys.executable}"\nargs = {json.dumps(COMMAND[1:])}\n'


async def good(*args: str) -> str:
    """What a command prints on stdout; it must have gone well and quietly."""
    stdout, stderr, status = await execenv(*args)
    assert (stderr.decode(), status) == ("", 0)
    return stdout.decode()


async def bad(*args: str, words: tuple[str, ...], status: int = 1) -> None:
    """A command must be refused, in one line with these words."""
    check_refused(await execenv(*args), words, status)


def check_refused(ended: tuple[bytes, bytes, int], words: tuple[str, ...], status: int) -> None:
    stdout, stderr, code = ended
    assert (stdout, code) == (b"", status)
    check_one_line(stderr, *words)
    assert SECRET not in stderr.decode()


@define
class Here:
    """The command line in this process, for what needs no other."""

    _capture: pytest.CaptureFixture[str]

    def run(self, *args: str) -> tuple[bytes, bytes, int]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        stdout, stderr = self._capture.readouterr()
        assert isinstance(ended.value.code, int)
        return stdout.encode(), stderr.encode(), ended.value.code

    def good(self, *args: str) -> str:
        stdout, stderr, status = self.run(*args)
        assert (stderr.decode(), status) == ("", 0)
        return stdout.decode()

    def bad(self, *args: str, words: tuple[str, ...], status: int = 1) -> None:
        check_refused(self.run(*args), words, status)


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Here:
    return Here(capfd)


# Editing.


def test_environments_are_added_changed_and_removed_and_comments_stay(here: Here, file: Path) -> None:
    here.good("env", "add", "devbox", "ws://127.0.0.1:8765", "--token-file", "token", "--default")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    token = os.path.abspath("token")
    assert file.read_text() == dedent(
        f"""\
        default = "devbox"

        [[environments]]
        id = "devbox"
        url = "ws://127.0.0.1:8765"
        auth_bearer_token_file = "{token}"
        """
    )
    file.write_text(f"# mine\n{file.read_text()}")
    file.chmod(0o640)
    options = ("--cwd", "/srv", "-e", "A=b=c", "--initialize-timeout", "2.5", "--bootstrap")
    here.good("env", "add", *options, "box", "--", "sh", "-c", "a b")
    text = file.read_text()
    assert text.startswith('# mine\ndefault = "devbox"\n')
    assert text.endswith(
        dedent(
            """
            [[environments]]
            id = "box"
            program = "sh"
            args = ["-c", "a b"]
            env = {A = "b=c"}
            cwd = "/srv"
            bootstrap = true
            initialize_timeout_sec = 2.5
            """
        )
    )
    here.good("env", "add", "--replace", "box", "sh -c 'c d'")
    assert 'args = ["-c", "c d"]\n' in file.read_text()
    here.good("env", "default", "box")
    assert here.good("env", "default") == "box\n"
    here.good("env", "remove", "devbox")
    assert file.read_text().startswith('# mine\ndefault = "box"\n\n[[environments]]\nid = "box"\n')
    here.good("env", "default", "NONE")
    assert here.good("env", "default") == "none\n"
    here.good("env", "remove", "box")
    assert file.read_text() == '# mine\ndefault = "none"\n'
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert os.listdir(file.parent) == ["environments.toml"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["add", "a", "ws://h"], ("`a` is there already",)),
        (["add", "local", "ws://h"], ("`local` is reserved",)),
        (["add", "x y", "ws://h"], ("`x y`", "write `x-y`")),
        (["add", "x", "http://h"], ("must use ws:// or wss://", "`ws://h`")),
        (["add", "x", "ws://h", "--token-env", "X"], ("needs wss:// or a loopback",)),
        (["add", "x", "wss://h", "--token-env", "X", "--token-file", "f"], ("both set",)),
        (["add", "x", "ws://h", "--cwd", "/"], ("--cwd is for commands",)),
        (["add", "x", "ws://h", "-e", "A=b", "--bootstrap"], ("-e and --bootstrap are for commands",)),
        (["add", "x", "--token-env", "X", "--", "sh"], ("--token-env is for URLs",)),
        (["add", "x", "--connect-timeout", "0", "--", "sh"], ("--connect-timeout is for URLs",)),
        (["add", "x", "ws://h", "--connect-timeout", "-1"], ("connect_timeout_sec cannot be -1",)),
        (["add", "x", "sh 'a"], ("is no command",)),
        (["add", "x", " "], ("name a URL or a command",)),
        (["remove", "b"], ("is the default",)),
        (["remove", "a", "c"], ("`c` is not in",)),
        (["default", "c"], ("`c` is not in", "`a`")),
        (["show", "c"], ("`c` is not configured",)),
    ],
)
def test_edit_that_cannot_be_changes_nothing(
    here: Here, file: Path, args: list[str], words: tuple[str, ...]
) -> None:
    text = f'default = "b"\n{websocket("a", "ws://h")}{websocket("b", "ws://h")}'
    write(file, text)
    here.bad("env", *args, words=words)
    assert file.read_text() == text
    assert os.listdir(file.parent) == ["environments.toml"]


def test_file_that_is_wrong_is_named_with_its_line_and_left_alone(here: Here, file: Path) -> None:
    write(file, "# c\ndefalt = 1\n")
    words = (f"{file}, line 2: unknown field `defalt`", "did you mean `default`?")
    for args in (["add", "x", "ws://h"], ["remove", "x"], ["default", "x"], ["default"], ["show"], ["check"]):
        here.bad("env", *args, words=words)
    here.bad("run", "true", words=words, status=125)
    here.bad("run", "--env", "true", "true", words=words, status=125)
    stdout, _, status = here.run("env", "list")
    assert (words[0] in stdout.decode(), "cannot be used" in stdout.decode(), status) == (True, True, 1)
    assert file.read_text() == "# c\ndefalt = 1\n"


def test_link_to_the_file_stays_a_link(here: Here, file: Path, tmp_path: Path) -> None:
    write(tmp_path / "dotfiles" / "e.toml", "# mine\n")
    file.parent.mkdir(parents=True)
    file.symlink_to(tmp_path / "dotfiles" / "e.toml")
    here.good("env", "add", "a", "ws://h")
    assert file.is_symlink()
    assert "[[environments]]" in (tmp_path / "dotfiles" / "e.toml").read_text()


def test_first_addition_says_what_it_puts_out_of_use(
    here: Here, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEX_EXEC_SERVER_URL", "ws://h")
    stdout, stderr, status = here.run("env", "add", "a", "ws://h")
    assert (stdout, status) == (b"", 0)
    check_one_line(stderr, str(file), "CODEX_EXEC_SERVER_URL does not count any more")
    here.good("env", "add", "b", "ws://h")


# Listing.


@pytest.fixture
def several(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something in each place, and secrets wherever they can be."""
    write(
        file,
        f"""\
        default = "web"
        [[environments]]
        id = "web"
        url = "wss://me:{SECRET}@h/x?t={SECRET}"
        auth_bearer_token = "{SECRET}"
        [[environments]]
        id = "cmd"
        program = "ssh"
        args = ["box", "a b"]
        env = {{ TOKEN = "{SECRET}" }}
        """,
    )
    write(tmp_path / "codex" / "environments.toml", websocket("codex-box", "ws://10.0.0.1"))
    monkeypatch.setenv("EXECENV_URL", "none")
    monkeypatch.setenv("CODEX_EXEC_SERVER_URL", f"ws://me:{SECRET}@h2")
    return file


def test_list_has_all_and_says_what_rules_and_no_secret(here: Here, several: Path, tmp_path: Path) -> None:
    plain = here.good("env", "list")
    assert SECRET not in plain
    lines = plain.splitlines()
    assert re.fullmatch(r" +NAME +KIND +TARGET +SOURCE", lines[0])
    assert re.fullmatch(rf"\* +web +websocket +wss://\*\*\*@h/x +{several}", lines[2])
    assert re.fullmatch(rf" +cmd +command +ssh box 'a b' +{several}", lines[3])
    codex = tmp_path / "codex" / "environments.toml"
    assert re.fullmatch(rf" +codex-box +websocket +ws://10\.0\.0\.1 +{codex} \(not in use\)", lines[5])
    assert "default: web" in lines
    assert f"{several}: rules, as the first that is there" in lines
    assert f"EXECENV_URL: not in use: {several} comes before it" in lines
    assert "CODEX_EXEC_SERVER_NOISE_*: not there" in lines
    listed = json.loads(here.good("env", "list", "--json"))
    assert SECRET not in str(listed)
    assert (listed["rules"], listed["default"]) == (str(several), "web")
    assert [(row["name"], row["default"], row["inUse"]) for row in listed["environments"]] == [
        ("local", False, True),
        ("web", True, True),
        ("cmd", False, True),
        ("local", False, False),
        ("codex-box", False, False),
        ("remote", False, False),
    ]
    states = [source["state"] for source in listed["sources"]]
    assert states == ["rules", "overruled", "absent", "overruled", "overruled"]


def test_show_tells_how_it_is_reached_and_no_secret(here: Here, several: Path) -> None:
    shown = json.loads(here.good("env", "show", "--json"))
    assert shown == {
        "name": "web",
        "kind": "websocket",
        "url": "wss://***@h/x",
        "token": "in the file",
        "connectTimeout": 10.0,
        "initializeTimeout": 10.0,
        "source": str(several),
        "default": True,
        "inUse": True,
    }
    plain = here.good("env", "show", "cmd")
    assert SECRET not in plain
    assert re.search(r"^command: +ssh box 'a b'$", plain, re.MULTILINE)
    assert re.search(r"^variables: +TOKEN$", plain, re.MULTILINE)
    assert json.loads(here.good("env", "show", "codex-box", "--json"))["inUse"] is False


def test_nothing_configured_is_this_machine(here: Here, file: Path) -> None:
    listed = json.loads(here.good("env", "list", "--json"))
    assert (listed["default"], [row["name"] for row in listed["environments"]]) == ("local", ["local"])
    assert here.good("env", "default") == "local\n"
    assert not file.exists()


async def test_list_on_a_terminal_is_a_table(several: Path) -> None:
    async with on_terminal("env", "list") as terminal:
        shown = (await terminal.expect(b"default: web")).decode()
    assert "NAME" in shown
    assert "─" in shown
    assert SECRET not in shown


# Checking.


async def test_check_says_what_works_and_what_does_not(file: Path, websocket_server: WebsocketServer) -> None:
    write(file, websocket("web", websocket_server.url) + command("cmd"))
    reports: list[dict[str, Any]] = json.loads(await good("env", "check", "--json"))
    assert [report["name"] for report in reports] == ["local", "web", "cmd"]
    for report in reports:
        assert report["ok"] is True
        assert report["tests"] == {"run": "ok", "read": "ok", "http": "ok"}
        assert report["version"]
        assert report["connectSeconds"] > 0
        assert "processReceipt" in report["capabilities"]
        assert report["missing"] == []
    assert re.search(
        r"^cmd +ok +[\d.]+ ms +[\d.]+ ms +\S+ +ok +ok +ok$", await good("env", "check", "cmd"), re.M
    )


async def test_check_ends_with_1_and_the_reasons_if_one_is_bad(file: Path) -> None:
    write(
        file,
        websocket("closed", "ws://127.0.0.1:1")
        + 'auth_bearer_token_env = "NO_SUCH"\n'
        + websocket("refused", "ws://127.0.0.1:1")
        + '[[environments]]\nid = "mute"\nprogram = "true"\n',
    )
    stdout, stderr, status = await execenv("env", "check")
    assert (stderr, status) == (b"", 1)
    told = stdout.decode()
    assert re.search(r"^local +ok", told, re.MULTILINE)
    assert re.search(r"^closed +bad", told, re.MULTILINE)
    assert re.search(r"^closed: the variable NO_SUCH, .* is not set$", told, re.MULTILINE)
    assert re.search(r"^refused: .*ws://127\.0\.0\.1:1.*refused", told, re.MULTILINE)
    assert re.search(r"^mute: .*ended the connection", told, re.MULTILINE)
    reports = json.loads((await execenv("env", "check", "refused", "local", "--json"))[0])
    assert [report["ok"] for report in reports] == [False, True]
    await bad("env", "check", "no-such", words=("'no-such' is no environment", "`mute`"))


# Names where a command takes an environment.


@pytest.fixture
def configured(file: Path, websocket_server: WebsocketServer) -> str:
    """Two names, and the URL behind one of them."""
    write(file, websocket("web", websocket_server.url) + command("cmd"))
    return websocket_server.url


async def test_every_command_takes_a_name(configured: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("content")
    for name in ("web", "cmd"):
        assert await good("run", "--env", name, "--", "echo", "there") == "there\n"
    assert await good("ls", "--env", "web", str(tmp_path / "a")) == f"{tmp_path}/a\n"
    assert await good("ls", f"web:{tmp_path}/a") == f"{tmp_path}/a\n"
    assert await good("cat", f"web:{tmp_path}/a") == "content"
    await good("cp", "-q", str(tmp_path / "a"), f"web:{tmp_path}/b")
    assert (tmp_path / "b").read_text() == "content"
    assert json.loads(await good("info", "--env", "web", "--json"))["environment"].startswith("websocket")
    assert await good("http", "--env", "web", "-i", f"http{configured.removeprefix('ws')}/readyz")


async def test_alias_may_be_another_name_and_comes_first(configured: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("content")
    assert await good("cat", "--alias", "x=web", f"x:{tmp_path}/a") == "content"
    assert await good("cat", "--alias", "web=local", f"web:{tmp_path}/a") == "content"


@pytest.mark.parametrize("args", [["run", "--env", "wbe", "true"], ["info", "--env", "wbe"]])
def test_word_that_is_no_name_and_no_program_is_refused_with_suggestions(
    here: Here, configured: str, args: list[str]
) -> None:
    words = ("'wbe' is no environment", "`local`, `web`, `cmd`", "did you mean `web`?")
    here.bad(*args, words=words, status=125 if args[0] == "run" else 1)
    here.bad("cat", "wbe:/a", words=("'wbe'", "execenv env add wbe"))


async def test_word_that_is_a_program_is_a_command_unless_it_is_configured(file: Path) -> None:
    await bad("run", "--env", "true", "true", words=("stdio of true", "ended the connection"), status=125)
    write(file, command("true"))
    assert await good("run", "--env", "true", "--", "echo", "in") == "in\n"


async def test_default_is_that_of_our_file_then_of_our_variable_and_never_codexs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("info", "--json")
    monkeypatch.setenv("CODEX_EXEC_SERVER_URL", "ws://127.0.0.1:1")
    assert json.loads(await good(*where))["environment"] == "local"
    monkeypatch.setenv("EXECENV_URL", "ws://127.0.0.1:1")
    await bad(*where, words=("ws://127.0.0.1:1", "refused"))
    write(file, f'default = "cmd"\n{command("cmd")}')
    assert json.loads(await good(*where))["environment"].startswith("stdio")
    assert json.loads(await good(*where, "--env", "local"))["environment"] == "local"
    (tmp_path / "a").write_text("content")
    assert await good("cat", str(tmp_path / "a")) == await good("cat", f"local:{tmp_path}/a") == "content"
    write(file, f"include_local = true\n{command('cmd')}")
    assert json.loads(await good(*where))["environment"] == "local"


@pytest.mark.parametrize("way", ["variable", "file"])
def test_no_default_is_refused_and_does_not_run_here(
    here: Here, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "variable":
        monkeypatch.setenv("EXECENV_URL", "none")
    else:
        write(file, 'default = "none"')
    source = "EXECENV_URL" if way == "variable" else str(file)
    words = (source, "no default environment", "--env")
    here.bad("run", "--", "touch", str(tmp_path / "made"), words=words, status=125)
    assert not (tmp_path / "made").exists()
    for args in (["ls"], ["cat", "/a"], ["info"], ["http", "http://127.0.0.1:9/"]):
        here.bad(*args, words=words)


async def test_token_of_our_variable_goes_with_our_url_and_to_no_configured_name(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n")
    auth = ["--ws-auth", "capability-token", "--ws-token-file", str(tmp_path / "token")]
    with run_websocket_server((*SERVE, "ws://127.0.0.1:0", *auth)) as server:
        monkeypatch.setenv("EXECENV_URL", server.url)
        await bad("run", "echo", words=("401",), status=125)
        monkeypatch.setenv("EXECENV_TOKEN", SECRET)
        assert await good("run", "echo", "in") == "in\n"
        write(
            file,
            websocket("without", server.url)
            + websocket("with", server.url)
            + f'auth_bearer_token_file = "{tmp_path}/token"\n',
        )
        await bad("run", "--env", "without", "echo", words=("401",), status=125)
        monkeypatch.delenv("EXECENV_TOKEN")
        assert await good("run", "--env", "with", "echo", "in") == "in\n"
        assert json.loads(await good("env", "show", "with", "--json"))["token"] == f"in {tmp_path}/token"


def test_looking_for_a_name_imports_neither_tomlkit_nor_rich() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('tomlkit', 'rich')));"
        "from execenv.cli import main; main(['run', '--', 'echo', 'in'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("in\n", "", 0)
