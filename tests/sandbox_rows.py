"""Requests with a sandbox, and what they are answered: sandbox.md §1.4, §2, §3 and §8.1, row by row.

Each row says what a codex's exec-server answers. `DIFFERENCES` is the one list of where ours differs on
purpose. In rows, `/srv` stands for a new tree (`sandboxed.Tree`), and `/server-tmp` for the TMPDIR of the
server.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from textwrap import dedent
from unittest.mock import ANY

from attrs import frozen

from tests.sandboxed import (
    SYSTEM_PATH,
    SYSTEM_PYTHON,
    Json,
    RawClient,
    Server,
    Tree,
    context,
    entry,
    glob,
    open_client,
    restricted,
    special,
)

OK: Json = {"result": {}}
NOT_FOUND: Json = {"error": {"code": -32004, "message": "No such file or directory (os error 2)"}}
READ_ONLY: Json = {"error": {"code": -32603, "message": "Read-only file system (os error 30)"}}
EXISTS: Json = {"error": {"code": -32603, "message": "File exists (os error 17)"}}
NO_PERMISSION: Json = {"error": {"code": -32600, "message": "Permission denied (os error 13)"}}
NOT_DIRECTORY: Json = {"error": {"code": -32603, "message": "Not a directory (os error 20)"}}


def content(text: str) -> Json:
    """An answer of `fs/readFile`."""
    return {"result": {"dataBase64": b64encode(text.encode()).decode()}}


def error(code: int, message: str) -> Json:
    return {"error": {"code": code, "message": message}}


@frozen
class Row:
    """A request, or a few one after another.

    Attributes:
        name: what DIFFERENCES and tests call it.
        calls: method and params of each; the sandbox is added.
        expected: the answer to the last call.
        files: what is in which files afterwards (`None`: there is no such file).
        before: files that are put into the tree first.
    """

    name: str
    sandbox: Json
    calls: Sequence[tuple[str, Mapping[str, Json]]]
    expected: Json
    files: Mapping[str, str | None] = {}
    before: Mapping[str, str] = {}

    async def answer(self, client: RawClient, tree: Tree) -> Json:
        """What comes of it: the last answer, and the files."""
        answer: Json = None
        for method, params in self.calls:
            answer = await client.ask(method, {**params, "sandbox": self.sandbox})
        return {**_plain(answer), **({"files": tree_files(tree, self.files)} if self.files else {})}

    @property
    def expectation(self) -> Json:
        return {**self.expected, **({"files": dict(self.files)} if self.files else {})}


def tree_files(tree: Tree, names: Mapping[str, str | None]) -> dict[str, str | None]:
    return {name: tree.text(name) for name in names}


def _plain(answer: Json) -> Json:
    """An answer without what has no place in a comparison: order of names, what only ours says besides."""
    if "error" in answer:
        return {"error": {key: answer["error"][key] for key in ("code", "message")}}
    result = answer["result"]
    if "entries" in result:
        result = {
            **result,
            "entries": sorted(result["entries"], key=lambda one: json.dumps(one, sort_keys=True)),
        }
    if "isSymlink" in result:
        result = {key: result[key] for key in metadata("file")["result"]}
    return {"result": result}


@frozen
class ProcessRow:
    """A process and how it ends.

    Attributes:
        expected: of `Ran`, what is to be looked at.
        feed: is written to it when it has printed something.
    """

    name: str
    sandbox: Json
    argv: Sequence[str]
    expected: Mapping[str, Json]
    files: Mapping[str, str | None] = {}
    feed: bytes | None = None
    more: Mapping[str, Json] = {}
    before: Mapping[str, str] = {}

    async def answer(self, client: RawClient, tree: Tree) -> Json:
        ran = await client.run(self.argv, self.sandbox, feed=self.feed, **{"cwd": "/srv/w", **self.more})
        found: dict[str, Json] = {
            "exit_code": ran.exit_code,
            "text": ran.text,
            "denied": ran.denied,
            "sandbox_type": ran.sandbox_type,
            "error": ran.error and {key: ran.error[key] for key in ("code", "message")},
        }
        for here, there in client.moved.items():
            found["text"] = str(found["text"]).replace(there, here)
        if "outcomes" in self.expected:
            found["outcomes"] = json.loads(found["text"]) if ran.exit_code == 0 else found["text"]
        kept = {key: value for key, value in found.items() if key in self.expected or key == "error"}
        return {**kept, **({"files": tree_files(tree, self.files)} if self.files else {})}

    @property
    def expectation(self) -> Json:
        return {"error": None, **self.expected, **({"files": dict(self.files)} if self.files else {})}


@frozen
class Matching:
    """Equal to each text in which the pattern is found."""

    pattern: str

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and re.search(self.pattern, other, re.DOTALL) is not None

    def __hash__(self) -> int:
        return hash(self.pattern)


# Policies.

RO = context(restricted(special("root")))
WS = context(restricted(special("root"), entry("/srv/w", "write")))
VS = context(restricted(special("root"), entry("/srv/v", "write")))
RR = context(restricted(entry("/srv/w", "read")))


def ro(*entries: Json, **more: Json) -> Json:
    return context(restricted(special("root"), *entries, **more))


def ws(*entries: Json, **more: Json) -> Json:
    return context(restricted(special("root"), entry("/srv/w", "write"), *entries, **more))


# Requests.


def uri(path: str) -> str:
    return f"file://{path}"


def read(path: str) -> tuple[str, Json]:
    return ("fs/readFile", {"path": uri(path)})


def write(path: str, text: str = "new\n") -> tuple[str, Json]:
    return ("fs/writeFile", {"path": uri(path), "dataBase64": b64encode(text.encode()).decode()})


def make(path: str, *, recursive: bool = False) -> tuple[str, Json]:
    return ("fs/createDirectory", {"path": uri(path), "recursive": recursive})


def remove(path: str, *, recursive: bool = False, force: bool = False) -> tuple[str, Json]:
    return ("fs/remove", {"path": uri(path), "recursive": recursive, "force": force})


def copy(source: str, target: str, *, recursive: bool = False) -> tuple[str, Json]:
    return (
        "fs/copy",
        {"sourcePath": uri(source), "destinationPath": uri(target), "recursive": recursive},
    )


def stat(path: str) -> tuple[str, Json]:
    return ("fs/getMetadata", {"path": uri(path)})


def names(path: str) -> tuple[str, Json]:
    return ("fs/readDirectory", {"path": uri(path)})


def canonical(path: str) -> tuple[str, Json]:
    return ("fs/canonicalize", {"path": uri(path)})


def opened(path: str, mode: str) -> tuple[str, Json]:
    return ("fs/open", {"handleId": "0" * 32, "path": uri(path), "mode": mode})


def walk(path: str) -> tuple[str, Json]:
    options = {
        "maxDepth": 6,
        "maxDirectories": 2000,
        "maxEntries": 20000,
        "followDirectorySymlinks": False,
        "pruneHiddenDirectories": False,
    }
    return ("fs/walk", {"path": uri(path), "options": options})


def metadata(kind: str, *, size: Json = ANY, link: bool = False) -> Json:
    return {
        "result": {
            "isDirectory": kind == "directory",
            "isFile": kind == "file",
            "isSymlink": link,
            "size": size,
            "createdAtMs": ANY,
            "modifiedAtMs": ANY,
        }
    }


def directory(**kinds: str) -> Json:
    """An answer of `fs/readDirectory`; `_` in a name is a dot there."""
    entries = [
        {"fileName": name.replace("_", "."), "isDirectory": kind == "directory", "isFile": kind == "file"}
        for name, kind in kinds.items()
    ]
    return {"result": {"entries": sorted(entries, key=lambda one: json.dumps(one, sort_keys=True))}}


# §1.4: what is not understood. Each as `fs/readFile` and as `process/start`.

_SPECIALS = (
    "`root`, `minimal`, `current_working_directory`, `project_roots`, `tmpdir`, `slash_tmp`, `unknown`"
)
_MANAGED = {"type": "managed", "network": "restricted"}
_ONE = restricted(special("root"))


def _missing(field: str) -> Json:
    return error(-32602, f"missing field `{field}`")


VALIDATION: Mapping[str, tuple[Json, Json]] = {
    "nothing in it": ({}, _missing("permissions")),
    "permissions without a type": (context({}), _missing("type")),
    "a type nobody knows": (
        context({"type": "xxx"}),
        error(-32602, "unknown variant `xxx`, expected one of `managed`, `disabled`, `external`"),
    ),
    "managed without files": (context(_MANAGED), _missing("file_system")),
    "managed with files in another casing": (
        context({**_MANAGED, "fileSystem": {"type": "unrestricted"}}),
        _missing("file_system"),
    ),
    "restricted without entries": (
        context({**_MANAGED, "file_system": {"type": "restricted"}}),
        _missing("entries"),
    ),
    "another network": (
        context({**_MANAGED, "network": "x", "file_system": {"type": "unrestricted"}}),
        error(-32602, "unknown variant `x`, expected `restricted` or `enabled`"),
    ),
    "external without a network": (context({"type": "external"}), _missing("network")),
    "no windowsSandboxLevel": ({"permissions": _ONE}, _missing("windowsSandboxLevel")),
    "another access": (
        context(restricted(entry("/srv/w", "zz"))),
        error(-32602, "unknown variant `zz`, expected one of `read`, `write`, `deny`, `none`"),
    ),
    "another special": (
        context(restricted(special("home"))),
        error(-32602, f"unknown variant `home`, expected one of {_SPECIALS}"),
    ),
    "no depth at all": (
        context(restricted(special("root"), glob_scan_max_depth=0)),
        error(-32602, "invalid value: integer `0`, expected a nonzero usize"),
    ),
    "a native path": (
        context(restricted({"path": {"type": "path", "path": "/srv/w"}, "access": "read"})),
        error(-32602, "invalid URI: relative URL without a base"),
    ),
    "an old policy": (
        {"sandboxPolicy": {"type": "readOnly"}, "windowsSandboxLevel": "disabled"},
        _missing("permissions"),
    ),
    "cwd with another scheme": (
        context(_ONE, cwd="http://x/y"),
        error(-32602, "unsupported path URI scheme `http`"),
    ),
}

NEEDS_CWD = error(-32602, "file system sandbox context with dynamic permissions requires cwd")

_validation = [
    row
    for name, (sandbox, expected) in VALIDATION.items()
    for row in (
        Row(f"1.4 file: {name}", sandbox, [read("/srv/w/a.txt")], expected),
        ProcessRow(f"1.4 process: {name}", sandbox, ["/bin/true"], expected),
    )
] + [
    Row(
        "1.4 file: cwd of another system",
        context(restricted(special("root"), glob("*.env")), cwd="file:///C:/x"),
        [read("/srv/w/a.txt")],
        error(-32600, "'file:///C:/x' is invalid on 'linux'"),
    ),
    ProcessRow(
        "1.4 process: cwd of another system",
        context(restricted(special("root"), glob("*.env")), cwd="file:///C:/x"),
        ["/bin/true"],
        error(
            -32602,
            "failed to prepare process sandbox: invalid sandbox policy cwd: "
            "'file:///C:/x' is invalid on 'linux'",
        ),
    ),
    Row(
        "1.4 file: relative pattern without cwd",
        ro(glob("*.env")),
        [read("/srv/w/a.txt")],
        NEEDS_CWD,
    ),
    Row(
        "1.4 file: project_roots of a policyContext without cwd",
        context(
            restricted(special("root"), special("project_roots", "write")),
            policyContext={"workspaceRoots": ["file:///srv/w"]},
        ),
        [write("/srv/w/n.txt")],
        NEEDS_CWD,
    ),
    ProcessRow(
        "1.4 process: cwd of the process is the one of a relative pattern",
        ro(glob("*.env")),
        ["/bin/cat", ".env"],
        {"exit_code": 1, "text": "/bin/cat: .env: Permission denied\n", "denied": True},
    ),
]

# §2: what a policy means.

_project = restricted(special("root"), special("project_roots", "write"))

_meaning = [
    Row(
        "2.1 no roots, nothing granted",
        context(_project, cwd="file:///srv/w"),
        [write("/srv/w/n")],
        READ_ONLY,
    ),
    Row(
        "2.1 project_roots are the workspace roots",
        context(_project, cwd="file:///srv/out", workspaceRoots=["file:///srv/w", "file:///srv/v"]),
        [write("/srv/w/n"), write("/srv/v/n")],
        OK,
        {"w/n": "new\n", "v/n": "new\n"},
    ),
    Row(
        "2.1 the older name of project_roots",
        context(
            restricted(special("root"), special("current_working_directory", "write")),
            cwd="file:///srv/out",
            workspaceRoots=["file:///srv/w"],
        ),
        [write("/srv/w/n")],
        OK,
        {"w/n": "new\n"},
    ),
    Row(
        "2.1 a subpath of project_roots",
        context(
            restricted(special("root"), special("project_roots", "write", subpath="sub")),
            cwd="file:///srv/w",
            workspaceRoots=["file:///srv/w"],
        ),
        [write("/srv/w/sub/n"), write("/srv/w/n")],
        READ_ONLY,
        {"w/sub/n": "new\n", "w/n": None},
    ),
    Row(
        "1 a policyContext replaces the flat fields",
        context(
            _project,
            cwd="file:///srv/w",
            workspaceRoots=["file:///srv/w"],
            policyContext={"cwd": "file:///srv/w"},
        ),
        [write("/srv/w/n")],
        READ_ONLY,
    ),
    Row(
        "2.1 tmpdir is that of the server",
        ro(special("tmpdir", "write"), network="enabled"),
        [write("/server-tmp/row"), remove("/server-tmp/row")],
        OK,
    ),
    Row(
        "1 temporaryDirectories are not tmpdir",
        context(
            restricted(special("root"), special("tmpdir", "write")), temporaryDirectories=["file:///srv/w"]
        ),
        [write("/srv/w/n")],
        READ_ONLY,
    ),
    Row(
        "2.1 what is unknown grants nothing and is no error",
        ro(special("unknown", "write", path=":home")),
        [write("/srv/w/n")],
        READ_ONLY,
    ),
    Row(
        "1 members nobody knows are ignored",
        {**ro({**entry("/srv/w", "write"), "x": 1}), "x": 1},
        [write("/srv/w/n")],
        OK,
    ),
    Row(
        "2.1 a root by a link, a request by the place",
        ro(entry("/srv/link-to-w", "write")),
        [write("/srv/w/n")],
        OK,
        {"w/n": "new\n"},
    ),
    Row(
        "2.1 a root by a link, a request by the link",
        ro(entry("/srv/link-to-w", "write")),
        [write("/srv/link-to-w/n")],
        OK,
        {"w/n": "new\n"},
    ),
    Row(
        "2.1 a root that does not exist is skipped",
        ws(entry("/srv/missing", "write")),
        [write("/srv/w/n")],
        OK,
    ),
    Row(
        "2.2 read below write",
        ws(entry("/srv/w/sub", "read")),
        [write("/srv/w/sub/n")],
        READ_ONLY,
        {"w/sub/n": None},
    ),
    Row(
        "2.2 write below read below write",
        ws(entry("/srv/w/sub", "read"), entry("/srv/w/sub/deep", "write")),
        [write("/srv/w/sub/deep/n")],
        OK,
        {"w/sub/deep/n": "new\n"},
    ),
    Row(
        "2.2 write below deny",
        ws(entry("/srv/w/sub", "deny"), entry("/srv/w/sub/deep", "write")),
        [write("/srv/w/sub/deep/n")],
        OK,
        {"w/sub/deep/n": "new\n"},
    ),
    Row(
        "2.2 beside the write below deny",
        ws(entry("/srv/w/sub", "deny"), entry("/srv/w/sub/deep", "write")),
        [read("/srv/w/sub/b.txt")],
        NOT_FOUND,
    ),
    Row("2.2 write and read of one path", ws(entry("/srv/w", "read")), [write("/srv/w/n")], OK),
    Row(
        "2.2 deny and write of one path",
        ws(entry("/srv/w", "deny")),
        [read("/srv/w/a.txt")],
        NO_PERMISSION,
    ),
    Row(
        "2.2 a glob that grants is ignored", ro(glob("/srv/w/*", "write")), [write("/srv/w/a.txt")], READ_ONLY
    ),
    Row(
        "2.3 a client with no grant and a file of the minimal view",
        context(restricted()),
        [read("/etc/hostname")],
        {"result": {"dataBase64": ANY}},
    ),
    Row("2.4 protected only at the top", ws(), [make("/srv/w/sub/.git")], OK),
    Row(
        "2.4 an entry of its own",
        ws(entry("/srv/w/.git", "write")),
        [write("/srv/w/.git/config")],
        OK,
        {"w/.git/config": "new\n"},
    ),
    Row("2.4 .aws is protected", VS, [make("/srv/v/.aws")], EXISTS),
    Row("2.4 .codex is protected", VS, [write("/srv/v/.codex/config.toml")], READ_ONLY),
    Row("2.4 .agents is protected", VS, [make("/srv/v/.agents")], EXISTS),
    Row(
        "2.4 metadata of a protected name that is missing",
        context(restricted(entry("/srv/v", "write"))),
        [stat("/srv/v/.git")],
        metadata("directory"),
    ),
    Row(
        "2.4 metadata of a protected name that is missing, where everything may be read",
        VS,
        [stat("/srv/v/.git")],
        NOT_FOUND,
    ),
    Row(
        "2.4 a recursive createDirectory of a protected name that is missing",
        VS,
        [make("/srv/v/.git", recursive=True)],
        OK,
    ),
    Row(
        "2.4 a protected name that is a link",
        ws(),
        [write("/srv/w/n")],
        error(
            -32603,
            Matching(  # type: ignore[arg-type]
                "cannot enforce sandbox read-only path /srv/w/.codex because it crosses writable symlink "
                "/srv/w/.codex"
            ),
        ),
        before={"w/.codex": "-> sub"},
    ),
    Row(
        "2.5 a denied path that is a link",
        ws(entry("/srv/w/secrets/key", "deny")),
        [write("/srv/w/n")],
        error(
            -32603,
            Matching(  # type: ignore[arg-type]
                "cannot enforce sandbox deny-read path /srv/w/secrets/key because it crosses "
                "writable symlink /srv/w/secrets"
            ),
        ),
        before={"w/secrets": "-> sub"},
    ),
    Row(
        "2.5 a denied path that is missing",
        ws(entry("/srv/w/missing", "deny")),
        [write("/srv/w/missing")],
        READ_ONLY,
        {"w/missing": None},
    ),
    Row(
        "2.5 below a denied path that is missing",
        ws(entry("/srv/w/missing", "deny")),
        [write("/srv/w/missing/n")],
        NOT_DIRECTORY,
        {"w/missing": None},
    ),
    Row(
        "2.5 a recursive createDirectory below a denied path that is missing",
        ws(entry("/srv/w/missing", "deny")),
        [make("/srv/w/missing/n", recursive=True)],
        NOT_DIRECTORY,
        {"w/missing": None},
    ),
    Row(
        "2.5 a glob as deep as it says",
        ro(glob("/srv/w/**/*.env"), glob_scan_max_depth=1),
        [read("/srv/w/.env")],
        NO_PERMISSION,
    ),
    Row(
        "2.5 a glob not deeper than it says",
        ro(glob("/srv/w/**/*.env"), glob_scan_max_depth=1),
        [read("/srv/w/sub/.env")],
        content("sub key\n"),
    ),
    Row(
        "2.5 a relative glob",
        context(restricted(special("root"), glob("*.env")), cwd="file:///srv/w"),
        [read("/srv/w/.env")],
        NO_PERMISSION,
    ),
    Row(
        "2.5 a glob and what lies in a directory of that name",
        ro(glob("/srv/w/su*")),
        [read("/srv/w/sub/b.txt")],
        content("b\n"),
    ),
    Row("9 a pattern that is none", ro(glob("/srv/w/[")), [read("/srv/w/a.txt")], content("hi!\n")),
    Row(
        "9 write on a single file",
        ro(entry("/srv/w/a.txt", "write")),
        [write("/srv/w/a.txt")],
        error(-32603, Matching("Can't mkdir parents for /srv/w/a.txt/")),  # type: ignore[arg-type]
    ),
]

# §3: worked examples.

_ENV_MASK = ro(glob("/srv/w/**/*.env"))
_FREE = {
    "disabled": context({"type": "disabled"}),
    "external": context({"type": "external", "network": "restricted"}),
    "unrestricted": context({**_MANAGED, "file_system": {"type": "unrestricted"}}),
    "root is writable": context(restricted(special("root", "write"))),
}

_examples = [
    Row("3 RR read in the root", RR, [read("/srv/w/a.txt")], content("hi!\n")),
    Row("3 RR read outside", RR, [read("/srv/out/s.txt")], NOT_FOUND),
    Row("3 RR read by a link that leads outside", RR, [read("/srv/w/link")], NOT_FOUND),
    Row("3 RR read by a linked directory and ..", RR, [read("/srv/w/dlink/../out/s.txt")], NOT_FOUND),
    Row("3 RR read of a hard link", RR, [read("/srv/w/hard")], content("secret\n")),
    Row("3 RR metadata of a file", RR, [stat("/srv/w/a.txt")], metadata("file", size=4)),
    Row("3 RR metadata of a link that leads outside", RR, [stat("/srv/w/link")], NOT_FOUND),
    Row("3 RR canonicalize of a link that leads outside", RR, [canonical("/srv/w/link")], NOT_FOUND),
    Row(
        "3 RR canonicalize of a link inside",
        RR,
        [canonical("/srv/w/inlink")],
        {"result": {"path": "file:///srv/w/a.txt"}},
    ),
    Row(
        "3 RR names of the root",
        RR,
        [names("/srv/w")],
        directory(
            _git="directory",
            sub="directory",
            a_txt="file",
            _env="file",
            fifo="other",
            hard="file",
            inlink="file",
            run_sh="file",
        ),
    ),
    Row("3 RR names of the directory above", RR, [names("/srv")], directory(w="directory")),
    Row(
        "3 RR walk of a directory",
        RR,
        [walk("/srv/w/sub")],
        {
            "result": {
                "entries": [
                    {"path": "file:///srv/w/sub/deep", "kind": "directory"},
                    {"path": "file:///srv/w/sub/.env", "kind": "file"},
                    {"path": "file:///srv/w/sub/b.txt", "kind": "file"},
                    {"path": "file:///srv/w/sub/deep/c.txt", "kind": "file"},
                ],
                "errors": [],
                "truncated": False,
            }
        },
    ),
    Row("3 RR write of a new file", RR, [write("/srv/w/n.txt")], READ_ONLY, {"w/n.txt": None}),
    Row("3 RR write of a file", RR, [write("/srv/w/a.txt")], READ_ONLY, {"w/a.txt": "hi!\n"}),
    Row("3 RR copy inside", RR, [copy("/srv/w/a.txt", "/srv/w/c.txt")], READ_ONLY, {"w/c.txt": None}),
    Row("3 RR write outside", RR, [write("/srv/out/x")], NOT_FOUND, {"out/x": None}),
    Row("3 RO read", RO, [read("/srv/out/s.txt")], content("secret\n")),
    Row("3 RO write", RO, [write("/srv/w/n.txt")], READ_ONLY, {"w/n.txt": None}),
    Row("3 RO createDirectory", RO, [make("/srv/w/n")], READ_ONLY),
    Row("3 RO remove", RO, [remove("/srv/w/a.txt")], READ_ONLY, {"w/a.txt": "hi!\n"}),
    Row("3 RO open to replace", RO, [opened("/srv/w/a.txt", "replace")], READ_ONLY, {"w/a.txt": "hi!\n"}),
    Row("3 WS write", WS, [write("/srv/w/n.txt")], OK, {"w/n.txt": "new\n"}),
    Row("3 WS write outside", WS, [write("/srv/out/n")], READ_ONLY, {"out/n": None}),
    Row(
        "3 WS write by a link that leads outside",
        WS,
        [write("/srv/w/link")],
        READ_ONLY,
        {"out/s.txt": "secret\n"},
    ),
    Row("3 WS write by a linked directory", WS, [write("/srv/w/dlink/new")], READ_ONLY, {"out/new": None}),
    Row(
        "3 WS write by a link inside",
        WS,
        [write("/srv/w/inlink"), canonical("/srv/w/inlink")],
        {"result": {"path": "file:///srv/w/a.txt"}},
        {"w/a.txt": "new\n"},
    ),
    Row(
        "3 WS write of a hard link", WS, [write("/srv/w/hard")], OK, {"w/hard": "new\n", "out/s.txt": "new\n"}
    ),
    Row("3 WS copy from outside", WS, [copy("/srv/out/s.txt", "/srv/w/c.txt")], OK, {"w/c.txt": "secret\n"}),
    Row("3 WS copy to outside", WS, [copy("/srv/w/a.txt", "/srv/out/c.txt")], READ_ONLY, {"out/c.txt": None}),
    Row(
        "3 WS remove of a link",
        WS,
        [remove("/srv/w/dlink")],
        OK,
        {"out/s.txt": "secret\n", "w/dlink/s.txt": None},
    ),
    Row("3 WS remove outside", WS, [remove("/srv/out/s.txt")], READ_ONLY, {"out/s.txt": "secret\n"}),
    Row(
        "3 WS write of .git/config",
        WS,
        [write("/srv/w/.git/config")],
        READ_ONLY,
        {"w/.git/config": "config\n"},
    ),
    Row(
        "3 WS write of .git/config, missing",
        VS,
        [write("/srv/v/.git/config")],
        READ_ONLY,
        {"v/.git/config": None},
    ),
    Row("3 WS createDirectory of .git", WS, [make("/srv/w/.git")], EXISTS),
    Row("3 WS createDirectory of .git, missing", VS, [make("/srv/v/.git")], EXISTS),
    Row(
        "3 WS remove of .git",
        WS,
        [remove("/srv/w/.git", recursive=True)],
        READ_ONLY,
        {"w/.git/config": "config\n"},
    ),
    Row("3 WS read of .git/config", WS, [read("/srv/w/.git/config")], content("config\n")),
    Row(
        "3 deny of a directory: read",
        ro(entry("/srv/w/sub", "deny")),
        [read("/srv/w/sub/b.txt")],
        NO_PERMISSION,
    ),
    Row(
        "3 deny of a directory: names", ro(entry("/srv/w/sub", "deny")), [names("/srv/w/sub")], NO_PERMISSION
    ),
    Row(
        "3 none of a file: metadata",
        ro(entry("/srv/w/sub/b.txt", "none")),
        [stat("/srv/w/sub/b.txt")],
        metadata("file", size=0),
    ),
    Row(
        "3 none of a file: read",
        ro(entry("/srv/w/sub/b.txt", "none")),
        [read("/srv/w/sub/b.txt")],
        NO_PERMISSION,
    ),
    Row("3 deny by a glob", _ENV_MASK, [read("/srv/w/sub/.env")], NO_PERMISSION),
    Row("3 deny by a glob, beside it", _ENV_MASK, [read("/srv/w/sub/b.txt")], content("b\n")),
    Row(
        "3 RR read of a directory", RR, [read("/srv/w/sub")], error(-32600, "path `/srv/w/sub` is not a file")
    ),
    Row("3 RR read of a FIFO", RR, [read("/srv/w/fifo")], error(-32600, "path `/srv/w/fifo` is not a file")),
    Row("3 RO read of a device", RO, [read("/dev/null")], error(-32600, "path `/dev/null` is not a file")),
] + [
    Row(f"3 {name}: write anywhere", sandbox, [write("/srv/out/n")], OK, {"out/n": "new\n"})
    for name, sandbox in _FREE.items()
]

# Processes: §2 and §8.

_PROBE = dedent("""\
    import errno, json, os, socket, sys
    def attempt(words):
        what, rest = words[0], words[1:]
        try:
            if what == "read": return open(rest[0]).read()
            if what == "write": open(rest[0], "w").write("new\\n")
            if what == "append": open(rest[0], "a").write("new\\n")
            if what == "names": return sorted(os.listdir(rest[0]))
            if what == "mkdir": os.mkdir(rest[0])
            if what == "rmdir": os.rmdir(rest[0])
            if what == "mode": return oct(os.lstat(rest[0]).st_mode & 0o7777)
            if what == "size": return os.lstat(rest[0]).st_size
            if what == "socket": socket.socket(getattr(socket, rest[0]), getattr(socket, rest[1])).close()
            if what == "pair":
                for one in socket.socketpair(socket.AF_UNIX, getattr(socket, rest[0])):
                    one.close()
            if what == "env": return dict(os.environ)
            if what == "cwd": return os.getcwd()
            if what == "uid": return os.getuid()
            if what == "status":
                lines = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
                return lines[rest[0]].strip()
        except OSError as error:
            return errno.errorcode[error.errno]
        return "ok"
    print(json.dumps([attempt(words) for words in json.loads(sys.argv[1])]))
""")


def probe(*attempts: str) -> list[str]:
    """A command line that tries these, each some words, and prints what came of them as JSON."""
    words = json.dumps([one.split() for one in attempts])
    return [SYSTEM_PYTHON or "python3", "-I", "-S", "-c", _PROBE, words]


def outcomes(*values: Json) -> dict[str, Json]:
    """What a `probe` comes to."""
    return {"outcomes": list(values)}


MINIMAL = context(restricted(special("minimal"), entry("/srv/w", "read")))
_UNIX = "AF_UNIX SOCK_STREAM"

_processes = [
    ProcessRow(
        "8 RO",
        RO,
        probe("read /srv/out/s.txt", "write /srv/w/n", "mkdir /srv/w/n", "write /tmp/n"),
        outcomes("secret\n", "EROFS", "EROFS", "EROFS") | {"sandbox_type": "linuxSeccomp"},
        {"w/n": None},
    ),
    ProcessRow(
        "8 WS",
        WS,
        probe(
            "write /srv/w/n",
            "write /srv/out/n",
            "append /srv/w/link",
            "write /srv/w/dlink/n",
            "write /srv/w/sub/n",
        ),
        outcomes("ok", "EROFS", "EROFS", "EROFS", "ok"),
        {"w/n": "new\n", "out/n": None, "out/s.txt": "secret\n"},
    ),
    ProcessRow(
        "8 RR with minimal",
        MINIMAL,
        probe("read /srv/w/a.txt", "read /srv/out/s.txt", "names /srv", "write /srv/w/n", "read /srv/w/link"),
        outcomes("hi!\n", "ENOENT", ["w"], "EROFS", "ENOENT"),
    ),
    ProcessRow(
        "2.3 without minimal there is no shell",
        RR,
        ["/bin/sh", "-c", "echo hello"],
        {"exit_code": 101, "text": Matching("No such file or directory")},
    ),
    ProcessRow(
        "8 a program that is missing",
        RO,
        ["/srv/w/missing"],
        {"exit_code": 101, "text": Matching("No such file or directory")},
    ),
    ProcessRow(
        "2.4 protected names that are there",
        WS,
        probe(
            "write /srv/w/.git/config", "mkdir /srv/w/.git", "rmdir /srv/w/.git", "read /srv/w/.git/config"
        ),
        outcomes("EROFS", "EEXIST", "EBUSY", "config\n"),
        {"w/.git/config": "config\n"},
    ),
    ProcessRow(
        "2.4 protected names that are missing",
        VS,
        probe(
            *(
                f"{do} /srv/v/{name}"
                for name in (".git", ".agents", ".codex", ".aws")
                for do in ("mkdir", "mode")
            ),
            "write /srv/v/.git/config",
            "mkdir /srv/v/sub",
            "mkdir /srv/v/sub/.git",
        ),
        outcomes(*["EEXIST", "0o555"] * 4, "EROFS", "ok", "ok"),
        {"v/.git/config": None},
    ),
    ProcessRow(
        "2.5 denied directory, file, and missing path",
        ws(entry("/srv/w/sub", "deny"), entry("/srv/w/a.txt", "deny"), entry("/srv/w/missing", "deny")),
        probe(
            "names /srv/w/sub",
            "read /srv/w/sub/b.txt",
            "mode /srv/w/sub",
            "read /srv/w/a.txt",
            "mode /srv/w/a.txt",
            "size /srv/w/a.txt",
            "mkdir /srv/w/missing/n",
        ),
        outcomes("EACCES", "EACCES", "0o0", "EACCES", "0o0", 0, "ENOTDIR"),
        {"w/missing": None},
    ),
    ProcessRow(
        "2.2 write below deny, in a process",
        ws(entry("/srv/w/sub", "deny"), entry("/srv/w/sub/deep", "write")),
        probe("names /srv/w/sub", "read /srv/w/sub/b.txt", "write /srv/w/sub/deep/n"),
        outcomes("EACCES", "ENOENT", "ok"),
        {"w/sub/deep/n": "new\n"},
    ),
    ProcessRow(
        "2.5 deny by a glob, in a process",
        _ENV_MASK,
        probe("read /srv/w/.env", "read /srv/w/sub/.env", "read /srv/w/sub/b.txt"),
        outcomes("EACCES", "EACCES", "b\n"),
    ),
    ProcessRow(
        "9 write on a single file, in a process",
        ro(entry("/srv/w/a.txt", "write")),
        probe("write /srv/w/a.txt", "write /srv/w/n"),
        {"exit_code": 101, "text": Matching("Can't mkdir parents for /srv/w/a.txt/")},
    ),
    ProcessRow(
        "7 without network",
        RO,
        probe(
            "socket AF_INET SOCK_STREAM",
            "socket AF_INET6 SOCK_DGRAM",
            "socket AF_NETLINK SOCK_RAW",
            f"socket {_UNIX}",
            "pair SOCK_STREAM",
        ),
        outcomes("EPERM", "EPERM", "EPERM", "ok", "ok"),
    ),
    ProcessRow("7 a pair of datagram sockets without network", RO, probe("pair SOCK_DGRAM"), outcomes("ok")),
    ProcessRow(
        "7 with network",
        ro(network="enabled"),
        probe("socket AF_INET SOCK_STREAM", "status NoNewPrivs", "status Seccomp", "status CapEff"),
        outcomes("ok", "1", "2", "0" * 16),
    ),
    ProcessRow(
        "7 privileges",
        WS,
        probe("status NoNewPrivs", "status Seccomp", "status CapEff", "status CapBnd"),
        outcomes("1", "2", "0" * 16, "0" * 16),
    ),
    ProcessRow(
        "7 files free, network not",
        _FREE["unrestricted"],
        probe("write /srv/out/n", "socket AF_INET SOCK_STREAM", "status NoNewPrivs"),
        outcomes("ok", "EPERM", "1"),
        {"out/n": "new\n"},
    ),
    ProcessRow(
        "7 external, network restricted",
        _FREE["external"],
        probe("write /srv/out/n", "socket AF_INET SOCK_STREAM"),
        outcomes("ok", "EPERM"),
        {"out/n": "new\n"},
    ),
    ProcessRow(
        "7 external, network enabled",
        context({"type": "external", "network": "enabled"}),
        probe("write /srv/out/n", "socket AF_INET SOCK_STREAM", "status NoNewPrivs"),
        outcomes("ok", "ok", "0") | {"sandbox_type": "linuxSeccomp"},
    ),
    ProcessRow(
        "8 disabled",
        _FREE["disabled"],
        probe("write /srv/out/n", "status NoNewPrivs"),
        outcomes("ok", "0") | {"sandbox_type": "linuxSeccomp"},
    ),
    ProcessRow(
        "8 no sandbox",
        None,
        probe("write /srv/out/n"),
        outcomes("ok") | {"sandbox_type": "none"},
    ),
    ProcessRow(
        "8 environment and cwd",
        WS,
        probe("env", "cwd"),
        outcomes({"PATH": SYSTEM_PATH, "ONE": "1", "LC_ALL": "C", "PWD": "/srv/w/sub"}, "/srv/w/sub"),
        more={"cwd": "/srv/w/sub", "env": {"ONE": "1", "LC_ALL": "C"}},
    ),
    ProcessRow(
        "8 terminal",
        WS,
        ["/bin/sh", "-c", "tty; echo hello > n; exit 3"],
        {"exit_code": 3, "text": Matching("^/dev/"), "denied": False},
        {"w/n": "hello\n"},
        more={"tty": True},
    ),
    ProcessRow(
        "8 Ctrl-C on a terminal",
        WS,
        ["/bin/sh", "-c", "echo ready; exec sleep 1000"],
        {"exit_code": 1},
        feed=b"\x03",
        more={"tty": True},
    ),
    ProcessRow(
        "8 enforceManagedNetwork without a proxy",
        RO,
        ["/bin/true"],
        {"exit_code": 101, "denied": ANY},
        more={"enforceManagedNetwork": True},
    ),
    ProcessRow(
        "8 useLegacyLandlock",
        context(restricted(special("root")), useLegacyLandlock=True),
        ["/bin/true"],
        {
            "exit_code": 101,
            "text": Matching("filesystem-restricted execution requires bubblewrap to isolate"),
        },
    ),
]

# §8.1: whether a failure was the sandbox's.


def _says(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def _classified(name: str, script: str, denied: bool, sandbox: Json = RO, **more: Json) -> ProcessRow:
    expected = {"denied": denied, "exit_code": more.pop("exit_code", ANY)}
    return ProcessRow(f"8.1 {name}", sandbox, _says(script), expected, **more)


_WORDS = (
    "operation not permitted",
    "permission denied",
    "read-only file system",
    "seccomp",
    "sandbox",
    "landlock",
    "failed to write file",
)

_denied = [
    _classified("exit code 0", "echo permission denied", False, exit_code=0),
    *(_classified(f"word: {words}", f"echo 'x {words} y'; exit 3", True, exit_code=3) for words in _WORDS),
    *(
        _classified(f"not a word: {words}", f"echo '{words}'; exit 3", False)
        for words in ("access denied", "EACCES", "network is unreachable", "no such file or directory")
    ),
    *(
        _classified(f"exit code {code}", f"echo Permission Denied >&2; exit {code}", True, exit_code=code)
        for code in (1, 126, 127, 137, 158)
    ),
    _classified("exit code 159 in silence", "exit 159", True, exit_code=159),
    _classified("exit code 158 in silence", "exit 158", False, exit_code=158),
    _classified("in another case", "echo 'READ-Only fiLe SYSTEM'; exit 1", True),
    _classified(
        "words split over chunks",
        "printf 'permission '; read line; printf denied; exit 1",
        True,
        feed=b"\n",
    ),
    _classified(
        "words split over stdout and stderr",
        "printf 'permission '; read line; printf denied >&2; exit 1",
        True,
        feed=b"\n",
    ),
    _classified("on a terminal", "echo permission denied; exit 1", True, more={"tty": True}),
    _classified("100 kB ago", "echo permission denied; head -c 100000 /dev/zero | tr '\\0' x; exit 1", True),
    _classified("2 MB ago", "echo permission denied; head -c 2000000 /dev/zero | tr '\\0' x; exit 1", False),
    _classified("no sandbox", "echo permission denied; exit 1", False, None),
    _classified("disabled", "echo permission denied; exit 1", True, _FREE["disabled"]),
    _classified(
        "external with network",
        "echo permission denied; exit 1",
        True,
        context({"type": "external", "network": "enabled"}),
    ),
    _classified("external without network", "echo permission denied; exit 1", True, _FREE["external"]),
    _classified("a write that was refused", "echo x > /srv/w/n", True, RO),
    _classified("what is not in a minimal view", "cat /srv/out/s.txt", False, MINIMAL),
]

ROWS: tuple[Row | ProcessRow, ...] = (*_validation, *_meaning, *_examples, *_processes, *_denied)


@frozen
class Difference:
    """What ours answers instead, and why."""

    expected: Json
    reason: str


def _answer(answer: Json, reason: str) -> Difference:
    """Another answer to a call."""
    return Difference({"result": None, "error": None, **answer}, reason)


BY_NAME = "a helper for files masks nothing that is missing, so that nothing is left in the workspace"
NOTHING_ENFORCED = "nothing was enforced, so nothing was denied"
AT_ONCE = "what cannot be enforced is an error of the start"

DIFFERENCES: Mapping[str, Difference] = {
    "1.4 process: cwd of another system": Difference(
        error(-32600, "'file:///C:/x' is invalid on 'linux'"), "as a call about files says it"
    ),
    "2.3 a client with no grant and a file of the minimal view": _answer(
        NOT_FOUND, "the helper's own files are not in the view of a call"
    ),
    "2.4 metadata of a protected name that is missing": _answer(NOT_FOUND, BY_NAME),
    "2.4 a recursive createDirectory of a protected name that is missing": _answer(READ_ONLY, BY_NAME),
    "2.5 a denied path that is missing": _answer(NO_PERMISSION, BY_NAME),
    "2.5 below a denied path that is missing": _answer(NO_PERMISSION, BY_NAME),
    "2.5 a recursive createDirectory below a denied path that is missing": _answer(NO_PERMISSION, BY_NAME),
    "2.5 a glob and what lies in a directory of that name": _answer(
        NO_PERMISSION, "a pattern denies directories too"
    ),
    "9 a pattern that is none": _answer(error(-32602, ANY), "a rule that cannot be enforced is refused"),
    "9 write on a single file": _answer(OK, "a file has no protected names below it"),
    "9 write on a single file, in a process": Difference(
        {"exit_code": 0, "text": '["ok", "EROFS"]\n'}, "a file has no protected names below it"
    ),
    "2.3 without minimal there is no shell": Difference(
        {"exit_code": 127}, "127 is what a shell says of a program that is missing"
    ),
    "8 a program that is missing": Difference(
        {"exit_code": 127}, "127 is what a shell says of a program that is missing"
    ),
    "7 a pair of datagram sockets without network": Difference(
        outcomes("EPERM"), "one could be connected to a socket of the host by sendmsg"
    ),
    "8 Ctrl-C on a terminal": Difference({"exit_code": 130}, "as without a sandbox"),
    "8 enforceManagedNetwork without a proxy": Difference(
        {"exit_code": None, "denied": None, "error": error(-32603, ANY)["error"]}, AT_ONCE
    ),
    "8 useLegacyLandlock": Difference(
        {"exit_code": None, "text": "", "error": error(-32603, ANY)["error"]}, AT_ONCE
    ),
    "8.1 disabled": Difference({"denied": False}, NOTHING_ENFORCED),
    "8.1 external with network": Difference({"denied": False}, NOTHING_ENFORCED),
}


def expectation(row: Row | ProcessRow, *, ours: bool) -> Json:
    """What a server should say to it."""
    if ours and (difference := DIFFERENCES.get(row.name)):
        changed = {**row.expectation, **difference.expected}
        return {
            key: value for key, value in changed.items() if isinstance(row, ProcessRow) or value is not None
        }
    return row.expectation


async def ask(row: Row | ProcessRow, server: Server) -> Json:
    """What a server answers."""
    tree = Tree.make(server)
    tree.put(row.before)
    moved = {"/srv": str(tree.top), "/server-tmp": server.environ["TMPDIR"]}
    async with open_client(server.url, moved) as client:
        return await row.answer(client, tree)
