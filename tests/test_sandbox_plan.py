"""Plans of sandboxes: what is mounted where, and that bubblewrap makes of it what was meant."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pytest
from attrs import define, evolve
from hypothesis import given
from hypothesis import strategies as st

from execenv import PathUri
from execenv.errors import InternalError, InvalidParams
from execenv.paths import ForeignPathError
from execenv.sandbox import plan as plan_module
from execenv.sandbox.plan import (
    PROTECTED,
    Bind,
    Fact,
    FactKind,
    Forbidden,
    Link,
    Mask,
    MountPlan,
    arguments,
    count_data_fds,
    execution,
    is_within,
    make_plan,
)
from execenv.sandbox.policy import (
    Access,
    Entry,
    GlobRule,
    PathRule,
    Place,
    Sandbox,
    SandboxProfile,
    SpecialRule,
)

Tree = dict[str, str | None]
"""Paths: `None` for a directory, `-> target` for a link, anything else for a file."""

HOST: Tree = {
    "/bin": "-> usr/bin",
    "/etc/passwd": "",
    "/usr/bin/sh": "",
    "/tmp": None,
    "/dev/shm": None,
    "/dev/null": "",
    "/proc/1": None,
    "/srv/out/s.txt": "",
    "/srv/w/a.txt": "",
    "/srv/w/.git/config": "",
    "/srv/w/.agents": None,
    "/srv/w/.aws": None,
    "/srv/w/sub/deep/x": "",
    "/srv/w/sub/.env": "",
    "/srv/w/.env": "",
    "/srv/link-to-w": "-> w",
}
W = b"/srv/w"


class FakeFacts:
    """A file system in a dict. An inode is the place of the path in it."""

    def __init__(self, tree: Tree) -> None:
        whole: Tree = {"/": None}
        for path, content in tree.items():
            names = path.split("/")
            for end in range(2, len(names)):
                whole.setdefault("/".join(names[:end]), None)
            whole[path] = content
        self.paths = [path.encode() for path in whole]
        self._contents = dict(zip(self.paths, whole.values(), strict=True))
        self.asked: list[bytes] = []

    def look(self, path: bytes) -> Fact | None:
        if path not in self._contents:
            return None
        kind, target = self._kind(path)
        return Fact(kind, 1, self.paths.index(path), target)

    def names(self, directory: bytes) -> Iterable[tuple[bytes, FactKind]]:
        self.asked.append(directory)
        top = directory.rstrip(b"/") + b"/"
        for path in self.paths:
            if path.startswith(top) and path != top and b"/" not in path[len(top) :]:
                yield path[len(top) :], self._kind(path)[0]

    def _kind(self, path: bytes) -> tuple[FactKind, bytes | None]:
        content = self._contents[path]
        if content is None:
            return "directory", None
        if content.startswith("-> "):
            return "symlink", content[3:].encode()
        return "file", None


Listed = dict[Place, Access]


def managed(listed: Listed, depth: int | None = None) -> Sandbox:
    return Sandbox(SandboxProfile.managed(listed, glob_scan_max_depth=depth))


def plan_of(listed: Listed, tree: Tree | None = None, depth: int | None = None) -> MountPlan:
    return make_plan(managed(listed, depth), FakeFacts(HOST if tree is None else tree))


def options(plan: MountPlan, prefix: bytes = b"") -> str:
    return b" ".join(arguments(plan, range(3, 3 + count_data_fds(plan)), prefix=prefix)).decode()


def refusal(listed: Listed, tree: Tree) -> str:
    with pytest.raises(InternalError) as caught:
        plan_of(listed, tree)
    return caught.value.message


# Worked examples (sandbox.md §5). Masks of protected names that are missing come in the order of the names.

BASE = "--ro-bind / / --dev /dev"
CODEX = "--perms 555 --tmpfs /srv/w/.codex --remount-ro /srv/w/.codex"
WORKSPACE = (
    f"{BASE} --bind /srv/w /srv/w --ro-bind /srv/w/.agents /srv/w/.agents "
    f"--ro-bind /srv/w/.aws /srv/w/.aws {CODEX} --ro-bind /srv/w/.git /srv/w/.git"
)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({":root": "read"}, BASE),
        ({":root": "read", "/srv/w": "write"}, WORKSPACE),
        (
            {":minimal": "read", "/srv/w": "read"},
            "--tmpfs / --dev /dev --symlink usr/bin /bin --ro-bind /etc /etc --dir /srv "
            "--ro-bind /srv/w /srv/w --ro-bind /usr /usr --dir /proc --remount-ro /",
        ),
        (
            {":root": "read", "/srv/w/sub": "deny", "/srv/w/.env": "deny"},
            f"{BASE} --perms 000 --ro-bind-data 3 /srv/w/.env --perms 000 --tmpfs /srv/w/sub "
            "--remount-ro /srv/w/sub",
        ),
        (
            {":root": "read", "/srv/w": "write", "/srv/w/none/x": "deny"},
            f"{WORKSPACE} --perms 000 --ro-bind-data 3 /srv/w/none",
        ),
        (
            {":root": "read", "/srv/w/sub": "deny", "/srv/w/sub/deep": "read", "/srv/w/sub/.env": "read"},
            f"{BASE} --perms 111 --tmpfs /srv/w/sub --dir /srv/w/sub/deep "
            "--ro-bind /srv/w/sub/.env /srv/w/sub/.env --remount-ro /srv/w/sub "
            "--ro-bind /srv/w/sub/.env /srv/w/sub/.env --ro-bind /srv/w/sub/deep /srv/w/sub/deep",
        ),
        (
            {":root": "write", "/srv/w": "deny", "/srv/w/sub/.env": "read"},
            "--bind / / --dev /dev --perms 555 --tmpfs /.agents --remount-ro /.agents "
            "--perms 555 --tmpfs /.aws --remount-ro /.aws --perms 555 --tmpfs /.codex --remount-ro /.codex "
            "--perms 555 --tmpfs /.git --remount-ro /.git --bind /dev/shm /dev/shm --bind /srv /srv "
            "--perms 111 --tmpfs /srv/w --dir /srv/w/sub --ro-bind /srv/w/sub/.env /srv/w/sub/.env "
            "--remount-ro /srv/w --ro-bind /srv/w/sub/.env /srv/w/sub/.env",
        ),
        ({":root": "read", "/srv/w/a.txt": "write"}, f"{BASE} --bind /srv/w/a.txt /srv/w/a.txt"),
        ({":root": "read", "/srv/link-to-w": "write"}, WORKSPACE),
        (
            {"/srv/link-to-w": "read"},
            "--tmpfs / --dev /dev --dir /srv --symlink w /srv/link-to-w --ro-bind /srv/w /srv/w --dir /proc "
            "--remount-ro /",
        ),
        (
            {":root": "deny", "/etc": "read"},
            "--tmpfs / --dev /dev --ro-bind /etc /etc --dir /proc --remount-ro /",
        ),
        ({}, "--tmpfs / --dev /dev --dir /proc --remount-ro /"),
    ],
)
def test_plan_becomes_options_of_bubblewrap(listed: Listed, expected: str) -> None:
    assert options(plan_of(listed)) == expected


def test_nothing_that_is_there_is_emptied() -> None:
    # bubblewrap opens what it makes by --file with creat(2), through links
    listed: Listed = {":root": "read", "/srv/w": "write", "/srv/w/sub": "deny", "/srv/w/sub/.env": "write"}
    assert "--file" not in options(plan_of(listed)).split()


def test_view_below_a_prefix_has_the_hosts_sources() -> None:
    assert options(plan_of({":root": "read", "/srv/out": "write", "/srv/w": "deny"}), b"/v").startswith(
        "--ro-bind / /v --dev /v/dev --bind /srv/out /v/srv/out --perms 555 --tmpfs /v/srv/out/.agents "
        "--remount-ro /v/srv/out/.agents"
    )
    assert options(plan_of({":minimal": "read", "/srv/w": "deny", "/srv/w/sub": "read"}), b"/v") == (
        "--tmpfs /v --dev /v/dev --symlink usr/bin /v/bin --ro-bind /etc /v/etc --dir /v/srv/w "
        "--ro-bind /srv/w/sub /v/srv/w/sub --ro-bind /usr /v/usr --dir /v/proc --remount-ro /v"
    )
    assert options(plan_of({":root": "write", "/etc": "read"}), b"/v").startswith("--bind / /v --dev /v/dev")


def test_each_bare_directory_is_made_for_everybody() -> None:
    tree: Tree = {"/a/b": None, "/a/c/d": None, "/a/c/e": None, "/a/up": "-> ..", "/z/y/x": None}
    listed: Listed = {"/a/b": "read", "/a/c/d": "read", "/a/c/e": "read", "/a/up/z/y/x": "write"}
    assert options(plan_of(listed, tree)).startswith(
        "--tmpfs / --dev /dev --dir /a --symlink .. /a/up --ro-bind /a/b /a/b --dir /a/c "
        "--ro-bind /a/c/d /a/c/d --ro-bind /a/c/e /a/c/e --dir /z/y --bind /z/y/x /z/y/x --perms 555"
    )


def test_network_of_the_plan_is_that_of_the_profile() -> None:
    assert not plan_of({}).network
    assert make_plan(Sandbox(SandboxProfile.read_only(network="enabled")), FakeFacts(HOST)).network


def test_profile_that_restricts_no_files_binds_everything_writable() -> None:
    plan = make_plan(Sandbox(SandboxProfile.unrestricted()), FakeFacts({"/srv": None}))
    assert plan == MountPlan(True, (Bind(b"/", True, 1, 0),), (), False)


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (SandboxProfile.disabled(), "direct"),
        (SandboxProfile.external(), "direct"),
        (SandboxProfile.managed({":root": "write"}), "direct"),
        (SandboxProfile.read_only(), "direct reads"),
        (SandboxProfile.workspace_write(), "direct reads"),
        (SandboxProfile.managed({":root": "write", "/srv": "read"}), "direct reads"),
        (SandboxProfile.managed({":root": "write", "/srv": "deny"}), "sandboxed"),
        (SandboxProfile.managed({"/srv": "read"}), "sandboxed"),
    ],
)
def test_calls_about_files_are_done_directly_only_where_nothing_is_restricted(
    profile: SandboxProfile, expected: str
) -> None:
    assert execution(Sandbox(profile)) == expected


def test_importing_the_planner_is_cheap() -> None:
    code = "import sys, execenv.sandbox.plan; print({'trio', 'cattrs', 'orjson'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


# What entries stand for.


def test_symbolic_places_are_resolved_when_it_is_enforced() -> None:
    profile = SandboxProfile.managed(
        {
            ":project_roots": "write",
            ":project_roots/sub": "read",
            ":tmpdir": "write",
            ":slash_tmp": "read",
            SpecialRule("unknown", path=":x"): "write",
        }
    )
    value = Sandbox(profile, workspace_roots=(PathUri("file:///srv/w/"),))
    plan = make_plan(value, FakeFacts(HOST), tmpdir=b"/srv/out/")
    assert plan.writable_roots == (b"/srv/out", W)
    assert [plan.access_of(path) for path in (W + b"/sub/deep", b"/tmp/x", b"/etc")] == [
        "read",
        "read",
        "none",
    ]
    for nothing in (None, b"", b"relative"):
        assert make_plan(value, FakeFacts(HOST), tmpdir=nothing).writable_roots == (W,)
    assert make_plan(Sandbox(profile), FakeFacts(HOST)).writable_roots == ()


def test_missing_roots_are_skipped() -> None:
    assert plan_of({":root": "read", "/none": "write", "/srv/none": "deny"}) == plan_of({":root": "read"})


NEEDS_CWD = "file system sandbox context with dynamic permissions requires cwd"


@pytest.mark.parametrize("access", ["read", "deny"])
def test_relative_pattern_needs_a_cwd(access: Access) -> None:
    profile = SandboxProfile("managed", entries=(Entry(GlobRule("*.txt"), access),))
    with pytest.raises(InvalidParams, match=NEEDS_CWD):
        make_plan(Sandbox(profile), FakeFacts(HOST))
    make_plan(Sandbox(profile), FakeFacts(HOST), cwd=W)
    make_plan(Sandbox(profile, PathUri("file:///srv/w")), FakeFacts(HOST))


def test_project_roots_of_a_context_need_a_cwd() -> None:
    profile = SandboxProfile.workspace_write()
    with pytest.raises(InvalidParams, match=NEEDS_CWD):
        make_plan(Sandbox(profile, has_context=True), FakeFacts(HOST))
    make_plan(Sandbox(profile, has_context=True), FakeFacts(HOST), cwd=W)
    make_plan(Sandbox(profile), FakeFacts(HOST))


def test_path_of_another_system_is_refused() -> None:
    foreign = PathUri("file:///C:/x")
    with pytest.raises(ForeignPathError, match=r"'file:///C:/x' is invalid on 'linux'"):
        make_plan(Sandbox(SandboxProfile.read_only(), foreign), FakeFacts(HOST), cwd=W)
    with pytest.raises(ForeignPathError):
        execution(Sandbox(SandboxProfile.read_only(), foreign))
    assert execution(Sandbox(SandboxProfile.disabled(), foreign)) == "direct"
    with pytest.raises(ForeignPathError):
        plan_of({foreign: "read"})


@pytest.mark.parametrize(
    ("listed", "path", "expected"),
    [
        ({"/srv/w": "write", "/srv/w/sub": "read"}, "/srv/w/sub/x", "read"),
        ({"/srv/w": "write", "/srv/w/sub": "read", "/srv/w/sub/deep": "write"}, "/srv/w/sub/deep/x", "write"),
        ({"/srv/w": "read", "/srv/w/sub": "deny", "/srv/w/sub/deep": "write"}, "/srv/w/sub/deep/x", "write"),
        ({"/srv/w": "read", "/srv/w/sub": "deny", "/srv/w/sub/deep": "write"}, "/srv/w/sub/x", "none"),
        ({"/srv/w": "read", PathUri("file:///srv/w/"): "write"}, "/srv/w/x", "write"),
        ({"/srv/w": "read", "/srv/link-to-w": "deny"}, "/srv/w/x", "none"),
        ({"/srv/w": "write"}, "/srv/w/.git/config", "read"),
        ({"/srv/w": "write", "/srv/w/.git": "write"}, "/srv/w/.git/config", "write"),
        ({"/srv/w": "write", "/srv/w/.git/config": "write"}, "/srv/w/.git/config", "write"),
        ({"/srv/w": "write", "/srv/w/.codex": "write"}, "/srv/w/.codex/config", "write"),
        ({"/srv/w": "write"}, "/srv/w/.codex/config", "read"),
        ({"/srv/w": "write"}, "/srv/w/sub/.git", "write"),
        ({"/srv/w": "write", "/srv/w/sub": "write"}, "/srv/w/sub/.git", "read"),
        ({"/srv/w": "write", "/srv/w/.git": "deny"}, "/srv/w/.git", "none"),
        ({"/": "write", "/srv/w": "read"}, "/.git", "read"),
        ({"/srv/w/a.txt": "write"}, "/srv/w/a.txt", "write"),
        ({"/srv/w/a.txt": "write"}, "/srv/w/b.txt", "none"),
    ],
)
def test_most_specific_entry_decides(listed: Listed, path: str, expected: str) -> None:
    assert plan_of(listed).access_of(path.encode()) == expected


# What the sandboxed could change.

LINKS: Tree = {
    "/srv/w/link": "-> ../out",
    "/srv/w/.codex": "-> /srv/out",
    "/srv/into": "-> w/link/s.txt",
    "/srv/out/s.txt": "",
}


@pytest.mark.parametrize(
    ("entry", "what", "link"),
    [
        ({"/srv/w/link": "read"}, "read-only path /srv/w/link", "link"),
        ({"/srv/w/link/x": "deny"}, "deny-read path /srv/w/link/x", "link"),
        ({"/srv/w/link": "write"}, "writable path /srv/w/link", "link"),
        ({"/srv/into": "deny"}, "deny-read path /srv/into", "link"),
        ({GlobRule("/srv/w/link/*.env"): "deny"}, "deny-read path /srv/w/link/*.env", "link"),
        ({}, "read-only path /srv/w/.codex", ".codex"),
        ({"/srv/w/.codex": "write"}, "writable path /srv/w/.codex", ".codex"),
    ],
)
def test_entry_through_a_link_that_can_be_exchanged_is_refused(entry: Listed, what: str, link: str) -> None:
    message = f"cannot enforce sandbox {what} because it crosses writable symlink /srv/w/{link}"
    assert refusal({":root": "read", "/srv/w": "write", **entry}, LINKS) == message


def test_skipping_what_is_missing_does_not_excuse_a_link() -> None:
    skip = Entry(PathRule(PathUri("file:///srv/w/.codex")), "read", skip_missing=True)
    profile = SandboxProfile.managed([("/srv/w", "write"), skip])
    with pytest.raises(InternalError, match=r"crosses writable symlink /srv/w/\.codex"):
        make_plan(Sandbox(profile), FakeFacts(LINKS))


def test_links_outside_and_links_that_entries_do_not_cross_are_no_matter() -> None:
    assert plan_of({"/srv/w": "read", "/srv/w/link": "read"}, LINKS).access_of(b"/srv/out/s.txt") == "read"
    plan_of({"/srv/link-to-w": "write", "/srv/w/sub": "deny"})


def test_directories_above_an_entry_are_held_in_place() -> None:
    plan = plan_of(
        {":root": "read", "/srv/w": "write", "/srv/w/sub/deep/x": "deny", "/srv/w/sub/.env": "read"}
    )
    assert plan.writable_roots == (W, b"/srv/w/sub", b"/srv/w/sub/deep")
    plan = plan_of({"/srv/w": "write", "/srv/w/sub": "read", "/srv/w/sub/deep/x": "deny"})
    assert plan.writable_roots == (W,)
    plan = plan_of({"/srv/w": "write", "/srv/w/sub/deep": "write"})
    assert plan.writable_roots == (W, b"/srv/w/sub", b"/srv/w/sub/deep")
    plan = plan_of({"/srv/w": "write", "/srv/w/sub/deep/none/x": "deny"})
    assert plan.writable_roots == (W, b"/srv/w/sub", b"/srv/w/sub/deep")


def test_what_is_missing_is_covered_at_its_first_name() -> None:
    listed: Listed = {"/srv/w": "write", "/srv/w/n/a": "read", "/srv/w/m/b": "deny", "/srv/w/n/c": "write"}
    plan = plan_of(listed)
    inode = FakeFacts(HOST).paths.index(W)
    masks = {op.path: op for op in plan.operations if isinstance(op, Mask)}
    assert masks == {
        b"/srv/w/.codex": Mask(b"/srv/w/.codex", "empty directory", missing=True),
        b"/srv/w/m": Mask(b"/srv/w/m", "denied file", missing=True),
        b"/srv/w/n": Mask(b"/srv/w/n", "empty directory", missing=True),
    }
    assert plan.forbidden == (
        Forbidden(1, inode, b".codex", denied=False),
        Forbidden(1, inode, b"m", denied=True),
        Forbidden(1, inode, b"n", denied=False),
    )
    both = plan_of({**listed, "/srv/w/n/z": "deny"})
    assert Mask(b"/srv/w/n", "denied file", missing=True) in both.operations


def test_missing_place_that_may_be_skipped_is_not_covered_unless_it_is_protected() -> None:
    def skipping(name: str) -> Entry:
        return Entry(PathRule(PathUri(f"file:///srv/w/{name}")), "read", skip_missing=True)

    profile = SandboxProfile.managed([("/srv/w", "write"), skipping("none"), skipping(".codex")])
    plan = make_plan(Sandbox(profile), FakeFacts(HOST))
    assert [op.path for op in plan.operations if isinstance(op, Mask)] == [b"/srv/w/.codex"]


def test_write_entry_lifts_the_protection_of_a_name_that_is_missing() -> None:
    plan = plan_of({"/srv/w": "write", "/srv/w/.codex": "write"})
    assert not any(isinstance(op, Mask) for op in plan.operations)
    assert plan.forbidden == ()


def test_file_in_the_place_of_a_directory_is_held_instead() -> None:
    plan = plan_of({"/srv/w": "write", "/srv/w/a.txt/x": "deny"})
    inode = FakeFacts(HOST).paths.index(b"/srv/w/a.txt")
    assert Bind(b"/srv/w/a.txt", True, 1, inode) in plan.operations


def test_directory_in_which_nothing_can_be_made_is_held_instead() -> None:
    class Sealed(FakeFacts):
        def look(self, path: bytes) -> Fact | None:
            fact = super().look(path)
            return evolve(fact, sealed=True) if fact and path in {b"/", b"/srv/w/sub"} else fact

    facts = Sealed({**HOST, "/srv/w/.codex": None})
    listed: Listed = {":root": "write", "/srv/w": "write", "/srv/w/sub/none": "deny"}
    plan = make_plan(managed(listed), facts)
    assert plan.forbidden == ()
    assert set(plan.writable_roots) == {b"/", b"/dev/shm", b"/srv", W, b"/srv/w/sub"}


def test_file_as_a_writable_root_has_no_protected_names() -> None:
    assert plan_of({":root": "read", "/srv/w/a.txt": "write"}).forbidden == ()


def test_loop_of_links_leads_nowhere() -> None:
    tree: Tree = {"/srv/a": "-> b", "/srv/b": "-> a", "/srv/w": None, "/srv/w/c": "-> c"}
    assert plan_of({"/srv/a": "write", "/srv/w": "read"}, tree).writable_roots == ()
    assert "crosses writable symlink /srv/w/c" in refusal({"/srv/w": "write", "/srv/w/c": "deny"}, tree)


def test_link_that_leads_to_what_is_missing_in_a_writable_root_covers_that() -> None:
    tree: Tree = {"/srv/w": None, "/srv/l": "-> w/none/../x"}
    plan = plan_of({":root": "read", "/srv/w": "write", "/srv/l": "deny"}, tree)
    assert Mask(b"/srv/w/none", "denied file", missing=True) in plan.operations


def test_links_of_a_bare_view_lead_where_they_did() -> None:
    tree: Tree = {
        "/a/one": "-> /b/two/x",
        "/b/two": "-> ../c/./here",
        "/c/here/x/f": "",
        "/a/odd": "-> ../none-here/../c/here",
        "/none-here": None,
    }
    plan = plan_of({"/a/one": "read", "/a/odd/x": "read"}, tree)
    assert plan.operations == (
        Link(b"/a/odd", b"/c/here"),
        Link(b"/a/one", b"/b/two/x"),
        Link(b"/b/two", b"../c/./here"),
        Bind(b"/c/here/x", False, 1, FakeFacts(tree).paths.index(b"/c/here/x")),
    )
    assert plan_of({"/a": "read", "/a/one": "read"}, tree).operations[0] == Link(b"/b/two", b"../c/./here")


# /dev and /proc.


@pytest.mark.parametrize("path", ["/dev", "/dev/null", "/dev/shm", "/proc", "/proc/1"])
def test_grants_in_dev_and_proc_grant_nothing_but_shared_memory(path: str) -> None:
    both: tuple[Access, ...] = ("read", "write")
    for access in both:
        plan = plan_of({":root": "read", path: access})
        bound = {op.path for op in plan.operations if isinstance(op, Bind)}
        assert bound - {b"/dev/shm/" + name for name in PROTECTED} == (
            {b"/dev/shm"} if path == "/dev/shm" else set()
        )
    assert plan_of({":root": "read"}).access_of(b"/dev/null") == "write"
    assert plan_of({":root": "read", "/dev/shm": "read"}).access_of(b"/dev/shm/x") == "read"


@pytest.mark.parametrize(
    ("listed", "hidden", "expected"),
    [
        ({":root": "read"}, "/run/own", "denied directory"),  # to hold a lock there, reading is enough
        ({":root": "write"}, "/run/own", "denied directory"),
        ({":root": "read", "/run/own": "write"}, "/run/own", "denied directory"),
        ({":root": "read", "/run/own/lock": "write"}, "/run/own", "denied directory"),
        ({":minimal": "read"}, "/run/own", None),
        ({":root": "read"}, "/dev/shm/own", None),
        ({":root": "write"}, "/dev/shm/own", "denied directory"),
        # removed since it was made: nobody may make another
        ({":slash_tmp": "write"}, "/tmp/own", "denied file"),
        ({":root": "read"}, "/tmp/own", None),
    ],
)
def test_directories_of_our_own_are_in_no_view(listed: Listed, hidden: str, expected: str | None) -> None:
    facts = FakeFacts(HOST | {"/run/own/lock": "", "/dev/shm/own/lock": ""})
    plan = make_plan(managed(listed), facts, hidden=[hidden.encode()])
    found = [op for op in plan.operations if not isinstance(op, Link) and is_within(op.path, hidden.encode())]
    assert [(op.path, op.kind) for op in found if isinstance(op, Mask)] == (
        [(hidden.encode(), expected)] if expected else []
    )
    assert not [op for op in found if isinstance(op, Bind)]


@pytest.mark.parametrize(
    ("path", "own"), [("/dev", "/dev"), ("/dev/null", "/dev"), ("/proc", "/proc"), ("/proc/1", "/proc")]
)
def test_denying_what_every_view_has_is_refused(path: str, own: str) -> None:
    message = f"cannot enforce sandbox deny-read path {path} because {own} of a sandbox is its own"
    assert refusal({":root": "read", path: "deny"}, HOST) == message


def test_denying_devices_that_no_view_has_needs_nothing() -> None:
    tree: Tree = {**HOST, "/dev/sda": ""}
    assert plan_of({":root": "read", "/dev/sda": "deny", "/dev/shm": "deny"}, tree).operations == ()


# Patterns.


def denied(pattern: str, tree: Tree, depth: int | None = None) -> list[bytes]:
    plan = plan_of({":root": "read", GlobRule(pattern): "deny"}, tree, depth)
    return sorted(op.path for op in plan.operations if isinstance(op, Mask))


GLOBS: Tree = {
    "/w/.env": "",
    "/w/sub/.env": "",
    "/w/sub/x.env/y.env": "",
    "/w/l.env": "-> ../out/secret",
    "/w/gone.env": "-> nowhere",
    "/w/dir": "-> sub",
    "/out/secret": "",
    "/out/.env": "",
}


def test_pattern_masks_files_directories_and_what_links_lead_to() -> None:
    everything = [b"/out/secret", b"/w/.env", b"/w/sub/.env", b"/w/sub/x.env"]
    assert denied("/w/**/*.env", GLOBS) == everything
    assert denied("/w/*/.env", GLOBS) == [b"/w/sub/.env"]
    assert denied("/w/.env", GLOBS) == [b"/w/.env"]


def test_link_that_matches_cannot_take_away_a_root_of_the_policy() -> None:
    tree: Tree = {
        **GLOBS,
        "/w/up.env": "-> ../w",
        "/w/top.env": "-> /",
        "/w/side.env": "-> ../side",
        "/side/x": "",
    }
    listed: Listed = {":root": "read", "/w/sub": "write", GlobRule("/w/*.env"): "deny"}
    plan = plan_of(listed, tree)
    expected = {"/w/x": "read", "/w/sub/x": "write", "/out/secret": "none", "/side/x": "none", "/x": "read"}
    assert {path: plan.access_of(path.encode()) for path in expected} == expected


def test_pattern_reaches_as_deep_as_it_may() -> None:
    assert denied("/w/**/*.env", GLOBS, 1) == [b"/out/secret", b"/w/.env"]
    assert denied("/w/**/*.env", GLOBS, 2) == [b"/out/secret", b"/w/.env", b"/w/sub/.env", b"/w/sub/x.env"]


def test_what_is_reopened_below_a_match_is_searched_too() -> None:
    tree: Tree = {"/w/a.env/open/b.env": "", "/w/a.env/open/c": "", "/w/a.env/d/b.env": ""}
    plan = plan_of({"/w": "read", "/w/a.env/open": "write", GlobRule("/w/**/*.env"): "deny"}, tree)
    expected = {"/w/a.env/x": "none", "/w/a.env/open/c": "write", "/w/a.env/open/b.env": "none"}
    assert {path: plan.access_of(path.encode()) for path in expected} == expected


def test_match_that_is_a_root_is_denied() -> None:
    assert plan_of({"/w": "write", GlobRule("/*"): "deny"}, GLOBS).operations == ()


def test_only_what_can_be_seen_is_searched() -> None:
    facts = FakeFacts({**HOST, "/srv/w/sub/deep/more/x": ""})
    listed: Listed = {"/srv/w": "read", "/srv/w/sub/deep": "deny", GlobRule("/**/*.env"): "deny"}
    listed[GlobRule("/usr/**/*.env")] = "deny"
    make_plan(managed(listed), facts)
    below = {W + name for name in (b"", b"/.agents", b"/.aws", b"/.git", b"/sub")}
    assert set(facts.asked) == {b"/", b"/srv"} | below


def test_search_of_too_many_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tree: Tree = {f"/w/{number}": "" for number in range(9)}
    listed: Listed = {":root": "read", GlobRule("/w/*.env"): "deny"}
    monkeypatch.setattr(plan_module, "MAX_NAMES", 9)
    plan_of(listed, tree)
    monkeypatch.setattr(plan_module, "MAX_NAMES", 8)
    assert refusal(listed, tree).startswith(
        "cannot enforce sandbox deny-read path /w/*.env because there are more than 8 names to look at"
    )


def test_several_patterns_are_searched_for_at_once() -> None:
    facts = FakeFacts(GLOBS)
    listed: Listed = {":root": "read", GlobRule("/w/**/*.env"): "deny", GlobRule("/w/s*"): "deny"}
    plan = make_plan(managed(listed), facts)
    assert plan.access_of(b"/w/sub/x") == "none"
    assert facts.asked == [b"/w"]


def test_invalid_pattern_is_refused_with_any_access() -> None:
    both: tuple[Access, ...] = ("read", "deny")
    for access in both:
        profile = SandboxProfile("managed", entries=(Entry(GlobRule("/w/[z-a]"), access),))
        with pytest.raises(InvalidParams, match=re.escape("invalid glob pattern `/w/[z-a]`")):
            make_plan(Sandbox(profile), FakeFacts(GLOBS))


def test_grants_by_pattern_are_ignored() -> None:
    profile = SandboxProfile("managed", entries=(Entry(GlobRule("/w/*"), "write"),))
    assert make_plan(Sandbox(profile), FakeFacts(GLOBS)).operations == ()


# Any entries, any tree: the rule of precedence, the plan and what its mounts come to are one.

NAMES = ("a", "b", ".git")
tree_paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(lambda names: "/" + "/".join(names))
trees = st.lists(tree_paths, max_size=8).map(lambda paths: _as_tree(paths))
accesses: st.SearchStrategy[Access] = st.sampled_from(("read", "write", "deny"))
entry_lists = st.lists(
    st.tuples(st.one_of(tree_paths, st.just("/")), accesses, st.booleans()).map(
        lambda drawn: Entry(PathRule(PathUri.from_native(drawn[0])), drawn[1], drawn[2])
    ),
    max_size=6,
)


def _as_tree(paths: list[str]) -> Tree:
    tree: Tree = {}
    for path in paths:
        below = any(other.startswith(path + "/") for other in paths)
        tree[path] = None if below or len(path) % 4 < 2 else ""
    return tree


def precedence(entries: list[Entry], facts: FakeFacts, path: bytes) -> Literal["none", "read", "write"]:
    """Rule §2.2 with §2.4, by going through every entry."""
    rules: list[tuple[bytes, Access]] = []
    for entry in entries:
        assert isinstance(entry.rule, PathRule)
        rules.append((entry.rule.path.to_native(), entry.access))
    exist = [(at, access) for at, access in rules if facts.look(at) is not None]
    strength = {"read": 0, "write": 1, "deny": 2}
    strongest = {at: max((a for p, a in exist if p == at), key=strength.__getitem__) for at, _ in exist}
    writable = [at for at, access in strongest.items() if access == "write"]
    for root in writable:
        fact = facts.look(root)
        if fact is not None and fact.kind == "directory":
            for name in PROTECTED:
                at = root.rstrip(b"/") + b"/" + name
                if (at, "write") not in rules and at not in strongest:
                    exist.append((at, "read"))
    holding = [(len(at), strength[access], access) for at, access in exist if is_within(path, at)]
    access = max(holding)[2] if holding else "deny"
    return "none" if access == "deny" else access


@define
class View:
    """What mounts come to: a list of what is mounted where, as the kernel has it."""

    mounts: list[tuple[bytes, str]]
    facts: FakeFacts

    def mounted(self, path: bytes) -> str:
        return next(kind for at, kind in reversed(self.mounts) if is_within(path, at))

    def exists(self, path: bytes) -> bool:
        at, kind = next((at, kind) for at, kind in reversed(self.mounts) if is_within(path, at))
        return path == at or (kind in {"ro", "rw"} and self.facts.look(path) is not None)

    def mount(self, path: bytes, kind: str, makes: bool) -> None:
        assert makes or self.exists(path), f"no mount point {path!r}"
        self.mounts = [mount for mount in self.mounts if not is_within(mount[0], path)]
        self.mounts.append((path, kind))
        self.mounts.sort(key=lambda mount: len(mount[0]))

    def apply(self, plan: MountPlan) -> None:
        made: set[bytes] = set()
        self.mount(b"/", "ro" if plan.whole else "nothing", makes=True)
        self.mount(b"/dev", "own", makes=True)
        for op in plan.operations:
            assert not isinstance(op, Link)
            bare = self.mounted(op.path) == "nothing"
            if isinstance(op, Bind):
                self.mount(op.path, "rw" if op.writable else "ro", makes=bare or op.path in made)
                if op.path == b"/":
                    self.mount(b"/dev", "own", makes=True)
            else:
                assert not op.missing or self.mounted(op.path) == "rw"
                assert op.missing == (self.facts.look(op.path) is None)
                self.mount(op.path, "empty" if op.kind == "empty directory" else "denied", makes=op.missing)
                made |= {*op.reopened, *op.reopened_files}

    def access(self, path: bytes) -> str:
        # Behind a mask nothing is, but the place of an empty directory can be seen.
        words = {
            "ro": "read",
            "rw": "write",
            "empty": "read",
            "denied": "none",
            "nothing": "none",
            "own": "write",
        }
        return words[self.mounted(path)]


@given(trees, entry_lists)
def test_plan_rule_and_mounts_agree(tree: Tree, entries: list[Entry]) -> None:
    facts = FakeFacts(tree)
    plan = make_plan(Sandbox(SandboxProfile("managed", entries=tuple(entries))), facts)
    view = View([], facts)
    view.apply(plan)
    covered = [op.path for op in plan.operations if isinstance(op, Mask) and op.missing]
    probes = {*facts.paths, *(path.rstrip(b"/") + b"/new" for path in facts.paths)}
    probes |= {path.rstrip(b"/") + b"/.git" for path in facts.paths}
    for path in probes:
        assert plan.access_of(path) == view.access(path), path
        if not any(is_within(path, cover) for cover in covered):
            assert plan.access_of(path) == precedence(entries, facts, path), path


@given(trees, entry_lists)
def test_what_is_missing_and_not_writable_can_nowhere_be_made(tree: Tree, entries: list[Entry]) -> None:
    facts = FakeFacts(tree)
    plan = make_plan(Sandbox(SandboxProfile("managed", entries=tuple(entries))), facts)
    strength = {"read": 0, "write": 1, "deny": 2}
    strongest: dict[bytes, Entry] = {}
    for entry in entries:
        assert isinstance(entry.rule, PathRule)
        at = entry.rule.path.to_native()
        if at not in strongest or strength[entry.access] > strength[strongest[at].access]:
            strongest[at] = entry
    for at, entry in strongest.items():
        excused = entry.skip_missing and entry.access == "read" and facts.look(at) is None
        if entry.access != "write" and not excused:
            assert plan.access_of(at) != "write" or not _could_be_made(facts, at)


def _could_be_made(facts: FakeFacts, path: bytes) -> bool:
    """Not where a file is in the way, which is held in its place."""
    above = path
    while facts.look(above) is None:
        above = above[: above.rfind(b"/")] or b"/"
    fact = facts.look(above)
    return above == path or (fact is not None and fact.kind == "directory")


# With bubblewrap.


class HostFacts:
    def look(self, path: bytes) -> Fact | None:
        try:
            found = os.lstat(path)
        except OSError:
            return None
        target = os.readlink(path) if stat.S_ISLNK(found.st_mode) else None
        return Fact(self._kind(found.st_mode), found.st_dev, found.st_ino, target)

    def names(self, directory: bytes) -> Iterable[tuple[bytes, FactKind]]:
        with os.scandir(directory) as entries:
            for entry in entries:
                yield entry.name, self._kind(entry.stat(follow_symlinks=False).st_mode)

    def _kind(self, mode: int) -> FactKind:
        if stat.S_ISLNK(mode):
            return "symlink"
        if stat.S_ISDIR(mode):
            return "directory"
        return "file" if stat.S_ISREG(mode) else "other"


@define
class Real:
    """A workspace `w` and `out` beside it, on this host."""

    root: Path

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def make(self, *names: str) -> None:
        for name in names:
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir()
            else:
                path.write_text(f"{name}\n")

    def run(self, listed: Listed, script: str, depth: int | None = None) -> list[str]:
        """What a shell script says in the view, in the root of it all; `!` for each command that fails."""
        plan = make_plan(managed(listed, depth), HostFacts())
        fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(count_data_fds(plan))]
        view = [os.fsdecode(argument) for argument in arguments(plan, fds)]
        frame = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--proc", "/proc", "--cap-drop", "ALL"]
        lines = "\n".join(f"{{ {line}; }} 2>/dev/null || echo !" for line in script.strip().splitlines())
        command = ["/bin/sh", "-c", f"cd {self.root}\n{lines}"]
        try:
            done = subprocess.run(
                ["bwrap", "--die-with-parent", *view, *frame, "--", *command],
                pass_fds=fds,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        finally:
            for fd in fds:
                os.close(fd)
        assert done.stderr == ""
        return done.stdout.splitlines()


@pytest.fixture
def real(tmp_path: Path) -> Real:
    if shutil.which("bwrap") is None:
        reason = "there is no bwrap (apt install bubblewrap)"
        if os.environ.get("EXECENV_REQUIRE_TOOLS") == "1":
            pytest.fail(f"EXECENV_REQUIRE_TOOLS=1, but {reason}")
        pytest.skip(reason)
    host = Real(tmp_path.resolve())
    host.make("w/a.txt", "w/.git/config", "w/sub/b.txt", "w/sub/deep/c.txt", "w/.env", "out/s.txt")
    return host


BASICS: Listed = {":minimal": "read"}
EVERYTHING: Listed = {":root": "read"}


def test_read_only_view_reads_everything_and_writes_nothing(real: Real) -> None:
    script = "cat w/a.txt out/s.txt\necho x > w/n\nmkdir w/n\nrm w/a.txt\nln w/a.txt w/b.txt"
    assert real.run({":root": "read"}, script) == ["w/a.txt", "out/s.txt", "!", "!", "!", "!"]
    assert not (real.root / "w" / "n").exists()


def test_workspace_is_writable_but_for_what_is_protected(real: Real) -> None:
    script = """
        echo x > w/n
        echo x > out/n
        cat w/.git/config
        echo x > w/.git/config
        mv w/.git w/g
        mkdir w/.codex
        echo x > w/.codex/config
        mkdir w/sub/.git
        stat -c %a w/.codex
    """
    said = real.run({":root": "read", real.path("w"): "write"}, script)
    assert said == ["!", "w/.git/config", "!", "!", "!", "!", "555"]
    assert (real.root / "w" / "n").read_text() == "x\n"
    assert (real.root / "w" / "sub" / ".git").is_dir()


def test_bare_view_has_what_is_listed_and_nothing_else(real: Real) -> None:
    script = f"""
        cat w/a.txt
        cat out/s.txt
        ls
        echo x > w/n
        echo x > n
        echo x > /n
        stat -c %a / {real.root}
        ls -d /proc/1 /bin
    """
    said = real.run({**BASICS, real.path("w"): "read"}, script)
    assert said == ["w/a.txt", "!", "w", "!", "!", "!", "755", "755", "/bin", "/proc/1"]


def test_denied_directory_is_shut_but_for_what_is_reopened(real: Real) -> None:
    listed: Listed = {
        ":root": "read",
        real.path("w"): "write",
        real.path("w/sub"): "deny",
        real.path("w/sub/deep"): "write",
        real.path("w/sub/b.txt"): "read",
        real.path("w/.env"): "deny",
    }
    script = """
        ls w/sub
        cat w/sub/b.txt
        echo x > w/sub/b.txt
        cat w/sub/deep/c.txt
        echo x > w/sub/deep/n
        echo x > w/sub/n
        mv w/sub w/away
        cat w/.env
        rm w/.env
    """
    said = real.run(listed, script)
    assert said == ["!", "w/sub/b.txt", "!", "w/sub/deep/c.txt", "!", "!", "!", "!"]
    assert (real.root / "w" / "sub" / "deep" / "n").exists()
    assert (real.root / "w" / ".env").read_text() == "w/.env\n"


def test_deeply_reopened_places_have_bare_directories_above_them(real: Real) -> None:
    real.make("w/sub/p/q/f", "w/sub/r/s/")
    listed: Listed = {
        ":root": "read",
        real.path("w/sub"): "deny",
        real.path("w/sub/p/q/f"): "read",
        real.path("w/sub/r/s"): "write",
    }
    script = """
        cat w/sub/p/q/f
        stat -c %a w/sub w/sub/p w/sub/p/q w/sub/r
        echo x > w/sub/r/s/n
        echo x > w/sub/r/n
    """
    assert real.run(listed, script) == ["w/sub/p/q/f", "111", "755", "755", "755", "!"]


def test_root_is_the_same_by_the_link_to_it(real: Real) -> None:
    (real.root / "link").symlink_to("w")
    for listed in (BASICS, EVERYTHING):
        said = real.run(
            {**listed, real.path("link"): "write"}, "cat link/a.txt w/a.txt\necho x > link/n\nrm w/n"
        )
        assert said == ["w/a.txt", "w/a.txt"]


def test_single_file_is_writable_alone(real: Real) -> None:
    for listed in (BASICS, EVERYTHING):
        script = "echo x >> w/a.txt\ntail -n 1 w/a.txt\necho x > w/n\nrm w/a.txt"
        assert real.run({**listed, real.path("w/a.txt"): "write"}, script) == ["x", "!", "!"]


def test_what_is_denied_cannot_be_moved_into_sight(real: Real) -> None:
    listed: Listed = {
        ":root": "read",
        real.path("w"): "write",
        real.path("w/sub/deep/c.txt"): "deny",
        real.path("w/new/secret"): "deny",
    }
    script = "mv w/sub w/away\nmv w/sub/deep w/sub/away\ncat w/sub/deep/c.txt\nmkdir w/new\nmkdir w/fine"
    assert real.run(listed, script) == ["!", "!", "!", "!"]
    assert (real.root / "w" / "fine").is_dir()


def test_pattern_shuts_files_and_directories(real: Real) -> None:
    real.make("w/sub/.env", "w/x.env/in")
    listed: Listed = {":root": "read", GlobRule(real.path("w/**/*.env")): "deny"}
    script = "cat w/.env\ncat w/sub/.env\ncat w/x.env/in\ncat w/sub/b.txt"
    assert real.run(listed, script) == ["!", "!", "!", "w/sub/b.txt"]
    assert real.run(listed, script, depth=1) == ["!", "w/sub/.env", "!", "w/sub/b.txt"]


def test_view_of_a_writable_root_has_a_dev_of_its_own(real: Real) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may make mount points in /")
    listed: Listed = {":root": "write", real.path("out"): "deny", "/usr": "read"}
    for name in PROTECTED:
        listed[f"/{name.decode()}"] = "write"  # so that none is made in the root of this host
    script = "echo x > w/n\nls out\ntest -c /dev/null\ntest -e /dev/sda\necho x > /usr/n\ntest -d /dev/shm"
    assert real.run(listed, script) == ["!", "!", "!"]


def test_view_at_a_prefix_is_the_same_view(real: Real) -> None:
    plan = make_plan(managed({**BASICS, real.path("w"): "read"}), HostFacts())
    view = [os.fsdecode(argument) for argument in arguments(plan, (), prefix=b"/view")]
    links = "--symlink usr/bin /bin --symlink usr/lib /lib --symlink usr/lib64 /lib64"
    frame = f"--ro-bind /usr /usr {links} --dir /view"
    script = f"cat /view{real.root}/w/a.txt; ls /view/bin/sh; ls /view{real.root}"
    done = subprocess.run(
        ["bwrap", *frame.split(), *view, "--", "/bin/sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["w/a.txt", "/view/bin/sh", "w"], "")


# Too much.


@pytest.mark.parametrize(
    ("rules", "roots", "error"),
    [
        ([GlobRule("/w/" + "{a,b}" * 9 + "*" + "x" * 100)], 0, "it stands for too much"),
        ([GlobRule("/w/" + "*a" * 20_000)], 0, "it stands for too much"),
        ([GlobRule(f"/w/*.{number}") for number in range(2001)], 0, "the patterns of a sandbox"),
        ([GlobRule("/w/" + "*a" * 9_000), GlobRule("/w/" + "*b" * 9_000)], 0, "the patterns of a sandbox"),
        ([SpecialRule("project_roots")] * 101, 100, "more than 10000 paths"),
    ],
)
def test_policy_that_stands_for_too_much_is_refused_at_once(
    rules: list[GlobRule | SpecialRule], roots: int, error: str
) -> None:
    entries = tuple(Entry(rule, "deny") for rule in rules)
    workspace = tuple(PathUri.from_native(f"/r{number}") for number in range(roots))
    sandbox = Sandbox(SandboxProfile("managed", "restricted", entries), workspace_roots=workspace)
    with pytest.raises(InvalidParams, match=error):
        make_plan(sandbox, FakeFacts({"/w": None}))


def test_plan_with_more_mounts_than_bubblewrap_takes_is_refused() -> None:
    tree: Tree = {"/w": None, **{f"/w/{number}": "" for number in range(3001)}}
    rules = [(PathRule(PathUri.from_native(path)), "deny" if path != "/w" else "write") for path in tree]
    entries = tuple(Entry(rule, access) for rule, access in rules)  # type: ignore[arg-type]
    with pytest.raises(InternalError, match="more than 3000 mounts"):
        make_plan(Sandbox(SandboxProfile("managed", "restricted", entries)), FakeFacts(tree))
