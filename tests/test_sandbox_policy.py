"""Policies of sandboxes: from the wire, to the wire, and as programs build them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from execenv import PathUri, UsageError
from execenv.errors import InvalidParams
from execenv.sandbox.patterns import compile_pattern
from execenv.sandbox.policy import (
    Access,
    Entry,
    GlobRule,
    Network,
    PathRule,
    Sandbox,
    SandboxProfile,
    SpecialKind,
    SpecialRule,
    decode_sandbox,
    encode_sandbox,
)

W = PathUri("file:///srv/w")
ROOT_READ = Entry(SpecialRule("root"), "read")


def sandbox(permissions: Any, **members: Any) -> dict[str, Any]:
    return {"permissions": permissions, "windowsSandboxLevel": "disabled", **members}


def managed(*entries: Any, **members: Any) -> dict[str, Any]:
    files = {"type": "restricted", "entries": list(entries), **members}
    return {"type": "managed", "network": "restricted", "file_system": files}


def entry(path: Any, access: Any = "read", **members: Any) -> dict[str, Any]:
    return {"path": path, "access": access, **members}


def special(kind: str, **members: Any) -> dict[str, Any]:
    return {"type": "special", "value": {"kind": kind, **members}}


def path(uri: str) -> dict[str, Any]:
    return {"type": "path", "path": uri}


def refusal(value: Any) -> str:
    with pytest.raises(InvalidParams) as caught:
        decode_sandbox(value)
    assert caught.value.code == -32602
    return caught.value.message


def entries_of(*listed: Any) -> tuple[Entry, ...]:
    entries = decode_sandbox(sandbox(managed(*listed))).profile.entries
    assert entries is not None
    return entries


# From the wire.


def test_sandbox_is_read_with_its_own_casing() -> None:
    value = sandbox(
        {
            "type": "managed",
            "network": "enabled",
            "file_system": {
                "type": "restricted",
                "entries": [
                    entry(special("root")),
                    entry(special("project_roots", subpath=".git"), missing_path_behavior="skip"),
                    entry({"type": "glob_pattern", "pattern": "**/*.env"}, "deny"),
                    entry(special("unknown", path=":later"), "write"),
                    entry(path("file:///srv/w"), "write"),
                ],
                "glob_scan_max_depth": 3,
            },
        },
        cwd="file:///srv/w",
        workspaceRoots=["file:///srv/w"],
        userHomeDir="file:///root",
        temporaryDirectories=["file:///tmp"],
        useLegacyLandlock=True,
        windowsSandboxProxySettingsMode="reconcile",
    )
    entries = (
        ROOT_READ,
        Entry(SpecialRule("project_roots", ".git"), "read", skip_missing=True),
        Entry(GlobRule("**/*.env"), "deny"),
        Entry(SpecialRule("unknown", path=":later"), "write"),
        Entry(PathRule(W), "write"),
    )
    assert decode_sandbox(value) == Sandbox(
        SandboxProfile("managed", "enabled", entries, 3),
        W,
        (W,),
        PathUri("file:///root"),
        (PathUri("file:///tmp"),),
        use_legacy_landlock=True,
    )


def test_each_kind_of_profile_is_read() -> None:
    def profile(permissions: Any) -> SandboxProfile:
        return decode_sandbox(sandbox(permissions)).profile

    assert profile({"type": "disabled"}) == SandboxProfile.disabled()
    assert profile({"type": "external", "network": "restricted"}) == SandboxProfile.external("restricted")
    unrestricted = {"type": "managed", "network": "enabled", "file_system": {"type": "unrestricted"}}
    assert profile(unrestricted) == SandboxProfile.unrestricted("enabled")
    assert profile(managed()) == SandboxProfile.managed({})


def test_unknown_members_are_ignored_at_every_level() -> None:
    plain = entry(special("root"))
    noisy = entry(special("root", later=1, subpath="x") | {"more": 2}, other=3)
    permissions = managed(noisy, and_so=4) | {"on": 5}
    assert decode_sandbox(sandbox(permissions, sandboxPolicy=6)) == decode_sandbox(sandbox(managed(plain)))


def test_policy_context_replaces_both_flat_members_even_where_it_omits_one() -> None:
    flat = {"cwd": "file:///a", "workspaceRoots": ["file:///a"]}
    read = decode_sandbox(sandbox({"type": "disabled"}, **flat, policyContext={"cwd": "file:///b"}))
    assert (read.cwd, read.workspace_roots, read.has_context) == (PathUri("file:///b"), (), True)
    read = decode_sandbox(sandbox({"type": "disabled"}, **flat, policyContext={}))
    assert (read.cwd, read.workspace_roots, read.has_context) == (None, (), True)
    read = decode_sandbox(sandbox({"type": "disabled"}, **flat, policyContext=None))
    assert (read.cwd, read.workspace_roots) == (PathUri("file:///a"), (PathUri("file:///a"),))
    assert not read.has_context


def test_old_spellings_are_read_and_never_written() -> None:
    (none, roots) = entries_of(
        entry(path("file:///a"), "none"), entry(special("current_working_directory"), "write")
    )
    assert none.access == "deny"
    assert roots == Entry(SpecialRule("project_roots"), "write")
    written = str(encode_sandbox(Sandbox(SandboxProfile("managed", entries=(none, roots)))))
    assert "none" not in written
    assert "current_working_directory" not in written


@pytest.mark.parametrize(
    ("permissions", "profile"),
    [
        ({"network": {"enabled": True}}, SandboxProfile.managed({}, network="enabled")),
        ({"network": {"enabled": False}, "file_system": None}, SandboxProfile.managed({})),
        ({"network": None}, SandboxProfile.managed({})),
        (
            {"file_system": {"entries": [entry(special("root"))], "glob_scan_max_depth": 2}},
            SandboxProfile.managed({":root": "read"}, glob_scan_max_depth=2),
        ),
        (
            {"file_system": {"read": ["/a"], "write": ["/b"]}},
            SandboxProfile.managed({"/a": "read", "/b": "write"}),
        ),
        ({"file_system": {"read": None, "write": ["/b"]}}, SandboxProfile.managed({"/b": "write"})),
        ({"file_system": {}}, SandboxProfile.managed({})),
    ],
)
def test_profile_from_before_it_had_a_type_is_read_as_managed(
    permissions: Any, profile: SandboxProfile
) -> None:
    assert decode_sandbox(sandbox(permissions)).profile == profile
    written = encode_sandbox(Sandbox(profile))["permissions"]
    assert written["type"] == "managed"


TAGGED_FILES = "internally tagged enum ManagedFileSystemPermissions"
ONE_OF_SPECIALS = (
    "one of `root`, `minimal`, `current_working_directory`, `project_roots`, `tmpdir`, `slash_tmp`, `unknown`"
)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "missing field `permissions`"),
        ({"type": "readOnly"}, "missing field `permissions`"),
        ({"sandboxPolicy": {}, "windowsSandboxLevel": "disabled"}, "missing field `permissions`"),
        ({"permissions": {}}, "missing field `type`"),
        (sandbox({"entries": []}), "missing field `type`"),
        (sandbox({"network": "restricted", "fileSystem": {}}), "missing field `type`"),
        (
            {"permissions": {"type": "xxx"}},
            "unknown variant `xxx`, expected one of `managed`, `disabled`, `external`",
        ),
        (sandbox({"type": "managed", "network": "restricted"}), "missing field `file_system`"),
        (sandbox({"type": "managed", "file_system": {"type": "unrestricted"}}), "missing field `network`"),
        (
            sandbox({"type": "managed", "network": "restricted", "fileSystem": {"type": "unrestricted"}}),
            "missing field `file_system`",
        ),
        (
            sandbox({"type": "managed", "network": "restricted", "file_system": {"type": "restricted"}}),
            "missing field `entries`",
        ),
        (
            sandbox({"type": "managed", "network": "x", "file_system": {"type": "unrestricted"}}),
            "unknown variant `x`, expected `restricted` or `enabled`",
        ),
        (sandbox({"type": "external"}), "missing field `network`"),
        ({"permissions": {"type": "disabled"}}, "missing field `windowsSandboxLevel`"),
        (
            {"permissions": {"type": "disabled"}, "windowsSandboxLevel": "x"},
            "unknown variant `x`, expected one of `disabled`, `restricted-token`, `elevated`, `mxc`",
        ),
        (
            sandbox({"type": "disabled"}, windowsSandboxProxySettingsMode="x"),
            "unknown variant `x`, expected `reconcile` or `preserve`",
        ),
        (
            sandbox(managed(entry(special("root"), "zz"))),
            "unknown variant `zz`, expected one of `read`, `write`, `deny`, `none`",
        ),
        (sandbox(managed(entry(special("home")))), f"unknown variant `home`, expected {ONE_OF_SPECIALS}"),
        (sandbox(managed(entry(special("unknown")))), "missing field `path`"),
        (sandbox(managed({"access": "read"})), "missing field `path`"),
        (sandbox(managed({"path": special("root")})), "missing field `access`"),
        (
            sandbox(managed(entry({"type": "x"}))),
            "unknown variant `x`, expected one of `path`, `glob_pattern`, `special`",
        ),
        (
            sandbox(managed(glob_scan_max_depth=0)),
            "invalid value: integer `0`, expected a nonzero usize",
        ),
        (
            sandbox(managed(glob_scan_max_depth=-1)),
            "invalid value: integer `-1`, expected a nonzero usize",
        ),
        (sandbox(managed(glob_scan_max_depth=True)), "invalid type: boolean, expected a nonzero usize"),
        (sandbox(managed(entry(path("/srv/w")))), "invalid URI: relative URL without a base"),
        (sandbox(managed(entry(path("srv")))), "invalid URI: relative URL without a base"),
        (sandbox(managed(entry(path("http://a/")))), "unsupported path URI scheme `http`"),
        (sandbox(managed(entry(path("C:\\x")))), "unsupported path URI scheme `c`"),
        (sandbox({"type": "disabled"}, cwd="http://a/"), "unsupported path URI scheme `http`"),
        (
            sandbox(managed(entry(special("project_roots", subpath="../x"), "write"))),
            "invalid subpath `../x`, expected a relative path without `..`",
        ),
        (
            sandbox(managed(entry(special("project_roots", subpath="/x"), "write"))),
            "invalid subpath `/x`, expected a relative path without `..`",
        ),
        (
            sandbox(managed(entry(special("root"), missing_path_behavior="x"))),
            "unknown variant `x`, expected `skip`",
        ),
        ([], "invalid type: sequence, expected struct FileSystemSandboxContext"),
        (sandbox(1), "invalid type: number, expected internally tagged enum PermissionProfile"),
        (sandbox({"type": 1}), "invalid type: number, expected string or map"),
        (sandbox(managed() | {"file_system": None}), f"invalid type: null, expected {TAGGED_FILES}"),
        (sandbox(managed(7)), "invalid type: number, expected struct FileSystemSandboxEntry"),
        (sandbox({"type": "disabled"}, workspaceRoots=None), "invalid type: null, expected a sequence"),
        (
            sandbox({"type": "disabled"}, workspaceRoots=["file:///w"] * 10_001),
            "a list of a sandbox has 10001 members, more than 10000",
        ),
        (sandbox({"type": "disabled"}, workspaceRoots=[1]), "invalid type: number, expected a string"),
        (sandbox({"type": "disabled"}, useLegacyLandlock=1), "invalid type: number, expected a boolean"),
        (
            sandbox({"type": "disabled"}, policyContext=1),
            "invalid type: number, expected struct FileSystemSandboxPolicyContext",
        ),
    ],
)  # fmt: skip
def test_what_is_no_sandbox_is_refused_in_the_words_of_the_reference(value: Any, message: str) -> None:
    assert refusal(value) == message


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.sampled_from(("", "x", "/a", "file:///a", "restricted")),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.sampled_from(("type", "kind")), values),
    max_leaves=3,
)


def _replaced(value: Any, draw: st.DataObject) -> Any:
    """Something else in the place of a part, or without it."""
    if isinstance(value, dict) and value and draw.draw(st.booleans()):
        name = draw.draw(st.sampled_from(sorted(value)))
        rest = {key: member for key, member in value.items() if key != name}
        return rest if draw.draw(st.booleans()) else {**rest, name: _replaced(value[name], draw)}
    if isinstance(value, list) and value and draw.draw(st.booleans()):
        return [_replaced(value[0], draw), *value[1:]]
    return draw.draw(json_values)


@given(st.data())
def test_whatever_is_sent_is_a_sandbox_or_refused(draw: st.DataObject) -> None:
    entries = [entry(special("project_roots", subpath="x")), entry(path("file:///a"))]
    context = {"cwd": "file:///a", "workspaceRoots": ["file:///a"]}
    whole = sandbox(managed(*entries, glob_scan_max_depth=1), **context, policyContext=context)
    value = _replaced(whole, draw)
    try:
        read = decode_sandbox(value)
    except InvalidParams:
        return
    assert decode_sandbox(encode_sandbox(read)) == read


def test_another_systems_path_is_read_because_it_depends_on_who_enforces_it() -> None:
    assert decode_sandbox(sandbox({"type": "disabled"}, cwd="file:///C:/x")).cwd == PathUri("file:///C:/x")


# To the wire.


def test_sandbox_is_written_as_released_servers_take_it() -> None:
    value = Sandbox(SandboxProfile.workspace_write(), W, (W,), has_context=True)
    assert encode_sandbox(value) == {
        "permissions": managed(
            entry(special("root")),
            entry(special("project_roots"), "write"),
            entry(special("slash_tmp"), "write"),
            entry(special("tmpdir"), "write"),
        ),
        "cwd": "file:///srv/w",
        "workspaceRoots": ["file:///srv/w"],
        "policyContext": {"cwd": "file:///srv/w", "workspaceRoots": ["file:///srv/w"]},
        "windowsSandboxLevel": "disabled",
        "useLegacyLandlock": False,
    }


names = st.text("abc%é *", min_size=1, max_size=4)
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: PathUri.from_native("/" + "/".join(parts)))
kinds: st.SearchStrategy[SpecialKind] = st.sampled_from(
    ("root", "minimal", "tmpdir", "slash_tmp", "project_roots")
)
rules = st.one_of(
    paths.map(PathRule),
    st.text(max_size=8).map(GlobRule),
    kinds.map(SpecialRule),
    names.map(lambda name: SpecialRule("project_roots", name)),
    names.map(lambda name: SpecialRule("unknown", path=name)),
)
accesses: st.SearchStrategy[Access] = st.sampled_from(("read", "write", "deny"))
networks: st.SearchStrategy[Network] = st.sampled_from(("restricted", "enabled"))
profiles = st.one_of(
    st.just(SandboxProfile.disabled()),
    networks.map(SandboxProfile.external),
    networks.map(SandboxProfile.unrestricted),
    st.builds(
        SandboxProfile,
        st.just("managed"),
        networks,
        st.lists(st.builds(Entry, rules, accesses, st.booleans()), max_size=5).map(tuple),
        st.none() | st.integers(1, 2**64 - 1),
    ),
)
several = st.lists(paths, max_size=3).map(tuple)


@given(st.builds(Sandbox, profiles, st.none() | paths, several, st.none() | paths, several))
def test_what_is_written_is_read_as_it_was(value: Sandbox) -> None:
    assert decode_sandbox(encode_sandbox(value)) == value


@given(profiles, st.none() | paths, several)
def test_what_is_written_with_a_context_is_read_as_it_was(
    profile: SandboxProfile, cwd: PathUri | None, roots: tuple[PathUri, ...]
) -> None:
    value = Sandbox(profile, cwd, roots, use_legacy_landlock=True, has_context=True)
    assert decode_sandbox(encode_sandbox(value)) == value


# From programs.


def test_workspace_write_is_symbolic_unless_roots_are_given() -> None:
    assert SandboxProfile.workspace_write(temporary=False).entries == (
        ROOT_READ,
        Entry(SpecialRule("project_roots"), "write"),
    )
    given_roots = SandboxProfile.workspace_write(["/srv/w", PathUri("file:///b")], network="enabled")
    assert given_roots.network == "enabled"
    assert given_roots.entries == (
        ROOT_READ,
        Entry(PathRule(W), "write"),
        Entry(PathRule(PathUri("file:///b")), "write"),
        Entry(SpecialRule("slash_tmp"), "write"),
        Entry(SpecialRule("tmpdir"), "write"),
    )


def test_managed_takes_words_paths_and_rules() -> None:
    listed: dict[Any, Any] = {
        ":minimal": "read",
        ":project_roots/vendor": "read",
        "/srv/w": "write",
        "file:///srv/[x]": "deny",
        PathUri("file:///a"): "read",
        GlobRule("**/*.env"): "deny",
        SpecialRule("tmpdir"): "write",
    }
    profile = SandboxProfile.managed(listed)
    assert profile.entries == (
        Entry(SpecialRule("minimal"), "read"),
        Entry(SpecialRule("project_roots", "vendor"), "read"),
        Entry(PathRule(W), "write"),
        Entry(PathRule(PathUri("file:///srv/[x]")), "deny"),
        Entry(PathRule(PathUri("file:///a")), "read"),
        Entry(GlobRule("**/*.env"), "deny"),
        Entry(SpecialRule("tmpdir"), "write"),
    )
    assert SandboxProfile.managed([("/srv/w", "read"), Entry(PathRule(W), "write", True)]).entries == (
        Entry(PathRule(W), "read"),
        Entry(PathRule(W), "write", True),
    )


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"srv": "read"}, "'srv' is no absolute path"),
        ({"/srv": "none"}, "access is"),
        ({":home": "read"}, "is no place: :root, :minimal"),
        ({":unknown": "read"}, "is no place"),
        ({":root/x": "read"}, "is no place"),
        ({":project_roots/../x": "write"}, "without `..`"),
        ({SpecialRule("project_roots", "/x"): "write"}, "without `..`"),
        ({"/srv/*.env": "deny"}, r"say GlobRule\('/srv/\*.env'\)"),
        ({GlobRule("/srv/*.env"): "read"}, "can only deny"),
        ({GlobRule("/srv/[.env"): "deny"}, "is not closed"),
        ({7: "read"}, "a path is a str, an os.PathLike or a PathUri"),
        (["/srv"], "is a pair"),
    ],
)
def test_entry_that_means_nothing_is_a_usage_error(listed: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SandboxProfile.managed(listed)


def test_other_nonsense_is_a_usage_error() -> None:
    odd: Any = "no"
    with pytest.raises(UsageError, match="network is"):
        SandboxProfile.read_only(network=odd)
    with pytest.raises(UsageError, match="at least 1"):
        SandboxProfile.managed({}, glob_scan_max_depth=0)
    with pytest.raises(UsageError, match="a list of them"):
        SandboxProfile.workspace_write("/srv/w")
    with pytest.raises(UsageError, match="a list of them"):
        SandboxProfile.workspace_write(Path("/srv/w"))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no absolute path"):
        SandboxProfile.workspace_write(["w"])
    with pytest.raises(UsageError, match="not 3"):
        SandboxProfile.workspace_write([3])  # type: ignore[list-item]
    odd = SpecialRule("home")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'home' is no place: root, minimal,"):
        SandboxProfile.managed([(odd, "read")])


def test_paths_are_given_in_any_form() -> None:
    forms: list[str | PathUri | Path] = [
        "/srv/w",
        Path("/srv/w"),
        PathUri.parse("file:///srv/w"),
        "file:///srv/w",
    ]
    assert len({SandboxProfile.workspace_write([path]) for path in forms}) == 1
    assert len({SandboxProfile.managed([(path, "read")]) for path in forms}) == 1


def test_profile_without_writes_keeps_what_is_denied_and_the_depth() -> None:
    glob = GlobRule("/srv/w/*.env")
    profile = SandboxProfile.managed(
        {":root": "write", "/srv/w": "deny", glob: "deny"}, network="enabled", glob_scan_max_depth=2
    )
    assert profile.without_writes() == SandboxProfile.managed(
        {":root": "read", "/srv/w": "deny", glob: "deny"}, network="enabled", glob_scan_max_depth=2
    )
    assert SandboxProfile.disabled().without_writes() == SandboxProfile.read_only(network="enabled")
    assert SandboxProfile.external().without_writes() == SandboxProfile.read_only()


@pytest.mark.parametrize(
    ("profile", "files", "reads", "network"),
    [
        (SandboxProfile.disabled(), False, True, False),
        (SandboxProfile.external("restricted"), False, True, True),
        (SandboxProfile.unrestricted("enabled"), False, True, False),
        (SandboxProfile.read_only(), True, True, True),
        (SandboxProfile.workspace_write(), True, True, True),
        (SandboxProfile.managed({":root": "write"}), False, True, True),
        (SandboxProfile.managed({"/": "write", "/srv": "write", ":root": "read"}), False, True, True),
        (
            SandboxProfile(
                "managed", entries=(Entry(SpecialRule("root"), "write"), Entry(GlobRule("*"), "read"))
            ),
            False,
            True,
            True,
        ),
        (
            SandboxProfile.managed([("/", "write"), Entry(SpecialRule("unknown", path="x"), "read")]),
            False,
            True,
            True,
        ),
        (SandboxProfile.managed({":root": "write", "/srv": "read"}), True, True, True),
        (SandboxProfile.managed({":root": "write", "/srv": "deny"}), True, False, True),
        (SandboxProfile.managed({":root": "read", GlobRule("*"): "deny"}), True, False, True),
        (SandboxProfile.managed({":root": "deny"}), True, False, True),
        (SandboxProfile.managed({}, network="enabled"), True, False, False),
    ],
)
def test_profile_says_what_it_restricts(
    profile: SandboxProfile, files: bool, reads: bool, network: bool
) -> None:
    assert (profile.restricts_files, profile.reads_everything, profile.restricts_network) == (
        files,
        reads,
        network,
    )
    assert profile.enforces == (files or network)


WORKSPACE = (ROOT_READ, Entry(SpecialRule("project_roots"), "write"))


@pytest.mark.parametrize(
    ("policy", "profile"),
    [
        ({"type": "danger-full-access"}, SandboxProfile.disabled()),
        ({"type": "dangerFullAccess"}, SandboxProfile.disabled()),
        ({"type": "external-sandbox"}, SandboxProfile.external("restricted")),
        ({"type": "externalSandbox", "networkAccess": "enabled"}, SandboxProfile.external("enabled")),
        ({"type": "read-only"}, SandboxProfile.read_only()),
        (
            {"type": "readOnly", "networkAccess": True, "access": {"type": "fullAccess"}},
            SandboxProfile.read_only(network="enabled"),
        ),
        ({"type": "read-only", "access": {"type": "full-access"}}, SandboxProfile.read_only()),
        ({"type": "workspace-write"}, SandboxProfile.workspace_write()),
        (
            {
                "type": "workspace-write",
                "writable_roots": ["/srv/w"],
                "network_access": True,
                "exclude_tmpdir_env_var": True,
                "exclude_slash_tmp": True,
                "read_only_access": {"type": "full-access"},
            },
            SandboxProfile("managed", "enabled", (*WORKSPACE, Entry(PathRule(W), "write"))),
        ),
        (
            {"type": "workspaceWrite", "writableRoots": ["file:///srv/w"], "excludeSlashTmp": True},
            SandboxProfile(
                "managed",
                "restricted",
                (*WORKSPACE, Entry(PathRule(W), "write"), Entry(SpecialRule("tmpdir"), "write")),
            ),
        ),
    ],
)
def test_old_policy_becomes_a_profile_and_stays_symbolic(policy: Any, profile: SandboxProfile) -> None:
    assert SandboxProfile.from_sandbox_policy(policy) == profile


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("read-only", 'invalid type: string "read-only", expected internally tagged enum SandboxPolicy'),
        ({}, "missing field `type`"),
        (
            {"type": "x"},
            "unknown variant `x`, expected one of `danger-full-access`, `read-only`, `external-sandbox`, "
            "`workspace-write`",
        ),
        (
            {"type": "read-only", "access": {"type": "restricted", "readable_roots": []}},
            "unknown variant `restricted`, expected `full-access`",
        ),
        (
            {"type": "workspaceWrite", "readOnlyAccess": {"type": "restricted"}},
            "unknown variant `restricted`, expected `full-access`",
        ),
        ({"type": "read-only", "network_access": "yes"}, 'invalid type: string "yes", expected a boolean'),
    ],
)
def test_old_policy_that_cannot_be_meant_any_more_is_refused(policy: Any, message: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        SandboxProfile.from_sandbox_policy(policy)
    assert caught.value.message == message


# Patterns.


def matches(pattern: str, text: str, base: bytes = b"/") -> bool:
    """Whether a path is one that a pattern stands for, without the economy of a search."""

    def rest(parts: tuple[Any, ...], names: list[str]) -> bool:
        if not parts:
            return not names
        head, *tail = parts
        if head is None:
            return any(rest(tuple(tail), names[at:]) for at in range(len(names) + 1))
        return bool(names) and bool(head.fullmatch(names[0])) and rest(tuple(tail), names[1:])

    for one in compile_pattern(pattern, base):
        fixed = one.fixed.decode().rstrip("/")
        if text == (fixed or "/") and not one.parts:
            return True
        if text.startswith(fixed + "/") and rest(one.parts, text[len(fixed) + 1 :].split("/")):
            return True
    return False


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("/w/*.env", ["/w/.env", "/w/a.env"], ["/w/s/.env", "/w/.envs", "/w/xenv"]),
        ("/w/**/*.env", ["/w/.env", "/w/a/b/.env"], ["/v/.env", "/w/.env/x"]),
        ("/w/**", ["/w/a", "/w/a/b"], ["/w", "/wa"]),
        ("/w/**/**/x", ["/w/x", "/w/a/x"], ["/w/a/y"]),
        ("/w/?", ["/w/a", "/w/é", "/w/\n"], ["/w/ab", "/w/"]),
        ("/w/[a-c]x", ["/w/bx"], ["/w/dx"]),
        ("/w/[!a-c]", ["/w/d"], ["/w/a"]),
        ("/w/[^]]", ["/w/d"], ["/w/]"]),
        ("/w/[]a]", ["/w/]", "/w/a"], ["/w/b"]),
        ("/w/[a-]", ["/w/-", "/w/a"], ["/w/b"]),
        ("/w/{a,b/c}.{x,y}", ["/w/a.x", "/w/b/c.y"], ["/w/b.x"]),
        ("/w/{a,{b,c}*}", ["/w/a", "/w/cc"], ["/w/aa"]),
        (r"/w/\*", ["/w/*"], ["/w/a"]),
        ("/w/a**z", ["/w/az", "/w/a1/2/3z"], ["/w/b/az"]),
        ("/w/**.env", ["/w/.env", "/w/a/b.env"], ["/w/.env/x"]),
        ("/w/./x/../*.py/", ["/w/a.py"], ["/w/x/a.py"]),
        ("/w/*a*b*c", ["/w/abc", "/w/xaxbxc", "/w/aabbcc"], ["/w/acb", "/w/ab"]),
        ("/w/.env", ["/w/.env"], ["/w/.env/x"]),
        ("rel/*.py", ["/b[/rel/a.py"], ["/rel/a.py"]),
        ("../*.py", ["/a.py"], ["/b[/a.py"]),
        ("/**", ["/a"], []),
    ],
)
def test_pattern_matches(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [path for path in yes if not matches(pattern, path, b"/b[")] == []
    assert [path for path in no if matches(pattern, path, b"/b[")] == []


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("", "it is empty"),
        ("/w/[a", "a `[` is not closed"),
        ("/w/[]", "a `[` is not closed"),
        ("/w/[z-a]", "the range `z-a` is empty"),
        ("/w/{a,b", "a `{` is not closed"),
        ("/w/a}", "a `}` has no `{`"),
        ("/w/a\\", "a backslash ends it"),
        ("/w/\0", "it has a NUL"),
        ("/w/*/../x", "`..` behind a wildcard leads nowhere"),
        ("{/a,b}", "an alternative of a relative pattern is absolute"),
        ("/w/" + "{a,b}" * 20, "too many alternatives"),
        ("/w/" + "{" * 20 + "}" * 20, "its braces are nested too deep"),
        ("/w/" + "a**" * 20, "too many `**` in one name"),
        ("/w/" + "a**b**c/" * 6, "too many alternatives"),
        ("/w/\ud800/*", "it has an unpaired surrogate"),
    ],
)
def test_pattern_that_is_wrong_is_refused_and_says_why(pattern: str, why: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        compile_pattern(pattern)
    assert caught.value.message.startswith("invalid glob pattern `")
    assert caught.value.message.endswith(f"`: {why}")


@given(st.text("ab*?[]{},!^-\\\\/.", max_size=12))
def test_any_text_is_a_pattern_or_refused(text: str) -> None:
    with suppress(InvalidParams):
        matches(text, "/a/b")


def test_pattern_with_many_stars_takes_no_time() -> None:
    (pattern,) = compile_pattern("/w/" + "*a" * 60 + "b")
    (part,) = pattern.parts
    assert part is not None
    assert not part.fullmatch("a" * 255)
