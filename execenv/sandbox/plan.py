"""From a policy to mounts: a pure decision over what is known of the file system (sandbox.md §2, §5, §11.1).

The plan is what is enforced, what goldens test, and what a warm helper is kept under: two requests with
equal plans see the same. It names the inode of whatever it binds, so a directory that was replaced makes
another plan.

Whatever is below a writable root may be changed by the sandboxed while, and before, a plan is made. So:

- No entry may lead through a symlink there, whatever its access: it could lead elsewhere the next time.
- A directory between a writable root and an entry below it is bound onto itself. A mount point cannot be
  renamed from inside, so the entry is found where it was. Inside, a rename or a hard link from or to such a
  directory fails with EXDEV, as between any two mounts. What a pattern matches is not held in place so, it
  would take too many mounts: who may rename a directory can take it out of a pattern that names it.
- What is missing there and must stay so is covered at its first missing name.

`/dev` and `/proc` of a view are its own. Entries there grant nothing, but for `/dev/shm`; what denies some
of what a view always has of them is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

from attrs import define, field, frozen

from execenv.errors import InternalError, InvalidParams
from execenv.paths import PathUri
from execenv.sandbox.patterns import Pattern, compile_pattern
from execenv.sandbox.policy import Access, GlobRule, PathRule, Sandbox, SpecialRule, check_subpath

FactKind = Literal["file", "directory", "symlink", "other"]
Execution = Literal["direct", "direct reads", "sandboxed"]

PROTECTED = (b".git", b".agents", b".codex", b".aws")
"""Names directly below a writable root that stay as they are."""
MINIMAL = (
    b"/bin",
    b"/etc",
    b"/lib",
    b"/lib64",
    b"/sbin",
    b"/usr",
    b"/nix/store",
    b"/run/current-system/sw",
)
"""What `minimal` stands for, as far as it exists."""
MAX_NAMES = 200_000
"""How many names are looked at for all patterns of a policy."""
MAX_PLACES = 10_000
"""How many paths the entries of a policy may stand for."""
MAX_PATTERNS = 2_000
"""How many patterns without braces they may stand for."""
MAX_PATTERN_TEXT = 100_000
"""And how long all of these may be, as regular expressions."""
MAX_MOUNTS = 3_000
"""More than bubblewrap takes at once."""
MAX_LINKS = 40


@frozen
class Fact:
    """What is at a path, not following a link there.

    Attributes:
        target: of a symlink, as it is written.
        sealed: a directory in which the user whose programs are sandboxed can make nothing, and which is not
            theirs, so that they cannot change that. There is nothing to cover in it then, and bubblewrap
            could not.
    """

    kind: FactKind
    device: int
    inode: int
    target: bytes | None = None
    sealed: bool = False


class Facts(Protocol):
    """What the planner asks of the file system."""

    def look(self, path: bytes) -> Fact | None:
        """What is at an absolute path; `None` if nothing, or it cannot be reached."""

    def names(self, directory: bytes) -> Iterable[tuple[bytes, FactKind]]:
        """What is in a directory; nothing if it cannot be read."""


@frozen
class Bind:
    """`path` of the host at the same place in the view, with everything mounted below it.

    `device` and `inode` are the host's: who enforces the plan checks that it is this one that was bound.
    """

    path: bytes
    writable: bool
    device: int
    inode: int


@frozen
class Mask:
    """Something in place of `path`, so that what is there is not seen.

    Attributes:
        kind: `"empty directory"`: mode 0555, for a protected name that is missing. `"denied directory"`:
            mode 0000, or 0111 with something reopened, which is bound behind it. `"denied file"`: mode 0000.
        missing: nothing is there on the host: bubblewrap would make a mount point, and a helper for files
            refuses by name instead.
        reopened: directories below it, at any depth, that are bound.
        device, inode: of what is there; 0 if it is missing.
        reopened_files: the same of what is no directory.
    """

    path: bytes
    kind: Literal["empty directory", "denied directory", "denied file"]
    missing: bool
    reopened: tuple[bytes, ...] = ()
    device: int = 0
    inode: int = 0
    reopened_files: tuple[bytes, ...] = ()


@frozen
class Link:
    """A symlink of the view: the way that leads to a root by another name."""

    path: bytes
    target: bytes


Operation = Bind | Mask | Link


@frozen
class Forbidden:
    """A name that must not come into being: `name` in the directory with that inode.

    `denied`: a rule denies it (EACCES); otherwise it is protected (EROFS, or EEXIST for mkdir).
    """

    device: int
    inode: int
    name: bytes
    denied: bool


@frozen(cache_hash=True)
class MountPlan:
    """What a sandboxed process or file call sees.

    Attributes:
        whole: the view begins with the whole host, read-only (`--ro-bind / /`), or writable if the first
            operation binds `/` writable; otherwise with nothing.
        operations: in this order.
        forbidden: the missing masks, as a helper for files enforces them.
        network: whether there is any.
    """

    whole: bool
    operations: tuple[Operation, ...]
    forbidden: tuple[Forbidden, ...]
    network: bool

    @property
    def writable_roots(self) -> tuple[bytes, ...]:
        """Every path that is bound writable, also those that are only held in place so."""
        return tuple(op.path for op in self.operations if isinstance(op, Bind) and op.writable)

    def access_of(self, path: bytes) -> Literal["none", "read", "write"]:
        """What the view lets be done at an absolute path without links, whatever the permission bits say.

        `/dev` is the view's own and writable: nothing of it outlives the view, but what is bound there.
        `/proc` is as the rest of `/`.
        """
        access: Literal["none", "read", "write"] = "read" if self.whole else "none"
        own = is_within(path, _DEV)
        if own:
            access = "write"
        for op in self.operations:
            if isinstance(op, Link) or not is_within(path, op.path) or (own and op.path == b"/"):
                continue
            if isinstance(op, Bind):
                access = "write" if op.writable else "read"
            else:
                access = "read" if op.kind == "empty directory" else "none"
        return access


def is_within(path: bytes, root: bytes) -> bool:
    """Whether an absolute path is `root` or below it."""
    return path == root or root == b"/" or path.startswith(root + b"/")


def with_parents(path: bytes) -> Iterator[bytes]:
    """An absolute path, and every directory above it."""
    while path != b"/":
        yield path
        path = _parent(path)
    yield path


def execution(sandbox: Sandbox) -> Execution:
    """How calls about files are done (sandbox.md §4.1): as without a sandbox, or reads so, or none.

    Raises:
        ForeignPathError: files are restricted, and `cwd` is of another operating system.
    """
    if not sandbox.profile.restricts_files:
        return "direct"
    _cwd_of(sandbox, None)
    return "direct reads" if sandbox.profile.reads_everything else "sandboxed"


def make_plan(
    sandbox: Sandbox,
    facts: Facts,
    *,
    tmpdir: bytes | None = None,
    cwd: bytes | None = None,
    hidden: Iterable[bytes] = (),
) -> MountPlan:
    """The mounts for a sandbox that restricts files.

    Args:
        tmpdir: what `tmpdir` stands for; `None` for nothing.
        cwd: what stands for a missing `cwd` of the sandbox (a process has one of its own).
        hidden: directories of our own that are denied where they could be seen, whatever entries say.

    Raises:
        InvalidParams: a pattern is wrong, or the policy needs a `cwd` and has none.
        InternalError: it cannot be enforced, as where a protected path leads through a symlink that the
            sandboxed could exchange (sandbox.md §2.4).
        ForeignPathError: a path is of another operating system.
    """
    profile, planner = sandbox.profile, _Planner(facts)
    listed, searches = _listed(sandbox, tmpdir, _cwd_of(sandbox, cwd))
    if profile.entries is None:
        planner.put(b"/", "write")
    places = planner.decide(listed, searches, profile.glob_scan_max_depth, hidden)
    return planner.plan(places, network=not profile.restricts_network)


def arguments(plan: MountPlan, data_fds: Iterable[int], *, prefix: bytes = b"") -> list[bytes]:
    """The mount options of bubblewrap (sandbox.md §5, MOUNTS), without namespaces, `--proc` and the command.

    A view that does not begin with the whole host has a directory `/proc` for the `--proc` that follows, and
    its root ends read-only: nothing else can be mounted at a new place behind these. Directories above what
    is bound there are made first, because those that bubblewrap makes by itself are for their owner only.

    Args:
        data_fds: descriptors of empty files, one for each mask that needs one (`count_data_fds`).
        prefix: where in the new root the view is to be, without a slash at its end; nothing for the root
            itself.
    """
    fds = (b"%d" % fd for fd in data_fds)
    operations, root = plan.operations, prefix or b"/"
    base = [b"--ro-bind", b"/", root] if plan.whole else [b"--tmpfs", root]
    if plan.whole and operations and operations[0].path == b"/":
        base, operations = [b"--bind", b"/", root], operations[1:]
    options = [*base, b"--dev", prefix + _DEV]
    bound = {b"/"} if plan.whole else set()
    bare = {b"/"}
    for op in operations:
        if isinstance(op, Mask):
            options += _mask_options(op, fds, prefix)
            continue
        above = _parent(op.path)
        if above not in bare and bound.isdisjoint(with_parents(above)):
            options += (b"--dir", prefix + above)
            bare.add(above)
        if isinstance(op, Link):
            options += (b"--symlink", op.target, prefix + op.path)
        else:
            options += (b"--bind" if op.writable else b"--ro-bind", op.path, prefix + op.path)
            bound.add(op.path)
    if not plan.whole:
        options += (b"--dir", prefix + _PROC, b"--remount-ro", root)
    return options


def _mask_options(mask: Mask, fds: Iterator[bytes], prefix: bytes) -> Iterator[bytes]:
    at = prefix + mask.path
    if mask.kind == "denied file":
        yield from (b"--perms", b"000", b"--ro-bind-data", next(fds), at)
        return
    reopened = mask.reopened or mask.reopened_files
    mode = b"555" if mask.kind == "empty directory" else b"111" if reopened else b"000"
    yield from (b"--perms", mode, b"--tmpfs", at)
    for path in mask.reopened:
        yield from (b"--dir", prefix + path)
    for path in mask.reopened_files:
        if _parent(path) != mask.path:
            yield from (b"--dir", prefix + _parent(path))
        # Not --file, which empties what is there: behind a link that is put in the way, a file of the host.
        yield from (b"--ro-bind", path, prefix + path)
    yield from (b"--remount-ro", at)


def count_data_fds(plan: MountPlan) -> int:
    """How many descriptors `arguments` takes."""
    return sum(isinstance(op, Mask) and op.kind == "denied file" for op in plan.operations)


# What the entries say, before anything is looked at.


@frozen
class _Listed:
    """A path that an entry is about, as it is written."""

    path: bytes
    access: Access
    skip_missing: bool


@frozen
class _Search:
    """A pattern of an entry that denies."""

    text: str
    pattern: Pattern


def _cwd_of(sandbox: Sandbox, fallback: bytes | None) -> bytes | None:
    return fallback if sandbox.cwd is None else sandbox.cwd.to_native()


def _listed(sandbox: Sandbox, tmpdir: bytes | None, cwd: bytes | None) -> tuple[list[_Listed], list[_Search]]:
    entries = sandbox.profile.entries
    if entries is None:
        return [], []
    places: list[_Listed] = []
    searches: list[_Search] = []
    text = 0
    for entry in entries:
        if isinstance(entry.rule, GlobRule):
            found = [_Search(entry.rule.pattern, one) for one in _compile(entry.rule.pattern, cwd)]
            text += sum(len(part.pattern) for one in found for part in one.pattern.parts if part is not None)
            if text > MAX_PATTERN_TEXT or len(searches) + len(found) > MAX_PATTERNS:
                raise InvalidParams(
                    f"the patterns of a sandbox stand for more than {MAX_PATTERNS}, or are too long"
                )
            if entry.access == "deny":
                searches += (search for search in found if search.pattern.parts)
                paths = [search.pattern.fixed for search in found if not search.pattern.parts]
            else:
                paths = []
        elif isinstance(entry.rule, PathRule):
            paths = [entry.rule.path.to_native()]
        else:
            paths = _special(entry.rule, sandbox, tmpdir, cwd)
        if len(places) + len(paths) > MAX_PLACES:
            raise InvalidParams(f"the entries of a sandbox stand for more than {MAX_PLACES} paths")
        places += (_Listed(_normal(path), entry.access, entry.skip_missing) for path in paths)
    return places, searches


def _compile(pattern: str, cwd: bytes | None) -> tuple[Pattern, ...]:
    if pattern.startswith("/"):
        return compile_pattern(pattern)
    if cwd is None:
        raise InvalidParams(_NEEDS_CWD)
    return compile_pattern(pattern, cwd)


def _special(rule: SpecialRule, sandbox: Sandbox, tmpdir: bytes | None, cwd: bytes | None) -> list[bytes]:
    if rule.kind == "project_roots":
        if sandbox.has_context and cwd is None:
            raise InvalidParams(_NEEDS_CWD)
        return [_below(root, rule.subpath) for root in sandbox.workspace_roots]
    if rule.kind == "tmpdir":
        return [tmpdir] if tmpdir and tmpdir.startswith(b"/") else []
    return {"root": [b"/"], "minimal": list(MINIMAL), "slash_tmp": [b"/tmp"]}.get(rule.kind, [])


def _below(root: PathUri, subpath: str | None) -> bytes:
    if subpath is None:
        return root.to_native()
    try:
        return root.to_native() + b"/" + check_subpath(subpath).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidParams("invalid subpath: it has an unpaired surrogate") from None


def _normal(path: bytes) -> bytes:
    """Without doubled and trailing slashes and dot segments."""
    names: list[bytes] = []
    for name in path.split(b"/"):
        if name == b"..":
            del names[-1:]
        elif name not in _NO_NAME:
            names.append(name)
    return b"/" + b"/".join(names)


# What they mean, here and now.


@frozen
class _Place:
    """Where a path leads.

    Attributes:
        path: without links, also if it is not there.
        missing: the first that is not there of what it leads through; `None` if all is.
        links: the symlinks that it leads through, by their paths without links.
    """

    path: bytes
    missing: bytes | None
    links: tuple[tuple[bytes, bytes], ...]


_Rule = Literal["read", "write", "deny", "own"]
_VISIBLE = frozenset(("read", "write"))
_STRENGTH = {"read": 1, "write": 2, "deny": 3, "own": 4}
_WORDS = {"read": "read-only path", "write": "writable path", "deny": "deny-read path"}
_DEV, _SHM, _PROC = b"/dev", b"/dev/shm", b"/proc"
_OWN_NAMES = b"null zero full random urandom tty pts ptmx fd stdin stdout stderr core console".split()
"""What bubblewrap puts into `/dev`."""
_NO_NAME = frozenset((b"", b"."))
_NEEDS_CWD = "file system sandbox context with dynamic permissions requires cwd"


def _cannot(access: Access, path: str, why: str) -> InternalError:
    return InternalError(f"cannot enforce sandbox {_WORDS[access]} {path} because {why}")


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "replace")


def _parent(path: bytes) -> bytes:
    return path[: path.rfind(b"/")] or b"/"


def _join(directory: bytes, name: bytes) -> bytes:
    return directory + name if directory == b"/" else directory + b"/" + name


def _names(path: bytes) -> list[bytes]:
    return path.split(b"/")


@define(eq=False)
class _Planner:
    """One plan in the making.

    Attributes:
        rules: what holds at a path without links that exists, or is covered, and for what is below it.
        explicit: those that entries name, so that they must be found again at the same place.
        covered: paths that do not exist and must not.
    """

    _facts: Facts
    _looked: dict[bytes, Fact | None] = field(factory=dict)
    rules: dict[bytes, _Rule] = field(factory=lambda: {_DEV: "own", _PROC: "own"})
    explicit: set[bytes] = field(factory=set)
    covered: set[bytes] = field(factory=set)

    def decide(
        self, listed: list[_Listed], searches: list[_Search], depth: int | None, hidden: Iterable[bytes]
    ) -> list[tuple[_Listed, _Place]]:
        """Make the rules; where the entries lead."""
        places = [(one, self.resolve(one.path)) for one in listed]
        prefixes = [(one, self.resolve(one.pattern.fixed)) for one in searches]
        for one, place in places:
            if place.missing is None:
                self.settle(one, place.path)
        self.refuse_links(places, prefixes)
        if self.rules.get(b"/") == "write" and self.kind(_SHM) == "directory":
            self.rules.setdefault(_SHM, "write")
        self.search(prefixes, depth)
        gone = self.hide(hidden)
        if self.rules.get(b"/") == "deny":
            del self.rules[b"/"]  # nothing is there, then: the same, and what is reopened has its place
        lifted = {place.path for one, place in places if one.access == "write"}
        missing = self.protect(lifted)
        missing += [
            (place.missing, one.access)
            for one, place in places
            if place.missing is not None
            and (one.access == "deny" or (one.access == "read" and not one.skip_missing))
        ]
        self.cover(missing + gone)
        self.hold()
        return places

    # Looking.

    def look(self, path: bytes) -> Fact | None:
        try:
            return self._looked[path]
        except KeyError:
            fact = self._looked[path] = self._facts.look(path)
            return fact

    def kind(self, path: bytes) -> FactKind | None:
        fact = self.look(path)
        return None if fact is None else fact.kind

    def resolve(self, path: bytes) -> _Place:
        """Follow every link, as the system does; behind what is missing, by the text alone."""
        pending = [name for name in reversed(_names(path)) if name not in _NO_NAME]
        real, missing = b"/", None
        links: list[tuple[bytes, bytes]] = []
        while pending:
            name = pending.pop()
            if name == b"..":
                real = _parent(real)
                continue
            here = _join(real, name)
            fact = None if missing else self.look(here)
            if fact is not None and fact.kind == "symlink":
                target = fact.target or b""
                links.append((here, target))
                if target and len(links) <= MAX_LINKS:
                    real = b"/" if target.startswith(b"/") else real
                    pending += (name for name in reversed(_names(target)) if name not in _NO_NAME)
                    continue
                fact = None
            if fact is None and missing is None:
                missing = here
            real = here
        return _Place(real, missing, tuple(links))

    def access(self, path: bytes) -> _Rule | None:
        """What the rules say at a path."""
        while path not in self.rules:
            if path == b"/":
                return None
            path = _parent(path)
        return self.rules[path]

    def put(self, path: bytes, access: _Rule) -> None:
        if _STRENGTH[access] > _STRENGTH.get(self.rules.get(path, ""), 0):
            self.rules[path] = access

    # Deciding.

    def settle(self, one: _Listed, path: bytes) -> None:
        """Note what an entry says about a path that exists."""
        if is_within(path, _PROC) or (is_within(path, _DEV) and not is_within(path, _SHM)):
            top = _names(path)[2:3] or [b""]
            if one.access == "deny" and (is_within(path, _PROC) or path == _DEV or top[0] in _OWN_NAMES):
                own = _shown(_PROC if is_within(path, _PROC) else _DEV)
                raise _cannot("deny", _shown(one.path), f"{own} of a sandbox is its own")
            return
        self.put(path, one.access)
        self.explicit.add(path)

    def refuse_links(
        self, places: list[tuple[_Listed, _Place]], prefixes: list[tuple[_Search, _Place]]
    ) -> None:
        named = [(place, one.access, _shown(one.path)) for one, place in places]
        named += ((place, "deny", one.text) for one, place in prefixes)
        roots = {path for path, access in self.rules.items() if access == "write"}
        for place, access, text in named:
            for link, _ in place.links:
                if not roots.isdisjoint(with_parents(link)):
                    raise _cannot(access, text, f"it crosses writable symlink {_shown(link)}")

    def search(self, prefixes: list[tuple[_Search, _Place]], depth: int | None) -> None:
        """Rules for all that patterns match."""
        together: dict[bytes, list[_Search]] = {}
        for one, place in prefixes:
            if place.missing is None:
                together.setdefault(place.path, []).append(one)
        if not together:
            return
        opened = {b"/"}
        for path, rule in self.rules.items():
            while rule in _VISIBLE and path not in opened:
                opened.add(path)
                path = _parent(path)
        left = MAX_NAMES
        for start, searches in together.items():
            if not self.is_worth_a_look(start, opened):
                continue
            walk = _Walk(start, [search.pattern for search in searches], depth)
            for directory in walk:
                for name, kind in self._facts.names(directory):
                    left -= 1
                    if left < 0:
                        raise _cannot(
                            "deny",
                            searches[0].text,
                            f"there are more than {MAX_NAMES} names to look at: "
                            "begin it with more of the path, or limit glob_scan_max_depth",
                        )
                    path = _join(directory, name)
                    matched, after = walk.step(name)
                    if matched:
                        self.deny_match(path, kind, opened)
                    if after and kind == "directory" and self.is_worth_a_look(path, opened):
                        walk.enter(path, after)

    def hide(self, hidden: Iterable[bytes]) -> list[tuple[bytes, Access]]:
        """Rules for our own directories; what is missing of them, since somebody has removed it.

        Also where they could only be read: a lock takes no more than that, and who holds one stops us.
        """
        gone: list[tuple[bytes, Access]] = []
        for path in hidden:
            place = self.resolve(path)
            if place.missing is not None:
                gone.append((place.missing, "deny"))
                continue
            for inside in [rule for rule in self.rules if is_within(rule, place.path)]:
                del self.rules[inside]
            if self.access(place.path) in _VISIBLE:
                self.rules[place.path] = "deny"
                self.explicit.add(place.path)
        return gone

    def is_worth_a_look(self, directory: bytes, opened: set[bytes]) -> bool:
        """Whether anything can be seen in a directory, or further down."""
        return directory in opened or self.access(directory) in _VISIBLE

    def deny_match(self, path: bytes, kind: FactKind, opened: set[bytes]) -> None:
        if kind == "symlink":
            place = self.resolve(path)
            if place.missing is not None or place.path in opened:
                return  # whoever makes a link must not take away what the policy is about
            path = place.path
        if self.look(path) is not None:
            self.put(path, "deny")

    def protect(self, lifted: set[bytes]) -> list[tuple[bytes, Access]]:
        """Rules for the protected names that are there; those that are not."""
        missing: list[tuple[bytes, Access]] = []
        roots = [path for path in self.explicit if self.rules.get(path) == "write"]
        for root in sorted(roots):
            if self.kind(root) != "directory":
                continue
            for name in PROTECTED:
                path = _join(root, name)
                if path in lifted:
                    continue
                kind = self.kind(path)
                if kind == "symlink":
                    raise _cannot("read", _shown(path), f"it crosses writable symlink {_shown(path)}")
                if kind is None:
                    missing.append((path, "read"))
                else:
                    self.put(path, "read")
        return missing

    def cover(self, missing: list[tuple[bytes, Access]]) -> None:
        """Rules for what must not come into being where the sandboxed could make it."""
        for path, access in missing:
            parent = _parent(path)
            if path in self.covered:
                self.put(path, access)
            elif self.access(parent) == "write":
                fact = self.look(parent)
                if fact is not None and fact.kind == "directory" and not fact.sealed:
                    self.rules[path] = access
                    self.covered.add(path)
                    self.explicit.add(path)
                else:
                    # Nothing can be made in it while it is there, so it must stay what it is.
                    self.rules.setdefault(parent, "write")
                    self.explicit.add(parent)

    def hold(self) -> None:
        """Bind what is between a writable root and an explicit path onto itself."""
        held: set[bytes] = set()
        for path in self.explicit:
            between: list[bytes] = []
            while path != b"/":
                path = _parent(path)
                if path not in self.rules:
                    between.append(path)
                    continue
                if self.rules[path] == "write":
                    held.update(between)
                if path in self.explicit:
                    break  # what is above that is found from there
                between = []
        self.rules.update(dict.fromkeys(held, "write"))

    # Saying.

    def plan(self, places: list[tuple[_Listed, _Place]], *, network: bool) -> MountPlan:
        whole = b"/" in self.rules
        links = () if whole else self.links(places)
        operations = (*links, *self.operations())
        if len(operations) > MAX_MOUNTS:
            raise InternalError(f"cannot enforce the sandbox: it takes more than {MAX_MOUNTS} mounts")
        forbidden = (self.forbidden(path) for path in sorted(self.covered))
        return MountPlan(whole, operations, tuple(forbidden), network)

    def operations(self) -> Iterator[Operation]:
        """What is seen first, then what is not with what it reopens; each behind all that is above it."""
        shown: list[bytes] = []
        shut: list[bytes] = []
        mask_over: dict[bytes, bytes] = {}
        reopened: dict[bytes, list[bytes]] = {}
        trail: list[bytes] = []  # the rules that the current one is below, and itself
        for path in sorted(self.rules, key=_names):
            rule = self.rules[path]
            while trail and not is_within(path, trail[-1]):
                trail.pop()
            above = trail[-1] if trail else None
            trail.append(path)
            if rule == "own":
                continue
            inherited = None if above is None else self.rules[above]
            mask = None if above is None else mask_over.get(above)
            if rule == "deny" and inherited in _VISIBLE:
                mask, reopened[path] = path, []
            elif rule in {"deny", inherited} and rule != "write":
                if mask is not None:
                    mask_over[path] = mask
                continue
            elif inherited == "deny" and mask is not None:
                reopened[mask].append(path)
            if mask is None:
                shown.append(path)
            else:
                mask_over[path] = mask
                shut.append(path)
        for path in (*shown, *shut):
            if path != b"/" or self.rules[path] == "write":
                yield self.operation(path, reopened.get(path, ()))

    def operation(self, path: bytes, reopened: Iterable[bytes]) -> Operation:
        rule, fact = self.rules[path], self.look(path)
        device, inode = (fact.device, fact.inode) if fact else (0, 0)
        if rule == "deny":
            if fact is None or fact.kind != "directory":
                return Mask(path, "denied file", fact is None, (), device, inode)
            directories = tuple(child for child in reopened if self.kind(child) == "directory")
            files = tuple(child for child in reopened if child not in directories)
            return Mask(path, "denied directory", False, directories, device, inode, files)
        if fact is None:
            return Mask(path, "empty directory", True)
        return Bind(path, rule == "write", device, inode)

    def forbidden(self, path: bytes) -> Forbidden:
        parent = self.look(_parent(path))
        device, inode = (parent.device, parent.inode) if parent else (0, 0)
        return Forbidden(device, inode, _names(path)[-1], self.rules[path] == "deny")

    def links(self, places: list[tuple[_Listed, _Place]]) -> list[Link]:
        """The links that lead to what is seen, where they are not seen with what they are in."""
        made: dict[bytes, Link] = {}
        for _, place in places:
            if place.missing is None and self.access(place.path) in _VISIBLE:
                for path, target in place.links:
                    if self.access(path) is None:
                        made[path] = Link(path, self.target(path, target))
        return [made[path] for path in sorted(made)]

    def target(self, link: bytes, target: bytes) -> bytes:
        """As it is written, unless it goes through directories that need not be in the view."""
        names = [name for name in _names(target) if name not in _NO_NAME]
        while names[:1] == [b".."]:
            del names[0]
        return self.resolve(link).path if b".." in names else target


class _Walk:
    """Which directories are to be looked at for patterns with one fixed part; iterate over it.

    A state is a pattern and how many of its parts are behind.
    """

    def __init__(self, start: bytes, patterns: list[Pattern], depth: int | None) -> None:
        self._parts = [pattern.parts for pattern in patterns]
        self._depth = depth
        first = self._closed({(pattern, 0) for pattern in range(len(patterns))})
        self._pending = [(start, first, 1)]

    def __iter__(self) -> Iterator[bytes]:
        while self._pending:
            directory, states, self._level = self._pending.pop()
            parts = [((pattern, at), self._parts[pattern][at]) for pattern, at in states]
            self._staying = frozenset(state for state, part in parts if part is None)
            self._tests = [((pattern, at + 1), part) for (pattern, at), part in parts if part is not None]
            self._after = self._closed(self._staying)
            yield directory

    def step(self, name: bytes) -> tuple[bool, frozenset[tuple[int, int]]]:
        """Whether a pattern matches this name in the current directory, and the states below it."""
        text = name.decode("utf-8", "surrogateescape")
        hits = {state for state, part in self._tests if part.fullmatch(text)}
        if not hits:
            return False, self._after
        going_on = {(pattern, at) for pattern, at in hits if at < len(self._parts[pattern])}
        return len(going_on) < len(hits), self._closed(self._staying | going_on) if going_on else self._after

    def enter(self, directory: bytes, states: frozenset[tuple[int, int]]) -> None:
        if self._depth is None or self._level < self._depth:
            self._pending.append((directory, states, self._level + 1))

    def _closed(self, states: Iterable[tuple[int, int]]) -> frozenset[tuple[int, int]]:
        """With all that is reached where `**` stands for nothing; it is never last."""
        closed = set(states)
        for pattern, at in states:
            while self._parts[pattern][at] is None:
                at += 1
                closed.add((pattern, at))
        return frozenset(closed)
