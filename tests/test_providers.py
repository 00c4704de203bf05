"""Which file or variable says which environments there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve

from execenv.config import LOCAL_ONLY, Snapshot
from execenv.errors import ConfigError, ConnectFailed, UsageError
from execenv.providers import (
    CODEX_URL,
    NOISE_ACCOUNT,
    NOISE_VARIABLES,
    OUR_URL,
    Loaded,
    UrlProvider,
    codex_home,
    default_target,
    load_snapshot,
    named_target,
    our_file,
)
from execenv.targets import CommandTarget, LocalTarget, RelayTarget, WebsocketTarget

URL = "ws://127.0.0.1:8765"
SECRET = "hush-hush"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders for both files: `xdg` and `codex`."""
    for variable, name in (("XDG_CONFIG_HOME", "xdg"), ("CODEX_HOME", "codex")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def write_ours(home: Path, text: str) -> Path:
    path = home / "xdg" / "execenv" / "environments.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def write_codex(home: Path, text: str) -> Path:
    path = home / "codex" / "environments.toml"
    path.write_text(text)
    return path


def entry(id_: str) -> str:
    return f'[[environments]]\nid = "{id_}"\nurl = "{URL}"\n'


def remote(url: str, token_variable: str | None = None) -> Snapshot:
    return Snapshot((("remote", WebsocketTarget(url, bearer_token_env=token_variable)),), "remote", False)


def test_nothing_configured_is_this_machine_alone(home: Path) -> None:
    assert load_snapshot() == Loaded(LOCAL_ONLY, "nothing is configured")
    assert Snapshot((), "local", True) == LOCAL_ONLY


# Variables.


@pytest.mark.parametrize("variable", [OUR_URL, CODEX_URL])
@pytest.mark.parametrize(
    ("value", "snapshot"),
    [
        ("", None),
        (" \t", None),
        ("none", Snapshot((), None, False)),
        (" NoNe ", Snapshot((), None, False)),
        (f" {URL} ", remote(URL)),
        ("http://what ever", remote("http://what ever")),
        ("local", remote("local")),
    ],
)
def test_variable_names_a_url_or_nothing_or_disables(
    home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, snapshot: Snapshot | None
) -> None:
    monkeypatch.setenv(variable, value)
    assert UrlProvider(variable).read() == snapshot
    assert load_snapshot().snapshot == (snapshot or LOCAL_ONLY)


def test_url_of_a_variable_has_the_usual_times() -> None:
    target = WebsocketTarget(URL)
    assert (target.connect_timeout, target.initialize_timeout) == (10.0, 10.0)


def test_token_variable_goes_with_our_url_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXECENV_TOKEN", SECRET)
    monkeypatch.setenv(CODEX_URL, URL)
    assert load_snapshot().snapshot == remote(URL)
    monkeypatch.setenv(OUR_URL, URL)
    loaded = load_snapshot()
    assert loaded.snapshot == remote(URL, "EXECENV_TOKEN")
    assert SECRET not in repr(loaded)


@pytest.mark.parametrize("number", range(1, 7))
def test_noise_variables_are_there_all_or_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_codex(home, entry("a"))
    monkeypatch.setenv(CODEX_URL, URL)
    there = [name for bit, name in enumerate(NOISE_VARIABLES) if number >> bit & 1]
    for name in there:
        monkeypatch.setenv(name, SECRET)
    with pytest.raises(ConfigError) as caught:
        load_snapshot()
    for name in NOISE_VARIABLES:
        assert name in str(caught.value)
    missing = str(caught.value).partition(" set but ")[2]
    assert [name for name in NOISE_VARIABLES if name not in missing] == there
    assert SECRET not in str(caught.value)


NOISE = ("https://registry.example/base/", "env_1", SECRET)


def set_noise(monkeypatch: pytest.MonkeyPatch, *values: str, account: str | None = None) -> None:
    for name, value in zip(NOISE_VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    if account is not None:
        monkeypatch.setenv(NOISE_ACCOUNT, account)


@pytest.mark.parametrize(
    ("account", "known"), [(None, None), ("", None), (" ", None), (" an-account ", "an-account")]
)
def test_noise_variables_are_one_environment_and_come_before_the_rest_of_codex(
    home: Path, monkeypatch: pytest.MonkeyPatch, account: str | None, known: str | None
) -> None:
    write_codex(home, entry("a"))
    monkeypatch.setenv(CODEX_URL, URL)
    set_noise(monkeypatch, *(f" {value}\n" for value in NOISE), account=account)
    loaded = load_snapshot()
    target = RelayTarget(
        "https://registry.example/base", "env_1", bearer_token_env=NOISE_VARIABLES[2], account_id=known
    )
    assert loaded == Loaded(Snapshot((("remote", target),), "remote", False), "CODEX_EXEC_SERVER_NOISE_*")
    assert target.security == "noise"
    assert SECRET not in repr(loaded)
    monkeypatch.setenv(OUR_URL, URL)
    assert load_snapshot().source == OUR_URL


def test_token_of_the_noise_variables_is_read_when_it_is_wanted(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_noise(monkeypatch, *NOISE)
    target = named_target("remote")
    assert isinstance(target, RelayTarget)
    assert target.read_token() == SECRET
    monkeypatch.setenv(NOISE_VARIABLES[2], "another")
    assert target.read_token() == "another"
    monkeypatch.delenv(NOISE_VARIABLES[2])
    with pytest.raises(ConnectFailed, match=NOISE_VARIABLES[2]):
        target.read_token()


def test_account_alone_is_no_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NOISE_ACCOUNT, "an-account")
    assert load_snapshot().snapshot is LOCAL_ONLY


@pytest.mark.parametrize(
    ("number", "value", "words"),
    [
        (0, f"https://u:{SECRET}@h", "names a user"),
        (0, f"https://h/?{SECRET}", "has a query"),
        (0, "http://h.example", "this machine alone"),
        (0, "h.example", "https:// URL"),
        (1, "a/b", "only ASCII letters, digits, - and _"),
        (1, "e" * 257, "256 characters at most"),
        (3, f"{SECRET}\n{SECRET}", "cannot stand in a header"),
    ],
)
def test_noise_variable_that_cannot_be_used_is_named_and_nothing_else_is_used_instead(
    home: Path, monkeypatch: pytest.MonkeyPatch, number: int, value: str, words: str
) -> None:
    write_codex(home, entry("a"))
    monkeypatch.setenv(CODEX_URL, URL)
    set_noise(monkeypatch, *NOISE)
    name = (*NOISE_VARIABLES, NOISE_ACCOUNT)[number]
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words) as caught:
        load_snapshot()
    assert (caught.value.key, name in str(caught.value)) == (name, True)
    assert SECRET not in str(caught.value)


def test_url_of_ours_may_be_that_of_a_relay_and_that_of_codex_is_a_websocket(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "relay+https://registry.example/base/env_1"
    monkeypatch.setenv(CODEX_URL, url)
    assert load_snapshot().snapshot == remote(url)
    monkeypatch.setenv(OUR_URL, f" {url} ")
    target = RelayTarget("https://registry.example/base", "env_1")
    assert load_snapshot() == Loaded(Snapshot((("remote", target),), "remote", False), OUR_URL)
    monkeypatch.setenv("EXECENV_TOKEN", SECRET)
    assert named_target("remote") == evolve(target, bearer_token_env="EXECENV_TOKEN")
    monkeypatch.setenv(OUR_URL, f"relay+https://registry.example/?{SECRET}")
    with pytest.raises(ConfigError, match=OUR_URL) as caught:
        load_snapshot()
    assert caught.value.key == OUR_URL
    assert SECRET not in str(caught.value)


# Precedence.


def test_first_that_is_there_rules_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODEX_URL, "ws://codex-variable")
    assert load_snapshot() == Loaded(remote("ws://codex-variable"), CODEX_URL)
    path = write_codex(home, entry("of-codex"))
    assert load_snapshot().snapshot.ids == ("local", "of-codex")
    assert load_snapshot().source == str(path)
    monkeypatch.setenv(OUR_URL, "ws://our-variable")
    assert load_snapshot() == Loaded(remote("ws://our-variable"), OUR_URL)
    path = write_ours(home, entry("ours"))
    assert load_snapshot().snapshot.ids == ("local", "ours")
    assert load_snapshot().source == str(path) == our_file()


def test_empty_file_rules_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CODEX_URL, URL)
    write_codex(home, "")
    assert load_snapshot().snapshot == LOCAL_ONLY


def test_disabling_variable_of_ours_hides_what_codex_has(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_codex(home, entry("a"))
    monkeypatch.setenv(OUR_URL, "none")
    assert load_snapshot().snapshot == Snapshot((), None, False)


def _directory(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _latin(path: Path) -> None:
    path.write_bytes(b"# a\n# \xe9\n")


def _huge(path: Path) -> None:
    path.write_bytes(b"#" * (1024 * 1024 + 1))


def _wrong(path: Path) -> None:
    path.write_text("\ndefault = 1")


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_directory, "failed to read environment config"),
        (_fifo, "no regular file"),
        (_dangling, "leads nowhere"),
        (_loop, "failed to read environment config"),
        (_latin, "line 2: it is not UTF-8"),
        (_huge, "larger than 1048576 bytes"),
        (_wrong, "line 2: default takes a string"),
    ],
)
def test_file_that_cannot_be_used_is_an_error_and_never_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch, ours: bool, make: Callable[[Path], None], words: str
) -> None:
    monkeypatch.setenv(CODEX_URL, URL)
    path = home / ("xdg/execenv" if ours else "codex") / "environments.toml"
    path.parent.mkdir(exist_ok=True)
    make(path)
    with pytest.raises(ConfigError, match=words) as caught:
        load_snapshot()
    assert str(path) in str(caught.value)
    assert caught.value.file == str(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_without_permission_is_an_error(home: Path) -> None:
    write_ours(home, entry("a")).chmod(0)
    with pytest.raises(ConfigError, match="failed to read"):
        load_snapshot()


def test_folder_that_is_a_file_holds_no_configuration(home: Path) -> None:
    (home / "xdg" / "execenv").write_text("")
    assert load_snapshot().snapshot is LOCAL_ONLY


# Folders.


def test_codex_home_is_the_variable_or_in_the_users_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert codex_home() == str(home / "codex")
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("CODEX_HOME")
        else:
            monkeypatch.setenv("CODEX_HOME", value)
        assert codex_home() == str(home / ".codex")
    assert load_snapshot().snapshot is LOCAL_ONLY
    (home / ".codex").mkdir()
    (home / ".codex" / "environments.toml").write_text(entry("a"))
    assert load_snapshot().snapshot.ids == ("local", "a")


@pytest.mark.parametrize(("name", "words"), [("missing", "does not exist"), ("file", "is no directory")])
def test_codex_home_that_is_no_directory_is_an_error(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("CODEX_HOME", str(home / name))
    monkeypatch.setenv(CODEX_URL, URL)
    with pytest.raises(ConfigError, match=words) as caught:
        load_snapshot()
    assert str(home / name) in str(caught.value)
    monkeypatch.setenv(OUR_URL, URL)  # then nobody asks for it
    assert load_snapshot().source == OUR_URL


def test_relative_paths_of_the_file_of_codex_begin_in_its_home(home: Path) -> None:
    write_codex(home, '[[environments]]\nid = "a"\nprogram = "x"\ncwd = "work"')
    assert named_target("a") == CommandTarget(("x",), cwd=str(home / "codex" / "work"))


def test_keys_of_ours_belong_in_our_file(home: Path) -> None:
    text = entry("a") + 'auth_bearer_token_env = "X"\n'
    write_codex(home, text)
    with pytest.raises(ConfigError, match="codex does not know it"):
        load_snapshot()
    write_ours(home, text)
    assert named_target("a") == WebsocketTarget(URL, bearer_token_env="X")


# What the command line makes of it.


def test_default_of_commands_is_ours_or_this_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_codex(home, f'default = "a"\n{entry("a")}')
    assert default_target() == LocalTarget()
    assert named_target("a") == WebsocketTarget(URL)
    monkeypatch.setenv(OUR_URL, "ws://other")
    assert default_target() == WebsocketTarget("ws://other")
    assert named_target("remote") == WebsocketTarget("ws://other")
    assert named_target("a") is None
    write_ours(home, entry("b"))
    assert default_target() == LocalTarget()


@pytest.mark.parametrize("text", ['default = "none"', "include_local = false"])
def test_no_default_is_refused_and_is_not_this_machine(home: Path, text: str) -> None:
    path = write_ours(home, text)
    with pytest.raises(UsageError, match="--env") as caught:
        default_target()
    assert str(path) in str(caught.value)


# Tokens.


def test_token_is_read_where_it_is_kept_whenever_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    of_file, of_variable = (
        WebsocketTarget(URL, bearer_token_file=str(path)),
        WebsocketTarget(URL, bearer_token_env="A_TOKEN"),
    )
    for value in ("one", "two"):
        path.write_text(f"{value}\n")
        monkeypatch.setenv("A_TOKEN", value)
        assert (of_file.read_token(), of_variable.read_token()) == (value, value)
    assert (WebsocketTarget(URL, "x").read_token(), WebsocketTarget(URL).read_token()) == ("x", None)


@pytest.mark.parametrize("content", ["", "\n", f"{SECRET}\n{SECRET}", f"{SECRET}é", "x" * 100_000])
def test_what_is_no_token_is_not_sent_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    (tmp_path / "token").write_text(content)
    monkeypatch.setenv("A_TOKEN", content)
    for target, name in (
        (WebsocketTarget(URL, bearer_token_file=str(tmp_path / "token")), str(tmp_path / "token")),
        (WebsocketTarget(URL, bearer_token_env="A_TOKEN"), "A_TOKEN"),
    ):
        with pytest.raises(ConnectFailed, match="no bearer token") as caught:
            target.read_token()
        assert name in str(caught.value)
        assert SECRET not in str(caught.value)


def test_missing_token_is_an_error_and_not_a_connection_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConnectFailed, match=f"{tmp_path}/none: No such file"):
        WebsocketTarget(URL, bearer_token_file=f"{tmp_path}/none").read_token()
    with pytest.raises(ConnectFailed, match="NO_SUCH_VARIABLE"):
        WebsocketTarget(URL, bearer_token_env="NO_SUCH_VARIABLE").read_token()
