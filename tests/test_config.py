"""environments.toml: what it says, what is refused and where, and how it is edited."""

from __future__ import annotations

import tomllib
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from execenv._toml_lines import read_layout
from execenv.config import (
    Snapshot,
    check_snapshot,
    parse_config,
    with_default,
    with_environment,
    without_environment,
)
from execenv.errors import ConfigError, UsageError
from execenv.targets import CommandTarget, LocalTarget, RelayTarget, Target, WebsocketTarget

FILE = "/home/me/.config/execenv/environments.toml"
URL = 'url = "ws://127.0.0.1:8765"'
REGISTRY = 'registry = "https://registry.example/base"\nenvironment_id = "env_1"'
SECRET = "hush-hush"

EXAMPLE = """\
default = "ssh-dev"
include_local = true

[[environments]]
id = "devbox"
url = "ws://127.0.0.1:8765"
connect_timeout_sec = 12.5

[[environments]]
id = "ssh-dev"
program = "ssh"
args = ["dev", "execenv serve --listen stdio"]
initialize_timeout_sec = 30
"""
DEVBOX = WebsocketTarget("ws://127.0.0.1:8765", connect_timeout=12.5)
SSH_DEV = CommandTarget(("ssh", "dev", "execenv serve --listen stdio"), initialize_timeout=30.0)


def parse(text: str, *, ours: bool = True) -> Snapshot:
    return parse_config(dedent(text), file=FILE, ours=ours)


def one(*lines: str, ours: bool = True) -> Target:
    """The target of an environment with these lines."""
    [(id_, target)] = parse("\n".join(("[[environments]]", 'id = "a"', *lines)), ours=ours).environments
    assert id_ == "a"
    return target


def refusal(text: str, *, ours: bool = True) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, ours=ours)
    assert caught.value.file == FILE
    assert SECRET not in str(caught.value)
    return caught.value


# What it says.


def test_example_says_what_it_says() -> None:
    assert parse(EXAMPLE) == Snapshot((("devbox", DEVBOX), ("ssh-dev", SSH_DEV)), "ssh-dev", True)


def test_empty_file_is_this_machine_alone() -> None:
    assert parse("") == parse("# nothing\n") == Snapshot((), "local", True)


@pytest.mark.parametrize(
    ("text", "default"),
    [
        ("", "local"),
        ("include_local = false", None),
        ('default = "none"', None),
        ('default = " NoNe "', None),
        ('default = " local "', "local"),
        (f'default = "b"\n[[environments]]\nid = "b"\n{URL}', "b"),
        (f'include_local = false\n[[environments]]\nid = "b"\n{URL}', None),
    ],
)
def test_default_is_local_if_nothing_else_is_said_and_that_is_included(
    text: str, default: str | None
) -> None:
    assert parse(text).default == default


def test_every_key_of_a_websocket_is_understood() -> None:
    keys = ("connect_timeout_sec = 0", "initialize_timeout_sec = 2", "skills = { required = [] }")
    assert one(
        'url = " wss://u:p@h:1/x?y=z#f "', f'auth_bearer_token = "{SECRET}"', *keys
    ) == WebsocketTarget("wss://u:p@h:1/x?y=z#f", SECRET, 0.0, 2.0)
    assert SECRET not in repr(one(URL, f'auth_bearer_token = "{SECRET}"'))


def test_every_key_of_a_command_is_understood() -> None:
    keys = ('args = ["-x", ""]', 'env = { A = "1", "b c" = "" }', 'cwd = "/srv"', "bootstrap = true")
    target = one('program = " ssh "', *keys, "initialize_timeout_sec = 1.5")
    assert target == CommandTarget(("ssh", "-x", ""), {"A": "1", "b c": ""}, "/srv", 1.5, bootstrap=True)
    assert one('program = "x"') == CommandTarget(("x",))


def test_every_key_of_a_relay_is_understood() -> None:
    usual = RelayTarget("https://registry.example/base", "env_1")
    assert one(REGISTRY) == one(REGISTRY, 'security = "noise"') == usual
    keys = ("connect_timeout_sec = 0", "initialize_timeout_sec = 2", "skills = { required = [] }")
    target = one(
        'registry = " http://[::1]:80/x// "',
        f'environment_id = "{"e" * 256}"',
        'security = "clear"',
        'account_id = "an account"',
        f'auth_bearer_token = "{SECRET}"',
        *keys,
    )
    assert target == RelayTarget(
        "http://[::1]:80/x", "e" * 256, SECRET, 0.0, 2.0, security="clear", account_id="an account"
    )
    assert SECRET not in repr(target)
    of_file = one(REGISTRY, 'auth_bearer_token_file = "token"')
    assert isinstance(of_file, RelayTarget)
    assert of_file.bearer_token_file == "/home/me/.config/execenv/token"
    assert one(REGISTRY, 'auth_bearer_token_env = "X"') == RelayTarget(
        usual.registry, "env_1", bearer_token_env="X"
    )


def test_relative_paths_begin_at_the_folder_of_the_file() -> None:
    command = one('program = "x"', 'cwd = "work/../here"')
    assert isinstance(command, CommandTarget)
    assert command.cwd == "/home/me/.config/execenv/here"
    websocket = one(URL, 'auth_bearer_token_file = "token"')
    assert isinstance(websocket, WebsocketTarget)
    assert websocket.bearer_token_file == "/home/me/.config/execenv/token"


@pytest.mark.parametrize("id_", ["LOCAL", "a" * 64, "0", "-", "_", "A-b_9"])
def test_id_is_taken(id_: str) -> None:
    assert parse(f'[[environments]]\nid = "{id_}"\n{URL}').ids == ("local", id_)


@pytest.mark.parametrize(
    "url", ["wss://far.example", "ws://127.8.0.1", "ws://[::1]:9/x", "ws://localhost:1", "ws://u@localhost"]
)
@pytest.mark.parametrize("key", ["auth_bearer_token", "auth_bearer_token_file", "auth_bearer_token_env"])
def test_token_goes_over_tls_or_stays_on_this_machine(url: str, key: str) -> None:
    assert isinstance(one(f'url = "{url}"', f'{key} = "x"'), WebsocketTarget)


def test_all_ways_to_write_tables_mean_the_same() -> None:
    expected = Snapshot((("a", CommandTarget(("x",), {"A": "1"})),), "local", True)
    for text in (
        '[[environments]]\nid = "a"\nprogram = "x"\nenv.A = "1"',
        '[[environments]]\nid = "a"\nprogram = "x"\n[environments.env]\nA = "1"',
        'environments = [{ id = "a", program = "x", env = { A = "1" } }]',
        '[["environments"]]\r\n"id" = "a"\r\n\'program\' = \'\'\'x\'\'\'\r\nenv = {"A" = """1"""}\r\n',
    ):
        assert parse(text) == expected


# What is refused: the rows of environments.md §3.5. First the line, then words of the message.

REFUSED = {
    # 1: unknown keys
    "unknown key": ('x = 1\ndefalt = "a"', 1, ["failed to parse", "unknown field `x`", "`default`"]),
    "slip": ('\n# c\ndefalt = "a"', 3, ["unknown field `defalt`", "did you mean `default`?"]),
    "unknown key below": (
        f'[[environments]]\nid = "a"\n{URL}\n\n# why\n[[environments]]\nid = "b"\n  urll = "x"',
        8,
        ["failed to parse", "unknown field `urll`", "`url`", "did you mean `url`?"],
    ),
    "unknown table": ("[environments]\nx = 1", 1, ["environments takes an array of tables, not a table"]),
    "unknown in skills": ('[[environments]]\nid = "a"\nskills = { x = 1 }', 3, ["unknown field `x`"]),
    # 2: id missing
    "no id": (f"# c\n\n[[environments]]\n{URL}", 3, ["failed to parse", "missing field `id`"]),
    "no id, second": (
        f'environments = [\n  {{ id = "a", {URL} }},\n  # c\n  {{ {URL} }},\n]',
        4,
        ["missing field `id`"],
    ),
    # 3: types and values
    "default type": ("default = 1", 1, ["failed to parse", "default takes a string, not the integer `1`"]),
    "include_local type": (
        'include_local = "yes"',
        1,
        ["include_local takes a boolean, not the string `yes`"],
    ),
    "environments type": ("environments = true", 1, ["not the boolean `true`", "[[environments]]"]),
    "element type": ("environments = [\n1]", 2, ["takes a table, not an integer"]),
    "id type": ("[[environments]]\nid = 2024-01-01", 2, ["id takes a string, not a date"]),
    "url type": ('[[environments]]\nid = "a"\nurl = []', 3, ["url takes a string, not an array"]),
    "program type": ('[[environments]]\nid = "a"\nprogram = 1.5', 3, ["program takes a string", "`1.5`"]),
    "args type": ('[[environments]]\nid = "a"\nargs = "x"', 3, ["args takes an array of strings"]),
    "arg type": (
        '[[environments]]\nid = "a"\nargs = [\n  "x",  # c\n  5,\n]',
        5,
        ["args[1] takes a string, not an integer"],
    ),
    "env type": ('[[environments]]\nid = "a"\nenv = []', 3, ["env takes a table of strings, not an array"]),
    "variable type": (
        '[[environments]]\nid = "a"\n[environments.env]\n# c\nA = "1"\nB = 2',
        6,
        ["env.B takes a string, not an integer:"],
    ),
    "variable name": (
        '[[environments]]\nid = "a"\nenv = { "A=B" = "1" }',
        3,
        ["`A=B`", "name of a variable"],
    ),
    "cwd type": ('[[environments]]\nid = "a"\ncwd = {}', 3, ["cwd takes a string, not a table"]),
    "NUL": ('[[environments]]\nid = "a"\nprogram = "a\\u0000"', 3, ["program holds a NUL"]),
    "token type": ('[[environments]]\nid = "a"\nauth_bearer_token = 77', 3, ["a string, not an integer:"]),
    "skills type": ('[[environments]]\nid = "a"\nskills = 1', 3, ["skills takes a table"]),
    "skills value": (
        '[[environments]]\nid = "a"\nskills.required = true',
        3,
        ["skills.required takes an array"],
    ),
    "bootstrap type": ('[[environments]]\nid = "a"\nbootstrap = 1', 3, ["bootstrap takes a boolean"]),
    "timeout type": (
        '[[environments]]\nid = "a"\nconnect_timeout_sec = "1"',
        3,
        ["a number, not the string `1`"],
    ),
    "timeout boolean": (
        '[[environments]]\nid = "a"\ninitialize_timeout_sec = true',
        3,
        ["the boolean `true`"],
    ),
    "timeout negative": (
        '[[environments]]\nid = "a"\nconnect_timeout_sec = -0.5',
        3,
        ["failed to parse", "connect_timeout_sec cannot be -0.5"],
    ),
    "timeout nan": ('[[environments]]\nid = "a"\ninitialize_timeout_sec = nan', 3, ["cannot be nan"]),
    "timeout inf": ('[[environments]]\nid = "a"\nconnect_timeout_sec = inf', 3, ["cannot be inf"]),
    "timeout huge": ('[[environments]]\nid = "a"\nconnect_timeout_sec = 1e30', 3, ["cannot be 1e+30"]),
    "syntax": ('default = "a"\n\nid =\n', 3, ["failed to parse", "invalid value"]),
    "syntax of a header": ("[[environments]\n", 1, ["failed to parse"]),
    "syntax at the end": ('x = """\n\n', 2, ["unterminated string"]),
    "key twice": ('default = "a"\n\ndefault = """\nb"""', 3, ["overwrite", "there twice"]),
    "too deep": ("x = " + "[" * 5000, None, ["nested too deeply"]),
    "too many digits": ("x = " + "1" * 5000, None, ["failed to parse"]),
    # 4: ids
    "id empty": (f'[[environments]]\nid = ""\n{URL}', 2, ["environment id cannot be empty"]),
    "id of blanks": (f'[[environments]]\nid = "  "\n{URL}', 2, ["environment id cannot be empty"]),
    "id with blanks": (f'[[environments]]\nid = " a"\n{URL}', 2, ["` a`", "blanks around", "write `a`"]),
    "id local": (f'[[environments]]\nid = "local"\n{URL}', 2, ["`local` is reserved"]),
    "id none": (f'[[environments]]\nid = "NonE"\n{URL}', 2, ["`NonE` is reserved"]),
    "id with odd characters": (
        f'[[environments]]\nid = "é x"\n{URL}',
        2,
        ["`é x` must contain only", "`-x`"],
    ),
    "id too long": (f'[[environments]]\nid = "{"!" * 65}"\n{URL}', 2, ["longer than 64", "has 65"]),
    "id twice": (
        f'[[environments]]\nid = "a"\n{URL}\n[[environments]]\n{URL}\nid = "a"',
        6,
        ["environment id `a` is duplicated"],
    ),
    # 5: none, and more than one
    "none": (
        '# c\n[[environments]]\nid = "a"',
        2,
        ["environment `a`", "must set exactly one of url, program or registry", "it has none"],
    ),
    "url and program": (
        f'[[environments]]\nid = "a"\n{URL}\nprogram = "x"',
        4,
        ["exactly one of url, program or registry", "it has url and program"],
    ),
    "url and program, empty": (
        '[[environments]]\nid = "a"\nprogram = ""\nurl = ""',
        3,
        ["exactly one of url, program or registry"],
    ),
    "url and registry": (
        f'[[environments]]\nid = "a"\n{REGISTRY}\n{URL}',
        3,
        ["exactly one of url, program or registry", "it has url and registry"],
    ),
    "program and registry": (
        f'[[environments]]\nid = "a"\nprogram = "x"\n{REGISTRY}',
        4,
        ["exactly one of url, program or registry", "it has program and registry"],
    ),
    "all three": (
        f'[[environments]]\nid = "a"\nprogram = "x"\n{REGISTRY}\n{URL}',
        4,
        ["it has url and program and registry, remove all but one"],
    ),
    # 6: url
    "url empty": ('[[environments]]\nid = "a"\nurl = " "', 3, ["environment `a`", "url cannot be empty"]),
    "url scheme": (
        '[[environments]]\nid = "a"\nurl = "https://h/x"',
        3,
        ["`https://h/x` must use ws:// or wss://", "did you mean `wss://h/x`?"],
    ),
    "url in capitals": (
        '[[environments]]\nid = "a"\nurl = "WS://h"',
        3,
        ["`WS://h`", "did you mean `ws://h`?"],
    ),
    "url without scheme": ('[[environments]]\nid = "a"\nurl = "h:1"', 3, ["`h:1` must use ws:// or wss://"]),
    "url with a blank": (
        '[[environments]]\nid = "a"\nurl = "ws://h/a b"',
        3,
        ["`ws://h/a b` is invalid", "' '"],
    ),
    "url without a host": ('[[environments]]\nid = "a"\nurl = "ws:///x"', 3, ["is invalid", "names no host"]),
    "url with a bad port": ('[[environments]]\nid = "a"\nurl = "ws://h:99999"', 3, ["is invalid", "port"]),
    "url with secrets": (
        f'[[environments]]\nid = "a"\nurl = "http://u:{SECRET}@h/?t={SECRET}"',
        3,
        ["`http://***@h/`"],
    ),
    # 7: program
    "program empty": ('[[environments]]\nid = "a"\nprogram = " "', 3, ["program cannot be empty"]),
    # 8: what needs a program
    "args without program": (
        f'[[environments]]\nid = "a"\n{URL}\nargs = []',
        4,
        ["args, env and cwd require"],
    ),
    "env without program": (f'[[environments]]\nid = "a"\nenv = {{}}\n{URL}', 3, ["require program", "env"]),
    "cwd without program": (
        '[[environments]]\nid = "a"\ncwd = "/"',
        3,
        ["args, env and cwd require program"],
    ),
    "bootstrap without program": (
        f'[[environments]]\nid = "a"\n{URL}\nbootstrap = false',
        4,
        ["bootstrap requires program"],
    ),
    # 9, 10: what needs a url
    "connect timeout without url": (
        '[[environments]]\nid = "a"\nprogram = "x"\n\nconnect_timeout_sec = 1',
        5,
        ["environment `a`", "connect_timeout_sec requires url"],
    ),
    "token without url": (
        f'[[environments]]\nid = "a"\nprogram = "x"\nauth_bearer_token = "{SECRET}"',
        4,
        ["auth_bearer_token requires url"],
    ),
    "token file without url": (
        '[[environments]]\nid = "a"\nauth_bearer_token_file = "x"',
        3,
        ["auth_bearer_token_file requires url"],
    ),
    "token in clear": (
        f'[[environments]]\nid = "a"\nurl = "ws://h.example/?x"\nauth_bearer_token = "{SECRET}"',
        4,
        ["auth_bearer_token needs wss:// or a loopback address", "`ws://h.example/`"],
    ),
    "token file in clear": (
        '[[environments]]\nid = "a"\nurl = "ws://10.0.0.1"\nauth_bearer_token_file = "x"',
        4,
        ["auth_bearer_token_file needs wss://"],
    ),
    "token variable in clear": (
        '[[environments]]\nid = "a"\nurl = "ws://127.0.0.1.example"\nauth_bearer_token_env = "X"',
        4,
        ["auth_bearer_token_env needs wss://"],
    ),
    "token for no header": (
        f'[[environments]]\nid = "a"\n{URL}\nauth_bearer_token = "{SECRET}\\n"',
        4,
        ["auth_bearer_token cannot stand in a header"],
    ),
    "token empty": (
        f'[[environments]]\nid = "a"\n{URL}\nauth_bearer_token = ""',
        4,
        ["cannot stand in a header"],
    ),
    "token file empty": (
        f'[[environments]]\nid = "a"\n{URL}\nauth_bearer_token_file = ""',
        4,
        ["name the file"],
    ),
    "token variable empty": (
        f'[[environments]]\nid = "a"\n{URL}\nauth_bearer_token_env = "A=B"',
        4,
        ["`A=B` cannot be the name of a variable"],
    ),
    "two tokens": (
        f'[[environments]]\nid = "a"\n{URL}\nauth_bearer_token_env = "X"\nauth_bearer_token = "{SECRET}"',
        4,
        ["auth_bearer_token and auth_bearer_token_env are both set"],
    ),
    # relays
    "registry type": ('[[environments]]\nid = "a"\nregistry = 1', 3, ["registry takes a string", "`1`"]),
    "environment_id type": ('[[environments]]\nid = "a"\nenvironment_id = 1', 3, ["takes a string", "`1`"]),
    "security type": ('[[environments]]\nid = "a"\nsecurity = true', 3, ["security takes a string"]),
    "account_id type": ('[[environments]]\nid = "a"\naccount_id = []', 3, ["account_id takes a string"]),
    "registry empty": (
        '[[environments]]\nid = "a"\nenvironment_id = "e"\nregistry = " "',
        4,
        ["environment `a`", "registry cannot be empty", 'registry = "https://'],
    ),
    "registry scheme": (
        '[[environments]]\nid = "a"\nenvironment_id = "e"\nregistry = "wss://h/x"',
        4,
        ["environment `a`: registry `wss://h/x` cannot be used", "has an https:// URL"],
    ),
    "registry in clear": (
        '[[environments]]\nid = "a"\nenvironment_id = "e"\nregistry = "http://h.example"',
        4,
        ["`http://h.example` cannot be used", "this machine alone", "use https://"],
    ),
    "registry with secrets": (
        f'[[environments]]\nid = "a"\nregistry = "https://u:{SECRET}@h/?t={SECRET}#{SECRET}"',
        3,
        ["registry `https://***@h/` cannot be used: it names a user"],
    ),
    "registry with a query": (
        f'[[environments]]\nid = "a"\nregistry = "https://h/?t={SECRET}"',
        3,
        ["registry `https://h/` cannot be used: it has a query"],
    ),
    "registry without environment_id": (
        '[[environments]]\nid = "a"\nregistry = "https://h"',
        3,
        ["environment `a`: registry requires environment_id"],
    ),
    "environment_id without registry": (
        f'[[environments]]\nid = "a"\n{URL}\nenvironment_id = "e"',
        4,
        ["environment `a`: environment_id requires registry: name it, or remove environment_id"],
    ),
    "security without registry": (
        f'[[environments]]\nid = "a"\n{URL}\nsecurity = "noise"',
        4,
        ["security requires registry"],
    ),
    "account_id without registry": (
        '[[environments]]\nid = "a"\nprogram = "x"\naccount_id = "1"',
        4,
        ["account_id requires registry"],
    ),
    "environment_id empty": (
        '[[environments]]\nid = "a"\nregistry = "https://h"\nenvironment_id = ""',
        4,
        ["environment_id `` cannot be used", "cannot be empty"],
    ),
    "environment_id with a slash": (
        '[[environments]]\nid = "a"\nregistry = "https://h"\nenvironment_id = "../e"',
        4,
        ["environment_id `../e` cannot be used", "only ASCII letters, digits, - and _"],
    ),
    "environment_id too long": (
        f'[[environments]]\nid = "a"\nregistry = "https://h"\nenvironment_id = "{"e" * 257}"',
        4,
        ["256 characters at most"],
    ),
    "security unknown": (
        f'[[environments]]\nid = "a"\n{REGISTRY}\nsecurity = "Noise"',
        5,
        ['security takes "noise" or "clear", not `Noise`', "did you mean `noise`?"],
    ),
    "security empty": (f'[[environments]]\nid = "a"\n{REGISTRY}\nsecurity = ""', 5, ["not ``"]),
    "account_id for no header": (
        f'[[environments]]\nid = "a"\n{REGISTRY}\naccount_id = "{SECRET}\\n"',
        5,
        ["account_id cannot stand in a header"],
    ),
    "token of a relay for no header": (
        f'[[environments]]\nid = "a"\n{REGISTRY}\nauth_bearer_token = "{SECRET}\\n"',
        5,
        ["auth_bearer_token cannot stand in a header"],
    ),
    "token file of a relay empty": (
        f'[[environments]]\nid = "a"\n{REGISTRY}\nauth_bearer_token_file = " "',
        5,
        ["name the file"],
    ),
    "two tokens of a relay": (
        f'[[environments]]\nid = "a"\n{REGISTRY}\nauth_bearer_token_env = "X"\nauth_bearer_token_file = "x"',
        5,
        ["auth_bearer_token_file and auth_bearer_token_env are both set"],
    ),
    "token of nothing": (
        '[[environments]]\nid = "a"\nauth_bearer_token_env = "x"',
        3,
        ["auth_bearer_token_env requires url or registry"],
    ),
    "args of a relay": (f'[[environments]]\nid = "a"\n{REGISTRY}\nargs = []', 5, ["require program"]),
    # 11: default
    "default empty": ('# c\ndefault = " "', 2, ["default environment id cannot be empty", "`local`"]),
    "default unknown": (
        f'default = "devbx"\n[[environments]]\nid = "devbox"\n{URL}',
        1,
        ["default environment `devbx` is not configured", "`devbox`", "did you mean `devbox`?"],
    ),
    "default local, not included": (
        'default = "local"\ninclude_local = false',
        1,
        ["default environment `local` is not configured"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_with_its_line(case: str) -> None:
    text, line, words = REFUSED[case]
    error = refusal(text)
    place = FILE if line is None else f"{FILE}, line {line}: "
    assert (error.line, place in str(error)) == (line, True), str(error)
    for word in words:
        assert word in str(error)
    assert error.problem in str(error)


def test_key_at_fault_is_told() -> None:
    assert refusal('[[environments]]\nid = "a"\nargs = [1]').key == "environments[0].args[0]"
    assert refusal("[[environments]]").key == "environments[0].id"
    assert refusal('default = ""').key == "default"


def test_control_characters_of_the_file_do_not_reach_a_terminal() -> None:
    assert "`\\x1b[2J`" in str(refusal('"\\u001b[2J" = 1'))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ('x = 1\n[[environments]]\nid = ""', "syntax at the end =", "expected '='"),
        ('[[environments]]\nid = ""', "[[environments]]\nid = 5", "takes a string"),
        ('default = ""\n[[environments]]\nid = ""', "args = []", "id cannot be empty"),
        ('[[environments]]\nid = "a"\nargs = []', 'auth_bearer_token = "x"', "require program"),
        (
            '[[environments]]\nid = "a"\nconnect_timeout_sec = 1',
            'auth_bearer_token = "x"',
            "auth_bearer_token",
        ),
        ('[[environments]]\nid = "a"\nprogram = ""', "connect_timeout_sec = 1", "requires url"),
        ('default = ""\n[[environments]]\nid = "a"\nurl = ""', '[[environments]]\nid = ""', "url cannot be"),
        (
            f'[[environments]]\nid = "a"\n{URL}\n[[environments]]\nid = "a"\n{URL}',
            '[[environments]]\nid = "b"\nurl = ""',
            "duplicated",
        ),
        (
            f'default = ""\n[[environments]]\nid = "a"\n{URL}',
            f'[[environments]]\nid = "a"\n{URL}',
            "duplicated",
        ),
    ],
)
def test_first_failure_in_the_order_of_the_reference_wins(first: str, second: str, words: str) -> None:
    assert words in str(refusal(f"{first}\n{second}")).lower()


@pytest.mark.parametrize(
    "key",
    [
        'auth_bearer_token_file = "x"',
        'auth_bearer_token_env = "X"',
        "bootstrap = true",
        'registry = "https://h"',
        'environment_id = "e"',
        'security = "clear"',
        'account_id = "x"',
    ],
)
def test_keys_of_ours_are_refused_in_the_file_of_codex(key: str) -> None:
    error = refusal(f'[[environments]]\nid = "a"\n{URL}\n{key}', ours=False)
    assert (error.line, "codex does not know it" in str(error)) == (4, True)
    assert isinstance(one(URL, 'auth_bearer_token = "x"', ours=False), WebsocketTarget)
    assert "auth_bearer_token_env" not in str(refusal("[[environments]]\nx = 1", ours=False))


def test_rules_of_the_file_of_codex_do_not_speak_of_keys_of_ours() -> None:
    for lines, words in (
        ("", "exactly one of url or program: it has none"),
        (f'{URL}\nprogram = "x"', "exactly one of url or program: it has url and program"),
        ("connect_timeout_sec = 1", "connect_timeout_sec requires url: "),
    ):
        error = refusal(f'[[environments]]\nid = "a"\n{lines}', ours=False)
        assert words in str(error)
        assert "registry" not in str(error)


SNIPPETS = st.sampled_from(
    [
        *"[]{}=.,\n\t\"'# ",
        *('"""', "'''", "[[environments]]", "\n", "id", "url", "env", "args", "default", "include_local"),
        *("true", "1", "-1", "nan", "1979-05-27 07:32:00", '"a"', '"ws://h"', '"none"', "\\", "é", "\r\n"),
        *(f"{text}\n" for text in (REGISTRY, 'security = "clear"')),
        *(f"{text}\n" for text in ('id = "a"', URL, "[environments.env]", "program = 'x'", "args = []")),
    ]
)


@given(st.text() | st.lists(SNIPPETS).map("".join))
def test_any_text_is_a_snapshot_or_refused(text: str) -> None:
    line = None
    try:
        check_snapshot(parse_config(text, file=FILE))
    except ConfigError as error:
        line = error.line
    else:
        tomllib.loads(text)
    assert line is None or 1 <= line <= text.count("\n") + 1


# Where keys stand.

KEYS = st.sampled_from(["a", "b-1", "_", "1", '"q k"', "'l.k'", '"e\\"s"', '""'])
SCALARS = st.sampled_from(
    [
        *("1", "-1.5e3", "true", "inf", "0x_f".replace("_", ""), '"s # no comment"', "'l'", '"\\\\"', '""'),
        *('"""m\n[x]\ny = 1\n"""', "'''\n''l'\n'''", '""""q""""', "1979-05-27 07:32:00", "07:32:00"),
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[ # c ]\n" + ",\n".join(items) + "\n]")
        | st.dictionaries(KEYS, inner, max_size=3).map(
            lambda table: "{ " + ", ".join(f"{key} = {value}" for key, value in table.items()) + " }"
        )
    ),
    max_leaves=6,
)
PAIRS = st.tuples(st.lists(KEYS, min_size=1, max_size=2), VALUES).map(
    lambda pair: f"{' . '.join(pair[0])} = {pair[1]} # c\n"
)
HEADERS = st.tuples(st.lists(KEYS, min_size=1, max_size=3), st.booleans()).map(
    lambda header: f"{'[' * (1 + header[1])} {'.'.join(header[0])} {']' * (1 + header[1])}\n"
)
DOCUMENTS = st.lists(PAIRS | HEADERS | st.sampled_from(["\n", "# [c]\n", "  "])).map("".join)


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in _paths(item, (*path, key)))]


@given(DOCUMENTS)
def test_every_key_of_a_document_has_a_line_and_that_line_has_the_key(text: str) -> None:
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assume(False)
    layout = read_layout(text)
    lines = text.split("\n")
    paths = _paths(document)[1:]
    assert set(layout.offsets) == set(paths)
    for path in paths:
        line = layout.line_of(path)
        assert line is not None
        key = path[-1]
        if isinstance(key, str):
            assert repr(key)[1:-1] in lines[line - 1].replace('\\"', '"')
    assert [found.start for found in layout.statements] == sorted(found.start for found in layout.statements)


# Editing.

COMMENTED = f"""\
# Mine. Keep it tidy.

default = "b"   # for now

# the first
[[environments]]
id = "a"  # a comment
{URL}
# says who
connect_timeout_sec = 3 # slow

# the build box
# (in the cellar)
[[environments]]
id = "b"
program = "ssh"
args = [
  "b",  # the host
]
[environments.env]
X = "1"  # why

# the last
[[environments]]
id = "c"
{URL}
skills = {{ required = [] }}
# the end
"""


def test_addition_goes_to_the_end_and_changes_nothing_else() -> None:
    target = CommandTarget(("ssh", "box", "a b"), {"A": "1"}, "/srv", 3.5, bootstrap=True)
    text = with_environment(COMMENTED, "new", target, file=FILE)
    assert text == COMMENTED + dedent(
        """
        [[environments]]
        id = "new"
        program = "ssh"
        args = ["ssh-args"]
        env = {A = "1"}
        cwd = "/srv"
        bootstrap = true
        initialize_timeout_sec = 3.5
        """
    ).replace('["ssh-args"]', '["box", "a b"]')
    assert dict(parse(text).environments)["new"] == target
    assert with_environment("", "d", DEVBOX, file=FILE) == (
        '[[environments]]\nid = "d"\nurl = "ws://127.0.0.1:8765"\nconnect_timeout_sec = 12.5\n'
    )
    assert with_environment("# mine", "d", DEVBOX, file=FILE).startswith("# mine\n\n[[environments]]\n")


def test_replacement_keeps_the_comments_and_the_place() -> None:
    text = with_environment(
        COMMENTED, "a", WebsocketTarget("wss://h", initialize_timeout=1), file=FILE, replace=True
    )
    assert text == COMMENTED.replace(URL, 'url = "wss://h"', 1).replace(
        "# says who\nconnect_timeout_sec = 3 # slow\n", "# says who\ninitialize_timeout_sec = 1\n"
    )
    text = with_environment(COMMENTED, "c", CommandTarget(("x",), {"A": "1"}), file=FILE, replace=True)
    assert text == COMMENTED.replace(f'id = "c"\n{URL}\n', 'id = "c"\n').replace(
        "# the end\n", '# the end\nprogram = "x"\nenv = {A = "1"}\n'
    )
    assert with_environment(
        COMMENTED, "b", dict(parse(COMMENTED).environments)["b"], file=FILE, replace=True
    ) == (COMMENTED)


def test_relay_takes_the_place_of_a_url_and_gives_it_back_with_its_comments() -> None:
    target = RelayTarget(
        "https://h/base",
        "env_1",
        connect_timeout=2,
        bearer_token_env="X",
        security="clear",
        account_id="1",
    )
    text = with_environment(COMMENTED, "a", target, file=FILE, replace=True)
    assert dict(parse(text).environments)["a"] == target
    assert text == COMMENTED.replace(f"{URL}\n", "", 1).replace(
        "# says who\nconnect_timeout_sec = 3 # slow\n",
        "# says who\nconnect_timeout_sec = 2 # slow\n"
        'auth_bearer_token_env = "X"\nregistry = "https://h/base"\n'
        'environment_id = "env_1"\nsecurity = "clear"\naccount_id = "1"\n',
    )
    again = with_environment(
        text,
        "a",
        RelayTarget("https://h/base", "env_2", connect_timeout=2, bearer_token_env="X"),
        file=FILE,
        replace=True,
    )
    assert again == text.replace("env_1", "env_2").replace('security = "clear"\naccount_id = "1"\n', "")
    back = with_environment(again, "a", WebsocketTarget("ws://127.0.0.1:8765"), file=FILE, replace=True)
    assert "registry" not in back
    assert "environment_id" not in back
    assert "# says who\n" in back
    assert with_environment("", "r", RelayTarget("https://h/", "e"), file=FILE) == (
        '[[environments]]\nid = "r"\nregistry = "https://h"\nenvironment_id = "e"\n'
    )


def test_removal_takes_the_comments_directly_above_and_no_others() -> None:
    text = with_default(COMMENTED, "c", file=FILE)
    first, second, third = (text.index(f"# the {word}") for word in ("first", "build box", "last"))
    assert without_environment(text, "a", file=FILE) == text[:first] + text[second:]
    assert without_environment(text, "b", file=FILE) == text[:second] + text[third:]
    assert without_environment(COMMENTED, "c", file=FILE) == COMMENTED[: COMMENTED.index("\n# the last")]
    one_and_only = f'# Mine.\n[[environments]]\nid = "a"\n{URL}\n'
    assert without_environment(one_and_only, "a", file=FILE) == "# Mine.\n"


def test_default_is_changed_in_its_place_or_put_behind_the_other_keys() -> None:
    assert with_default(COMMENTED, "a", file=FILE) == COMMENTED.replace('default = "b" ', 'default = "a" ')
    assert with_default(COMMENTED, None, file=FILE) == COMMENTED.replace(
        'default = "b" ', 'default = "none" '
    )
    assert with_default("", None, file=FILE) == 'default = "none"\n'
    assert with_default("# mine", "local", file=FILE) == '# mine\ndefault = "local"\n'
    assert with_default("include_local = true # c", "local", file=FILE) == (
        'include_local = true # c\ndefault = "local"\n'
    )
    bare = f'# Mine.\n\n# a\n[[environments]]\nid = "a"\n{URL}\n'
    assert with_default(bare, "a", file=FILE) == bare.replace("# a\n", 'default = "a"\n\n# a\n')


def test_environments_in_one_statement_are_edited_too() -> None:
    text = f'environments = [ # c\n  {{ id = "a", {URL} }}, # first\n  {{ id = "b", program = "x" }},\n]\n'
    text = with_environment(text, "c", CommandTarget(("y",), {"A": "1"}), file=FILE)
    text = with_environment(text, "a", DEVBOX, file=FILE, replace=True)
    text = without_environment(with_default(text, "c", file=FILE), "b", file=FILE)
    assert parse(text) == Snapshot((("a", DEVBOX), ("c", CommandTarget(("y",), {"A": "1"}))), "c", True)
    assert text.startswith("environments = [ # c\n")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda: with_environment(COMMENTED, "a", DEVBOX, file=FILE), "is there already"),
        (lambda: with_environment(COMMENTED, "local", DEVBOX, file=FILE), "`local` is reserved"),
        (lambda: with_environment(COMMENTED, "x y", DEVBOX, file=FILE), "write `x-y`"),
        (lambda: with_environment("", "x", WebsocketTarget("http://h"), file=FILE), "did you mean `ws://h`"),
        (lambda: with_environment("", "x", LocalTarget(), file=FILE), "include_local"),
        (lambda: with_environment("", "x", RelayTarget("http://h", "e"), file=FILE), "use https://"),
        (
            lambda: with_environment("", "x", RelayTarget("https://h", "e/f"), file=FILE),
            "`e/f` cannot be used",
        ),
        (lambda: without_environment(COMMENTED, "b", file=FILE), "is the default"),
        (lambda: without_environment(COMMENTED, "bb", file=FILE), "did you mean `b`"),
        (lambda: with_default(COMMENTED, "d", file=FILE), "`d` is not in"),
    ],
)
def test_edit_that_cannot_be_is_refused(edit: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        edit()
    assert words in str(caught.value)
    assert "line" not in str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: with_environment(text, "x", DEVBOX, file=FILE),
        lambda text: without_environment(text, "x", file=FILE),
        lambda text: with_default(text, "x", file=FILE),
    ],
)
def test_file_that_is_wrong_is_not_edited(edit: Any) -> None:
    with pytest.raises(ConfigError, match="line 2"):
        edit("\ndefault = 1\n")


IDS = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True).filter(
    lambda id_: id_.lower() not in ("none", "local")
)
STRINGS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
SECONDS = st.floats(0, 1e6) | st.just(10.0)
TARGETS: st.SearchStrategy[Target] = (
    st.builds(
        WebsocketTarget,
        st.sampled_from(["ws://127.0.0.1:1", "wss://h/x?y"]),
        st.none() | st.just("a token"),
        SECONDS,
        SECONDS,
    )
    | st.builds(
        CommandTarget,
        st.tuples(st.just("x"), STRINGS, STRINGS) | st.just(("x",)),
        st.dictionaries(STRINGS.filter(lambda name: name and "=" not in name), STRINGS, max_size=2),
        st.none() | st.just("/srv"),
        SECONDS,
        st.booleans(),
    )
    | st.builds(
        RelayTarget,
        st.sampled_from(["https://h", "https://h:1/a/b/", "http://127.0.0.1:1"]),
        st.from_regex(r"[A-Za-z0-9_-]{1,9}", fullmatch=True),
        st.none() | st.just("a token"),
        SECONDS,
        SECONDS,
        security=st.sampled_from(["noise", "clear"]),
        account_id=st.none() | st.just("an account"),
    )
)


@given(st.dictionaries(IDS, TARGETS, max_size=4), st.data())
def test_what_is_written_is_read_back(environments: dict[str, Target], data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(["", "# c\n", "include_local = true\n", "environments = []\n"]))
    for id_, target in environments.items():
        text = with_environment(text, id_, target, file=FILE)
    default = data.draw(st.sampled_from([None, "local", *environments]))
    text = with_default(text, default, file=FILE)
    assert parse_config(text, file=FILE) == Snapshot(tuple(environments.items()), default, True)
    for id_ in environments:
        other = data.draw(TARGETS)
        text = with_environment(text, id_, other, file=FILE, replace=True)
        assert dict(parse_config(text, file=FILE).environments) == {**environments, id_: other}
        environments[id_] = other
    text = with_default(text, None, file=FILE)
    for id_ in environments:
        text = without_environment(text, id_, file=FILE)
    assert parse_config(text, file=FILE) == Snapshot((), None, True)


# Snapshots that no file gave.


@pytest.mark.parametrize(
    ("snapshot", "words"),
    [
        (Snapshot((("", DEVBOX),)), "environment id cannot be empty"),
        (Snapshot((("local", DEVBOX),)), "reserved"),
        (Snapshot((("a", DEVBOX), ("a", SSH_DEV))), "`a` is there twice"),
        (Snapshot((("a", LocalTarget()),)), "is this machine"),
        (Snapshot((("a", DEVBOX),), "b"), "default environment `b` is not configured"),
        (Snapshot((), "local"), "default environment `local` is not configured"),
    ],
)
def test_snapshot_that_contradicts_itself_is_refused(snapshot: Snapshot, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_snapshot(snapshot)


def test_ids_of_a_snapshot_begin_with_local() -> None:
    assert Snapshot((("a", DEVBOX),), "a", True).ids == ("local", "a")
    assert Snapshot((("a", DEVBOX),)).ids == ("a",)
